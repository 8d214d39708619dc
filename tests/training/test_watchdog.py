"""A run that hangs says where, on every rank, and ends; the same command goes on."""

import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from forked import ROOT, Command
from processes import until

from common.training import watchdog
from common.training.checkpoints import read
from diffusion.sampling import Sampler
from supervised import Classification

# A user's own classes, in a module of the working directory: they wait for ever, the first time that they come there.
MODULE = """
import time
from pathlib import Path

import lightning as L

import common.data


def wait_for_ever():
    while True:
        time.sleep(0.05)


def first_time(name):
    try:
        Path(name).mkdir()
    except FileExistsError:
        return False
    return True


class Waiting(L.Callback):
    def __init__(self, rank: int = 0, step: int = 12):
        self.rank, self.step = rank, step

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_rank == self.rank and trainer.global_step == self.step and first_time("hung"):
            if trainer.world_size > 1:  # this rank's watch runs ahead of the other's
                next(c for c in trainer.callbacks if type(c).__name__ == "Watchdog")._last -= 0.9
            wait_for_ever()


class WaitingValidation(L.Callback):
    def on_validation_batch_start(self, trainer, *_):
        if trainer.current_epoch == 1 and first_time("hung"):
            wait_for_ever()


class WaitingDigits(common.data.ImageData):
    def load(self, split):
        images = super().load(split)
        fetch = type(images).__getitems__

        def fetched(self, draws):
            if draws[0].epoch == 1 and first_time("hung"):
                wait_for_ever()
            return fetch(self, draws)

        images.__class__ = type("Waiting", (type(images),), {"__getitems__": fetched})
        return images
"""
RUN = ["--run_name", "run", "--trainer.max_epochs", "3", "--checkpoint.every_n_steps", "4"]
WAITS_FOR_A_RANK = "distributed_c10d.py|in backward|in _agreed|in barrier"
TWO = ["--trainer.devices", "2", "--trainer.accelerator", "cpu"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "waiting.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "waiting", raising=False)
    return tmp_path / "runs" / "supervised" / "run"


def assert_ended(process: Command, folder: Path, seconds: str, step: int, saved: int) -> str:
    """By itself, with a line and the code of a killed process; the stacks of the first rank."""
    output = "".join(process.communicate(timeout=120))
    assert process.returncode == 134, output
    where = "runs/supervised/run/stacks/rank-0.txt"
    assert f"failed: rank 0 has had no batch for {seconds} s at step {step}, stacks -> {where}; " in output
    assert "the last checkpoint is kept, and the same command goes on (--hang_timeout gives it longer)" in output
    assert not list(folder.rglob("*.tmp"))
    assert read(folder / "checkpoints/last.ckpt")["global_step"] == saved
    return (folder / "stacks/rank-0.txt").read_text()


def assert_goes_on(outcome, folder: Path) -> None:
    assert outcome.code == 0, outcome
    results = json.loads((folder / "results.json").read_text())
    assert results["status"] == "finished" and results["step"] == 27


def test_a_step_that_hangs(command: Callable, start: Callable, folder: Path) -> None:
    options = [*RUN, "--trainer.callbacks+=waiting.Waiting", "--hang_timeout", "2.5"]
    stack = assert_ended(start("fit", *options), folder, "2.5", 12, 12)
    assert 'waiting.py", line' in stack and "in wait_for_ever" in stack and "in on_train_batch_start" in stack
    assert_goes_on(command("fit", *options), folder)


def test_a_rank_that_hangs_and_one_that_waits_for_it(command: Callable, start: Callable, folder: Path) -> None:
    """Each writes its own, so that it shows which of them is at fault."""
    options = [*RUN, "--trainer.callbacks+=waiting.Waiting", "--trainer.callbacks.rank", "1", "--hang_timeout", "4"]
    process = start("fit", *options, *TWO, ranks=2)
    waits = assert_ended(process, folder, "4", 12, 12)
    assert "in wait_for_ever" not in waits and re.search(WAITS_FOR_A_RANK, waits)
    assert "in wait_for_ever" in (folder / "stacks/rank-1.txt").read_text()
    assert_goes_on(command("fit", *options), folder)


@pytest.mark.soak
@pytest.mark.parametrize("workers", ["0", "1"])
def test_data_that_hang(command: Callable, start: Callable, folder: Path, workers) -> None:
    """In the training's own process, or in one of its loaders: then it shows what the training waits for."""
    options = [*RUN, "--data", "waiting.WaitingDigits", "--data.source", "common.data.Digits", "--data.image_size", "8",
               "--data.batch_size", "128", "--data.workers", workers, "--hang_timeout", "3"]  # fmt: skip
    stack = assert_ended(start("fit", *options), folder, "3", 9, 9)
    assert ("in wait_for_ever" in stack) == (workers == "0") and "dataloader.py" in stack
    assert_goes_on(command("fit", *options), folder)


@pytest.mark.soak
def test_a_validation_that_hangs(command: Callable, start: Callable, folder: Path) -> None:
    options = [*RUN, "--trainer.callbacks+=waiting.WaitingValidation", "--hang_timeout", "2.5"]
    stack = assert_ended(start("fit", *options), folder, "2.5", 18, 16)
    assert "in wait_for_ever" in stack and "in on_validation_batch_start" in stack
    assert_goes_on(command("fit", *options), folder)


@pytest.mark.soak
def test_a_rank_that_the_system_has_stopped(command: Callable, start: Callable, folder: Path) -> None:
    """The other one ends, with its stack; the stopped one can say nothing."""
    process = start("fit", *RUN, "--trainer.max_epochs", "400", *TWO, "--hang_timeout", "4", ranks=2)
    until(process, (folder / "checkpoints/previous.ckpt").exists)
    os.kill(process.pids[1], signal.SIGSTOP)
    until(process, lambda: process.codes[0] is not None)
    assert process.codes == [134, None]
    assert re.search(WAITS_FOR_A_RANK, (folder / "stacks/rank-0.txt").read_text())
    os.kill(process.pids[1], signal.SIGCONT)
    process.wait(timeout=60)  # which ends without the first


# No false alarm, nothing left


def watching() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "watchdog"]


