"""Dictionary tokens (paper, appendix F): a pixel's token is looked up by its intensities and not computed from them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from common.data import ImageData
from common.device import constant
from common.errors import InputError
from common.model import VisionTransformer
from supervised import Classification

LEVELS = 256
ENTRY = 256  # width of an entry: three channels make the 768 of ViT-B


class DictionaryTokens(nn.Module):
    """Tokens of single pixels, from one table of 256 entries a channel: uint8 images (B, C, H, W) -> (B, L, D).

    The channels' entries are concatenated, and projected where they are not as wide as the model.

    Args:
        trainable: whether the entries are learned; the paper does not say.
    """

    def __init__(self, channels: int, width: int, trainable: bool = True) -> None:
        super().__init__()
        self.tables = nn.Embedding(channels * LEVELS, ENTRY)
        # About the spread of a linear token of an image in [-1, 1], beside which positions start small.
        nn.init.normal_(self.tables.weight, std=0.5)
        self.tables.requires_grad_(trainable)
        self.proj = nn.Identity() if channels * ENTRY == width else nn.Linear(channels * ENTRY, width)
        self.register_buffer("starts", torch.arange(channels)[:, None] * LEVELS, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8:
            raise InputError(f"dictionary tokens look up whole intensities from 0 to 255 (uint8), and these images are "
                             f"{images.dtype}")
        places = images.flatten(2) + self.starts
        return self.proj(self.tables(places).transpose(1, 2).flatten(2))


class DictionaryTransformer(VisionTransformer):
    """A VisionTransformer of single pixels whose tokens come from a dictionary. Options as there."""

    def __init__(self, trainable: bool = True, **vit: Any) -> None:
        super().__init__(**vit)
        if self.patch_size != 1:
            raise InputError(f"model.patch_size={self.patch_size}: a dictionary has an entry for an intensity, so its "
                             "tokens are single pixels; set 1")
        self.patch_embed = DictionaryTokens(self.channels, self.width, trainable)

    def no_weight_decay(self) -> set[str]:
        """Neither do the tables: an entry that few images ask for would fade."""
        return super().no_weight_decay() | {"patch_embed.tables.weight"}


class DictionaryClassification(Classification):
    """Classification by dictionary tokens, of what intensities augmentation leaves, rounded to whole ones.

    Mixup and cutmix mix the embedded tokens: a mixture of two intensities is an entry of its own.

    Args:
        trainable: whether the entries are learned.
        **kwargs: see `supervised.Classification`; `patch_size` is 1, and pixels stay where they are.
    """

    data_class = ImageData

    def __init__(self, trainable: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.trainable = trainable

    def build(self, data: ImageData) -> DictionaryTransformer:
        if self.probe:
            raise InputError("model.probe: true is for supervised.Classification; dictionary tokens have no probing")
        return DictionaryTransformer(trainable=self.trainable, image_size=data.image_size, channels=data.channels,
                                     classes=len(data.class_names), **self.vit)

    def transform(self, images: Tensor) -> Tensor:
        """Normalised images (B, C, H, W) -> their intensities, uint8."""
        data = self.trainer.datamodule
        images = images.float()
        mean, std = (constant(values, images).view(-1, 1, 1) for values in (data.mean, data.std))
        return ((images * std + mean) * 255).round().clamp(0, 255).byte()

    def mixed(self, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mixes tokens on their grid, in place; the class token is the same in all images."""
        grid = tokens[:, self.net.num_prefix_tokens :].transpose(1, 2).unflatten(2, self.net.grid)
        return tokens, super().mixed(grid, labels)[1]

    def logits(self, batch: dict[str, Tensor], drops: Tensor | None) -> tuple[Tensor, Tensor]:
        tokens, targets = self.mixed(self.net.embed(self.transform(batch["image"])), batch["label"])
        return self.net.forward_head(self.net.norm(self.net.encode(tokens, drops))), targets
