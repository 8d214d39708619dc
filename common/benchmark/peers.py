"""The training step of our VisionTransformer against timm's of the same size, weights, batch and numerics, but for ours
in bf16 against timm's in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn

from common.benchmark.device import CPU, FAST, autocast, peak_bytes, start_afresh
from common.benchmark.interleaving import raced
from common.benchmark.memory import kept_bytes
from common.device import has_bf16
from common.model import SIZES, VisionTransformer
from common.training.compilation import compile_blocks
from common.training.optim import Recipe, adamw

Precision = Literal["fp32", "bf16", "bf16, compiled"]
RECIPE = Recipe(lr=1e-4)
COLUMNS = ("model", "image", "precision", "batch", "ours ms", "timm ms", "ours images/s", "timm images/s",
           "times as fast (quartiles)", "ours MB", "timm MB")  # fmt: skip
MEMORY = {"cpu": "what the forward keeps for its backward", "cuda": "what a step takes at most beside the weights and "
          "moments of both"}  # fmt: skip


class Case(NamedTuple):
    """A model, its images (side, channels), and the numerics of its step, which is compiled in "bf16, compiled".

    Args:
        against: the numerics of timm's step, where they are others.
    """

    size: str
    depth: int
    patch_size: int
    side: int
    channels: int
    classes: int
    batch: int
    precision: Precision
    against: Precision | None = None

    @property
    def precisions(self) -> tuple[Precision, Precision]:
        """Of our step, and of timm's."""
        return self.precision, self.against or self.precision


def cases(depth: int | None, batch: int | None = None, device: torch.device = CPU) -> list[Case]:
    """The embedded sizes, of digits and of shapes, and both of CIFAR, on pixels and on patches; the latter in bf16 too
    where the CPU has it, and in bf16 against fp32. On a GPU the sizes of CIFAR-100 and ImageNet on CIFAR's pixels.

    Args:
        depth: blocks of those on CIFAR; by default as many as the size has.
        batch: images in a step; by default the demo's 128, and 8 at CIFAR's size, where 1024 tokens each are work
            enough; 64 on a GPU.
    """
    if device.type == "cuda":
        return [Case(size, depth or SIZES[size].depth, 1, 32, 3, 10, batch or 64, FAST)
                for size in ("tiny", "small", "base")]
    patches = (1, 2)
    embedded = [Case("nano", SIZES["nano"].depth, patch, side, channels, 10, batch or 128, "fp32")
                for side, channels in ((8, 1), (16, 3)) for patch in patches]  # fmt: skip
    numerics = [("fp32", None), *[("bf16", None), ("bf16", "fp32")] * has_bf16()]
    cifar = [Case(size, depth or SIZES[size].depth, patch, 32, 3, 10, batch or 8, *precisions)
             for precisions in numerics for size in ("tiny", "small") for patch in patches]
    return embedded + cifar


def models(case: Case, device: torch.device = CPU) -> dict[str, nn.Module]:
    """Our model and timm's, with the same weights; compiled as `fit` and as timm's users do it."""
    torch.manual_seed(0)
    ours = VisionTransformer(case.side, case.patch_size, case.channels, case.classes, case.size, depth=case.depth)
    timm = TimmVisionTransformer(
        img_size=case.side, patch_size=case.patch_size, in_chans=case.channels, num_classes=case.classes,
        embed_dim=ours.width, depth=ours.depth, num_heads=ours.heads,
    )  # fmt: skip
    ours.load_state_dict(timm.state_dict())
    if case.precision == FAST:
        compile_blocks(ours)
        timm.compile()
    return {"ours": ours.to(device), "timm": timm.to(device)}


def batch_of(case: Case, device: torch.device = CPU) -> tuple[Tensor, Tensor]:
    """Random images (B, C, H, W) and labels (B,)."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(case.batch, case.channels, case.side, case.side, generator=generator)
    labels = torch.randint(case.classes, (case.batch,), generator=generator)
    return images.to(device), labels.to(device)


def training_step(net: nn.Module, images: Tensor, labels: Tensor, precision: str) -> Callable[[], Tensor]:
    """A step of forward, backward and AdamW, as the suite takes it; each call returns its loss."""
    optimizer = adamw(net, RECIPE, RECIPE.lr)

    def step() -> Tensor:
        optimizer.zero_grad()
        with autocast(images.device, precision != "fp32"):
            logits = net(images)
        loss = F.cross_entropy(logits.float(), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def kept(net: nn.Module, images: Tensor, precision: str) -> int:
    """Bytes that a forward keeps for its backward."""
    with autocast(images.device, precision != "fp32"):
        return kept_bytes(lambda: net(images), net.parameters())


def measure(case: Case, rounds: int, device: torch.device = CPU) -> tuple[str, ...]:
    """A row of the table; steps of the two models take turns."""
    start_afresh()
    nets, (images, labels) = models(case, device), batch_of(case, device)
    sides = list(zip(nets.values(), case.precisions, strict=True))
    steps = [training_step(net, images, labels, precision) for net, precision in sides]
    ours, timm, ratio = raced(*steps, rounds, device)
    memory = [peak_bytes(step, net) if device.type == "cuda" else kept(net, images, precision)
              for step, (net, precision) in zip(steps, sides, strict=True)]
    return (
        f"{case.size}/{case.patch_size}, {case.depth} blocks", f"{case.side}x{case.side}x{case.channels}",
        " / ".join(dict.fromkeys(case.precisions)), str(case.batch), f"{1e3 * ours:.1f}", f"{1e3 * timm:.1f}",
        f"{case.batch / ours:,.0f}", f"{case.batch / timm:,.0f}", f"{ratio:.3f}",
        *(f"{size / 1e6:.2f}" for size in memory),
    )  # fmt: skip
