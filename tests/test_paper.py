"""The paper's tables and figures as arms: paper.yaml, the commands it stands for, and python -m common.paper."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from common import paper
from common.errors import InputError
from common.exhibits import read_exhibits

ROOT = Path(__file__).parent.parent
IDS = ("T3a", "T3b", "T3c", "T3d", "F2a", "F2b", "F9")


@pytest.fixture
def exhibits(tmp_path, monkeypatch):
    """One exhibit of two arms in a study folder of the test's own; the working directory is that folder's parent."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "supervised" / "configs").mkdir(parents=True)
    config = tmp_path / "supervised" / "configs" / "tiny_set.yaml"
    config.write_text("# Where lr comes from.\n#\n# Steps: 9.\nmodel: {}\n")

    def read(**changes):
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
        (tmp_path / "supervised" / "paper.yaml").write_text(yaml.safe_dump({"X1": entry}, sort_keys=False))
        return read_exhibits(tmp_path)

    return read


def test_arms_expand_to_commands(exhibits):
    """An arm's own override beats the scale's, every seed runs all arms, and values are typed as YAML reads them."""
    starts = exhibits()["X1"].scale("demo").starts()
    assert [(start.arm, start.seed) for start in starts] == [("S/2", 0), ("S/1", 0), ("S/2", 1), ("S/1", 1)]
    assert str(starts[3]) == (
        "python -m supervised fit --config supervised/configs/tiny_set.yaml --model.patch_size 1 "
        "--data.image_size '[8, 8]' --model.drop_path null --seed_everything 1")
    assert [str(start) for start in exhibits()["X1"].scale("paper").starts()] == [
        "python -m supervised fit --config supervised/configs/tiny_set.yaml --model.qk_norm true --seed_everything 0"]
    assert len(exhibits()["X1"].scale("demo").starts(seeds=5)) == 10


@pytest.mark.parametrize("changes, message", [
    ({"show": "x"}, r"paper.yaml: X1.show: unknown key; there is shows"),
    ({"shows": 3}, r"X1.shows: 3 should be str"),
    ({"scales": {"demo": {}}}, r"X1.scales.demo: lacks config"),
    ({"scales": {"demo": {"config": "nowhere"}}}, r"scales.demo.config: nowhere; there is no file .*nowhere.yaml"),
    ({"scales": {"demo": {"config": "tiny_set", "seeds": 0}}}, r"scales.demo.seeds: 0"),
    ({"scales": {"demo": {"config": "tiny_set", "arms": {"a": 3}}}}, r"scales.demo.arms.a: 3 is not a mapping"),
    ({"arms": {}, "paper": {}}, r"X1.scales.demo: has no arms"),
    ({"paper": {"differences": {"S/1 - S/9": 1}}}, r"X1.paper: S/9 is none of the arms S/2, S/1"),
])
def test_malformed_exhibits_are_named(exhibits, changes, message):
    with pytest.raises(InputError, match=message):
        exhibits(**changes)


def test_an_id_belongs_to_one_study(exhibits, tmp_path):
    exhibits()
    (tmp_path / "mae").symlink_to(tmp_path / "supervised")
    with pytest.raises(InputError, match="X1 stands in supervised/paper.yaml too"):
        read_exhibits(tmp_path)


def test_show_names_sources_statements_and_commands(exhibits):
    exhibit = exhibits()["X1"]
    text = "\n".join(paper.show(exhibit, {"demo": exhibit.scale("demo")}))
    for part in ("val/acc1: S/1 - S/2 = +1.5", "unknown: both values", "supervised/configs/tiny_set.yaml",
                 "Where lr comes from.\n    \n    Steps: 9.", "# S/1, seed 1", str(exhibit.scale("demo").starts()[0])):
        assert part in text
    with pytest.raises(InputError, match="--scale gpu: X1 has no such scale; it has demo, paper"):
        exhibit.scale("gpu")


@pytest.fixture
def study(exhibits, tmp_path, monkeypatch):
    """A stand-in for `python -m supervised fit`: it writes a finished run folder, or leaves with exit code 3.

    Its folders lie where the test says, so that what `run` does with them is tested apart from the command line.
    """
    (tmp_path / "supervised" / "__init__.py").touch()
    (tmp_path / "supervised" / "__main__.py").write_text('''
import json, pathlib, sys
options = dict(zip(sys.argv[2::2], sys.argv[3::2]))
patch, seed = int(options["--model.patch_size"]), int(options["--seed_everything"])
with open("calls", "a") as calls:
    print(patch, seed, file=calls)
if pathlib.Path("broken").exists() and patch == 1:
    sys.exit(3)
folder = pathlib.Path(f"runs/supervised/tiny_set-p{patch}-s{seed}")
folder.mkdir(parents=True)
results = {"status": "finished", "seed": seed, "metrics": {"val/acc1": 90 + 4 / patch + seed}, "headline": "val/acc1",
           "higher_is_better": True, "patch_size": patch, "dataset": "digits", "epochs": 1, "batch_size": 8}
(folder / "results.json").write_text(json.dumps(results))
(folder / "config.yaml").write_text(f"seed_everything: {seed}\\nmodel: {{patch_size: {patch}}}\\n")
''')

    def locate(start):
        return Path("runs/supervised") / f"tiny_set-p{start.overrides['model.patch_size']}-s{start.seed}", "hash"

    monkeypatch.setattr(paper, "locate", locate)
    return exhibits()["X1"]


def calls() -> list[str]:
    return Path("calls").read_text().splitlines()


