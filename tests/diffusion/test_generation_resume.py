"""A diffusion Transformer trains the same weights continued, stopped and started again, and on two processes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import run
from small import SMALL

from common.training.checkpoints import read
from diffusion import Generation

ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "diffusion" / "configs" / "digits.yaml"
PIXELS = ["--data.autoencoder", "null", "--data.image_size", "8", "--data.augment.interpolation", "bilinear"]
OPTIONS = [*PIXELS, "--data.augment.flip", "0.5", "--model.picture_epochs", "0", "--model.optim.ema", "0.9",
           "--trainer.log_every_n_steps", "1"]  # fmt: skip
CONSTANT = ["--model.optim.schedule", "constant", "--model.optim.warmup_epochs", "2"]
STEPS = 9  # of an epoch


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Weights, their average, and the optimiser's moments and steps."""
    checkpoint = read(folder / "checkpoints" / "last.ckpt")
    average = {f"ema.{name}": value for name, value in checkpoint["ema"]["state_dict"].items()}
    states = checkpoint["optimizer_states"][0]["state"].items()
    return {**checkpoint["state_dict"], **average,
            **{f"{number}.{name}": value for number, state in states for name, value in state.items()}}  # fmt: skip


def assert_identical(one: Path, other: Path) -> None:
    ours, theirs = tensors(one), tensors(other)
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]


@pytest.fixture
def fit(command: Callable, tmp_path: Path) -> Callable[..., Path]:
    """Trains a small net into a run folder of this name, and returns the folder."""

    def run(name: str, epochs: int, *more: Any, code: int = 0) -> Path:
        outcome = command("fit", *OPTIONS, *CONSTANT, "--run_name", name, "--trainer.max_epochs", epochs, *more,
                          config=DIGITS, study="diffusion")  # fmt: skip
        assert outcome.code == code, outcome.err
        return tmp_path / "runs/diffusion" / name

    return run


def stop_before(step: int, patch: pytest.MonkeyPatch) -> None:
    training_step = Generation.training_step

    def until(module: Generation, *args: Any) -> torch.Tensor:
        if module.trainer.global_step == step:
            raise RuntimeError("stopped")
        return training_step(module, *args)

    patch.setattr(Generation, "training_step", until)


def curves(scalars: Callable, folder: Path, start: int = 0) -> dict[str, list[tuple[int, float]]]:
    """Of the steps after `start`; speed aside."""
    tags = ("train/loss", "train/lr", "val/loss", "val_raw/mse_q1")
    return {tag: [point for point in scalars(folder)[tag] if point[0] > start] for tag in tags}


def test_four_epochs_and_ten_are_fourteen(fit: Callable, scalars: Callable) -> None:
    four, whole = fit("4", 4), fit("14", 14)
    more = fit("4+10", 14, "--continue_from", four)
    assert read(more / "checkpoints/last.ckpt")["global_step"] == 14 * STEPS
    assert_identical(more, whole)
    assert curves(scalars, more) == curves(scalars, whole, start=4 * STEPS)
    assert [step for step, _ in curves(scalars, more)["train/loss"]] == list(range(4 * STEPS + 1, 14 * STEPS + 1))


# Steps of its own: before its first checkpoint, and after one in mid-epoch.
@pytest.mark.parametrize("done", [2, 15])
def test_a_continued_run_that_was_stopped_ends_bit_identical(
    fit: Callable, scalars: Callable, monkeypatch: pytest.MonkeyPatch, done: int
) -> None:
    """Once it has a checkpoint of its own, the run that it continues is not needed any more."""
    options = ["--data.batch_per_device", "32", "--checkpoint.every_n_steps", "4"]
    four, whole = fit("4", 4, *options), fit("8", 8, *options)
    with monkeypatch.context() as patch:
        stop_before(4 * STEPS + done, patch)
        more = fit("4+4", 8, *options, "--continue_from", four, code=1)
    own = more / "checkpoints/last.ckpt"
    if done == 2:
        assert not own.exists()
    else:
        assert read(own)["global_step"] == 4 * STEPS + 12
        four.rename(four.with_name("away"))
    fit("4+4", 8, *options, "--continue_from", four)
    assert_identical(more, whole)
    assert curves(scalars, more) == curves(scalars, whole, start=4 * STEPS)


@pytest.mark.parametrize("batch_per_device", [16, pytest.param(64, marks=pytest.mark.soak)])
def test_two_processes_train_as_one(fit: Callable, tmp_path: Path, batch_per_device: int) -> None:
    """Four micro-batches of 16 images on each, or half of the batch at once."""
    one = tensors(fit("one", 2))
    words = ["fit", "--config", DIGITS, "--runs", tmp_path / "runs", *SMALL, *OPTIONS, *CONSTANT, "--run_name", "two",
             "--trainer.max_epochs", 2, "--trainer.accelerator", "cpu", "--trainer.devices", 2,
             "--data.batch_per_device", batch_per_device]  # fmt: skip
    done = run("diffusion", *words, ranks=2)
    assert done.returncode == 0, done.stderr
    assert f"micro-batches per step     {64 // batch_per_device}" in done.stdout
    two = tensors(tmp_path / "runs/diffusion/two")
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-4, msg=name)
