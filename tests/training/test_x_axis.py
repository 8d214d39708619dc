"""What the x axis of TensorBoard's curves counts: optimiser steps, or images seen."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.figure import _axis, draw, read_curves
from common.runs import find_runs, group_runs, read_run

# 3 epochs of 2 steps of 399 images; a picture after the second.
OPTIONS = ["--config", "mae/configs/digits.yaml", "--model.width", "24", "--model.depth", "1", "--model.decoder_depth",
           "1", "--data.batch_size", "399", "--data.batch_per_device", "133", "--model.optim.warmup_epochs", "1",
           "--trainer.check_val_every_n_epoch", "1", "--trainer.log_every_n_steps", "1", "--model.picture_epochs", "2",
           "--trainer.limit_train_batches", "2", "--trainer.max_epochs", "3"]  # fmt: skip


def fit(runs: Path, *more: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "mae", "fit", *OPTIONS, "--runs", str(runs), "--run_name", "run", *more]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def by_images(tmp_path_factory) -> Path:
    """A run that was stopped after its fourth step and went on."""
    runs = tmp_path_factory.mktemp("images")
    # Its last checkpoint is of step 3; step 4 is logged, and logged again by the second start.
    stop = ["--checkpoint.every_n_steps", "3", "--x_axis", "images"]
    code = ("import sys, os; from common.training.curves import Curves; write = Curves._write\n"
            "def stopping(self, trainer, *rest):\n"
            "    write(self, trainer, *rest)\n"
            "    if trainer.global_step == 4: trainer.logger.experiment.flush(); os._exit(9)\n"
            "Curves._write = stopping\n"
            "from common.training.cli import main; sys.argv[0] = 'mae'; main('mae')")
    killed = subprocess.run([sys.executable, "-c", code, "fit", *OPTIONS, "--runs", str(runs), "--run_name", "run",
                             *stop], capture_output=True, text=True)  # fmt: skip
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
    groups, _ = group_runs(find_runs([by_images]))
    assert draw(groups, tmp_path / "curves.svg", "one run") == []
    assert "images seen" in (tmp_path / "curves.svg").read_text()
