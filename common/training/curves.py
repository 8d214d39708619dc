"""The training curves: loss, learning rate, speed, at one step axis for every study."""

from __future__ import annotations

import math
import time
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from common.device import peak_flops
from common.parallel.reduction import mean_over_ranks, sum_over_ranks

STARVING = 0.3  # share of the time without data from which a warning is due


class Point(NamedTuple):
    """What is written of a step, while its values are on their way from the device.

    Args:
        step: optimiser steps done.
        steps: those since the clock was last set.
        made: when this was made.
        waited: seconds without a batch, of those since the clock was last set.
        lr: of the step.
        names: of the values.
        values: one each, on the CPU once they have arrived.
        arrived: a GPU's event to wait for; None where they are there.
    """

    step: int
    steps: int
    made: float
    waited: float
    lr: float
    names: list[str]
    values: Tensor
    arrived: torch.cuda.Event | None


class Curves(L.Callback):
    """Writes `train/loss`, `train/lr`, `train/grad_norm`, `train/images_per_second`, `train/data_wait` and `train/mfu`
    every `log_every_n_steps` steps.

    Scalars that a `training_step` returns beside its loss, as a dict, are curves too: {"loss": ..., "l1": ...} writes
    `train/l1`. The loss, like them, is that of the step's whole global batch: the mean over the micro-batches, or over
    those that returned it. Nothing is read from a GPU but these points, each when the next step has been launched, so
    that it has work meanwhile; or before a validation, a checkpoint or the next epoch. One whose next step fails is not
    written. The x axis counts optimiser steps done, in validation too, unless `Events` makes images of them.
    `train/mfu`, the share of the devices' peak that the model's own FLOPs reach, is left out where the peak is not
    known. `train/data_wait` is the share of the time in which there was no batch to train on; where it is large, that
    is said. `train/grad_norm` is the norm of all gradients before they are clipped.

    Args:
        refuse_nonfinite: stop where a loss or a gradient is not finite, and name the step.
    """

    def __init__(self, refuse_nonfinite: bool = True) -> None:
        self.refuse_nonfinite = refuse_nonfinite
        self.peak_flops: float | None = None  # of all devices together
        self._flops = 0  # of an image
        self.values: dict[str, float] = {}
        self.clock = time.perf_counter  # replaced in tests
        self._returned: dict[str, list[torch.Tensor]] = {}  # by the step's micro-batches so far
        self._losses: list[torch.Tensor] = []  # of the steps since the last point, to name the one that went wrong
        self._point: Point | None = None  # not yet written
        self._lr = 0.0
        self._grad_norm = torch.tensor(0.0)
        self._started = self._idle_since = 0.0
        self._steps, self._waited = 0, 0.0
        self._points = 0  # of this start
        self._starving = False  # and said so

    def _restart_clock(self, *_: Any) -> None:
        self._started = self._idle_since = self.clock()
        self._steps, self._waited = 0, 0.0

    def _batch_arrived(self) -> None:
        self._waited += self.clock() - self._idle_since

    # Validation, and what the end of an epoch writes, are not training time.
    on_validation_end = on_train_epoch_start = _restart_clock

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        device = trainer.strategy.root_device
        if device.type == "cuda" and (peak := peak_flops(torch.cuda.get_device_name(device))):
            self.peak_flops = peak * trainer.world_size
        if self.peak_flops:
            self._flops = module.cost(module.net).training_flops  # now, with gradients on; a validation has none
        trainer.datamodule.arrived = self._batch_arrived
        self._restart_clock()

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Optimizer) -> None:
        self._lr = max(group["lr"] for group in optimizer.param_groups)  # the schedule moves on before the batch ends
        if (trainer.global_step + 1) % trainer.log_every_n_steps == 0:
            self._grad_norm = grad_norm(module)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, out: Any, batch: Any, i: int) -> None:
        self._idle_since = self.clock()
        for name, value in out.items():
            self._returned.setdefault(name, []).append(value.detach())
        if (i + 1) % trainer.accumulate_grad_batches:
            return
        returned, self._returned = self._returned, {}
        self._steps += 1
        self._losses.append(sum(returned["loss"]))  # Lightning has divided it, and nothing beside it
        self.settle(trainer)  # a GPU is at this step by now
        if trainer.global_step % trainer.log_every_n_steps == 0:
            means = {name: sum(values) / len(values) for name, values in returned.items()} | {"loss": self._losses[-1]}
            means["grad_norm"] = self._grad_norm  # which all ranks have alike
            values, arrived = fetched(mean_over_ranks(torch.stack([mean.float() for mean in means.values()])))
            self._point = Point(
                trainer.global_step, self._steps, self.clock(), self._waited, self._lr, list(means), values, arrived
            )
            self._steps = 0
            if arrived is None:
                self.settle(trainer)

    def settle(self, trainer: L.Trainer, *_: Any) -> None:
        """Writes the point that is not yet written, if there is one. To be called by all ranks at the same step."""
        if self._point is None:
            return
        point, self._point = self._point, None
        ended = point.made
        if point.arrived is not None and not point.arrived.query():  # it is the GPU that the training waits for
            point.arrived.synchronize()
            ended = self.clock()
        scalars = dict(zip(point.names, point.values.tolist(), strict=True))
        if self.refuse_nonfinite and not (math.isfinite(scalars["loss"]) and math.isfinite(scalars["grad_norm"])):
            self._refuse(trainer, point.step, scalars)
        self._losses = self._losses[len(self._losses) - (trainer.global_step - point.step) :]
        seconds = max(ended - self._started, 1e-9)
        images_per_second, waited = point.steps * trainer.datamodule.global_batch / seconds, point.waited / seconds
        self.values = {
            **{f"train/{name}": value for name, value in scalars.items()},
            "train/lr": point.lr,
            "train/images_per_second": images_per_second,
            "train/data_wait": waited,
        }
        self._warn_of_starving(trainer, waited)
        if self.peak_flops:
            self.values["train/mfu"] = self._flops * images_per_second / self.peak_flops
        trainer.logger.log_metrics(self.values, step=point.step)
        self._started, self._idle_since = ended, self.clock()
        self._waited -= point.waited

    # Before validation sets the clock anew, and before an epoch's end tells the values.
    on_validation_start = on_train_epoch_end = settle

    def first_nonfinite(self, trainer: L.Trainer) -> int | None:
        """The first step since the last point whose loss was not finite, on any rank. To be asked by all of them."""
        if not self._losses:
            return None
        finite = torch.stack(self._losses).isfinite().float()
        sound = (sum_over_ranks(finite) == trainer.world_size).tolist()
        return None if all(sound) else trainer.global_step - len(sound) + 1 + sound.index(False)

    def _refuse(self, trainer: L.Trainer, step: int, scalars: dict[str, float]) -> None:
        first = self.first_nonfinite(trainer)
        what = f"train/loss is {scalars['loss']}, for the first time at step {first}" if first and first <= step else (
            f"train/grad_norm is {scalars['grad_norm']} at step {step}")
        raise FloatingPointError(f"{what}; the last checkpoint is kept. Try a lower model.optim.lr, a longer warm-up, "
                                 "model.qk_norm, trainer.gradient_clip_val, or --nonfinite skip")

    def _warn_of_starving(self, trainer: L.Trainer, share: float) -> None:
        self._points += 1
        if share > STARVING and self._points > 1 and not self._starving:  # the first has the start of the workers in it
            self._starving = True
            rank_zero_warn(f"training waits for its data for {share:.0%} of the time (train/data_wait); data.workers: "
                           f"{trainer.datamodule.workers}, more of them would help where there are cores")


def fetched(values: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """Values on the CPU, or on their way there and the event to wait for; the GPU goes on meanwhile."""
    if values.device.type != "cuda":
        return values, None
    there = values.to("cpu", non_blocking=True)  # PyTorch takes pinned memory for it
    arrived = torch.cuda.Event()
    arrived.record()
    return there, arrived


def grad_norm(module: L.LightningModule) -> torch.Tensor:
    """The Euclidean norm of all gradients of a module, (), without waiting for the device."""
    norm = nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
