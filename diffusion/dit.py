"""The diffusion Transformer (Peebles and Xie 2023), whose parameters carry DiT's names.

Shapes: B batch, C channels, H x W latent pixels, P patch size, L tokens, D width.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.errors import InputError
from common.model import Attention, LinearTokens, Mlp, resolve_size, sincos_position, unpatchify
from common.model.transformer import LayerNorm
from common.model.vit import patch_grid

SINUSOIDS = 256  # of a timestep: half of them cosines, half sines


class DiT(nn.Module):
    """A Transformer that predicts the noise in a latent, conditioned on the timestep and the class by adaLN-Zero.

    Its output is zero before the first update. Published checkpoints load.

    Args:
        input_size: latent pixels, (height, width) or the side of a square.
        patch_size: side of a square patch in latent pixels; 1 makes every pixel a token.
        channels: channels of the latents.
        classes: 0 conditions on the timestep alone.
        size: a row of the table of sizes; `width`, `depth` and `heads` override it one by one.
        position: a learned table (paper, section 2.2), or DiT's fixed 2D sine-cosine table.
        label_dropout: rate at which a label becomes the null class, whose index is `classes`. Guidance needs it; at 0
            there is no null class.
        learn_variance: predict the variance too, in as many further channels.
        qk_norm: normalise queries and keys per head.
        checkpoint_blocks: number of blocks, from the first on, that recompute their activations in the backward; auto
            leaves it to the training, which takes as few as fit into memory.

    Raises:
        InputError: arguments that do not fit together, named with what would be right.
    """

    def __init__(
        self,
        input_size: int | tuple[int, int],
        patch_size: int = 2,
        channels: int = 4,
        classes: int = 1000,
        size: str = "tiny",
        width: int | None = None,
        depth: int | None = None,
        heads: int | None = None,
        position: Literal["learned", "sincos"] = "learned",
        label_dropout: float = 0.1,
        learn_variance: bool = True,
        qk_norm: bool = False,
        checkpoint_blocks: int | Literal["auto"] = 0,
    ) -> None:
        super().__init__()
        self.width, self.depth, self.heads = resolve_size(size, width, depth, heads)
        self.input_size = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
        self.patch_size = patch_size
        self.grid = patch_grid(self.input_size, patch_size)
        self.tokens = self.grid[0] * self.grid[1]
        self.channels = channels
        self.out_channels = 2 * channels if learn_variance else channels
        self.classes = classes
        self.position = position
        self.label_dropout = label_dropout
        self.qk_norm = qk_norm
        self.checkpoint_blocks = checkpoint_blocks
        self._check()

        self.x_embedder = LinearTokens(patch_size, channels, self.width)
        self.t_embedder = TimestepEmbedder(self.width)
        self.y_embedder = LabelEmbedder(classes, self.width, label_dropout) if classes else None
        if position == "sincos":
            self.register_buffer("pos_embed", sincos_position(self.grid, self.width, prefix=0))
        else:
            self.pos_embed = nn.Parameter(torch.empty(1, self.tokens, self.width))
        self.blocks = nn.ModuleList(ConditionedBlock(self.width, self.heads, qk_norm) for _ in range(self.depth))
        self.final_layer = FinalLayer(self.width, patch_size**2 * self.out_channels)
        self._initialise()

    def _check(self) -> None:
        if self.position not in ("learned", "sincos"):
            raise InputError(f"model.position={self.position!r} is not known; choose learned or sincos")
        if not 0.0 <= self.label_dropout < 1.0:
            raise InputError(f"model.label_dropout={self.label_dropout} must be at least 0 and below 1; DiT has 0.1")
        if self.checkpoint_blocks != "auto" and not 0 <= self.checkpoint_blocks <= self.depth:
            raise InputError(f"model.checkpoint_blocks={self.checkpoint_blocks} must be between 0 and "
                             f"depth={self.depth}")
        if self.channels < 1:
            raise InputError(f"channels={self.channels} must be at least 1")
        if self.classes < 0:
            raise InputError(f"classes={self.classes} must be at least 0")

    @torch.no_grad()
    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for embedding in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(embedding.weight, std=0.02)
        if self.y_embedder is not None:
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        if self.position == "learned":
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        # Every block starts as the identity (adaLN-Zero), and the output at zero.
        for layer in (*self.blocks, self.final_layer):
            nn.init.zeros_(layer.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, drops: Tensor | None = None) -> Tensor:
        """Noisy latents (B, C, H, W) -> predicted noise and, in C further channels, what interpolates its variance.

        Args:
            x: latents at the timesteps `t`.
            t: timesteps (B,) of the process that the net is trained on, 0 .. 999 as a rule.
            y: labels (B,); none where the net has no classes.
            drops: uniform draws (B,) in [0, 1): below `label_dropout` a label becomes the null class. They come from
                the caller so that they can be a function of the seed, the step and the place in the batch.
        """
        self._check_input(x, y)
        assert drops is not None or not (self.training and self.classes and self.label_dropout), \
            "label_dropout > 0 needs draws in training"
        # fp32 under autocast too, which costs next to nothing: bf16 would round away 3 % of the noise in x at t = 0.
        with torch.autocast(x.device.type, enabled=False):
            tokens = self.x_embedder(x.to(self.x_embedder.proj.weight.dtype)) + self.pos_embed
            condition = self.t_embedder(t)
            if self.y_embedder is not None:
                condition = condition + self.y_embedder(y, drops)
        for index, block in enumerate(self.blocks):
            if index < self.checkpoint_blocks and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, condition, use_reentrant=False, preserve_rng_state=False)
            else:
                tokens = block(tokens, condition)
        return unpatchify(self.final_layer(tokens, condition), self.grid, self.patch_size)

    def forward_with_guidance(self, x: Tensor, t: Tensor, y: Tensor, scale: float, channels: int = 3) -> Tensor:
        """As `forward`, with classifier-free guidance (Ho and Salimans 2022), in fp32, at twice its cost.

        The first `channels` of the predicted noise become null + scale * (conditional - null). DiT guides the first 3
        of 4, so as to reproduce its published numbers; the net's `channels` guides all. Whatever is not guided, the
        variance's channels among it, is the conditional prediction, as in DiT's published code.
        """
        if not (self.classes and self.label_dropout):
            raise InputError(f"guidance needs a net with a null class; this one has classes={self.classes}, "
                             f"label_dropout={self.label_dropout}")
        if channels < 1:
            raise InputError(f"guidance channels={channels} must be at least 1; DiT guides 3")
        both = self(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, torch.full_like(y, self.classes)]))
        conditional, null = both.float().chunk(2)
        guided = min(channels, self.channels)
        noise = null[:, :guided] + scale * (conditional - null)[:, :guided]
        return torch.cat([noise, conditional[:, guided:]], dim=1)

    def _check_input(self, x: Tensor, y: Tensor | None) -> None:
        if x.shape[1:] != (self.channels, *self.input_size):
            channels, height, width = x.shape[1:]
            raise InputError(f"latents of {height}x{width} and {channels} channels do not fit a model of input_size="
                             f"{self.input_size[0]}x{self.input_size[1]}, channels={self.channels}")
        if (y is None) != (self.classes == 0):
            raise InputError(f"a model of classes={self.classes} {'needs' if y is None else 'takes no'} labels")

    def beyond_shapes(self) -> dict[str, Any]:
        """What the function depends on and no parameter's shape tells."""
        return {"grid": list(self.grid), "heads": self.heads}

    def no_weight_decay(self) -> set[str]:
        """Parameters of more than one dimension that are exempt from weight decay."""
        return {"pos_embed", "y_embedder.embedding_table.weight"}


