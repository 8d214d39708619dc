"""The optimiser recipe of all studies: AdamW, decay groups, layer-wise decay, warm-up and cosine per step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from common.errors import InputError


@dataclass
class Recipe:
    """How a study optimises. Durations are in epochs, and are counted in optimiser steps.

    Args:
        lr: absolute peak learning rate; give it or `base_lr`.
        base_lr: peak learning rate per 256 images of the global batch (lr = base_lr * batch / 256).
        weight_decay: of parameters with two or more dimensions; the position table and the class token are exempt.
        betas: AdamW's.
        warmup_epochs: linear from exactly 0.
        schedule: after the warm-up, half a cosine down to `min_lr`, or constant.
        min_lr: where the cosine ends.
        layer_decay: learning rates shrink by this factor per layer from the head down (BEiT, MAE); 1 is off.
        ema: decay of the moving average of the weights that is evaluated beside them; none is off.
        ema_warmup: let the average's decay rise with the steps: min(ema, (1 + t) / (10 + t)). A decay of 0.9999
            remembers 10,000 steps, more than a short run has.
    """

    lr: float | None = None
    base_lr: float | None = None
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    warmup_epochs: float = 0.0
    schedule: Literal["cosine", "constant"] = "cosine"
    min_lr: float = 0.0
    layer_decay: float = 1.0
    ema: float | None = None
    ema_warmup: bool = False

    def __post_init__(self) -> None:
        if (self.lr is None) == (self.base_lr is None):
            raise InputError(f"model.optim: give one of lr (absolute) and base_lr (per 256 images), "
                             f"got lr={self.lr} and base_lr={self.base_lr}")
        for name in ("lr", "base_lr", "min_lr", "weight_decay", "warmup_epochs"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise InputError(f"model.optim.{name}: {value} is not a finite number from 0 up")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"model.optim.betas: {list(self.betas)} are not both in [0, 1)")
        if self.ema is not None and not 0 <= self.ema < 1:
            raise InputError(f"model.optim.ema: {self.ema} is not in [0, 1); leave it out to turn the average off")
        if not 0 < self.layer_decay <= 1:
            raise InputError(f"model.optim.layer_decay: {self.layer_decay} is not in (0, 1]; 1 turns it off")

    def peak_lr(self, global_batch: int) -> float:
        return self.lr if self.lr is not None else self.base_lr * global_batch / 256

    def factor(self, global_batch: int, steps_per_epoch: int, epochs: int) -> Callable[[int], float]:
        """The learning rate over the peak, as a function of the optimiser steps done."""
        warmup, total = self.warmup_epochs * steps_per_epoch, epochs * steps_per_epoch
        if warmup > total:
            raise InputError(f"model.optim.warmup_epochs: {self.warmup_epochs} is longer than the run of {epochs} "
                             "epochs")
        peak = self.peak_lr(global_batch)
        if self.min_lr > peak:
            raise InputError(f"model.optim.min_lr: {self.min_lr} is above the peak learning rate {peak}")
        floor = self.min_lr / peak if peak else 0.0

        def factor(step: int) -> float:
            if step < warmup:
                return step / warmup
            if self.schedule == "constant":
                return 1.0
            progress = min((step - warmup) / max(total - warmup, 1), 1.0)
            return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))

        return factor


def parameter_groups(net: nn.Module, recipe: Recipe, lr: float) -> list[dict]:
    """Groups by (weight decay or none) and layer; each has its own `lr`, which a factor schedule then multiplies.

    No decay on parameters of one dimension (biases, norms) and on those that `net.no_weight_decay()` names.
    Layer-wise decay: scale = layer_decay ** (last layer - layer), with `net.layer_index(name)`.
    """
    exempt = net.no_weight_decay()
    layer_of = (lambda _: 0) if recipe.layer_decay == 1 else net.layer_index
    named = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    last = max(layer_of(name) for name, _ in named)
    groups: dict[tuple[int, bool], dict] = {}
    for name, parameter in named:
        decayed = parameter.ndim > 1 and name not in exempt
        layer = layer_of(name)
        group = groups.setdefault((layer, decayed), {
            "params": [],
            "name": f"{'decay' if decayed else 'no decay'}{f', layer {layer}' if last else ''}",
            "weight_decay": recipe.weight_decay if decayed else 0.0,
            "lr": lr * recipe.layer_decay ** (last - layer),
        })
        group["params"].append(parameter)
    return list(groups.values())


def adamw(net: nn.Module, recipe: Recipe, lr: float) -> Optimizer:
    fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in net.parameters())
    return AdamW(parameter_groups(net, recipe, lr), lr=lr, betas=tuple(recipe.betas), fused=fused)


def lr_schedule(optimizer: Optimizer, factor: Callable[[int], float]) -> dict:
    """Lightning's description of a schedule that steps with the optimiser."""
    return {"scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, factor), "interval": "step"}
