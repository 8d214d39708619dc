"""What the x axis of TensorBoard's curves counts: optimiser steps, or images seen."""

import json
from pathlib import Path

import pytest
from forked import ROOT, Command, run
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.data import ImageData
from common.figure import _axis, draw, read_curves
from common.runs import find_runs, group_runs, read_run

# 3 epochs of 2 steps of 399 images; a picture after the second.
OPTIONS = ["--config", ROOT / "mae/configs/digits.yaml", "--model.width", "24", "--model.depth", "1",
           "--model.decoder_depth", "1", "--data.batch_size", "399", "--data.batch_per_device", "133",
           "--model.optim.warmup_epochs", "1", "--trainer.check_val_every_n_epoch", "1", "--trainer.log_every_n_steps",
           "1", "--model.picture_epochs", "2", "--trainer.limit_train_batches", "2", "--trainer.max_epochs", "3"]


def fit(runs: Path, *more: str, module: str = "mae") -> Command:
    return run(module, "fit", *OPTIONS, "--runs", runs, "--run_name", "run", *more, cwd=runs)


@pytest.fixture(scope="module")
def by_images(tmp_path_factory) -> Path:
    """A run that was stopped after its fourth step and went on."""
    runs = tmp_path_factory.mktemp("images")
    # Its last checkpoint is of step 3; step 4 is logged, and logged again by the second start.
    stop = ["--checkpoint.every_n_steps", "3", "--x_axis", "images"]
    code = ("import sys, os; from common.training.curves import Curves; end = Curves.on_train_batch_end\n"
            "def stopping(self, trainer, *rest):\n"
            "    end(self, trainer, *rest)\n"
            "    if trainer.global_step == 4: trainer.logger.experiment.flush(); os._exit(9)\n"
            "Curves.on_train_batch_end = stopping\n"
            "from common.training.cli import main; sys.argv[0] = 'mae'; main('mae')")
    (runs / "stopping.py").write_text(code)
    killed = fit(runs, *stop, module="stopping")
    assert killed.returncode == 9, killed.stderr
    again = fit(runs, *stop)
    assert again.returncode == 0, again.stderr
    assert "goes on: " in again.stdout and "after step 3" in again.stdout
    return runs / "mae" / "run"


@pytest.fixture(scope="module")
def by_steps(tmp_path_factory) -> Path:
    runs = tmp_path_factory.mktemp("steps")
    assert fit(runs).returncode == 0
    return runs / "mae" / "run"


def test_every_point_lies_at_images_seen(by_images, scalars):
    """None is doubled and none is missing, though the fourth step was logged twice."""
    curves = scalars(by_images)
    assert [x for x, _ in curves["train/loss"]] == [399 * step for step in range(1, 7)]
    assert [x for x, _ in curves["val/loss"] if x] == [399 * step for step in (2, 4, 6)]  # at 0 HPARAMS begins it
    events = EventAccumulator(str(by_images)).Reload()
    (pictures,) = (events.Images(tag) for tag in events.Tags()["images"])
    assert [picture.step for picture in pictures] == [399 * 4, 399 * 6]
    assert json.loads((by_images / "results.json").read_text())["x_axis"] == "images"


def test_a_run_keeps_its_axis(by_steps):
    refused = fit(by_steps.parent.parent, "--x_axis", "images")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert f"--x_axis: images, but the curves in {by_steps} are over step; give --x_axis step" in refused.stderr


def test_runs_of_both_axes_share_a_figure(by_images, by_steps, tmp_path):
    runs = [read_run(by_images), read_run(by_steps)]
    tags = ["train/loss"]
    for in_images, unit in [(False, 1), (True, 399)]:
        one, other = (read_curves(run.folder, tags, _axis(run, in_images))["train/loss"] for run in runs)
        assert list(one) == list(other) == [unit * step for step in range(1, 7)]
        assert one == pytest.approx(other)
    for folders, axis in [([by_images], "images seen"), ([by_images, by_steps], "optimiser steps")]:
        groups = [group for folder in folders for group in group_runs(find_runs([folder]))[0]]
        assert draw(groups, tmp_path / "curves.svg", "of one batch") == []
        assert axis in (tmp_path / "curves.svg").read_text()