class TimestepEmbedder(nn.Module):
    """Timesteps (B,), which need not be whole numbers, to vectors (B, D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(SINUSOIDS, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(sinusoids(t).to(self.mlp[0].weight.dtype))


def sinusoids(t: Tensor) -> Tensor:
    """Cosines, then sines, of t * 10000^(-k / 128), k = 0 .. 127: (B,) -> (B, 256) in fp32."""
    half = SINUSOIDS // 2
    # Named, because under bf16-true Lightning makes bf16 the default.
    k = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t.float()[:, None] * torch.exp(-math.log(10000) * k / half)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class LabelEmbedder(nn.Module):
    """Labels (B,) to vectors (B, D); the null class has the last row."""

    def __init__(self, classes: int, width: int, label_dropout: float) -> None:
        super().__init__()
        self.classes = classes
        self.label_dropout = label_dropout
        self.embedding_table = nn.Embedding(classes + (label_dropout > 0), width)

    def forward(self, y: Tensor, drops: Tensor | None) -> Tensor:
        if drops is not None:
            y = torch.where(drops < self.label_dropout, self.classes, y)
        return self.embedding_table(y)


class ConditionedBlock(nn.Module):
    """The pre-norm block with adaLN-Zero: a condition (B, D) shifts and scales both norms, and gates both branches."""

    def __init__(self, width: int, heads: int, qk_norm: bool = False) -> None:
        super().__init__()
        self.norm1 = LayerNorm(width, elementwise_affine=False)
        self.attn = Attention(width, heads, qk_norm)
        self.norm2 = LayerNorm(width, elementwise_affine=False)
        self.mlp = Mlp(width, approximate="tanh")
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Tokens (B, L, D) -> (B, L, D)."""
        modulation = self.adaLN_modulation(condition)[:, None].chunk(6, dim=2)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation
        x = x + gate_attn * self.attn(modulate(self.norm1(x), shift_attn, scale_attn))
        return x + gate_mlp * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    """A modulated norm and a linear layer: tokens (B, L, D) and a condition (B, D) to patches (B, L, `outputs`)."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.norm_final = LayerNorm(width, elementwise_affine=False)
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition)[:, None].chunk(2, dim=2)
        return self.linear(modulate(self.norm_final(x), shift, scale))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Normalised tokens (B, L, D) times 1 + scale (B, 1, D), plus shift (B, 1, D)."""
    return x * (1 + scale.to(x.dtype)) + shift  # in bf16, 1 + scale would lose a scale below 0.004
