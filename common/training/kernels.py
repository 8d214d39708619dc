"""Which attention kernel runs: it depends on device, shape, precision and mask, and decides the speed."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from common.model.blocked_attention import attend
from common.model.transformer import Attention, block_lists


def attention_kernels(
    net: nn.Module, tokens: int, masked: bool, device: torch.device, context: AbstractContextManager,
    compiled: bool = False,
) -> str:  # fmt: skip
    """The kernels of a net's rows of blocks, such as `flash` or `cudnn`, told by running them; `math` is not fused, and
    neither is `blocked`, the suite's own (common/model/blocked_attention.py).

    Args:
        tokens: the longest sequence.
        masked: attention leaves tokens out.
        device: where the net will train.
        context: in which its forward runs, for the precision.
        compiled: the blocks will be.
    """
    attentions = [next(part for part in row.modules() if isinstance(part, Attention)) for row in block_lists(net)]
    shapes = {(1, part.heads, tokens, part.proj.in_features // part.heads) for part in attentions}
    mask = torch.ones(1, 1, 1, tokens, dtype=torch.bool, device=device) if masked else None
    run = partial(F.scaled_dot_product_attention, attn_mask=mask) if compiled else partial(attend, mask=mask)
    with torch.enable_grad(), context:
        return ", ".join(sorted({_kernel(run, torch.zeros(shape, device=device, requires_grad=True))
                                 for shape in shapes}))  # fmt: skip


def _kernel(run: Callable[..., torch.Tensor], x: torch.Tensor) -> str:
    """Told by its backward's name: ScaledDotProductFlashAttentionForCpuBackward0, or BlockedAttentionBackward."""
    name = run(x, x, x).grad_fn.name()
    fused = re.match(r"(?:ScaledDotProduct)?(\w+?)Attention", name)
    return fused[1].lower() if fused else "math"
