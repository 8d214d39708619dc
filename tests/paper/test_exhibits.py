"""paper.yaml: the arms and commands that it stands for, and what is wrong with one."""

import pytest
from stand_in import CHAIN

from common.errors import InputError
from common.paper.exhibits import read_exhibits
from common.paper.listing import show


def test_arms_expand_to_commands(exhibits):
    """An arm's own override beats the scale's, every seed runs all arms, and values are typed as YAML reads them."""
    starts = exhibits()["X1"].scale("demo").starts()
    assert [(start.arm.name, start.seed) for start in starts] == [("S/2", 0), ("S/1", 0), ("S/2", 1), ("S/1", 1)]
    assert starts[3].stages == ("fit",) and starts[3].shown("fit") == (
        "python -m supervised fit --config supervised/configs/tiny_set.yaml --model.patch_size 1 "
        "--data.image_size '[8, 8]' --model.drop_path null --seed_everything 1")
    assert [start.shown("fit") for start in exhibits()["X1"].scale("paper").starts()] == [
        "python -m supervised fit --config supervised/configs/tiny_set.yaml --model.qk_norm true --seed_everything 0"]
    assert len(exhibits()["X1"].scale("demo").starts(seeds=5)) == 10


def test_an_arm_may_have_another_study_and_start_from_another_arm(exhibits, folders):
    """* is the scale's config, and each seed starts from the run of its own seed."""
    assert [start.shown("fit") for start in exhibits(**CHAIN)["X1"].scale("demo").starts()] == [
        f"python -m {study} fit --config {study}/configs/{name}.yaml --model.patch_size {patch} "
        f"--seed_everything {seed}{source}"
        for seed in (0, 1) for study, name, patch, source in [
            ("supervised", "tiny_set", 2, ""), ("mae", "tiny_set", 1, ""),
            ("mae", "tiny_set_finetune", 1, f" --init_from runs/mae/tiny_set-p1-s{seed}")]]


def test_an_arm_may_be_another_one_tested_otherwise(exhibits, folders):
    """Both are compared: the copy has the other's overrides and sources, and its weights."""
    arms = CHAIN["arms"] | {"again": {"again": "S/1", "model.predict.guidance": 1}}
    demo = exhibits(**{**CHAIN, "arms": arms}, metric="test/fid")["X1"].scale("demo")
    assert [start.arm.name for start in demo.compared(1)] == ["S/2", "S/1", "again"]
    assert demo.starts(1)[-1].shown("fit") == (
        "python -m mae fit --config mae/configs/tiny_set_finetune.yaml --model.patch_size 1 --model.predict.guidance 1 "
        "--seed_everything 0 --init_from runs/mae/tiny_set-p1-s0 --copy_of runs/mae/tiny_set_finetune-p1-s0")
    with pytest.raises(InputError, match="X1.arms.again.again: a copy has no other val/acc1; the metric is to be one"):
        exhibits(**{**CHAIN, "arms": arms})


def test_an_arm_may_have_a_command_that_goes_before(exhibits, folders, tmp_path):
    """It is given what the training is; a copy, which trains nothing, has none."""
    (tmp_path / "mae" / "cached.py").touch()
    arms = {"S/2": {"prepare": "mae.cached 'a folder' --fast", "data.cache": "a folder"},
            "again": {"again": "S/2", "model.predict.guidance": 1}}
    first, copy = exhibits(arms=arms, metric="test/fid", paper=None)["X1"].scale("demo").starts(1)
    assert first.stages == ("prepare", "fit", "test") and copy.stages == ("fit", "test")
    fit = "python -m supervised fit "
    assert first.shown("prepare") == first.shown("fit").replace(fit, "python -m mae.cached 'a folder' --fast ")
    assert first.shown("fit").startswith(fit) and "--data.cache 'a folder'" in first.shown("fit")


def test_configs_are_found_from_any_directory(exhibits, tmp_path, monkeypatch):
    exhibits(**CHAIN)
    monkeypatch.chdir(tmp_path / "supervised")
    configs = [start.arguments[1] for start in read_exhibits(tmp_path)["X1"].scale("demo").starts(1)[:2]]
    assert configs == ["configs/tiny_set.yaml", "../mae/configs/tiny_set.yaml"]


