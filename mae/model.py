"""The masked autoencoder (He et al. 2022): a Transformer on the visible tokens alone, and a small one that fills in.

Shapes: B batch, C channels, H x W pixels, P patch size, L tokens, V visible tokens, D width.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from common.errors import InputError
from common.model import VisionTransformer, patchify, sincos_position, unpatchify
from common.model.sizes import nearest_divisors
from common.model.transformer import Block, LayerNorm


class MaskedAutoencoder(VisionTransformer):
    """A VisionTransformer without a head, and a decoder on top; the parameters carry MAE's names.

    Both halves have a class token's row in their position tables. Patch size 1 masks pixels.

    Args:
        image_size: see VisionTransformer, as all others up to `qk_norm`.
        position: of the encoder's and the decoder's table. MAE fixes sines and cosines, which know the grid; a learned
            table does not.
        decoder_width: D of the decoder's tokens. MAE has 512 x 8 blocks x 16 heads for Base and larger.
        decoder_depth: blocks of the decoder.
        decoder_heads: attention heads of the decoder.
        norm_pix_loss: what the targets are normalised by: nothing, the mean and variance of their own patch (MAE's
            recommendation at patch size 16), or of the whole image.

    Raises:
        InputError: arguments that do not fit together, named with what would be right.
    """

    fresh_for_a_task = (*VisionTransformer.fresh_for_a_task, "mask_token", "decoder_")
    position_tables = ("pos_embed", "decoder_pos_embed")

    def __init__(
        self,
        image_size: int | tuple[int, int],
        patch_size: int = 16,
        channels: int = 3,
        size: str = "tiny",
        width: int | None = None,
        depth: int | None = None,
        heads: int | None = None,
        position: Literal["learned", "sincos"] = "learned",
        qk_norm: bool = False,
        decoder_width: int = 256,
        decoder_depth: int = 8,
        decoder_heads: int = 8,
        norm_pix_loss: Literal["none", "patch", "image"] = "none",
    ) -> None:
        super().__init__(image_size, patch_size, channels, 0, size, width, depth, heads, position=position,
                         qk_norm=qk_norm)  # fmt: skip
        self.decoder_width, self.decoder_depth, self.decoder_heads = decoder_width, decoder_depth, decoder_heads
        self.norm_pix_loss = norm_pix_loss
        self._check_decoder()

        self.decoder_embed = nn.Linear(self.width, decoder_width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_width))
        if position == "sincos":
            self.register_buffer("decoder_pos_embed", sincos_position(self.grid, decoder_width, prefix=1))
        else:
            self.decoder_pos_embed = nn.Parameter(torch.empty(1, 1 + self.tokens, decoder_width))
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_width, decoder_heads, qk_norm) for _ in range(decoder_depth)
        )
        self.decoder_norm = LayerNorm(decoder_width)
        self.decoder_pred = nn.Linear(decoder_width, patch_size**2 * channels)
        self._initialise_as_mae()

    def _check_decoder(self) -> None:
        if self.position == "none":
            raise InputError("model.position=none would make all masked tokens the same; choose learned or sincos")
        for name in ("decoder_width", "decoder_depth", "decoder_heads"):
            if getattr(self, name) < 1:
                raise InputError(f"model.{name}={getattr(self, name)} must be at least 1")
        if self.decoder_width % self.decoder_heads:
            nearest = nearest_divisors(self.decoder_heads, self.decoder_width)
            raise InputError(f"model.decoder_heads={self.decoder_heads} does not divide "
                             f"decoder_width={self.decoder_width}; nearest that do: {nearest}")
        if self.position == "sincos" and self.decoder_width % 4:
            raise InputError(f"model.decoder_width={self.decoder_width} is no multiple of 4, as position=sincos needs")
        if self.norm_pix_loss not in ("none", "patch", "image"):
            raise InputError(f"model.norm_pix_loss={self.norm_pix_loss!r} is not known; choose none, patch or image")
        if self.norm_pix_loss == "patch" and self.patch_size**2 * self.channels == 1:
            raise InputError("model.norm_pix_loss=patch: a patch of one pixel and one channel has no variance; "
                             "choose none or image")

    @torch.no_grad()
    def _initialise_as_mae(self) -> None:
        # But for the bias of the patch embedding, a convolution's there, which at 3 inputs would drown the positions.
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for token in (self.cls_token, self.mask_token):
            nn.init.normal_(token, std=0.02)
        if self.position == "learned":
            nn.init.trunc_normal_(self.decoder_pos_embed, std=0.02)

    def forward(self, images: Tensor, noise: Tensor, mask_ratio: float = 0.75) -> tuple[Tensor, Tensor, Tensor]:
        """Images (B, C, H, W) and noise (B, L) -> loss (scalar), prediction (B, L, P * P * C), mask (B, L).

        The noise comes from the caller so that masks can be a function of the seed, the epoch and the image.
        """
        latent, mask, ids_restore = self.forward_encoder(images, noise, mask_ratio)
        prediction = self.forward_decoder(latent, ids_restore)
        return self.forward_loss(images, prediction, mask), prediction, mask

    def forward_encoder(self, images: Tensor, noise: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
        """Encodes the visible tokens alone: latent (B, 1 + V, D), mask (B, L), ids_restore (B, L)."""
        ids_keep, ids_restore, mask = random_masking(noise, mask_ratio)
        return self.forward_features(images, ids_keep), mask, ids_restore

    def forward_decoder(self, latent: Tensor, ids_restore: Tensor) -> Tensor:
        """Latent (B, 1 + V, D) -> the pixels of all patches (B, L, P * P * C), visible ones included."""
        x = self.decoder_embed(latent)
        masked = self.mask_token.to(x.dtype).expand(len(x), self.tokens + 1 - x.shape[1], -1)
        shuffled = torch.cat([x[:, 1:], masked], dim=1)
        tokens = shuffled.gather(1, ids_restore[:, :, None].expand(-1, -1, self.decoder_width))
        x = torch.cat([x[:, :1], tokens], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x[:, 1:]))

    def forward_loss(self, images: Tensor, prediction: Tensor, mask: Tensor) -> Tensor:
        """Mean squared error over the masked patches, in fp32."""
        patches = patchify(images.float(), self.patch_size)
        mean, deviation = self._target_statistics(patches)
        error = (prediction.float() - (patches - mean) / deviation).square().mean(dim=-1)
        return (error * mask).sum() / mask.sum()

    def reconstruct(self, images: Tensor, prediction: Tensor) -> Tensor:
        """What was predicted, as images (B, C, H, W) in the units of `images`.

        A normalised target lacks its mean and its scale: they are taken from the true image, and so the picture is
        better than what the model knows.
        """
        mean, deviation = self._target_statistics(patchify(images.float(), self.patch_size))
        return unpatchify(prediction.float() * deviation + mean, self.grid, self.patch_size)

    def _target_statistics(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, broadcastable to patches (B, L, P * P * C), that the target is normalised by."""
        if self.norm_pix_loss == "none":
            return patches.new_zeros(()), patches.new_ones(())
        over = (-1,) if self.norm_pix_loss == "patch" else (1, 2)
        variance, mean = torch.var_mean(patches, dim=over, keepdim=True)  # unbiased, as MAE's
        return mean, (variance + 1e-6).sqrt()

    def beyond_shapes(self) -> dict[str, Any]:
        return {**super().beyond_shapes(), "decoder_heads": self.decoder_heads}

    def no_weight_decay(self) -> set[str]:
        return super().no_weight_decay() | {"decoder_pos_embed", "mask_token"}


def random_masking(noise: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
    """Which tokens stay visible: those of the least noise, in its order.

    Args:
        noise: uniform draws (B, L).
        mask_ratio: share of the tokens that are masked.

    Returns:
        ids_keep (B, V) with V = int(L * (1 - mask_ratio)); ids_restore (B, L), which puts visible tokens followed by
        masked ones back in place; mask (B, L), 1 where a token is masked.
    """
    visible = int(noise.shape[1] * (1 - mask_ratio))
    ids_shuffle = noise.argsort(dim=1, stable=True)  # equal draws do occur, and every device must break them alike
    ids_restore = ids_shuffle.argsort(dim=1)
    return ids_shuffle[:, :visible], ids_restore, (ids_restore >= visible).to(noise.dtype)
