"""python -m common.paper run: arms in order, stages, states, and all tables at once."""

import json
import shutil
from pathlib import Path

import forked
import pytest
import yaml
from stand_in import CHAIN, calls

from common.errors import InputError
from common.paper.exhibits import Start, read_exhibits
from common.paper.listing import _states, show
from common.paper.running import Pace, run, run_all
from common.paper.state import own_seconds, state


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


def test_a_copy_is_tested_beside_its_original(study):
    """Both are compared, and what was trained once counts once."""
    arms = {"S/2": {"model.patch_size": 2}, "again": {"again": "S/2", "model.predict.guidance": 1}}
    exhibit = study(arms=arms, metric="test/fid", paper=None, scales={"demo": {"config": "tiny_set"}})["X1"]
    demo = exhibit.scale("demo")
    assert run(exhibit, demo, 1) == 0
    own = "runs/supervised/tiny_set-p2-s0"
    assert calls() == [own, f"test {own}", f"{own}-copy", f"test {own}-copy"]
    text = Path("runs/paper/X1-demo/report.md").read_text()
    assert "| S/2 | no such run | 20.00 (1) |" in text and "| again | no such run | 25.00 (1) |" in text
    for folder, seconds in ((own, 60), (f"{own}-copy", 61)):
        results = json.loads(Path(folder, "results.json").read_text())
        Path(folder, "results.json").write_text(json.dumps(results | {"train_seconds": seconds}))
    assert [own_seconds(start) for start in demo.starts(1)] == [60, 1]
    assert run(exhibit, demo, 1) == 0 and len(calls()) == 4


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


def test_what_is_prepared_comes_before_the_training_and_is_not_repeated_for_a_test(study, capfd):
    Path("cached.py").write_text("""
import pathlib, sys
with open("calls", "a") as calls:
    print("cached", sys.argv[1], sys.argv[sys.argv.index("--model.patch_size") + 1], file=calls)
sys.exit(4 * pathlib.Path("full").exists())
""")
    arms = {name: {"prepare": "cached latents", "model.patch_size": int(name[-1])} for name in ("S/2", "S/1")}
    exhibit = study(arms=arms, metric="test/fid", paper=None, scales={"demo": {"config": "tiny_set"}})["X1"]
    scale, folders = exhibit.scale("demo"), [f"runs/supervised/tiny_set-p{patch}-s0" for patch in (2, 1)]
    Path("full").touch()
    assert run(exhibit, scale, 1) == 4 and calls() == ["cached latents 2"]  # nothing is trained on what is not there
    assert "S/2, seed 0: stopped with exit code 4" in capfd.readouterr().err
    Path("full").unlink()
    assert run(exhibit, scale, 1) == 0
    expected = [line for patch, folder in zip((2, 1), folders, strict=True)
                for line in (f"cached latents {patch}", folder, f"test {folder}")]  # fmt: skip
    assert calls()[1:] == expected

    path = Path(folders[0], "results.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"metrics": {"val/loss": 1.0}}))
    assert run(exhibit, scale, 1) == 0 and calls()[1:] == [*expected, f"test {folders[0]}"]


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
    """Neither after a failure nor after an early end, be its exit code 0."""
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
    monkeypatch.setenv("PYTHONPATH", str(forked.ROOT))
    shutil.copy(forked.ROOT / "supervised" / "configs" / "digits.yaml", tmp_path / "supervised" / "configs")
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
