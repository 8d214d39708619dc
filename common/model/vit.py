"""VisionTransformer = tokens + positions + blocks + pooling + head; at patch size 1 it is the pixel Transformer.

Shapes: B batch, C channels, H x W pixels, L image tokens, N = prefix + L tokens, D width.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.errors import InputError
from common.model.position import sincos_position
from common.model.sizes import nearest_divisors, resolve_size
from common.model.tokens import LinearTokens
from common.model.transformer import Block, LayerNorm, drop_path_rates, keep_scale


class VisionTransformer(nn.Module):
    """Pre-norm Vision Transformer whose parameters carry timm's names.

    Args:
        image_size: pixels, (height, width) or the side of a square.
        patch_size: side of a square patch in pixels; 1 makes every pixel a token.
        channels: channels of the images.
        classes: outputs of the head; 0 leaves the head out, and the pooled features come out.
        size: a row of the table of sizes; `width`, `depth` and `heads` override it one by one.
        class_token: prepend a learned token.
        pool: what the head sees: the class token, or the mean of the image tokens. The final LayerNorm comes before
            the class token is picked (`norm`) but after the mean is taken (`fc_norm`).
        position: a learned table (paper, section 2.2), the fixed 2D sine-cosine table, or none.
        drop_path: rate of skipped residual branches in the last block; it rises linearly from 0 in the first.
        qk_norm: normalise queries and keys per head.
        checkpoint_blocks: number of blocks, from the first on, that recompute their activations in the backward.
            Each saves 15 of 16 stored values and costs a second forward of that block. auto leaves the number to the
            training, which takes as few as fit into memory.
        head_std: standard deviation of the head's initial weights; MAE fine-tunes from 2e-5.

    Raises:
        InputError: arguments that do not fit together, named with what would be right.
    """

    # What weights from another task need not have: these parameters, by the beginning of their names.
    fresh_for_a_task: tuple[str, ...] = ("norm.", "fc_norm.", "head.")
    # Tables over the grid, which are resampled for another one.
    position_tables: tuple[str, ...] = ("pos_embed",)

    def __init__(
        self,
        image_size: int | tuple[int, int],
        patch_size: int = 16,
        channels: int = 3,
        classes: int = 1000,
        size: str = "tiny",
        width: int | None = None,
        depth: int | None = None,
        heads: int | None = None,
        class_token: bool = True,
        pool: Literal["cls", "avg"] = "cls",
        position: Literal["learned", "sincos", "none"] = "learned",
        drop_path: float = 0.0,
        qk_norm: bool = False,
        checkpoint_blocks: int | Literal["auto"] = 0,
        head_std: float = 0.02,
    ) -> None:
        super().__init__()
        self.width, self.depth, self.heads = resolve_size(size, width, depth, heads)
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        self.patch_size = patch_size
        self.grid = patch_grid(self.image_size, patch_size)
        self.tokens = self.grid[0] * self.grid[1]
        self.num_prefix_tokens = int(class_token)
        self.channels = channels
        self.classes = classes
        self.pool = pool
        self.position = position
        self.drop_path = drop_path
        self.drop_path_rates = drop_path_rates(drop_path, self.depth)
        self.qk_norm = qk_norm
        self.checkpoint_blocks = checkpoint_blocks
        self._check()

        self.patch_embed = LinearTokens(patch_size, channels, self.width)
        self.cls_token = nn.Parameter(torch.empty(1, 1, self.width)) if class_token else None
        if position == "sincos":
            self.register_buffer("pos_embed", sincos_position(self.grid, self.width, self.num_prefix_tokens))
        elif position == "learned":
            self.pos_embed = nn.Parameter(torch.empty(1, self.num_prefix_tokens + self.tokens, self.width))
        else:
            self.pos_embed = None
        self.blocks = nn.ModuleList(Block(self.width, self.heads, qk_norm) for _ in range(self.depth))
        self.norm = LayerNorm(self.width) if pool == "cls" else nn.Identity()
        self.fc_norm = LayerNorm(self.width) if pool == "avg" else nn.Identity()
        self.head = nn.Linear(self.width, classes) if classes else nn.Identity()
        self._initialise(head_std)

    def _check(self) -> None:
        if self.pool not in ("cls", "avg"):
            raise InputError(f"model.pool={self.pool!r} is not known; choose cls or avg")
        if self.pool == "cls" and not self.num_prefix_tokens:
            raise InputError("model.pool=cls needs a class token; set class_token=true or pool=avg")
        if self.position not in ("learned", "sincos", "none"):
            raise InputError(f"model.position={self.position!r} is not known; choose learned, sincos or none")
        if not 0.0 <= self.drop_path < 1.0:
            raise InputError(f"model.drop_path={self.drop_path} must be at least 0 and below 1")
        if self.checkpoint_blocks != "auto" and not 0 <= self.checkpoint_blocks <= self.depth:
            raise InputError(f"model.checkpoint_blocks={self.checkpoint_blocks} must be between 0 and "
                             f"depth={self.depth}")
        if self.channels < 1:
            raise InputError(f"channels={self.channels} must be at least 1")
        if self.classes < 0:
            raise InputError(f"classes={self.classes} must be at least 0")

    @torch.no_grad()
    def _initialise(self, head_std: float) -> None:
        # timm's default. The patch projection keeps torch's U(+-1/sqrt(fan in)), as timm's convolution
        # does: at 3 inputs a standard deviation of 0.02 would drown the pixels in the position table.
        for module in [*self.blocks.modules(), self.head]:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=head_std if module is self.head else 0.02)
                nn.init.zeros_(module.bias)
        if self.position == "learned":
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=1e-6)

    def forward(self, images: Tensor, drops: Tensor | None = None) -> Tensor:
        """Images (B, C, H, W) -> logits (B, classes), or pooled features (B, D) when there is no head.

        `drops` (B, 2 * depth) are the uniform draws in [0, 1) that decide which residual branches a sample skips;
        they come from the caller so that they can be a function of the seed, the step and the place in the batch.
        """
        return self.forward_head(self.forward_features(images, drops=drops))

    def forward_features(self, images: Tensor, ids: Tensor | None = None, drops: Tensor | None = None) -> Tensor:
        """Encode the images, or the tokens `ids` of them as in `embed`, to (B, N, D), the class token first.

        Normalised by `norm` under pool=cls; under pool=avg the norm belongs to the head.
        """
        return self.norm(self.encode(self.embed(images, ids), drops))

    def embed(self, images: Tensor, ids: Tensor | None = None) -> Tensor:
        """Tokens with their positions added and the class token in front, (B, N, D).

        `ids` (B, L') picks any tokens of each image, in any order: an image is a set of pixels.
        """
        if images.shape[1:] != (self.channels, *self.image_size):
            channels, height, width = images.shape[1:]
            raise InputError(
                f"images of {height}x{width} pixels and {channels} channels do not fit a model of image_size="
                f"{self.image_size[0]}x{self.image_size[1]}, channels={self.channels}"
            )
        x = self.patch_embed(images)
        if self.pos_embed is not None:
            x = x + self.pos_embed[:, self.num_prefix_tokens :]
        if ids is not None:
            x = x.gather(1, ids[:, :, None].expand(-1, -1, self.width))
        if self.cls_token is None:
            return x
        prefix = self.cls_token if self.pos_embed is None else self.cls_token + self.pos_embed[:, :1]
        return torch.cat([prefix.expand(len(x), -1, -1), x], dim=1)

    def encode(self, x: Tensor, drops: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Run the blocks over any set of embedded tokens (B, N, D), of which `mask` (B, N) may leave some out."""
        assert drops is not None or not (self.training and self.drop_path), "drop_path > 0 needs draws in training"
        for index, (block, rate) in enumerate(zip(self.blocks, self.drop_path_rates, strict=True)):
            scale = keep_scale(drops[:, 2 * index : 2 * index + 2], rate) if drops is not None and rate else None
            if index < self.checkpoint_blocks and torch.is_grad_enabled():
                # The blocks draw no random numbers, so there is no generator state to keep.
                x = checkpoint(block, x, scale, mask, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, scale, mask)
        return x

    def forward_head(self, tokens: Tensor) -> Tensor:
        """Pool encoded tokens (B, N, D) and classify: (B, classes)."""
        pooled = tokens[:, 0] if self.pool == "cls" else tokens[:, self.num_prefix_tokens :].mean(dim=1)
        return self.head(self.fc_norm(pooled))

    @torch.no_grad()
    def attention_maps(self, images: Tensor, layers: Iterable[int]) -> dict[int, Tensor]:
        """Attention maps of the given blocks (counted from 0): layer -> (B, heads, N, N), rows are queries.

        Costs 4 * heads * N^2 bytes per image and layer: 50 MB for ViT-B at 1024 tokens.
        """
        wanted = set(layers)
        unknown = sorted(layer for layer in wanted if not 0 <= layer < self.depth)
        if unknown:
            raise InputError(f"layers={unknown} do not exist; the model has layers 0 to {self.depth - 1}")
        layers = zip(range(max(wanted, default=-1) + 1), self.each_attention_map(images), strict=False)
        return {layer: maps for layer, maps in layers if layer in wanted}

    @torch.no_grad()
    def each_attention_map(self, images: Tensor) -> Iterator[Tensor]:
        """Attention maps (B, heads, N, N) of one block after the other."""
        x = self.embed(images)
        for block in self.blocks:
            yield block.attn.maps(block.norm1(x))
            x = block(x)

    def no_weight_decay(self) -> set[str]:
        """Parameters of more than one dimension that are exempt from weight decay."""
        return {"pos_embed", "cls_token"}

    def beyond_shapes(self) -> dict[str, Any]:
        """What the function depends on and no parameter's shape tells."""
        return {"grid": list(self.grid), "heads": self.heads}

    def layer_index(self, parameter_name: str) -> int:
        """Depth of a parameter for layer-wise decay (He et al. 2022): 0 before the blocks, depth + 1 after them."""
        first, _, rest = parameter_name.partition(".")
        if first in ("cls_token", "pos_embed", "patch_embed"):
            return 0
        return int(rest.partition(".")[0]) + 1 if first == "blocks" else self.depth + 1


def patch_grid(image_size: tuple[int, int], patch_size: int, name: str = "model.patch_size") -> tuple[int, int]:
    """Rows and columns of patches; `name` is the option that a mistake is called by.

    Raises:
        InputError: an empty image, or a patch that does not divide it, with the nearest patches that do.
    """
    height, width = image_size
    if min(height, width) < 1:
        raise InputError(f"image_size={height}x{width} must be at least 1x1")
    if patch_size < 1 or height % patch_size or width % patch_size:
        nearest = nearest_divisors(patch_size, math.gcd(height, width))
        raise InputError(
            f"{name}={patch_size} does not divide image_size={height}x{width}; nearest that do: {nearest}"
        )
    return height // patch_size, width // patch_size