# 2 epochs of 2 steps of 128 images, with every tag that there is.
DIGITS = ["--trainer.limit_train_batches", "2", "--trainer.max_epochs", "2", "--trainer.log_every_n_steps", "1",
          "--model.optim.warmup_epochs", "1", "--model.optim.schedule", "constant", "--model.optim.ema", "0.9",
          "--run_name", "run"]  # fmt: skip


def run_of(axis: str, *more: str) -> list[str]:
    return [*DIGITS, "--runs", axis, *more]


def test_whatever_is_logged_lies_at_images_seen(command, at, scalars, tmp_path):
    """What a callback logs with Lightning, or draws with TensorBoard, and what evaluations add."""

    def log_more(module) -> None:
        module.log("probe", 1.0)
        step = module.trainer.global_step
        module.logger.experiment.add_figure("figure", Figure(), step)  # which calls add_image
        module.logger.experiment.add_scalars("both", {"one": step}, global_step=step)
        module.logger.experiment.add_text("text", "no step")

    at("on_train_epoch_end", log_more)
    curves, events, hashes = {}, {}, set()
    for axis in ("step", "images"):
        assert command("fit", *run_of(axis, "--x_axis", axis)).code == 0
        for evaluation in ("validate", "test"):
            for more in ([], ["--x_axis", "images"]):  # it is the run's axis that counts
                outcome = command(evaluation, *run_of(axis, *more))
                assert outcome.code == 0, outcome.err
        folder = tmp_path / axis / "supervised/run"
        curves[axis] = {tag: [x for x, _ in points] for tag, points in scalars(folder).items()}
        events[axis] = EventAccumulator(str(folder)).Reload()
        hashes.add(json.loads((folder / "results.json").read_text())["config_hash"])
    assert {"val/acc1", "val_raw/acc1", "test/acc1", "train/lr", "probe", "epoch"} <= curves["step"].keys()
    assert curves["step"]["val/acc1"] == [0, 2, 4, 4, 4] and curves["step"]["train/loss"] == [1, 2, 3, 4]
    assert curves["images"] == {tag: [128 * step for step in steps] for tag, steps in curves["step"].items()}
    assert [image.step for image in events["step"].Images("figure")] == [2, 4]
    assert [image.step for image in events["images"].Images("figure")] == [256, 512]
    assert [x for x, _ in scalars(tmp_path / "images/supervised/run/both_one")["both"]] == [256, 512]
    assert len(hashes) == 1


def test_a_run_from_before_there_were_axes_is_one_of_steps(command, tmp_path):
    assert command("fit", *run_of("old")).code == 0
    config = tmp_path / "old/supervised/run/config.yaml"
    config.write_text(config.read_text().replace("x_axis: step\n", ""))
    assert "x_axis" not in config.read_text()
    refused = command("fit", *run_of("old", "--x_axis", "images"))
    assert refused.code == 2 and "are over step; give --x_axis step" in refused.err
    assert command("fit", *run_of("old")).out.startswith("finished: ")
    assert command("fit", *run_of("old", "--x_axis", "images", "--overwrite")).code == 0
    assert "x_axis: images\n" in config.read_text()


def test_a_run_that_is_trained_on_keeps_to_images(command, scalars, tmp_path, monkeypatch):
    """Its first point lies after its source's last, and data that fail before their batch is known are what is told."""
    assert command("fit", *run_of("images", "--x_axis", "images")).code == 0
    source = tmp_path / "images/supervised/run"
    on = ["--run_name", "on", "--continue_from", str(source), "--trainer.max_epochs", "3", "--x_axis", "images"]
    (source.parent / "on").mkdir()
    (source.parent / "on" / "notes").touch()  # the user's
    with monkeypatch.context() as context:

        def failing(data: ImageData, split: str) -> None:
            raise RuntimeError("a broken disk")

        context.setattr(ImageData, "load", failing)
        failed = command("fit", *run_of("images", *on))
    assert failed.code == 1 and failed.err.splitlines()[-1].startswith("failed: RuntimeError: a broken disk")
    assert [file.name for file in (source.parent / "on").iterdir()] == ["notes"]
    assert command("fit", *run_of("images", *on)).code == 0
    assert [x for x, _ in scalars(source.parent / "on")["train/loss"]] == [128 * 5, 128 * 6]
