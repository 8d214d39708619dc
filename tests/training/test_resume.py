"""A run killed at any moment and started again ends with the weights of an undisturbed run, bit for bit."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

# Everything that has a state or draws random numbers: EMA, drop path, augmentation, mixup, masks, micro-batches.
COMMANDS = {
    "supervised": [
        "--trainer.max_epochs", "3", "--model.drop_path", "0.2", "--model.mixup", "0.8", "--model.cutmix", "1.0",
        "--data.augment.flip", "0.5",
    ],
    "mae": [
        "--trainer.max_epochs", "3", "--trainer.check_val_every_n_epoch", "2", "--model.picture_epochs", "0",
        "--data.augment.crop_scale", "[0.3,1.0]", "--data.augment.flip", "0.5",
    ],
}  # fmt: skip
COMMON = ["--run_name", "run", "--model.optim.ema", "0.9", "--model.optim.warmup_epochs", "1",
          "--data.batch_per_device", "32", "--checkpoint.every_n_steps", "2"]  # fmt: skip


def start(runs: Path, *more: str, study: str = "supervised") -> subprocess.Popen:
    options = ["--config", f"{study}/configs/digits.yaml", "--runs", str(runs), *COMMON, *COMMANDS[study], *more]
    command = [sys.executable, "-m", study, "fit", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(runs: Path, *more: str, study: str = "supervised") -> Path:
    process = start(runs, *more, study=study)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return runs / study / "run" / "checkpoints"


def tensors(checkpoints: Path) -> dict[str, torch.Tensor]:
    checkpoint = torch.load(checkpoints / "last.ckpt", weights_only=True)
    states = {f"{k}.{name}": v for k, s in checkpoint["optimizer_states"][0]["state"].items() for name, v in s.items()}
    return {**checkpoint["state_dict"], **{f"ema.{k}": v for k, v in checkpoint["ema"]["state_dict"].items()}, **states}


def assert_identical(one: Path, other: Path) -> None:
    ours, theirs = tensors(one), tensors(other)
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different, different


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finish(tmp_path_factory.mktemp("undisturbed"))


def kill_and_finish(runs: Path, seed: int, kills: int, workers: int, study: str = "supervised") -> Path:
    """Kills at random moments after the training has begun; every other time in the middle of writing a checkpoint."""
    draw = random.Random(seed)
    folder = runs / study / "run" / "checkpoints"
    for kill in range(kills):
        process = start(runs, "--data.workers", str(workers), study=study)
        before = (folder / "last.ckpt").stat().st_mtime_ns if (folder / "last.ckpt").exists() else 0
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if kill % 2 and (folder / "last.ckpt.tmp").exists():
                break
            if not kill % 2 and (folder / "last.ckpt").exists() and (folder / "last.ckpt").stat().st_mtime_ns > before:
                time.sleep(draw.uniform(0, 1.0))
                break
            time.sleep(0.0005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    return finish(runs, "--data.workers", str(workers), study=study)


@pytest.mark.parametrize("seed, kills, workers", [(0, 2, 0), (1, 1, 2)])
def test_killed_runs_end_bit_identical(undisturbed: Path, tmp_path: Path, seed: int, kills: int, workers: int) -> None:
    checkpoints = kill_and_finish(tmp_path, seed, kills, workers)
    assert_identical(undisturbed, checkpoints)
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_killed_pretraining_ends_bit_identical(tmp_path: Path) -> None:
    whole = finish(tmp_path / "whole", study="mae")
    killed = kill_and_finish(tmp_path / "killed", 1, 1, 0, study="mae")
    assert_identical(whole, killed)
    assert len(list(killed.parent.glob("events.out.tfevents.*"))) == 2  # it was not over when it was killed


@pytest.mark.soak
@pytest.mark.parametrize("seed, workers", [(2, 0), (3, 2)])
def test_ten_kills(undisturbed: Path, tmp_path: Path, seed: int, workers: int) -> None:
    assert_identical(undisturbed, kill_and_finish(tmp_path, seed, 5, workers))
