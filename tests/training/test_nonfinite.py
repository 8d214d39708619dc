"""A loss or gradient that is not finite: the run stops and names the step, or leaves exactly that step out."""

import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from processes import leftovers, tensors

from common.training.checkpoints import read
from supervised import Classification

# 9 steps an epoch, of 4 micro-batches each.
RUN = ["--run_name", "run", "--model.optim.ema", "0.9", "--model.drop_path", "0.2", "--data.batch_per_device", "32"]
SKIP = [*RUN, "--nonfinite", "skip", "--trainer.log_every_n_steps", "1"]
POISON = """
import math
import lightning as L

class Poison(L.Callback):
    def on_train_batch_start(self, trainer, module, batch, i):
        if trainer.global_rank == 1 and trainer.global_step == 6:
            batch["image"] = batch["image"] * math.nan
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "supervised" / "run"


def poisoned(*steps: int, by: float = math.nan, micro: int = 2) -> Callable[..., None]:
    """A hook that spoils one of the micro-batches of these steps, counted from 1."""

    def act(module: Classification, batch: dict, i: int) -> None:
        if module.trainer.global_step + 1 in steps and i % 4 == micro:
            batch["image"] = batch["image"] * by

    return act


# Stop

FOUND_BY_A_CHECKPOINT = [(5, 6), (5, 7), (50, 3), (8, 17)]  # points of the curves every so many steps, and the bad step


@pytest.mark.parametrize("rhythm, step", [(1, 7), (5, 5), (5, 10), (8, 7), (8, 10), *FOUND_BY_A_CHECKPOINT])
def test_the_first_bad_step_is_named(command: Callable, at: Callable, folder: Path, rhythm, step) -> None:
    """Between two points of the curves, on one, after one, and where the checkpoint of an epoch's end comes first."""
    at("on_train_batch_start", poisoned(step))
    outcome = command("fit", *RUN, "--trainer.log_every_n_steps", rhythm)
    assert outcome.code == 1
    said = f"is not finite since step {step}, and" if (rhythm, step) in FOUND_BY_A_CHECKPOINT else (
        f"is nan, for the first time at step {step};")
    assert f"FloatingPointError: train/loss {said}" in outcome.err
    assert "--nonfinite skip" in outcome.err and "Traceback" not in outcome.err
    results = json.loads((folder / "results.json").read_text())
    assert results["status"] == "failed" and f"step {step}" in results["error"]
    assert not leftovers(folder)


def test_what_was_saved_before_it_stays(command: Callable, at: Callable, folder: Path) -> None:
    """No checkpoint of weights that are not finite, though one is due before the next point of the curves."""
    at("on_train_batch_start", poisoned(6))
    outcome = command("fit", *RUN, "--checkpoint.every_n_steps", 4, "--trainer.log_every_n_steps", 50)
    assert outcome.code == 1 and "since step 6, and weights are not finite at step 8; the last check" in outcome.err
    assert read(folder / "checkpoints/last.ckpt")["global_step"] == 4
    assert all(value.isfinite().all() for value in tensors(folder / "checkpoints/last.ckpt").values())
    at("on_train_batch_start", lambda *_: None)
    assert command("fit", *RUN, "--checkpoint.every_n_steps", 4).code == 0


def test_a_gradient_alone_is_named_too(command: Callable, at: Callable) -> None:
    def spoil(module: Classification) -> None:
        if module.trainer.global_step == 6:
            module.net.head.bias.grad[0] = math.inf

    at("on_after_backward", spoil)
    outcome = command("fit", *RUN, "--trainer.log_every_n_steps", 1)
    assert outcome.code == 1 and "train/grad_norm is inf at step 7; the last checkpoint is kept" in outcome.err


@pytest.mark.parametrize("nonfinite", ["stop", "skip"])
def test_of_two_processes_one_is_bad(
    start: Callable, scalars: Callable, folder: Path, tmp_path: Path, nonfinite
) -> None:
    (tmp_path / "poison.py").write_text(POISON)
    process = start("fit", *RUN, "--trainer.callbacks+=poison.Poison", "--nonfinite", nonfinite, "--trainer.devices",
                    "2", "--trainer.accelerator", "cpu", "--trainer.log_every_n_steps", "5", ranks=2)
    output = "".join(process.communicate(timeout=120))
    if nonfinite == "stop":
        assert process.returncode == 1 and "train/loss is not finite since step 7, and" in output, output
    else:
        assert process.returncode == 0 and output.count("step 7 is left out, for its gradient's norm is nan") == 1
        assert scalars(folder)["train/skipped_steps"] == [(7, 1.0)]
        assert all(value.isfinite().all() for value in tensors(folder / "checkpoints/last.ckpt").values())


# Skip


