"""A run killed at any moment and started again ends with the weights of an undisturbed run, bit for bit."""

import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from forked import Command
from processes import assert_identical, leftovers, tensors, until, written

from common.training.checkpoints import read

# Everything that has a state or draws random numbers: EMA, drop path, augmentation, mixup, masks, micro-batches, noise,
# label dropout, a discriminator (from step 1 on, felt from step 3 on) with batch norm, counts of a codebook.
COMMANDS = {
    "supervised/configs/digits.yaml": [
        "--trainer.max_epochs", "3", "--model.drop_path", "0.2", "--model.mixup", "0.8", "--model.cutmix", "1.0",
        "--data.augment.flip", "0.5",
    ],
    "mae/configs/digits.yaml": [
        "--trainer.max_epochs", "3", "--trainer.check_val_every_n_epoch", "2", "--model.picture_epochs", "0",
        "--data.augment.crop_scale", "[0.3,1.0]", "--data.augment.flip", "0.5",
    ],
    "diffusion/configs/autoencoder_digits.yaml": [
        "--trainer.max_epochs", "2", "--trainer.limit_train_batches", "12", "--model.picture_epochs", "0",
        "--model.adversary.start", "3", "--model.adversary.warmup", "2", "--data.augment.flip", "0.5",
    ],
    "diffusion/configs/digits.yaml": [
        "--trainer.max_epochs", "6", "--model.patch_size", "2", "--model.picture_epochs", "0",
        "--data.autoencoder", "null", "--data.image_size", "8", "--data.augment.interpolation", "bilinear",
        "--data.augment.flip", "0.5",
    ],
}  # fmt: skip
SUPERVISED, MAE, AUTOENCODER, GENERATION = COMMANDS
COMMON = ["--run_name", "run", "--model.optim.ema", "0.9", "--model.optim.warmup_epochs", "1",
          "--data.batch_per_device", "32", "--checkpoint.every_n_steps", "2"]  # fmt: skip


def start(runs: Path, *more: str, config: str = SUPERVISED, ranks: int = 1) -> Command:
    options = ["--config", config, "--runs", runs, *COMMON, *COMMANDS[config], *more]
    return Command(config.split("/")[0], "fit", *options, ranks=ranks)


def checkpoints_of(runs: Path, config: str) -> Path:
    return runs / config.split("/")[0] / "run" / "checkpoints"


def finish(runs: Path, *more: str, config: str = SUPERVISED, ranks: int = 1) -> Path:
    process = start(runs, *more, config=config, ranks=ranks)
    assert process.wait() == 0, process.stderr
    return checkpoints_of(runs, config)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finish(tmp_path_factory.mktemp("undisturbed"))


def kill_and_finish(runs: Path, seed: int, kills: int, workers: int, config: str = SUPERVISED) -> Path:
    """Kills at random moments after the training has begun; every other time as soon as it writes a checkpoint."""
    draw = random.Random(seed)
    folder = checkpoints_of(runs, config)
    for kill in range(kills):
        watched = [folder / "last.ckpt", *[folder / "last.ckpt.tmp"] * (kill % 2)]
        before = max(map(written, watched))
        process = start(runs, "--data.workers", str(workers), config=config)
        deadline = time.monotonic() + 120
        while process.poll() is None and max(map(written, watched)) <= before and time.monotonic() < deadline:
            time.sleep(0.0005)
        if not kill % 2:
            time.sleep(draw.uniform(0, 1.0))
        process.kill()
    return finish(runs, "--data.workers", str(workers), config=config)


@pytest.mark.parametrize("seed, kills, workers", [(0, 2, 0), (1, 1, 2)])
def test_killed_runs_end_bit_identical(undisturbed: Path, tmp_path: Path, seed: int, kills: int, workers: int) -> None:
    checkpoints = kill_and_finish(tmp_path, seed, kills, workers)
    assert_identical(undisturbed, checkpoints)
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("config, kills", [(MAE, 1), (AUTOENCODER, 2), (GENERATION, 1)])
def test_the_other_studies_end_bit_identical_too(tmp_path: Path, config: str, kills: int) -> None:
    whole = finish(tmp_path / "whole", config=config)
    killed = kill_and_finish(tmp_path / "killed", 1, kills, 0, config=config)
    assert_identical(whole, killed)
    starts = list(killed.parent.glob("events.out.tfevents.*"))
    assert len(starts) == kills + 1  # it was not over when it was killed
    counts = tensors(killed / "previous.ckpt").get("code_counts")
    assert (counts is not None and counts.sum() > 0) == (config == AUTOENCODER)  # of the epoch so far


