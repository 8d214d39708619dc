"""MAE of a chosen decoder, and a training step of it on noise, which the benchmarks measure."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from common.benchmark.device import autocast
from common.training.optim import Recipe, adamw
from mae.model import MaskedAutoencoder

MASKED, WHOLE = 0.75, 0.0  # mask ratios of the paper, and without any mask
RECIPE = Recipe(lr=1e-4)


class Decoder(NamedTuple):
    width: int
    depth: int
    heads: int


def autoencoder(size: str, patch_size: int, side: int, channels: int, decoder: Decoder) -> MaskedAutoencoder:
    """With an encoder of the table of sizes, for images (channels, side, side); always the same weights."""
    torch.manual_seed(0)
    return MaskedAutoencoder(side, patch_size, channels, size, decoder_width=decoder.width,
                             decoder_depth=decoder.depth, decoder_heads=decoder.heads)  # fmt: skip


class Step:
    """A training step of one model on one random batch, at a mask ratio that the caller chooses."""

    def __init__(self, net: MaskedAutoencoder, batch: int, bf16: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        self.net, self.bf16, self.device = net, bf16, net.pos_embed.device
        self.images = torch.randn(batch, net.channels, *net.image_size, generator=generator).to(self.device)
        self.noise = torch.rand(batch, net.tokens, generator=generator).to(self.device)
        self.optimizer = adamw(net, RECIPE, RECIPE.lr)

    def loss(self, mask_ratio: float) -> Tensor:
        """MAE's loss, but over all tokens."""
        with autocast(self.device, self.bf16):
            latent, _, ids_restore = self.net.forward_encoder(self.images, self.noise, mask_ratio)
            prediction = self.net.forward_decoder(latent, ids_restore)
        return self.net.forward_loss(self.images, prediction, torch.ones_like(self.noise))

    def __call__(self, mask_ratio: float) -> Tensor:
        """Takes the step and returns its loss."""
        self.optimizer.zero_grad()
        loss = self.loss(mask_ratio)
        loss.backward()
        self.optimizer.step()
        return loss.detach()
