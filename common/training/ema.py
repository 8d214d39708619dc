"""Exponential moving average of the weights, evaluated beside them and never swapped with them."""

from __future__ import annotations

import copy
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from common.training.compilation import compile_blocks


class EMA(L.Callback):
    """Keeps an average of the module's `net`, parameters and floating-point buffers, as `self.net`; in fp32 at least.

    The first update copies. The average is no part of the module, whose `state_dict` stays raw; a checkpoint holds it
    under the key `ema`. Evaluation uses it where there is one, and reports the raw weights beside it.

    Args:
        decay: of the average, per optimiser step.
        warmup: use min(decay, (1 + t) / (10 + t)) at update t.
    """

    def __init__(self, decay: float = 0.9999, warmup: bool = False) -> None:
        self.decay, self.warmup = decay, warmup
        self.net: nn.Module | None = None
        self.updates = 0
        self.last_step = 0
        # Both nets' numbers: looking for them in every step would cost a nano DiT 2 % of it.
        self._averaged: tuple[list[Tensor], list[Tensor]] | None = None

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.last_step = trainer.global_step
        self._averaged = None

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step == self.last_step:  # a micro-batch that did not step
            return
        self.last_step = trainer.global_step
        if self.net is None:
            self.net = _average_of(module, trainer)
        else:
            decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay
            dtype = _precision(trainer)
            self._averaged = self._averaged or (_floats(self.net), _floats(module.net))
            averages, values = self._averaged
            torch._foreach_lerp_(averages, [_whole(v).to(dtype) for v in values], 1 - decay)
        self.updates += 1

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if self.net is not None:
            checkpoint["ema"] = {"state_dict": self.net.state_dict(), "updates": self.updates}

    def on_load_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if "ema" in checkpoint:
            self.net = _average_of(module, trainer).to(trainer.strategy.root_device)
            self.net.load_state_dict(checkpoint["ema"]["state_dict"])
            self.updates = checkpoint["ema"]["updates"]


def _average_of(module: L.LightningModule, trainer: L.Trainer) -> nn.Module:
    net = _copy(module, trainer).to(_precision(trainer)).requires_grad_(False).eval()
    if module.compiled:  # a copy is not
        compile_blocks(net)
    return net


def _copy(module: L.LightningModule, trainer: L.Trainer) -> nn.Module:
    sharded = {name: value for name, value in module.net.state_dict().items() if isinstance(value, DTensor)}
    if not sharded:
        return copy.deepcopy(module.net)
    net = module.built(trainer.datamodule).to(trainer.strategy.root_device)  # a sharded net refuses to be copied
    net.load_state_dict({name: _whole(value) for name, value in module.net.state_dict().items()})
    return net


def _precision(trainer: L.Trainer) -> torch.dtype:
    return torch.float64 if trainer.precision == "64-true" else torch.float32


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _floats(net: nn.Module) -> list[torch.Tensor]:
    return [t for t in (*net.parameters(), *net.buffers()) if t.is_floating_point()]
