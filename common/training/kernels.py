"""Which attention kernel runs: it depends on device, shape, precision and mask, and decides the speed."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager

import torch
from torch import nn

from common.model.blocked_attention import attend
from common.model.transformer import Attention, block_lists


def attention_kernels(
    net: nn.Module, tokens: int, masked: bool, device: torch.device, context: AbstractContextManager
) -> str:
    """The kernels of a net's rows of blocks, such as `flash` or `cudnn`, told by running them; `math` is not fused.

    Args:
        tokens: the longest sequence.
        masked: attention leaves tokens out.
        device: where the net will train.
        context: in which its forward runs, for the precision.
    """
    attentions = [next(part for part in row.modules() if isinstance(part, Attention)) for row in block_lists(net)]
    shapes = {(1, part.heads, tokens, part.proj.in_features // part.heads) for part in attentions}
    mask = torch.ones(1, 1, 1, tokens, dtype=torch.bool, device=device) if masked else None
    with torch.enable_grad(), context:
        return ", ".join(sorted({_kernel(torch.zeros(shape, device=device, requires_grad=True), mask)
                                 for shape in shapes}))  # fmt: skip


def _kernel(x: torch.Tensor, mask: torch.Tensor | None) -> str:
    """Told by its backward's name: ScaledDotProductFlashAttentionForCpuBackward0, or BlockedAttentionBackward."""
    name = attend(x, x, x, mask).grad_fn.name()
    fused = re.match(r"(?:ScaledDotProduct)?(\w+?)Attention", name)
    return fused[1].lower() if fused else "math"