@pytest.mark.parametrize("by, clip", [(math.nan, []), (math.inf, ["--trainer.gradient_clip_val", "0.1"])])
def test_exactly_the_bad_step_is_left_out(
    command: Callable, at: Callable, scalars: Callable, folder: Path, monkeypatch: pytest.MonkeyPatch, by, clip
) -> None:
    """Weights, average and moments are those of a run whose optimiser is not asked then; the schedule goes on."""
    at("on_train_batch_start", poisoned(7, by=by))
    with pytest.warns(UserWarning, match=r"step 7 is left out, for its gradient's norm is nan \(1 so far\)"):
        assert command("fit", *SKIP, *clip).code == 0
    at("on_train_batch_start", lambda *_: None)
    step, asked = torch.optim.AdamW.step, []

    def all_but_the_seventh(optimizer: torch.optim.AdamW, closure: Callable):
        asked.append(optimizer)
        return closure() if len(asked) == 7 else step(optimizer, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", all_but_the_seventh)
    assert command("fit", *SKIP, *clip, "--runs", "reference").code == 0
    assert len(asked) == 18
    other = folder.parents[2] / "reference/supervised/run"
    ours, theirs = tensors(folder / "checkpoints/last.ckpt"), tensors(other / "checkpoints/last.ckpt")
    assert ours.keys() == theirs.keys() and all(torch.equal(value, theirs[key]) for key, value in ours.items())
    assert all(value == 17 for key, value in ours.items() if key.endswith(".step"))
    found, expected = scalars(folder), scalars(other)
    assert found["train/lr"] == expected["train/lr"] and len(found["train/lr"]) == 18
    losses = [step for step, value in found["train/loss"] if not math.isfinite(value)]
    assert losses == [7] and found["train/loss"][7:] == expected["train/loss"][7:]
    assert found["train/skipped_steps"] == [(7, 1.0)] and "train/skipped_steps" not in expected


def test_an_infinite_gradient_of_a_sound_loss_is_left_out_too(
    command: Callable, at: Callable, scalars: Callable, folder: Path
) -> None:
    def spoil(module: Classification) -> None:
        if module.trainer.global_step == 6:
            module.net.head.bias.grad[0] = math.inf

    at("on_after_backward", spoil)
    assert command("fit", *SKIP).code == 0
    assert scalars(folder)["train/skipped_steps"] == [(7, 1.0)]
    assert all(math.isfinite(value) for _, value in scalars(folder)["train/loss"])


def test_the_count_goes_on_after_a_resume_and_is_no_part_of_the_config(
    command: Callable, at: Callable, scalars: Callable, folder: Path
) -> None:
    spoil = poisoned(3, 12, 13)

    def spoil_and_stop(module: Classification, batch: dict, i: int) -> None:
        spoil(module, batch, i)
        if module.trainer.global_step == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    at("on_train_batch_start", spoil_and_stop)
    assert command("fit", *SKIP).code == 75
    at("on_train_batch_start", spoil)
    assert command("fit", *SKIP).code == 0
    assert scalars(folder)["train/skipped_steps"] == [(3, 1.0), (12, 2.0), (13, 3.0)]
    assert [step for step, _ in scalars(folder)["train/loss"]] == list(range(1, 19))
    assert "finished: " in command("fit", *RUN).out  # though --nonfinite is not what it was


def test_without_a_bad_step_the_two_ways_are_one(command: Callable, folder: Path) -> None:
    assert command("fit", *SKIP).code == command("fit", *RUN, "--runs", "stop").code == 0
    ours = tensors(folder / "checkpoints/last.ckpt")
    theirs = tensors(folder.parents[2] / "stop/supervised/run/checkpoints/last.ckpt")
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


@pytest.mark.parametrize("bad, stops_at", [
    (range(2, 12), 11), (range(5, 40), 14), ([*range(1, 10), *range(11, 20)], 0),
])  # fmt: skip
def test_ten_in_a_row_are_no_accident(command: Callable, at: Callable, scalars: Callable, folder: Path, bad, stops_at):
    at("on_train_batch_start", poisoned(*bad))
    outcome = command("fit", *SKIP, "--trainer.max_epochs", 3)
    assert outcome.code == bool(stops_at)
    assert len(scalars(folder)["train/skipped_steps"]) == (10 if stops_at else 18)
    if stops_at:
        assert f"the gradients of 10 steps in a row, up to step {stops_at}, were not finite" in outcome.err
        assert read(folder / "checkpoints/last.ckpt")["global_step"] == 9
        assert all(value.isfinite().all() for value in tensors(folder / "checkpoints/last.ckpt").values())


def test_results_of_a_run_that_ends_with_a_bad_step_are_json(command: Callable, at: Callable, folder: Path) -> None:
    """NaN and Infinity are not, and strict readers refuse the file."""
    at("on_train_batch_start", poisoned(18))
    assert command("fit", *SKIP).code == 0

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    assert json.loads((folder / "results.json").read_text(), parse_constant=refuse)["status"] == "finished"


def test_another_way_is_refused(command: Callable, tmp_path: Path) -> None:
    outcome = command("fit", *RUN, "--nonfinite", "ignore")
    assert outcome.code == 2 and "nonfinite: ignore is none of stop, skip" in outcome.err
    assert not (tmp_path / "runs").exists()