@pytest.fixture
def alarms(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Exit codes with which this process would have ended."""
    codes: list[int] = []
    monkeypatch.setattr(watchdog.os, "_exit", codes.append)
    return codes


@pytest.mark.parametrize("options, code", [([], 0), (["--model.optim.lr", "1e30"], 1), (["--data.batch_size", "1006",
                                           "--data.batch_per_device", "33"], 2)])  # fmt: skip
def test_no_thread_is_left(command: Callable, at: Callable, alarms: list, options, code) -> None:
    during = []
    at("on_train_batch_start", lambda *_: during.append(len(watching())))
    assert command("fit", "--run_name", "run", *options).code == code
    assert code == 2 or set(during) == {1}
    for thread in watching():
        thread.join(timeout=10)
    assert not watching() and not alarms


def test_no_thread_is_left_after_a_signal_or_an_evaluation(command: Callable, at: Callable, alarms: list) -> None:
    at("on_train_batch_start", lambda m, *_: m.trainer.global_step == 4 and os.kill(os.getpid(), signal.SIGTERM))
    assert command("fit", "--run_name", "run").code == 75
    assert command("test", "--run_name", "run").code == 0
    for thread in watching():
        thread.join(timeout=10)
    assert not watching()


def test_zero_watches_not(command: Callable, at: Callable, alarms: list) -> None:
    seen = []
    at("on_train_batch_start", lambda *_: seen.extend(watching()))
    assert command("fit", "--run_name", "run", "--hang_timeout", "0").code == 0
    assert not seen and not alarms


@pytest.mark.parametrize("seconds", ["-1", "-0.5", "nan", "soon"])
def test_what_is_no_time_is_refused(command: Callable, tmp_path: Path, alarms: list, seconds) -> None:
    outcome = command("fit", "--run_name", "run", "--hang_timeout", seconds)
    assert outcome.code == 2 and f"hang_timeout: {seconds}" in outcome.err.splitlines()[-1]
    assert not (tmp_path / "runs").exists() and not alarms


@pytest.fixture
def takes(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets so many seconds pass on the watch's clock, which stands still otherwise, and it look at that.

    Whatever else the machine is busy with (a disk that syncs for a second) is none of these tests' time.
    """
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic=lambda: clock.now, sleep=time.sleep))

    def take(seconds: float) -> None:
        clock.now += seconds
        time.sleep(0.15)  # three looks of --hang_timeout 0.2

    return take


@pytest.mark.parametrize("slow", ["on_train_batch_start", "on_validation_batch_start", "on_save_checkpoint"])
def test_what_is_slow_does_not_hang(command: Callable, at: Callable, takes: Callable, alarms: list, slow) -> None:
    """Nine batches, of which each takes three quarters of the time: more in all than one may."""
    before, slowly = getattr(Classification, slow), []

    def wait(*arguments: object) -> None:
        takes(0.15)
        slowly.append(slow)
        before(*arguments)

    at(slow, wait)
    options = ["--data.eval_batch_size", "33"] if slow == "on_validation_batch_start" else []
    rhythm = ["--checkpoint.every_n_steps", "1"] if slow == "on_save_checkpoint" else []
    outcome = command("fit", "--run_name", "run", "--hang_timeout", "0.2", "--trainer.max_epochs", "1",
                      "--model.optim.warmup_epochs", "0", *options, *rhythm)
    assert outcome.code == 0 and len(slowly) >= 9 and not alarms


def test_a_batch_of_samples_may_take_longer_than_a_batch(
    command: Callable, takes: Callable, alarms: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve steps of a solver, of which each takes three quarters of the time."""
    predicted, slowly = Sampler.predicted, []

    def slow(*arguments: object) -> object:
        takes(0.15)
        slowly.append("step")
        return predicted(*arguments)

    options = ["--run_name", "run", "--data.autoencoder", "null", "--data.image_size", "8", "--model.picture_epochs",
               "0", "--trainer.max_epochs", "1", "--model.predict.solver", "ddim", "--model.predict.steps", "12",
               "--model.predict.samples", "3"]  # fmt: skip
    generation = {"config": ROOT / "diffusion/configs/digits.yaml", "study": "diffusion"}
    assert command("fit", *options, **generation).code == 0
    monkeypatch.setattr(Sampler, "predicted", slow)
    outcome = command("predict", *options, "--hang_timeout", "0.2", **generation)
    assert outcome.code == 0 and "3 samples" in outcome.out and len(slowly) == 12 and not alarms


def test_a_hang_is_noticed_in_this_process_too(command: Callable, at: Callable, alarms: list, tmp_path: Path) -> None:
    """So that the tests above could fail."""
    at("on_train_batch_start", lambda m, _, i: [time.sleep(0.01) for _ in range(500) if i == 3 and not alarms])
    assert command("fit", "--run_name", "run", "--hang_timeout", "0.8").code == 0
    assert alarms[0] == 134 and (tmp_path / "runs/supervised/run/stacks/rank-0.txt").exists()
