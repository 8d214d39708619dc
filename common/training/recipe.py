"""The effective recipe: what a config amounts to on these devices, printed once and stored with the results."""

from __future__ import annotations

from typing import Any

import lightning as L
from rich.console import Console
from rich.table import Table

from common.data.loader import GlobalBatchData
from common.training.kernels import attention_kernels
from common.training.module import Experiment
from common.training.optim import parameter_groups

H200_FLOPS = 790e12  # sustained bf16 matrix products, the ceiling of the estimate


def effective_recipe(trainer: L.Trainer, module: Experiment, data: GlobalBatchData) -> dict[str, Any]:
    """Flat, in the order of reading: data, batch, schedule, parameter groups, model, cost."""
    lr = module.optim.peak_lr(data.global_batch)
    steps = data.steps_per_epoch * trainer.max_epochs
    groups = parameter_groups(module.net, module.optim, lr)
    cost = module.cost(module.net)
    images = steps * data.global_batch
    return {
        "dataset": data.dataset,
        "training images": len(data.sets["train"]),
        "image": "x".join(map(str, (*data.image_size, data.channels))),
        "global batch": data.global_batch,
        "devices": trainer.world_size,
        "micro-batch per device": data.micro_batch,
        "micro-batches per step": trainer.accumulate_grad_batches,
        "steps per epoch": data.steps_per_epoch,
        "epochs": trainer.max_epochs,
        "steps": steps,
        "learning rate": lr,
        "precision": str(trainer.precision),
        **{f"parameters, {decay}": _count(groups, decay) for decay in ("decay", "no decay")},
        "tokens": cost.tokens,
        "parameters": cost.parameters,
        "forward GFLOP per image": round(cost.forward_flops / 1e9, 4),
        "activation MB per image": round(cost.activation_bytes / 1e6, 2),
        **({"blocks that recompute": module.recomputed} if module.recomputed else {}),
        **_attention(trainer, module, cost.tokens),
        **module.notes(module.net),
        "H200 hours at 790 TFLOP/s": float(f"{cost.training_flops * images / H200_FLOPS / 3600:.3g}"),
    }


def _attention(trainer: L.Trainer, module: Experiment, tokens: int) -> dict[str, str]:
    prefix = getattr(module.backbone(module.net), "num_prefix_tokens", 0)
    kernels = attention_kernels(module.net, prefix + tokens, module.masked, trainer.strategy.root_device,
                                trainer.precision_plugin.forward_context(), module.compiled)
    return {"attention kernel": kernels} if kernels else {}


def _count(groups: list[dict], decay: str) -> str:
    tensors = [p for g in groups if g["name"].split(",")[0] == decay for p in g["params"]]
    return f"{sum(p.numel() for p in tensors):,} in {len(tensors)} tensors"


def print_recipe(recipe: dict[str, Any]) -> None:
    table = Table("effective recipe", "", show_header=True, box=None, padding=(0, 2, 0, 0))
    for name, value in recipe.items():
        form = {int: "{:,}", float: "{:g}"}.get(type(value), "{}")
        table.add_row(name, form.format(value))
    Console().print(table)