def test_run_trains_each_arm_once_and_compares(study, capfd):
    assert paper.run(study, study.scale("demo"), None) == 0
    assert calls() == ["2 0", "1 0", "2 1", "1 1"]
    out = capfd.readouterr().out
    assert "X1 demo, 2 of 4: S/1, seed 0" in out
    # By hand: /1 has 94 and 95, /2 has 92 and 93.
    assert "94.50 ± 0.71 (2) *" in out and "+2.00" in out
    assert "here: val/acc1: S/1 - S/2 = +2.00 (n = 2)" in out
    text = Path("runs/paper/X1-demo/comparison.md").read_text()
    assert "| S/2 (baseline) |" in text and "- paper: val/acc1: S/1 - S/2 = +1.5" in text
    assert Path("runs/paper/X1-demo/comparison.png").stat().st_size

    assert paper.run(study, study.scale("demo"), None) == 0
    assert len(calls()) == 4  # finished arms are skipped


def test_run_stops_with_the_arms_exit_code_and_goes_on_there(study, capfd):
    Path("broken").touch()
    assert paper.run(study, study.scale("demo"), 1) == 3
    assert "S/1, seed 0: stopped with exit code 3" in capfd.readouterr().err
    assert [paper.state(*paper.locate(start)) for start in study.scale("demo").starts(1)] == ["finished", "missing"]
    Path("broken").unlink()
    assert paper.run(study, study.scale("demo"), 1) == 0
    assert calls() == ["2 0", "1 0", "1 0"]


def test_states_follow_the_run_folders(study):
    scale = study.scale("demo")
    assert paper._states(scale) == "4 missing"
    for start, status in zip(scale.starts(), ("finished", "running", "failed"), strict=False):
        folder, _ = paper.locate(start)
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps({"status": status, "seed": 0, "metrics": {}}))
        (folder / "config.yaml").write_text("model: {}")
    assert paper._states(scale) == "1 failed, 1 finished, 1 missing, 1 unfinished"
    (folder / "results.json").write_text('{"status": "finished", "config_hash": "other", "seed": 0, "metrics": {}}')
    assert paper._states(scale) == "1 another config, 1 finished, 1 missing, 1 unfinished"


def test_a_real_run_is_found_again(exhibits, tmp_path, monkeypatch, capfd):
    """The folder and the hash that `run` expects are those that `python -m supervised fit` leaves."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    shutil.copy(ROOT / "supervised" / "configs" / "digits.yaml", tmp_path / "supervised" / "configs")
    short = {"trainer.max_epochs": 1, "model.optim.warmup_epochs": 0, "model.depth": 1, "model.patch_size": 4}
    scale = exhibits(scales={"demo": {"config": "digits", "arms": {"short": short}}})["X1"].scale("demo")
    assert paper.run(read_exhibits(tmp_path)["X1"], scale, None) == 0
    assert paper._states(scale) == "1 finished"
    assert Path("runs/paper/X1-demo/comparison.png").stat().st_size


@pytest.mark.parametrize("arguments, message", [
    (["show", "T99"], "T99: no such table or figure; there is T3a"),
    (["show", "T3a", "--scale", "huge"], "--scale huge: T3a has no such scale; it has demo"),
    (["run", "T3a", "--scale", "demo", "--seeds", "0"], "--seeds 0"),
])
def test_errors_are_one_line(arguments, message):
    done = subprocess.run([sys.executable, "-m", "common.paper", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


def test_supervised_exhibits():
    exhibits = read_exhibits()
    assert set(IDS) <= set(exhibits)
    for name in IDS:
        assert {"demo", "paper"} <= set(exhibits[name].scales)
        assert exhibits[name].unknown  # no absolute value of these is known in full
    tokens = {arm: (o["data.image_size"] // o["model.patch_size"]) ** 2
              for arm, o in exhibits["F2a"].scale("paper").arms.items()}
    assert tokens == dict.fromkeys(["224/16", "112/8", "56/4", "28/2", "14/1"], 196)
    assert [o["model.patch_size"] for o in exhibits["F2b"].scale("paper").arms.values()] == [16, 8, 4, 2, 1]
    assert [o["model.optim.lr"] for o in exhibits["F9"].scale("paper").arms.values()] == [8e-3, 4e-3]
    assert exhibits["T3a"].differences == {"T/1 - T/2": 1.5, "S/1 - T/1": 1.3}


@pytest.mark.parametrize("name", IDS)
def test_every_arm_parses_on_the_real_command_line(name, monkeypatch):
    """Every override is a key of its config, and no two arms of a scale fall into one run folder."""
    monkeypatch.chdir(ROOT)
    for scale in read_exhibits()[name].scales.values():
        folders = [located(start) for start in scale.starts(1)]
        assert len(set(folders)) == len(scale.arms)
        assert {folder.name.split("-")[0] for folder in folders} == {scale.config.stem}


def located(start) -> Path:
    from common.training.cli import run_folder

    words = shlex.split(str(start))
    assert words[:4] == ["python", "-m", "supervised", "fit"]
    return run_folder("supervised", words[4:])


def test_an_arm_shares_the_run_of_the_plain_command(monkeypatch):
    """The demo's run is an arm of T3a: it is trained once."""
    monkeypatch.chdir(ROOT)
    from common.training.cli import run_folder

    config = os.path.join("supervised", "configs", "digits.yaml")
    arms = {start.arm: located(start) for start in read_exhibits()["T3a"].scale("demo").starts(1)}
    assert arms["nano/1"] == run_folder("supervised", ["--config", config, "--model.patch_size", "1"])
