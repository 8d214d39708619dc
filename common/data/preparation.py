"""What a loader's process does to one decoded image, so that images of any size become a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.data.augment import Augment
from common.data.crop import Interpolation, fit_one
from common.data.loader import Draw
from common.errors import InputError
from common.randomness import seeded


class TrainingPreparation:
    """Crop, flip and RandAugment of uint8 images; colour and normalisation follow in batches, on the device.

    Args:
        mean: the data set's mean colour in [0, 1], with which RandAugment fills what it uncovers.
    """

    def __init__(self, augment: Augment, size: tuple[int, int], seed: int, mean: Sequence[float]) -> None:
        self.augment, self.size, self.seed = augment, size, seed
        self.rand_augment = _rand_augment(augment, size, mean) if augment.rand_augment else None

    def __call__(self, image: Tensor, draw: Draw) -> Tensor:
        keys = self.seed, draw.epoch, draw.index
        image = self.augment.place_one(image, self.augment.draws(*keys), self.size)
        return image if self.rand_augment is None else self.randomised(image, draw)

    def batch(self, images: Tensor, shapes: Tensor, draws: Tensor, keys: Sequence[Draw]) -> Tensor:
        """The same of stored squares uint8 (B, C, s, s), cropped in one batch: uint8 (B, C, H, W)."""
        placed = (self.augment.place_squares(images, shapes, draws, self.size) * 255).round().byte()
        if self.rand_augment is None:
            return placed
        return torch.stack([self.randomised(image, draw) for image, draw in zip(placed, keys, strict=True)])

    def randomised(self, image: Tensor, draw: Draw) -> Tensor:
        """RandAugment of one uint8 image (3, H, W)."""
        from PIL import Image

        keys = self.seed, draw.epoch, draw.index
        picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
        with seeded("rand_augment", *keys):
            picture = self.rand_augment(picture)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _rand_augment(augment: Augment, size: tuple[int, int], mean: Sequence[float]) -> Callable[[Any], Any]:
    """timm's operator on PIL images, with the hyper-parameters that timm's own training gives it."""
    from timm.data.auto_augment import rand_augment_transform
    from timm.data.transforms import str_to_pil_interp

    crop = augment.interpolation
    how = augment.rand_augment_interpolation or ("bicubic" if crop in ("adm", "nearest") else crop)
    given = {
        "img_mean": tuple(min(255, round(255 * channel)) for channel in mean),
        "translate_const": int(min(size) * 0.45),
        "interpolation": str_to_pil_interp(how),
    }
    try:
        return rand_augment_transform(augment.rand_augment, given)
    except (AssertionError, ValueError, KeyError) as error:
        raise InputError(
            f"data.augment.rand_augment: {augment.rand_augment!r} is not a description that timm reads, such as "
            f"rand-m9-mstd0.5-inc1"
        ) from error


class EvaluationPreparation:
    """Resize and central crop of uint8 images."""

    def __init__(self, size: tuple[int, int], share: float, interpolation: Interpolation) -> None:
        self.size, self.share, self.interpolation = size, share, interpolation

    def __call__(self, image: Tensor, _: Draw) -> Tensor:
        return fit_one(image, self.size, self.share, self.interpolation)
