"""What a loader's process does to decoded images, so that images of any sizes become a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from common.data.augment import Augment
from common.data.crop import Interpolation, fit_one
from common.data.loader import Draw
from common.errors import InputError
from common.randomness import seeded_each


class TrainingPreparation:
    """Crop, flip and RandAugment of uint8 images; colour and normalisation follow in batches, on the device.

    Args:
        mean: the data set's mean colour in [0, 1], with which RandAugment fills what it uncovers.
    """

    def __init__(self, augment: Augment, size: tuple[int, int], seed: int, mean: Sequence[float]) -> None:
        self.augment, self.size, self.seed = augment, size, seed
        self.rand_augment = _rand_augment(augment, size, mean) if augment.rand_augment else None

    def __call__(self, images: Sequence[Tensor], draws: Sequence[Draw]) -> Tensor:
        return self._randomised(self.augment.place_each(images, self._drawn(draws), self.size), draws)

    def squares(self, squares: Tensor, shapes: Tensor, draws: Sequence[Draw]) -> Tensor:
        """The same of squares uint8 (B, C, s, s) of a store, which were images of `shapes` (B, 2)."""
        placed = self.augment.place_squares(squares, shapes, self._drawn(draws), self.size)
        return self._randomised((placed * 255).round().byte(), draws)

    def _drawn(self, draws: Sequence[Draw]) -> Tensor:
        epochs, indices, _ = torch.tensor(list(zip(*draws, strict=True)))
        return self.augment.draws(self.seed, epochs, indices)

    def _randomised(self, images: Tensor, draws: Sequence[Draw]) -> Tensor:
        """RandAugment of uint8 images (B, 3, H, W), where there is any."""
        if self.rand_augment is None:
            return images
        from PIL import Image

        epochs, indices, _ = torch.tensor(draws).T
        pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
        with closing(seeded_each("rand_augment", self.seed, epochs, indices)) as seeds:
            for number in seeds:
                pixels[number] = self.rand_augment(Image.fromarray(pixels[number]))
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


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

    def __call__(self, images: Sequence[Tensor], draws: Sequence[Draw] = ()) -> Tensor:
        return torch.stack([fit_one(image, self.size, self.share, self.interpolation) for image in images])
