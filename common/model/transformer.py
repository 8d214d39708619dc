"""The pre-norm Transformer block, with timm's parameter names.

Shapes: B batch, N tokens (prefix included), D width, H heads, K = D / H channels of a head.
"""

from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.model.blocked_attention import attend

LayerNorm = partial(nn.LayerNorm, eps=1e-6)


class Attention(nn.Module):
    """Multi-head self-attention: tokens (B, N, D) -> (B, N, D).

    `qk_norm` normalises queries and keys per head (Dehghani et al. 2023).
    """

    def __init__(self, width: int, heads: int, qk_norm: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = LayerNorm(width // heads) if qk_norm else nn.Identity()
        self.k_norm = LayerNorm(width // heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """`mask` (B, N) is true for the tokens that are attended to; without one, all are."""
        keys = None if mask is None else mask[:, None, None]
        return self.proj(attend(*self.split(x), keys).transpose(1, 2).flatten(2))

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (B, H, N, K)."""
        # Unbinding before the transpose lets the backward write the gradient of qkv once, in its final layout.
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).unbind(2)
        return self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2), v.transpose(1, 2)

    def maps(self, x: Tensor) -> Tensor:
        """Attention maps (B, H, N, N) in fp32; each row is a query and sums to one."""
        q, k, _ = self.split(x)
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)
        return logits.softmax(dim=-1, dtype=torch.float32)


class Mlp(nn.Module):
    """Two linear layers around a GELU, exact or approximated by tanh, four times as wide inside."""

    def __init__(self, width: int, approximate: Literal["none", "tanh"] = "none") -> None:
        super().__init__()
        self.approximate = approximate
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate=self.approximate))


class Block(nn.Module):
    """norm -> attention -> residual, norm -> MLP -> residual."""

    def __init__(self, width: int, heads: int, qk_norm: bool = False) -> None:
        super().__init__()
        self.norm1 = LayerNorm(width)
        self.attn = Attention(width, heads, qk_norm)
        self.norm2 = LayerNorm(width)
        self.mlp = Mlp(width)

    def forward(self, x: Tensor, scale: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Tokens (B, N, D) -> (B, N, D).

        `scale` (B, 2) are factors of a sample's two residual branches, see `keep_scale`; `mask` (B, N) is true for the
        tokens that are attended to.
        """
        if scale is None:
            x = x + self.attn(self.norm1(x), mask)
            return x + self.mlp(self.norm2(x))
        x = x + scaled(self.attn(self.norm1(x), mask), scale[:, 0])
        return x + scaled(self.mlp(self.norm2(x)), scale[:, 1])


def keep_scale(draws: Tensor, rate: float) -> Tensor:
    """Factors of residual branches, of which a share of `rate` is skipped (Huang et al. 2016).

    1 / (1 - rate) where a uniform draw in [0, 1) is at least `rate`, else 0.
    """
    return (draws >= rate).to(draws.dtype) / (1.0 - rate)


def scaled(branch: Tensor, scale: Tensor) -> Tensor:
    """Multiply each sample of a branch (B, N, D) by its factor (B), in the branch's own precision."""
    return branch * scale.to(branch.dtype)[:, None, None]


def block_lists(net: nn.Module) -> list[nn.ModuleList]:
    """The rows of Transformer blocks in a net: its encoder's, and its decoder's where it has one."""
    return [row for row in net.modules() if isinstance(row, nn.ModuleList) and len(row)
            and all(isinstance(block, nn.Module) and any(isinstance(part, Attention) for part in block.modules())
                    for block in row)]  # fmt: skip


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Drop-path rates of the blocks, rising linearly from 0 in the first to `rate` in the last."""
    return [rate * index / max(depth - 1, 1) for index in range(depth)]
