"""The paper's tables and figures as arms: paper.yaml, the commands it stands for, and python -m common.paper."""

import json
import os
import shlex
import shutil
from pathlib import Path

import forked
import pytest
import yaml

from common.errors import InputError
from common.identity import arm_hash, config_hash, covered
from common.paper import cost
from common.paper.exhibits import Start, read_exhibits
from common.paper.listing import _states, show
from common.paper.report import report
from common.paper.running import Pace, run, run_all
from common.paper.state import state
from common.runs import changed_source
from common.runs import trained as trained_as

ROOT = Path(__file__).parent.parent
GENERATED_IDS = ("T1", "T2")
IDS = ("T3a", "T3b", "T3c", "T3d", "F2a", "F2b", "F9", "F6", "F7", "F8", "App-D")
MAE_IDS = ("T4a", "T4b")
DIFFUSION_IDS = ("T5", "T6", "F3")
LOCALITY_IDS = ("F4", "F5-left", "F5-right", "PE", "T7", "T8", "T9", "scope", "shuffle")
PRICES = {patch: cost.Price(1_000_000, 6_000_000 // patch**2, 0, 1000, 10) for patch in (1, 2, 4)}
CHAIN = {
    "arms": {
        "S/2": {"model.patch_size": 2},
        "before": {"config": "mae/*", "model.patch_size": 1},
        "S/1": {"config": "mae/*_finetune", "runs": {"init_from": "before"}, "model.patch_size": 1},
    },
    "scales": {"demo": {"config": "tiny_set", "seeds": 2}},
}


@pytest.fixture
def exhibits(tmp_path, monkeypatch):
    """One exhibit of two arms in study folders of the test's own; the working directory is those folders' parent."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cost, "computed", lambda start: PRICES[start.arm.overrides.get("model.patch_size", 1)])
    for file in ("supervised/configs/tiny_set.yaml", "mae/configs/tiny_set.yaml", "mae/configs/tiny_set_finetune.yaml"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(f"# Where lr of {file} comes from.\n#\n# Steps: 9.\nmodel: {{}}\n")

    def read(**changes):
        """With these keys changed, or left out where they are None."""
        entry = {
            "shows": "one against two", "metric": "val/acc1",
            "paper": {"differences": {"S/1 - S/2": 1.5}, "unknown": "both values"},
            "arms": {"S/2": {"model.patch_size": 2}, "S/1": {"model.patch_size": 1, "model.drop_path": None}},
            "scales": {
                "demo": {"config": "tiny_set", "set": {"model.patch_size": 4, "data.image_size": [8, 8]}, "seeds": 2},
                "paper": {"config": "tiny_set", "arms": {"only": {"model.qk_norm": True}}},
            },
            **changes,
        }
        entry = {key: value for key, value in entry.items() if value is not None}
        (tmp_path / "supervised" / "paper.yaml").write_text(yaml.safe_dump({"X1": entry}, sort_keys=False))
        return read_exhibits(tmp_path)

    return read


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


@pytest.fixture
def folders(monkeypatch):
    """Run folders where the test says, so that what is done with them is tested apart from the command line."""

    def located(start):
        patch = start.arm.overrides.get("model.patch_size", 1)
        sources = {option: str(source.located[0]) for option, source in start.sources.items()}
        return (Path("runs", start.arm.study, f"{start.arm.config.stem}-p{patch}-s{start.seed}"),
                {"seed_everything": start.seed, "model.patch_size": patch, **sources})

    monkeypatch.setattr(Start, "located", property(located))


@pytest.fixture
def study(exhibits, folders, tmp_path):
    """A stand-in for `python -m STUDY fit|test`: it writes a finished run folder, or leaves with exit code 3.

    With a file `early` the pre-training leaves before its end, with exit code 0; with `early2` every training of patch
    size 2 does. `test` adds `test/fid`. And one for a command that draws.
    """
    (tmp_path / "drawing.py").write_text('''
import pathlib, sys
with open("calls", "a") as calls:
    print("drawing", *sys.argv[1:], file=calls)
if pathlib.Path("undrawable").exists():
    sys.exit(2)
figure = pathlib.Path(sys.argv[sys.argv.index("--figure") + 1])
figure.parent.mkdir(parents=True, exist_ok=True)
figure.write_bytes(b"a picture")
''')
    (tmp_path / "printing.py").write_text("import sys; print('| seven |\\n| --- |\\n|', sys.argv[1], '|')")
    for name in ("supervised", "mae"):
        (tmp_path / name / "__init__.py").touch()
        (tmp_path / name / "__main__.py").write_text('''
import json, pathlib, sys
word, options = sys.argv[1], dict(zip(sys.argv[2::2], sys.argv[3::2]))
patch, seed = int(options.get("--model.patch_size", 1)), int(options["--seed_everything"])
study, config = pathlib.Path(__file__).parent.name, pathlib.Path(options["--config"]).stem
source = options.get("--init_from")
folder = pathlib.Path(f"runs/{study}/{config}-p{patch}-s{seed}")
with open("calls", "a") as calls:
    print(*["test"] * (word == "test"), folder, *[source] * bool(source), file=calls)
if pathlib.Path("broken").exists() and patch == 1:
    sys.exit(3)
if word == "test":
    results = json.loads((folder / "results.json").read_text())
    results["metrics"] |= {"test/fid": 10 * patch + seed, "test/sfid": 1.0}
    results["evaluation"] = {"samples": 8}
    (folder / "results.json").write_text(json.dumps(results))
    sys.exit(0)
folder.mkdir(parents=True, exist_ok=True)
before = study == "mae" and not source
metrics = {"val/loss": 0.5} if before else {"val/acc1": 90 + 4 / patch + seed}
early = before and pathlib.Path("early").exists() or patch == 2 and pathlib.Path("early2").exists()
results = {"status": "running" if early else "finished",
           "seed": seed, "metrics": metrics, "headline": next(iter(metrics)), "higher_is_better": not before,
           "patch_size": patch, "dataset": "digits", "epochs": 1, "batch_size": 8}
(folder / "results.json").write_text(json.dumps(results))
trained = {"seed_everything": seed, "model": {"patch_size": patch}, "init_from": source}
(folder / "config.yaml").write_text(json.dumps(trained))
''')
    return exhibits


def calls() -> list[str]:
    return Path("calls").read_text().splitlines()


def test_run_trains_each_arm_once_and_compares(study, capfd):
    study = study()["X1"]
    assert run(study, study.scale("demo"), None) == 0
    assert calls() == [f"runs/supervised/tiny_set-p{patch}-s{seed}" for seed in (0, 1) for patch in (2, 1)]
    out = capfd.readouterr().out
    assert "X1 demo, 1 of 4: S/2, seed 0: 1.5e+12 FLOP; 4.2 min by formula" in out
    assert "X1 demo, 2 of 4: S/1, seed 0: 6e+12 FLOP; about 0 min left" in out  # at the speed of the first
    # By hand: /1 has 94 and 95, /2 has 92 and 93.
    assert "94.50 ± 0.71 (2) *" in out and "+2.00" in out
    assert "here: val/acc1: S/1 - S/2 = +2.00 ± 0.00 (p < 0.001, n = 2)" in out
    text = Path("runs/paper/X1-demo/report.md").read_text()
    assert "| S/2 (baseline) |" in text and "- paper: val/acc1: S/1 - S/2 = +1.5" in text
    assert Path("runs/paper/X1-demo/comparison.png").stat().st_size

    assert run(study, study.scale("demo"), None) == 0
    assert len(calls()) == 4  # finished arms are skipped


def test_run_stops_with_the_arms_exit_code_and_goes_on_there(study, capfd):
    study = study()["X1"]
    Path("broken").touch()
    assert run(study, study.scale("demo"), 1) == 3
    assert "S/1, seed 0: stopped with exit code 3" in capfd.readouterr().err
    assert [state(start) for start in study.scale("demo").starts(1)] == ["finished", "missing"]
    Path("broken").unlink()
    assert run(study, study.scale("demo"), 1) == 0
    assert calls() == [f"runs/supervised/tiny_set-p{patch}-s0" for patch in (2, 1, 1)]


SCRATCH, BEFORE = "runs/supervised/tiny_set-p2-s{0}", "runs/mae/tiny_set-p1-s{0}"
TUNED = "runs/mae/tiny_set_finetune-p1-s{0} runs/mae/tiny_set-p1-s{0}"


def test_a_run_that_starts_from_another_comes_after_it_and_is_compared_alone(study, capfd):
    chain = study(**CHAIN)["X1"]
    assert run(chain, chain.scale("demo"), None) == 0
    assert calls() == [call.format(seed) for seed in (0, 1) for call in (SCRATCH, BEFORE, TUNED)]
    out = capfd.readouterr().out
    # By hand, as above: both seeds are in one mean although their weights come from two folders.
    assert "94.50 ± 0.71 (2) *" in out and "here: val/acc1: S/1 - S/2 = +2.00 ± 0.00 (p < 0.001, n = 2)" in out
    text = Path("runs/paper/X1-demo/report.md").read_text()
    assert "| S/2 (baseline) |" in text and "| S/1 |" in text and "| before" not in text
    assert _states(chain.scale("demo")) == "6 finished"


# Chains of the kind that generation is: what serves all seeds, a test after the training, a figure of its own
GENERATED = {
    "metric": "val/loss",
    "arms": {
        "S/2": {"model.patch_size": 2},
        "judge": {"config": "mae/*", "seed_everything": 0},
        "S/1": {"runs": {"init_from": "judge"}, "model.patch_size": 1},
    },
    "scales": {
        "demo": {"config": "tiny_set", "seeds": 2, "metric": ["test/fid", "test/sfid"], "draws": "drawing --rows 2"},
        "paper": {"config": "tiny_set"},
    },
}


def test_an_arm_of_one_seed_serves_all(study):
    starts = study(**GENERATED)["X1"].scale("demo").starts(3)
    assert [(start.arm.name, start.seed) for start in starts] == [
        ("S/2", 0), ("judge", 0), ("S/1", 0), ("S/2", 1), ("S/1", 1), ("S/2", 2), ("S/1", 2)]
    assert all(start.shown("fit").endswith("--init_from runs/mae/tiny_set-p1-s0") for start in starts[2::2])


def test_samples_are_judged_after_the_training_and_drawn_at_the_end(study, capfd):
    generated = study(**GENERATED)["X1"]
    scale = generated.scale("demo")
    judge, before = "runs/mae/tiny_set-p1-s0", _states(scale)
    assert before == "5 missing" and run(generated, scale, None) == 0
    runs = [[f"runs/supervised/tiny_set-p2-s{seed}", *[judge] * (seed == 0),
             f"runs/supervised/tiny_set-p1-s{seed} {judge}"] for seed in (0, 1)]
    expected = [line for seed in runs for run in seed for line in [run, *[f"test {run}"] * (run != judge)]]
    folders = " ".join(f"runs/supervised/tiny_set-p{patch}-s{seed}" for seed in (0, 1) for patch in (2, 1))
    drawn = f"drawing {folders} --figure runs/paper/X1-demo/figure.png --rows 2"
    assert calls() == [*expected, drawn]
    out = capfd.readouterr().out
    assert "20.50 ± 0.71 (2)" in out and "10.50 ± 0.71 (2) *" in out and "1.0000 ± 0.0000 (2)" in out
    assert "here: test/fid: S/1 - S/2 = -10.00 ± 0.00 (p < 0.001, n = 2)" in out
    assert "![X1, figure](figure.png)" in Path("runs/paper/X1-demo/report.md").read_text()
    shown = "\n".join(show(generated, {"demo": scale}))
    assert "judged by val/loss" in shown and "judged by test/fid" in shown and f"  python -m {drawn}" in shown
    assert shown.count("python -m supervised test ") == 4 and "python -m mae test" not in shown

    # A run that was trained and not tested is tested alone; the figure is drawn again.
    path = Path("runs/supervised/tiny_set-p1-s1/results.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"metrics": {"val/loss": 1.0}}))
    assert _states(scale) == "4 finished, 1 not tested"
    Path("undrawable").touch()
    assert run(generated, scale, None) == 2
    assert "![figure]" not in Path("runs/paper/X1-demo/report.md").read_text()
    assert calls()[len(expected) + 1 :] == [f"test {runs[1][1]}", drawn]
    assert "X1 demo, its figure: stopped with exit code 2" in capfd.readouterr().err

    # At a scale that is judged by a validation nothing is tested.
    assert [start.stages for start in generated.scale("paper").starts()] == [("fit",)] * 3


def test_a_training_that_ended_early_is_not_tested(study):
    generated = study(**GENERATED)["X1"]
    Path("early2").touch()
    assert run(generated, generated.scale("demo"), 1) == 0
    assert [call for call in calls() if call.startswith("test")] == [
        "test runs/supervised/tiny_set-p1-s0 runs/mae/tiny_set-p1-s0"]
    assert _states(generated.scale("demo")) == "2 finished, 2 missing, 1 unfinished"


def test_a_test_that_does_not_measure_the_metric_stops_at_the_first_arm(study):
    demo = {"config": "tiny_set", "metric": "test/fd_judge"}
    generated = study(**GENERATED | {"scales": {"demo": demo}})["X1"]
    with pytest.raises(InputError, match="supervised/paper.yaml: X1, scale demo: metric test/fd_judge: the test of "
                                         "runs/supervised/tiny_set-p2-s0 did not .*; there is test/fid, test/sfid"):
        run(generated, generated.scale("demo"), None)
    assert len(calls()) == 2


def test_a_test_of_other_samples_is_not_this_arm_s(study, monkeypatch):
    """Somebody tried more guidance on the same run since."""
    generated = study(**GENERATED)["X1"]
    scale = generated.scale("demo")
    assert run(generated, scale, 1) == 0
    monkeypatch.setattr(Start, "sampling", {"samples": 8, "solver": "ddim", "guidance": 1.5})
    path = Path("runs/supervised/tiny_set-p1-s0/results.json")
    results = json.loads(path.read_text())
    for guidance, expected in [(1.5, "finished"), (4.0, "not tested")]:
        record = {"samples": 8, "solver": "ddim", "guidance": guidance}
        path.write_text(json.dumps(results | {"evaluation": record}))
        assert [state(start) for start in scale.starts(1)] == ["finished", "finished", expected]


def test_a_scale_may_draw_otherwise(study):
    scales = {"demo": {"config": "tiny_set"}, "paper": {"config": "tiny_set", "draws": "drawing --rows 3"}}
    exhibit = study(**GENERATED | {"draws": "drawing", "scales": scales})["X1"]
    assert {name: scale.draws for name, scale in exhibit.scales.items()} == {
        "demo": ("drawing",), "paper": ("drawing", "--rows", "3")}


def test_weights_come_from_a_finished_run_only(study, capfd):
    """Neither after a failure nor after an early end with exit code 0, which a limit of time is."""
    chain = study(**CHAIN)["X1"]
    scale = chain.scale("demo")
    Path("broken").touch()
    assert run(chain, scale, 1) == 3
    Path("broken").unlink()
    Path("early").touch()
    assert run(chain, scale, 1) == 1
    assert "X1 demo, 3 of 3: S/1, seed 0: not started" in (error := capfd.readouterr().err)
    assert "runs/mae/tiny_set-p1-s0, which is unfinished" in error
    Path("early").unlink()
    assert run(chain, scale, 1) == 0
    assert calls() == [call.format(0) for call in (SCRATCH, BEFORE, BEFORE, BEFORE, TUNED)]


def test_states_follow_the_run_folders(exhibits, folders):
    scale = exhibits()["X1"].scale("demo")
    assert _states(scale) == "4 missing"
    for start, status in zip(scale.starts(), ("finished", "running", "failed"), strict=False):
        folder, config = start.located
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps({"status": status, "seed": 0, "metrics": {}}))
        (folder / "config.yaml").write_text(json.dumps(config))
    assert _states(scale) == "1 failed, 1 finished, 1 missing, 1 unfinished"
    (folder / "results.json").write_text('{"status": "finished", "seed": 0, "metrics": {}}')
    read = {**config, "seed_everything": float(start.seed)}  # as a parser may read it
    (folder / "config.yaml").write_text(json.dumps(read))
    assert _states(scale) == "2 finished, 1 missing, 1 unfinished"
    (folder / "config.yaml").write_text(json.dumps({**config, "model.size": "tiny"}))
    assert _states(scale) == "1 another config, 1 finished, 1 missing, 1 unfinished"
    (folder / "results.json").write_text('{"status": "finished", "seed": 0}')  # without metrics
    assert _states(scale) == "1 finished, 1 missing, 1 unfinished, 1 unreadable"


def test_a_config_without_runs_needs_no_parser(exhibits, monkeypatch):
    """tiny_set.yaml names no class: looking up one of its folders would be an error."""
    scale = exhibits(**CHAIN)["X1"].scale("demo")
    Path("runs/mae/another-p1-s0").mkdir(parents=True)
    assert _states(scale) == "6 missing"
    Path("runs/mae/tiny_set-p1-s0").mkdir()
    with pytest.raises(InputError):
        _states(scale)


def test_a_real_run_is_found_again(exhibits, tmp_path, monkeypatch, capfd):
    """The folder and the hash that `run` expects are those that `python -m supervised fit` leaves.

    A second run starts from the first one's weights, and its log of what was loaded says so.
    """
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    shutil.copy(ROOT / "supervised" / "configs" / "digits.yaml", tmp_path / "supervised" / "configs")
    short = {"trainer.max_epochs": 1, "model.optim.warmup_epochs": 0, "model.depth": 1, "model.patch_size": 4}
    arms = {"short": short, "on": {"runs": {"init_from": "short"}, **short}}
    scale = exhibits(scales={"demo": {"config": "digits", "arms": arms}})["X1"].scale("demo")
    assert run(read_exhibits(tmp_path)["X1"], scale, None) == 0
    assert _states(scale) == "2 finished"
    first, second = (start.located[0] for start in scale.starts())
    assert first != second
    assert json.loads((second / "results.json").read_text())["init_from"]["source"] == str(first)
    assert Path("runs/paper/X1-demo/comparison.png").stat().st_size


@pytest.mark.parametrize("arguments, message", [
    (["show", "T99"], "T99: no such table or figure; there is T1, T2, T3a"),
    (["show", "T3a", "--scale", "huge"], "--scale huge: T3a has no such scale; it has demo"),
    (["run", "T3a", "--scale", "demo", "--seeds", "0"], "--seeds 0"),
])
def test_errors_are_one_line(arguments, message):
    done = forked.run("common.paper", *arguments)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


def test_generated_tables():
    exhibits = read_exhibits()
    assert {name: exhibits[name].scale("demo").prints for name in GENERATED_IDS} == {
        "T1": ("common.paper.tables", "designs"), "T2": ("common.paper.tables", "sizes")}
    assert not any(exhibits[name].scale(scale).arms for name in GENERATED_IDS for scale in ("demo", "paper"))
    assert "  python -m common.paper.tables sizes" in show(exhibits["T2"], exhibits["T2"].scales)


def test_supervised_exhibits():
    exhibits = read_exhibits()
    assert set(IDS) <= set(exhibits)
    for name in IDS:
        assert {"demo", "paper"} <= set(exhibits[name].scales)
        assert exhibits[name].unknown  # no absolute value of these is known in full
    tokens = {arm.name: (arm.overrides["data.image_size"] // arm.overrides["model.patch_size"]) ** 2
              for arm in exhibits["F2a"].scale("paper").arms}
    assert tokens == dict.fromkeys(["224/16", "112/8", "56/4", "28/2", "14/1"], 196)
    assert [arm.overrides["model.patch_size"] for arm in exhibits["F2b"].scale("paper").arms] == [16, 8, 4, 2, 1]
    assert [arm.overrides["model.optim.lr"] for arm in exhibits["F9"].scale("paper").arms] == [8e-3, 4e-3]
    assert exhibits["T3a"].differences == {"T/1 - T/2": 1.5, "S/1 - T/1": 1.3}


@pytest.mark.parametrize("name", MAE_IDS)
def test_mae_exhibits(name):
    """From scratch with the very options of an arm of T3a; fine-tuned from a run of the same model."""
    exhibits = read_exhibits()
    assert set(exhibits[name].scales) == {"demo", "gpu", "paper"} and exhibits[name].unknown

    def same_model(arm):
        return {key: value for key, value in arm.overrides.items() if key.startswith("model.") and "optim" not in key}

    for scale in exhibits[name].scales.values():
        scratch2, scratch1, before2, before1, tuned2, tuned1 = scale.arms
        plain = [(arm.config, arm.overrides) for arm in exhibits["T3a"].scale(scale.name).arms]
        assert all((arm.config, arm.overrides) in plain for arm in (scratch2, scratch1))
        for before, tuned, patch in [(before2, tuned2, 2), (before1, tuned1, 1)]:
            assert tuned.runs == {"init_from": before.name} and same_model(tuned) == same_model(before)
            assert tuned.overrides["model.patch_size"] == patch
            assert (tuned.study, tuned.config.stem) == ("mae", f"{before.config.stem}_finetune")
    depth = {"T4a": {}, "T4b": {"model.depth": 6}}[name]
    sizes = {"T4a": "tiny", "T4b": "small"}
    assert same_model(exhibits[name].scale("demo").arms[0]) == {"model.patch_size": 2, **depth}
    assert same_model(exhibits[name].scale("paper").arms[0]) == {"model.patch_size": 2, "model.size": sizes[name]}
    lengths = [(arm.overrides["trainer.max_epochs"], arm.overrides["model.optim.warmup_epochs"])
               for arm in exhibits[name].scale("gpu").arms]
    assert lengths == [(20, 2), (20, 2), (100, 5), (100, 5), (20, 2), (20, 2)]


def test_diffusion_exhibits():
    """T6 goes on from the runs of T5, which F3 draws; all of the demo's are of one autoencoder and one classifier."""
    exhibits = read_exhibits()
    assert {name: exhibits[name].values for name in DIFFUSION_IDS} == {
        "T5": {}, "T6": {"L/1": 2.68, "L/2": 2.89}, "F3": {}}
    for scale, compared in [("demo", ["nano/2", "nano/1"]), ("paper", ["L/2", "L/1"])]:
        arms = {name: {start.arm.name: start for start in exhibits[name].scale(scale).compared()}
                for name in DIFFUSION_IDS}
        assert all(list(arms[name]) == compared for name in DIFFUSION_IDS)
        for arm, start in arms["T5"].items():
            assert start.shown("fit") == arms["F3"][arm].shown("fit") and start.stages == ("fit", "test")
            before = arms["T6"][arm].sources["continue_from"]
            assert before.shown("fit") == start.shown("fit") and before.stages == ("fit",)
            epochs = {"demo": 400, "paper": 1400}[scale]
            assert arms["T6"][arm].arm.overrides["trainer.max_epochs"] == epochs
    assert exhibits["T5"].scale("paper").starts()[0].sampling == {
        "samples": 50_000, "solver": "ddpm", "steps": 250, "guidance": 1.5, "guidance_channels": 3, "seed": 0}
    folders = {str(start.sources[option].located[0]) for seed in range(3)
               for start in exhibits["T5"].scale("demo").compared(3)[2 * seed :][:2] for option in start.sources}
    assert folders == {"runs/diffusion/autoencoder_digits-s0", "runs/supervised/digits-nano-p2-s0"}
    assert exhibits["T5"].scale("demo").metric == "test/fd_digits-nano-p2-s0"
    assert exhibits["T5"].scale("paper").columns == (
        "test/fid", "test/sfid", "test/inception_score", "test/precision", "test/recall")


def test_a_figure_of_no_training_is_drawn_alone(study, capfd):
    (exhibit,) = study(metric=None, arms=None, paper=None, draws="drawing --rows 2",
                       scales={"demo": None, "paper": {"draws": "drawing"}}).values()
    assert run(exhibit, exhibit.scale("demo"), None) == 0
    assert calls() == ["drawing --figure runs/paper/X1-demo/figure.png --rows 2"]
    assert "![X1, figure](figure.png)" in Path("runs/paper/X1-demo/report.md").read_text()
    shown = list(show(exhibit, exhibit.scales))
    assert shown[0] == "X1: one against two"
    assert "  python -m drawing --figure runs/paper/X1-paper/figure.png" in shown


def test_a_generated_table_is_kept_and_shown(study, capfd):
    (exhibit,) = study(metric=None, arms=None, paper=None, prints="printing 7", scales={"demo": None}).values()
    assert run(exhibit, exhibit.scale("demo"), None) == 0
    assert "| seven |" in capfd.readouterr().out
    assert "\n\n| seven |\n| --- |\n| 7 |\n" in Path("runs/paper/X1-demo/report.md").read_text()


def change(folder: str, **results) -> None:
    path = Path("runs/supervised", folder, "results.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | results))


def test_a_report_shows_what_runs_left_and_averages_finished_ones_alone(study, capfd):
    exhibit = study(scales={"demo": {"config": "tiny_set", "seeds": 2}, "paper": {"config": "tiny_set"}})["X1"]
    assert run(exhibit, exhibit.scale("demo"), 3) == 0
    Path("runs/supervised/tiny_set-p2-s1/config.yaml").write_text("{model: {patch_size: 4}}")
    change("tiny_set-p1-s2", status="running", epoch=0)
    Path("runs/supervised/tiny_set-p2-s2/results.json").write_text("{")
    for seed in (0, 1):
        change(f"tiny_set-p1-s{seed}", hardware="an abacus", commit="abc1234", train_seconds=60)
    report([exhibit], "demo")
    text = Path("runs/paper/X1.md").read_text()
    states = "1 another config, 3 finished, 1 unfinished, 1 unreadable"
    assert f"| [X1](#X1-demo) | demo | one against two | {states} |" in text
    assert "| S/2 | unknown | 92.00 (1) |" in text and "| S/1 | unknown | 94.50 ± 0.71 (2) |" in text
    assert "| S/1 - S/2 | +1.5 | +2.00 (n = 1) |" in text  # seed 0 alone is in both
    for line in ("S/2, seed 1: another config, not averaged in", "S/1, seed 2: unfinished, not averaged in",
                 "S/2, seed 2: unreadable, not averaged in", "hardware: unknown; an abacus", "commit: unknown; abc1234",
                 "paper: unknown: both values"):
        assert f"- {line}\n" in text, line
    page = Path("runs/paper/X1.html").read_text()
    assert 'src="data:image/png;base64,' in page and 'src="X1' not in page and "<td" in page
    assert "94.50 ± 0.71 (2)" in page and '<a href="#X1-demo">' in page and 'id="X1-demo"' in page


def test_arms_of_another_budget_are_marked(study):
    exhibit = study()["X1"]
    assert run(exhibit, exhibit.scale("demo"), 1) == 0
    change("tiny_set-p1-s0", epochs=7)
    report([exhibit], None)
    assert "| S/1 - S/2 | +1.5 | +2.00 (n = 1) † |" in Path("runs/paper/X1.md").read_text()


def test_a_report_of_no_runs_says_so(study):
    report(list(study().values()), None)
    assert "| X1 | demo, paper | one against two | none yet |" in Path("runs/paper/X1.md").read_text()
    assert "<table>" in Path("runs/paper/X1.html").read_text()


def test_all_runs_share_arms_and_outlive_a_failure(study, tmp_path, capfd):
    """X2 has an arm of X1 and one that fails; X3 cannot be judged; X4 has no such scale, and X5 is done at last."""
    exhibit = study()["X1"]
    arms = {"S/2": {"model.patch_size": 2, "data.image_size": [8, 8]}}
    entry = {"shows": "more", "metric": "val/acc1", "scales": {"demo": {"config": "tiny_set", "arms": arms}}}
    broken = {"S/2": arms["S/2"], "S/1": {"model.patch_size": 1, "data.image_size": [8, 8]}}
    others = {"X2": entry | {"scales": {"demo": {"config": "tiny_set", "arms": broken}}},
              "X3": entry | {"metric": "test/is"},
              "X4": entry | {"scales": {"paper": {"config": "tiny_set", "arms": arms}}}, "X5": entry}
    path = tmp_path / "supervised" / "paper.yaml"
    both = {"X1": yaml.safe_load(path.read_text())["X1"] | {"arms": arms, "paper": {}}, **others}
    path.write_text(yaml.safe_dump(both, sort_keys=False))
    exhibits = read_exhibits(tmp_path)
    Path("broken").touch()
    assert exhibit.id == "X1" and run_all(exhibits.values(), "demo", 1) == 1
    assert calls() == ["runs/supervised/tiny_set-p2-s0", "runs/supervised/tiny_set-p1-s0",
                       "test runs/supervised/tiny_set-p2-s0"]
    said = capfd.readouterr()
    assert "X4: has no scale demo" in said.out and "X5 demo, 1 of 1: S/2, seed 0: finished" in said.out
    assert "X2: not done: exit code 3\nX3: not done: supervised/paper.yaml: X3" in said.err


def test_a_training_that_was_asked_to_stop_is_followed_by_no_other(study, monkeypatch):
    exhibit = study()["X1"]
    monkeypatch.setattr("common.paper.running.run", lambda *_: 75)
    assert run_all([exhibit, exhibit], "demo", 1) == 75


def test_time_left_follows_the_speed_of_the_runs_so_far(exhibits):
    exhibit = exhibits()["X1"]
    two, one, *_ = starts = exhibit.scale("demo").starts(2)
    pace = Pace(starts, "demo")
    assert pace.left() == "4.2 min by formula"  # 2 * (6 + 1.5) TFLOP at 60 GFLOP/s
    pace.done(two, seconds=150)  # 1.5 TFLOP at 10 GFLOP/s
    assert pace.left() == "about 22 min left"  # 13.5 TFLOP
    pace.done(one)
    assert pace.left() == "about 12 min left"
    assert Pace(starts, "paper").left() == "5.3e-06 H200 h by formula"


def test_locality_exhibits():
    """The demo's shares of all pairs are the paper's, and an arm that two figures share is one run."""
    exhibits = read_exhibits()
    left, right = exhibits["F5-left"], exhibits["F5-right"]
    assert left.values == {"T 0": 82.4, "T 25K": 57.2} and left.differences == {"T 25K - T 0": -25.2}
    swaps = {scale: [arm.overrides.get("model.permutation.swaps", 0) for arm in left.scale(scale).arms]
             for scale in left.scales}
    assert swaps["paper"] == [0, 1000, 5000, 10_000, 15_000, 20_000, 25_000]
    for scale, pairs in [("demo", 16 * 16 // 2), ("gpu", 32 * 32 // 2)]:
        assert swaps[scale] == [round(pairs * t / 25_088) for t in swaps["paper"]]
    for scale in ("demo", "gpu", "paper"):
        (_, *arms), deltas = right.scale(scale).arms, [2, 4, 8, *[16, 32] * (scale == "paper"), None]
        twice = [swaps[scale][3]] * len(deltas) + [swaps[scale][5]] * len(deltas)
        assert [arm.overrides["model.permutation.swaps"] for arm in arms] == twice
        assert [arm.overrides.get("model.permutation.delta") for arm in arms] == deltas * 2
        folders = [{start.located[0] for start in exhibit.scale(scale).starts()} for exhibit in (left, right)]
        assert len(folders[0] & folders[1]) == 3
    assert exhibits["PE"].differences == {"none - sincos": -1.5}
    for name in ("T7", "T8", "T9", "scope", "shuffle"):
        assert not exhibits[name].values and set(exhibits[name].scales) == {"demo", "gpu", "paper"}
    assert not exhibits["F4"].scale("demo").arms


@pytest.mark.parametrize("name", GENERATED_IDS + IDS + MAE_IDS + DIFFUSION_IDS + LOCALITY_IDS)
def test_every_arm_parses_on_the_real_command_line(name, monkeypatch):
    """Every override is a key of its config, and no two arms of a scale fall into one run folder."""
    monkeypatch.chdir(ROOT)
    for scale in read_exhibits()[name].scales.values():
        starts = scale.starts(1)
        assert len({start.located[0] for start in starts}) == len(scale.arms)
        for start in starts:
            assert start.located[0].parent == Path("runs", start.arm.study)
            assert start.located[0].name.split("-")[0] == start.arm.config.stem
            for stage in start.stages:
                assert shlex.split(start.shown(stage)) == ["python", "-m", start.arm.study, stage, *start.arguments]


def test_an_arm_shares_the_run_of_the_plain_command(monkeypatch):
    """The demo's run is an arm of T3a: it is trained once."""
    monkeypatch.chdir(ROOT)
    from common.training.cli import run_folder

    config = os.path.join("supervised", "configs", "digits.yaml")
    arms = {start.arm.name: start for start in read_exhibits()["T3a"].scale("demo").starts(1)}
    assert arms["nano/1"].located[0] == run_folder("supervised", ["--config", config, "--model.patch_size", "1"])


# What makes runs repeats of one another


def trained(seed, source=None):
    return {"seed_everything": seed, "model": {"patch_size": 1}, "init_from": source}


@pytest.mark.parametrize("source", [
    "runs/mae/digits-nano-p1-s{}", "runs/mae/digits-nano-p1-s{}-2883cd", "runs/mae/digits-s{}/checkpoints/last.ckpt",
])
def test_seeds_that_start_from_the_run_of_their_own_seed_are_one_arm(source):
    assert len({arm_hash(trained(seed, source.format(seed))) for seed in (0, 1, 12)}) == 1
    assert len({config_hash(trained(seed, source.format(seed))) for seed in (0, 1, 12)}) == 3


@pytest.mark.parametrize("source", ["weights/vit-small.pth", "runs/mae/digits-nano-p1-s0"])
def test_seeds_that_start_from_one_source_are_one_arm(source):
    assert len({arm_hash(trained(seed, source)) for seed in (0, 1, 5)}) == 1


@pytest.mark.parametrize("one, other", [
    (trained(0, "runs/mae/a-s0"), trained(1, "runs/mae/b-s1")),
    (trained(0, "runs/mae/a-s0-2883cd"), trained(1, "runs/mae/a-s1-1df6e7")),
    (trained(0, "runs/mae/a-s0-2883cd"), trained(1, "runs/mae/a-s1")),
    (trained(0, "runs/mae/a-s0x"), trained(1, "runs/mae/a-s1x")),
    (trained(0, "runs/mae/a-s0-long"), trained(1, "runs/mae/a-s1-long")),  # no hash: a name that somebody chose
    (trained(0, "runs/mae/a-s0"), trained(1)),
])
def test_other_weights_are_another_arm(one, other):
    assert arm_hash(one) != arm_hash(other)


def test_options_of_prediction_alone_are_no_part_of_a_run():
    config = {"model": {"class_path": "A", "init_args": {"patch_size": 1, "predict": {"masks": 2}}}}
    assert covered(config) == {"model.class_path": "A", "model.patch_size": 1}
    for key in ("predict", "predictor"):  # a model's own key that only looks like it
        assert covered({"model": {key: "noise"}}) == {f"model.{key}": "noise"}


def test_weights_that_were_trained_anew_are_noticed(tmp_path):
    source = tmp_path / "source"
    source.mkdir()

    def train(**results):
        (source / "results.json").write_text(json.dumps({"status": "finished", "step": 9, **results}))

    train(config_hash="a")
    run = {"init_from": {"source": str(source), "trained": trained_as(source)}}
    assert changed_source(run) is None
    for other in ({"config_hash": "b"}, {"config_hash": "a", "step": 10}):
        train(**other)
        assert changed_source(run) == str(source)
    train(config_hash="a")
    assert changed_source(run) is None  # the same config gives the same weights
    (source / "results.json").unlink()
    assert changed_source(run) is None  # nothing says that they were others
    assert changed_source({}) is None and changed_source({"init_from": {"source": "mae_pretrain.pth"}}) is None
