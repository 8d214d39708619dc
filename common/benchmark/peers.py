"""The training step of our VisionTransformer against timm's of the same size, weights, batch and numerics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn

from common.benchmark.interleaving import raced
from common.benchmark.memory import kept_bytes
from common.device import has_bf16
from common.model import SIZES, VisionTransformer
from common.training.optim import Recipe, adamw

RECIPE = Recipe(lr=1e-4)
COLUMNS = ("model", "image", "precision", "batch", "ours ms", "timm ms", "ours images/s", "timm images/s",
           "times as fast (quartiles)", "ours MB kept", "timm MB kept")  # fmt: skip


class Case(NamedTuple):
    """A model, its images (side, channels), and the numerics of its step."""

    size: str
    depth: int
    patch_size: int
    side: int
    channels: int
    classes: int
    batch: int
    precision: Literal["fp32", "bf16"]


def cases(depth: int, batch: int | None = None) -> list[Case]:
    """Digits as in the demo, and CIFAR-10 on `depth` blocks, on pixels and on patches; in bf16 where the CPU has it.

    Args:
        batch: images in a step; by default the demo's 128, and 8 at CIFAR's size, where 1024 tokens each are work
            enough.
    """
    patches = (1, 2)
    digits = [Case("nano", SIZES["nano"].depth, patch, 8, 1, 10, batch or 128, "fp32") for patch in patches]
    cifar = [Case("tiny", depth, patch, 32, 3, 10, batch or 8, precision)
             for precision in ("fp32", *["bf16"] * has_bf16()) for patch in patches]
    return digits + cifar


def models(case: Case) -> dict[str, nn.Module]:
    """Our model and timm's, with the same weights."""
    torch.manual_seed(0)
    ours = VisionTransformer(case.side, case.patch_size, case.channels, case.classes, case.size, depth=case.depth)
    timm = TimmVisionTransformer(
        img_size=case.side, patch_size=case.patch_size, in_chans=case.channels, num_classes=case.classes,
        embed_dim=ours.width, depth=ours.depth, num_heads=ours.heads,
    )  # fmt: skip
    ours.load_state_dict(timm.state_dict())
    return {"ours": ours, "timm": timm}


def batch_of(case: Case) -> tuple[Tensor, Tensor]:
    """Random images (B, C, H, W) and labels (B,)."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(case.batch, case.channels, case.side, case.side, generator=generator)
    return images, torch.randint(case.classes, (case.batch,), generator=generator)


def training_step(net: nn.Module, images: Tensor, labels: Tensor, precision: str) -> Callable[[], float]:
    """A step of forward, backward and AdamW, as the suite takes it; each call returns its loss."""
    optimizer = adamw(net, RECIPE, RECIPE.lr)

    def step() -> float:
        optimizer.zero_grad()
        # Without the cache of casts, as Lightning's bf16-mixed does.
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16", cache_enabled=False):
            logits = net(images)
        loss = F.cross_entropy(logits.float(), labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def kept(net: nn.Module, images: Tensor, precision: str) -> int:
    """Bytes that a forward keeps for its backward."""
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16", cache_enabled=False):
        return kept_bytes(lambda: net(images), net.parameters())


def measure(case: Case, rounds: int) -> tuple[str, ...]:
    """A row of the table; single steps of the two models take turns."""
    nets = models(case)
    memory = [kept(net, batch_of(case)[0], case.precision) for net in nets.values()]
    steps = (training_step(net, *batch_of(case), case.precision) for net in nets.values())
    ours, timm, ratio = raced(*steps, rounds)
    return (
        f"{case.size}/{case.patch_size}, {case.depth} blocks", f"{case.side}x{case.side}x{case.channels}",
        case.precision, str(case.batch), f"{1e3 * ours:.1f}", f"{1e3 * timm:.1f}",
        f"{case.batch / ours:,.0f}", f"{case.batch / timm:,.0f}", f"{ratio:.3f}",
        *(f"{size / 1e6:.2f}" for size in memory),
    )  # fmt: skip