@pytest.mark.parametrize("changes, message", [
    ({"show": "x"}, r"paper.yaml: X1.show: unknown key; there is shows"),
    ({"shows": 3}, r"X1.shows: 3 should be str"),
    ({"scales": {"demo": {}}}, r"X1.scales.demo: lacks config"),
    ({"scales": {"demo": {"config": "nowhere"}}}, r"scales.demo.config: nowhere; there is no file .*nowhere.yaml"),
    ({"scales": {"demo": {"config": "tiny_set", "seeds": 0}}}, r"scales.demo.seeds: 0"),
    ({"scales": {"demo": {"config": "tiny_set", "arms": {"a": 3}}}}, r"scales.demo.arms.a: 3 is not a mapping"),
    ({"arms": {}, "paper": {}}, r"X1.scales.demo: has no arms"),
    ({"arms": {"S/2": {"runs": {"init_from": "S/1"}}, "S/1": {}}},
     r"paper.yaml: X1.arms.S/2.runs.init_from: S/1 is no arm above this one; there is none"),
    ({"scales": {"demo": {"config": "tiny_set", "arms": {"a": {}, "b": {}, "c": {"runs": {"data.x": "S/2"}}}}}},
     r"paper.yaml: X1.scales.demo.arms.c.runs.data.x: S/2 is no arm above this one; there is a, b"),
    ({"arms": {"S/2": {"runs": {"init_from": "S/2"}}, "S/1": {}}}, r"X1.arms.S/2.runs.init_from: S/2 is no arm above"),
    ({"arms": {"S/2": {"runs": "S/2"}, "S/1": {}}}, r"X1.arms.S/2.runs: 'S/2' is not a mapping"),
    ({"arms": {"S/2": {}, "S/1": {"runs": {"init_from": ["S/2"]}}}}, r"S/1.runs.init_from: \['S/2'\] is no arm above"),
    ({"metric": "test/fid", "arms": {"S/2": {"again": "S/1", "model.predict.seed": 1}, "S/1": {}}},
     r"X1.arms.S/2.again: S/1 is no arm above this one; there is none"),
    ({"metric": "test/fid", "arms": {"S/2": {}, "S/1": {"again": "S/2", "model.predict.seed": 1, "model.depth": 2}}},
     r"X1.arms.S/1.model.depth: S/2 is tested otherwise, not trained; give options that begin with model.predict. or"),
    ({"metric": "test/fid", "arms": {"S/2": {}, "S/1": {"again": "S/2"}}},
     r"X1.arms.S/1.again: S/2 is tested otherwise, not trained; give"),
    ({"metric": "test/fid", "arms": {"S/2": {}, "S/1": {"again": None}}}, r"X1.arms.S/1.again: None is no arm above"),
    ({"metric": 3}, r"paper.yaml: X1.metric: 3 is neither a tag, such as val/acc1, nor a list of tags"),
    ({"metric": []}, r"X1.metric: \[\] is neither"),
    ({"scales": {"demo": {"config": "tiny_set", "metric": ["val/loss", 3]}}}, r"scales.demo.metric: .*3\] is neither"),
    ({"draws": "mae.drawing --x 1"}, r"yaml: X1.draws: mae.drawing is no module; there is no file mae/drawing.py"),
    ({"draws": "mae.drawing 'x"}, r"X1.draws: mae.drawing 'x: No closing quotation"),
    ({"scales": {"demo": {"config": "tiny_set", "draws": " "}}}, r"X1.scales.demo.draws: ' ' names no module"),
    ({"arms": {"S/2": {"config": "mae/*_probe"}, "S/1": {}}},
     r"X1.arms.S/2.config: mae/\*_probe; there is no file mae/configs/tiny_set_probe.yaml"),
    ({"arms": {"S/2": {"config": "tiny_set"}, "S/1": {}}}, r"X1.arms.S/2.config: tiny_set is not STUDY/NAME"),
    ({"scales": {"demo": {"config": "tiny_set", "set": {"runs": {"init_from": "S/2"}}}}},
     r"X1.scales.demo.set.runs: .* is no override"),
    ({"arms": {"S/2": {"prepare": "mae.cached x"}}, "paper": {}},
     r"paper.yaml: X1.arms.S/2.prepare: mae.cached is no module; there is no file mae/cached.py"),
    ({"arms": {"S/2": {"prepare": ["mae.cached"]}}, "paper": {}}, r"S/2.prepare: \['mae.cached'\] is no command"),
    ({"arms": {"S/2": {"prepare": ""}}, "paper": {}}, r"S/2.prepare: '' names no module"),
    ({"scales": {"demo": {"config": "tiny_set", "set": {"prepare": "mae.cached"}}}},
     r"X1.scales.demo.set.prepare: mae.cached is no override"),
    ({"paper": {"differences": {"S/1 - S/9": 1}}}, r"X1.paper: S/9 is none of the arms S/2, S/1"),
])
def test_malformed_exhibits_are_named(exhibits, changes, message):
    with pytest.raises(InputError, match=message):
        exhibits(**changes)


def test_an_id_belongs_to_one_study(exhibits, tmp_path):
    exhibits()
    (tmp_path / "diffusion").symlink_to(tmp_path / "supervised")
    with pytest.raises(InputError, match="X1 stands in supervised/paper.yaml too"):
        read_exhibits(tmp_path)


def test_show_names_sources_statements_and_commands(exhibits):
    exhibit = exhibits()["X1"]
    text = "\n".join(show(exhibit, {"demo": exhibit.scale("demo")}))
    for part in ("val/acc1: S/1 - S/2 = +1.5", "unknown: both values", "hyper-parameters: supervised/configs/tiny_set",
                 "cost by formula: 4.2 min\n",  # two seeds of 6e12 and 1.5e12 FLOP at 60 GFLOP/s
                 "Where lr of supervised/configs/tiny_set.yaml comes from.\n    \n    Steps: 9.", "# S/1, seed 1",
                 exhibit.scale("demo").starts()[0].shown("fit")):
        assert text.count(part) == 1  # both arms have one config
    with pytest.raises(InputError, match="--scale gpu: X1 has no such scale; it has demo, paper"):
        exhibit.scale("gpu")


def test_show_names_the_sources_of_all_its_configs(exhibits, folders):
    exhibit = exhibits(**CHAIN)["X1"]
    lines = list(show(exhibit, exhibit.scales))
    for config in ("supervised/configs/tiny_set", "mae/configs/tiny_set", "mae/configs/tiny_set_finetune"):
        assert lines.count(f"    Where lr of {config}.yaml comes from.") == 1
    assert sum(line.endswith("--init_from runs/mae/tiny_set-p1-s1") for line in lines) == 1
