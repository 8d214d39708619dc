"""Which attention a block runs: torch's fused one, but plain attention in bf16 on a CPU that multiplies in it.

There torch's takes as long in bf16 as in fp32, while a matrix product takes half of that or less (RESULTS.md, Speed on
CPU). With a matrix unit (AMX) its forward is fast, and its backward alone is plain attention's. That rounds its logits
to bf16, which the fused one keeps in fp32.

Shapes: B batch, H heads, N queries, M keys, K channels of a head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.amp import custom_bwd, custom_fwd
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from common.device import has_avx512_bf16, has_matrix_unit

# Entries of the attention maps that are computed at once, of one head at the least: 1 MB, a core's cache.
HELD = 2**19
# Of a map beyond this (1,448 tokens) torch's kernel, which cuts a map in pieces, is no slower.
LARGEST = 2**21


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of queries (B, H, N, K) to keys and values (B, H, M, K): (B, H, N, K).

    `mask`, which broadcasts to (B, H, N, M), is true where a key is attended to; without one, all are.
    """
    if mask is None and blocked(q, k, v):
        return BlockedAttention.apply(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def blocked(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether attention in blocks of heads is the faster one."""
    if v.device.type != "cpu" or torch.compiler.is_compiling() or q.shape[2] * k.shape[2] > LARGEST:
        return False
    precision = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else v.dtype
    return precision == torch.bfloat16 and has_avx512_bf16()


class BlockedAttention(Function):
    """Plain attention, a few heads at a time; the backward computes the maps anew, as fused kernels do.

    With a matrix unit the forward is torch's.
    """

    @staticmethod
    @custom_fwd(device_type="cpu", cast_inputs=torch.bfloat16)
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        if has_matrix_unit():  # which torch's forward makes use of, unlike its backward
            return F.scaled_dot_product_attention(q, k, v)
        out = q.new_empty(*q.shape[:3], v.shape[3])
        for q_i, k_i, v_i, out_i in _blocks(q, k, v, out):
            torch.bmm(_maps(q_i, k_i), v_i, out=out_i)
        return out

    @staticmethod
    @custom_bwd(device_type="cpu")
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inputs = ctx.saved_tensors
        gradients = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]
        for q, k, v, d_o, d_q, d_k, d_v in _blocks(*inputs, d_out, *gradients):
            maps = _maps(q, k)
            torch.bmm(maps.mT, d_o, out=d_v)
            d_logits = torch.ops.aten._softmax_backward_data(d_o @ v.mT, maps, -1, maps.dtype).mul_(_scale(q))
            torch.bmm(d_logits, k, out=d_q)
            torch.bmm(d_logits.mT, q, out=d_k)
        return tuple(gradients)


def _blocks(q: Tensor, k: Tensor, *others: Tensor) -> zip[tuple[Tensor, ...]]:
    """Each (heads, tokens, K), of as many heads of the batch as are computed at once.

    Keys that are all moved alike have the same softmax and all the same gradients; without what they have in common the
    logits are small, and so is what rounding takes from them.
    """
    k = k - k.mean(dim=2, keepdim=True)
    heads = max(1, HELD // (q.shape[2] * k.shape[2]))
    return zip(*(x.flatten(0, 1).split(heads) for x in (q, k, *others)), strict=True)


def _maps(q: Tensor, k: Tensor) -> Tensor:
    return torch.baddbmm(q.new_empty(1, 1, 1), q, k.mT, beta=0, alpha=_scale(q)).softmax(dim=-1)


def _scale(q: Tensor) -> float:
    return q.shape[-1] ** -0.5
