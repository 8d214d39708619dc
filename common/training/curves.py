"""The training curves: loss, learning rate, speed, at one step axis for every study."""

from __future__ import annotations

import math
import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from common.device import peak_flops

STARVING = 0.3  # share of the time without data from which a warning is due


class Curves(L.Callback):
    """Writes `train/loss`, `train/lr`, `train/grad_norm`, `train/images_per_second`, `train/data_wait` and `train/mfu`
    every `log_every_n_steps` steps.

    Scalars that a `training_step` returns beside its loss, as a dict, are curves too: {"loss": ..., "l1": ...} writes
    `train/l1`. The loss, like them, is that of the step's whole global batch: the mean over the micro-batches, or over
    those that returned it. Between two points nothing is read from
    the device, so a step never waits for it. The x axis counts optimiser steps done, in validation too, unless `Events`
    makes images of them. `train/mfu`, the share of the devices' peak that the model's own FLOPs reach, is left out
    where the peak is not known. `train/data_wait` is the share of the time in which there was no batch to train on;
    where it is large, that is said. `train/grad_norm` is the norm of all gradients before they are clipped.

    Args:
        refuse_nonfinite: stop where a loss or a gradient is not finite, and name the step.
    """

    def __init__(self, refuse_nonfinite: bool = True) -> None:
        self.refuse_nonfinite = refuse_nonfinite
        self.peak_flops: float | None = None  # of all devices together
        self.values: dict[str, float] = {}
        self.clock = time.perf_counter  # replaced in tests
        self._returned: dict[str, list[torch.Tensor]] = {}  # by the step's micro-batches so far
        self._losses: list[torch.Tensor] = []  # of the steps since the last point, to name the one that went wrong
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
        if trainer.global_step % trainer.log_every_n_steps == 0:
            means = {name: sum(values) / len(values) for name, values in returned.items()} | {"loss": self._losses[-1]}
            reduced = trainer.strategy.reduce(torch.stack([mean.float() for mean in means.values()]), reduce_op="mean")
            self._write(trainer, module, dict(zip(means, reduced.tolist(), strict=True)))

    def _write(self, trainer: L.Trainer, module: L.LightningModule, scalars: dict[str, float]) -> None:
        step, norm = trainer.global_step, float(self._grad_norm)
        if self.refuse_nonfinite and not (math.isfinite(scalars["loss"]) and math.isfinite(norm)):
            self._refuse(trainer, scalars["loss"], norm)
        self._losses = []
        seconds = max(self.clock() - self._started, 1e-9)
        images_per_second = self._steps * trainer.datamodule.global_batch / seconds
        self.values = {
            **{f"train/{name}": value for name, value in scalars.items()},
            "train/lr": self._lr,
            "train/grad_norm": norm,
            "train/images_per_second": images_per_second,
            "train/data_wait": self._waited / seconds,
        }
        self._warn_of_starving(trainer, self._waited / seconds)
        if self.peak_flops:
            flops = module.cost(module.net).training_flops * images_per_second
            self.values["train/mfu"] = flops / self.peak_flops
        trainer.logger.log_metrics(self.values, step=step)
        self._restart_clock()

    def first_nonfinite(self, trainer: L.Trainer) -> int | None:
        """The first step since the last point whose loss was not finite, on any rank. To be asked by all of them."""
        if not self._losses:
            return None
        finite = torch.stack(self._losses).isfinite().float()
        sound = (trainer.strategy.reduce(finite, reduce_op="sum") == trainer.world_size).tolist()
        return None if all(sound) else trainer.global_step - len(sound) + 1 + sound.index(False)

    def _refuse(self, trainer: L.Trainer, loss: float, norm: float) -> None:
        first = self.first_nonfinite(trainer)
        what = f"train/loss is {loss}, for the first time at step {first}" if first else (
            f"train/grad_norm is {norm} at step {trainer.global_step}")
        raise FloatingPointError(f"{what}; the last checkpoint is kept. Try a lower model.optim.lr, a longer warm-up, "
                                 "model.qk_norm, trainer.gradient_clip_val, or --nonfinite skip")

    def _warn_of_starving(self, trainer: L.Trainer, share: float) -> None:
        self._points += 1
        if share > STARVING and self._points > 1 and not self._starving:  # the first has the start of the workers in it
            self._starving = True
            rank_zero_warn(f"training waits for its data for {share:.0%} of the time (train/data_wait); data.workers: "
                           f"{trainer.datamodule.workers}, more of them would help where there are cores")


def grad_norm(module: L.LightningModule) -> torch.Tensor:
    """The Euclidean norm of all gradients of a module, (), without waiting for the device."""
    norm = nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