def test_a_killed_loader_process_ends_the_run_and_costs_no_step(
    command: Callable, at: Callable, scalars: Callable, tmp_path: Path
) -> None:
    """As the system does where memory is short."""
    options = [*COMMON, "--trainer.max_epochs", "3", "--trainer.log_every_n_steps", "1"]
    killed = []

    def kill(module, *_: object) -> None:
        if module.trainer.global_step == 13 and not killed:
            killed.append(multiprocessing.active_children()[0])
            killed[0].kill()
            killed[0].join()  # while it dies, its pipe may break before torch can tell that it is dead

    at("on_train_batch_start", kill)
    outcome = command("fit", *options, "--data.workers", "2")
    assert outcome.code == 1
    assert f"DataLoader worker (pid {killed[0].pid}) is killed by signal: Killed" in outcome.err.splitlines()[-1] or (
        f"DataLoader worker (pid(s) {killed[0].pid}) exited unexpectedly" in outcome.err.splitlines()[-1]), outcome
    assert not [process for process in multiprocessing.active_children() if process.daemon]  # the other loader
    folder = tmp_path / "runs/supervised/run"
    results = json.loads((folder / "results.json").read_text())
    assert results["status"] == "failed" and "DataLoader worker" in results["error"]
    assert 12 <= read(folder / "checkpoints/last.ckpt")["global_step"] <= 26 and not leftovers(folder)

    assert command("fit", *options, "--data.workers", "1").code == 0
    assert command("fit", *options, "--runs", "whole").code == 0
    assert_identical(tmp_path / "whole/supervised/run/checkpoints", folder / "checkpoints")
    assert [step for step, _ in scalars(folder)["train/loss"]] == list(range(1, 28))


@pytest.mark.soak
@pytest.mark.parametrize("seed, workers", [(2, 0), (3, 2)])
def test_ten_kills(undisturbed: Path, tmp_path: Path, seed: int, workers: int) -> None:
    assert_identical(undisturbed, kill_and_finish(tmp_path, seed, 5, workers))


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_twenty_kills_of_two_processes(tmp_path: Path, scalars: Callable) -> None:
    """kill -9 of the first rank, of the second, or of both: what is left ends by itself."""
    options = ["--model.patch_size", "2", "--trainer.devices", "2", "--trainer.accelerator", "cpu",
               "--trainer.max_epochs", "50", "--trainer.log_every_n_steps", "1"]  # fmt: skip
    whole = finish(tmp_path / "whole", *options, ranks=2)
    draw, runs = random.Random(4), tmp_path / "killed"
    last = checkpoints_of(runs, SUPERVISED) / "last.ckpt"
    for kill in range(20):
        watched = [last, *[last.with_name("last.ckpt.tmp")] * (kill % 2)]  # in the middle of writing, every other time
        before = max(map(written, watched))
        process = start(runs, *options, ranks=2)
        until(process, lambda watched=watched, before=before: max(map(written, watched)) > before)
        if not kill % 2:
            time.sleep(draw.uniform(0, 1.0))
        for pid in process.pids if kill % 3 == 2 else [process.pids[kill % 3]]:
            os.kill(pid, signal.SIGKILL)
        process.wait(timeout=60)
    assert_identical(whole, finish(runs, *options, ranks=2))
    folder = runs / "supervised" / "run"
    assert [step for step, _ in scalars(folder)["train/loss"]] == list(range(1, 451))
    assert len(list(folder.glob("events.*"))) == 21
    assert not [*folder.rglob("*.tmp"), *folder.glob("lock*")]
