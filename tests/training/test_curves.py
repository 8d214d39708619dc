"""What the curves say is true: loss of the whole batch, images over training time, and nothing that is not finite."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
import torch.nn.functional as F

from common.data.loader import GlobalBatchData
from common.device import peak_flops
from common.training import curves as curves_module
from common.training.checkpoints import Checkpoints, read
from common.training.curves import Curves
from supervised import Classification


class Time(L.Callback):
    """A clock that runs half a second per batch, ten in validation and five when an epoch ends."""

    def __init__(self, curves: Curves) -> None:
        self.now = 100.0
        curves.clock = lambda: self.now

    def on_train_batch_start(self, trainer: L.Trainer, *_) -> None:
        self.now += 0.5

    def on_validation_start(self, trainer: L.Trainer, *_) -> None:
        self.now += 10

    def on_train_epoch_end(self, trainer: L.Trainer, *_) -> None:
        self.now += 5


class Gpu:
    """Values that are on the CPU once somebody has asked whether they are, or has waited for them.

    Attributes:
        behind: the CPU is ahead of it, and has to wait.
        wait: what happens then, by the point's number from 1.
    """

    def __init__(self) -> None:
        self.made = self.read = 0
        self.behind = False
        self.wait: Callable[[int], None] = lambda point: None

    def fetched(self, values: torch.Tensor) -> tuple[torch.Tensor, SimpleNamespace]:
        self.made += 1
        point, there = self.made, torch.full_like(values, 123.0)

        def arrive() -> bool:
            self.read += 1
            there.copy_(values)
            return True

        def wait() -> None:
            self.wait(point)
            arrive()

        return there, SimpleNamespace(query=lambda: not self.behind and arrive(), synchronize=wait)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    gpu = Gpu()
    monkeypatch.setattr(curves_module, "fetched", gpu.fetched)
    return gpu


@pytest.mark.parametrize("device", ["cpu", "gpu"])
@pytest.mark.parametrize("batch_per_device, seconds", [(8, 0.5), (2, 2.0)])
def test_images_per_second_counts_training_time_alone(
    train: Callable, scalars: Callable, request, device, batch_per_device, seconds
):  # fmt: skip
    if device == "gpu":  # that waits for the CPU
        request.getfixturevalue("gpu")
    curves = Curves()
    trainer = train(Time(curves), curves, epochs=3, batch_per_device=batch_per_device, log_every_n_steps=2)
    speeds = scalars(trainer.logger.log_dir)["train/images_per_second"]
    assert speeds == [(step, pytest.approx(8 / seconds)) for step in range(2, 15, 2)]


@pytest.mark.parametrize("rhythm", [1, 2])
def test_images_per_second_are_those_of_a_gpu_that_is_behind(train: Callable, scalars: Callable, gpu: Gpu, rhythm):
    """It takes half a second a step, where the CPU launches one in no time."""
    curves, done = Curves(), {"now": 100.0}
    curves.clock = lambda: done["now"]

    class Validated(L.Callback):
        """What it reads at its end, it has waited for."""

        def on_validation_end(self, trainer: L.Trainer, *_) -> None:
            done["now"] = 100 + 0.5 * trainer.global_step

    gpu.behind, gpu.wait = True, lambda point: done.update(now=100 + 0.5 * rhythm * point)
    trainer = train(Validated(), curves, log_every_n_steps=rhythm)
    written = scalars(trainer.logger.log_dir)
    assert written["train/images_per_second"] == [(step, pytest.approx(16)) for step in range(rhythm, 11, rhythm)]
    assert {share for _, share in written["train/data_wait"]} == {0.0}


class Losses(L.Callback):
    """The loss of each step's global batch, computed anew before it, and the learning rate of the step."""

    def __init__(self) -> None:
        self.expected: list[float] = []
        self.rates: list[float] = []
        self.step, self.parts = -1, []

    def on_train_batch_start(self, trainer: L.Trainer, module: Classification, batch: dict, _: int) -> None:
        with torch.no_grad():
            loss = F.cross_entropy(module.net(batch["image"]), batch["label"], reduction="none")
        self.parts = [*self.parts, *loss.tolist()] if trainer.global_step == self.step else loss.tolist()
        self.step = trainer.global_step

    def on_before_optimizer_step(self, trainer: L.Trainer, module: Classification, optimizer) -> None:
        self.expected.append(sum(self.parts) / len(self.parts))
        self.rates.append(optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("batch_per_device", [8, 4, 2])
def test_the_loss_is_that_of_the_global_batch(train: Callable, scalars: Callable, batch_per_device):
    losses = Losses()
    written = scalars(train(losses, Curves(), batch_per_device=batch_per_device).logger.log_dir)
    assert written["train/loss"] == [pytest.approx(point, abs=1e-6) for point in enumerate(losses.expected, start=1)]
    assert written["train/lr"] == [pytest.approx(point) for point in enumerate(losses.rates, start=1)]


class Read(L.Callback):
    """How many points were read when a step ended, and the step of the last one where a checkpoint is saved."""

    def __init__(self, gpu: Gpu, scalars: Callable) -> None:
        self.gpu, self.scalars = gpu, scalars
        self.at_ends: list[int] = []
        self.at_checkpoints: dict[int, int] = {}

    def on_train_batch_end(self, *_) -> None:
        self.at_ends.append(self.gpu.read)

    def on_save_checkpoint(self, trainer: L.Trainer, *_) -> None:
        self.at_checkpoints[trainer.global_step] = self.scalars(trainer.logger.log_dir)["train/loss"][-1][0]


@pytest.mark.parametrize("behind", [False, True])
def test_a_gpu_has_the_next_step_to_do_while_a_point_is_read(train: Callable, scalars: Callable, gpu: Gpu, behind):
    """Nothing is asked of it before; but no checkpoint goes without its point."""
    gpu.behind = behind
    losses, read_points = Losses(), Read(gpu, scalars)
    trainer = train(losses, Curves(), read_points, Checkpoints(every_n_steps=3))
    found = scalars(trainer.logger.log_dir)
    assert found["train/loss"] == [pytest.approx(point, abs=1e-6) for point in enumerate(losses.expected, start=1)]
    assert found["train/lr"] == [pytest.approx(point) for point in enumerate(losses.rates, start=1)]
    assert read_points.at_checkpoints == {step: step for step in (3, 5, 6, 9, 10)}
    assert read_points.at_ends == list(range(10))
    assert len(found["train/grad_norm"]) == 10 and min(norm for _, norm in found["train/grad_norm"]) > 0


@pytest.mark.parametrize("val_every", [1, 100])
def test_the_last_point_of_a_run_is_written(train: Callable, scalars: Callable, gpu: Gpu, val_every: int):
    """Whether or not a validation or a checkpoint comes after it, and before the epoch's end is told."""
    curves, told = Curves(), []

    class Told(L.Callback):
        def on_train_epoch_end(self, *_) -> None:
            told.append(curves.values["train/loss"])

    trainer = train(curves, Told(), check_val_every_n_epoch=val_every)
    points = scalars(trainer.logger.log_dir)["train/loss"]
    assert [step for step, _ in points] == list(range(1, 11))
    assert told == [pytest.approx(points[4][1]), pytest.approx(points[9][1])]


@pytest.mark.parametrize("log_every_n_steps", [1, 4, 50])
def test_a_diverged_run_on_a_gpu_names_the_same_step(train: Callable, gpu: Gpu, log_every_n_steps):
    with pytest.raises(FloatingPointError, match="train/loss is nan, .* at step 8;|since step 8, "):
        train(Poison(7), Curves(), Checkpoints(every_n_steps=3), log_every_n_steps=log_every_n_steps)


def test_the_step_after_a_point_is_named_by_the_next_one(train: Callable, gpu: Gpu):
    """It has gone wrong before the point was read."""
    with pytest.raises(FloatingPointError, match="train/loss is nan, for the first time at step 5;"):
        train(Poison(4), Curves(), epochs=1, images=100, log_every_n_steps=4)


def test_a_norm_is_refused_though_the_next_loss_is_no_number_either(train: Callable, gpu: Gpu):
    class Exploded(L.Callback):
        """An infinite gradient in step 4, whose loss is finite; the weights after it are not."""

        def on_before_optimizer_step(self, trainer: L.Trainer, module: Classification, _) -> None:
            if trainer.global_step == 3:
                module.net.head.bias.grad[0] = torch.inf

    with pytest.raises(FloatingPointError, match="train/grad_norm is inf at step 4;"):
        train(Exploded(), Curves(), log_every_n_steps=4)


def test_validation_has_the_same_axis(train: Callable, scalars: Callable):
    written = scalars(train(Curves(), log_every_n_steps=5).logger.log_dir)
    assert [step for step, _ in written["val/loss"]] == [step for step, _ in written["train/loss"]] == [5, 10]


def test_mfu_is_the_share_of_the_peak(train: Callable):
    curves = Curves()
    curves.peak_flops = 1e6
    module = train(Time(curves), curves).lightning_module
    forward = module.cost(module.net).forward_flops
    assert curves.values["train/mfu"] == pytest.approx(3 * forward * 8 / 0.5 / 1e6)


@pytest.mark.parametrize("seconds, warned", [(0.1, False), (0.5, True)])
def test_waiting_for_data_is_measured_and_said_once(train: Callable, scalars: Callable, monkeypatch, seconds, warned):
    """Half a second of work a step, and before it the time that the loader takes."""
    curves, fetch = Curves(), GlobalBatchData.train_dataloader
    clock = Time(curves)

    def slow(data: GlobalBatchData):
        loader = fetch(data)
        collate = loader.collate_fn

        def wait(batch):
            clock.now += seconds
            return collate(batch)

        loader.collate_fn = wait
        return loader

    monkeypatch.setattr(GlobalBatchData, "train_dataloader", slow)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = train(clock, curves, epochs=2, log_every_n_steps=1)
    shares = scalars(trainer.logger.log_dir)["train/data_wait"]
    assert shares == [(step, pytest.approx(seconds / (seconds + 0.5))) for step in range(1, 11)]
    said = [str(warning.message) for warning in caught if "training waits for its data" in str(warning.message)]
    assert len(said) == warned
    assert all("for 50% of the time (train/data_wait); data.workers: 0" in line for line in said)


def test_losses_are_kept_from_one_point_to_the_next_alone(train: Callable):
    """A long run would gather millions of them."""
    curves = Curves()
    train(curves, epochs=3, log_every_n_steps=4)  # 15 steps
    assert len(curves._losses) == 3


@pytest.mark.parametrize("clip", [[], ["--trainer.gradient_clip_val", "0.01"]])
def test_the_gradients_norm_is_that_before_clipping(command: Callable, at: Callable, scalars: Callable, tmp_path, clip):
    """Of the step's whole batch, which comes in four micro-batches."""
    before, after = [], []

    def norm(module: Classification) -> float:
        return sum(p.grad.double().square().sum().item() for p in module.parameters() if p.grad is not None) ** 0.5

    at("on_before_optimizer_step", lambda module, optimizer: before.append(norm(module)))
    at("on_before_zero_grad", lambda module, optimizer: after.append(norm(module)))
    options = ["--data.batch_per_device", "32", "--trainer.log_every_n_steps", "2", *clip]
    assert command("fit", "--run_name", "run", *options).code == 0
    found = scalars(tmp_path / "runs/supervised/run")["train/grad_norm"]
    assert found == [(step, pytest.approx(before[step - 1], rel=1e-5)) for step in range(2, 19, 2)]
    assert min(before) > 0.01 and (max(after) < 0.0101) == bool(clip)


class Poison(L.Callback):
    """Makes a weight not a number after a given step, as a diverged optimiser does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, module: Classification, *_) -> None:
        if trainer.global_step == self.step:
            module.net.head.bias.data[0] = torch.nan


@pytest.mark.parametrize("log_every_n_steps, step", [(1, 8), (50, 9)])
def test_a_diverged_run_stops_and_what_was_saved_is_sound(train: Callable, tmp_path: Path, log_every_n_steps, step):
    """Also where the epoch, or the whole run, ends before the next point of the curves."""
    with pytest.raises(FloatingPointError, match=f"at step {step};"):
        train(Poison(7), Curves(), Checkpoints(every_n_steps=3), log_every_n_steps=log_every_n_steps)
    saved = read(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert saved["global_step"] == 6
    assert all(value.isfinite().all() for value in saved["state_dict"].values())


def test_a_diverged_command_leaves_with_1_and_says_where(command: Callable, tmp_path: Path):
    outcome = command("fit", "--run_name", "wild", "--model.optim.lr", "1e30", "--trainer.log_every_n_steps", "1")
    assert outcome.code == 1
    assert outcome.err.splitlines()[-1].startswith("failed: FloatingPointError: train/loss is ")
    assert "at step " in outcome.err and "Traceback" not in outcome.err
    results = json.loads((tmp_path / "runs/supervised/wild/results.json").read_text())
    assert results["status"] == "failed" and results["error"].startswith("FloatingPointError")


@pytest.mark.parametrize("name, peak", [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12),
                                        ("NVIDIA H100 NVL", 835e12), ("NVIDIA H200", 989e12),
                                        ("NVIDIA A100-SXM4-80GB", 312e12), ("Tesla T4", None)])
def test_peaks_are_those_of_the_makers_data_sheets(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak
