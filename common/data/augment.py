"""A training recipe for images, and its execution: in batches on the training device, or image by image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.data import colour
from common.data.crop import (
    BOX_DRAWS,
    Boxes,
    Filter,
    Interpolation,
    central_boxes,
    crop,
    crop_one,
    crop_weights,
    fit,
    fit_one,
    random_boxes,
    resample,
    stretched,
)
from common.device import constant
from common.errors import InputError
from common.randomness import uniform

# Which of an image's uniform draws decides what. The numbering is part of every run's randomness: only append to it.
FLIP, JITTER, FACTORS, ORDER, GREY, DRAWS = (
    BOX_DRAWS, BOX_DRAWS + 1, slice(BOX_DRAWS + 2, BOX_DRAWS + 6), slice(BOX_DRAWS + 6, BOX_DRAWS + 10),
    BOX_DRAWS + 10, BOX_DRAWS + 11,
)  # fmt: skip
PIECE, SQUARES = 128, 16  # images of about 32x32, and of 96x96, that fit a core's cache together


@dataclass(frozen=True)
class Augment:
    """What happens to a training image; by default it is no more than resized and centrally cropped.

    Every image has its own parameters, a function of (seed, epoch, index in the data set).

    Args:
        crop_scale: the crop's share of the image's area, low and high; null takes the whole image, its short side
            resized to fit, and its centre.
        crop_ratio: the crop's width / height, low and high.
        interpolation: of the crop; antialiased, but for nearest, which copies single pixels. adm is the preprocessing
            of ADM and DiT, for whole images: halved by a box filter while they are twice too large, bicubic for the
            rest.
        flip: probability of mirroring left and right.
        jitter: how far brightness, contrast and saturation may leave 1 and hue may leave 0 (half a circle is 0.5); the
            four come in an order drawn for each image.
        jitter_probability: how often an image is jittered at all.
        grayscale: probability of losing all colour.
        rand_augment: timm's description of a RandAugment, such as rand-m9-mstd0.5-inc1; image by image, in PIL, so the
            loader's processes do it.
        rand_augment_interpolation: of its rotations and shears, at the image's final size; by default the crop's, and
            bicubic where that is adm or nearest.
    """

    crop_scale: tuple[float, float] | None = None
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: Interpolation = "bilinear"
    flip: float = 0.0
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    jitter_probability: float = 1.0
    grayscale: float = 0.0
    rand_augment: str | None = None
    rand_augment_interpolation: Filter | None = None

    def __post_init__(self) -> None:
        for name in ("flip", "jitter_probability", "grayscale"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"data.augment.{name}: {getattr(self, name)} is not a probability between 0 and 1")
        if self.crop_scale is not None and not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise InputError(f"data.augment.crop_scale: {list(self.crop_scale)} is not a range of shares in (0, 1]")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise InputError(f"data.augment.crop_ratio: {list(self.crop_ratio)} is not a range of positive ratios")
        if self.interpolation == "adm" and self.crop_scale is not None:
            raise InputError(f"data.augment.interpolation: adm takes whole images, but data.augment.crop_scale is "
                             f"{list(self.crop_scale)}; set that to null, or interpolate by bicubic")
        if min(self.jitter) < 0 or self.jitter[colour.HUE] > 0.5:
            raise InputError(f"data.augment.jitter: {list(self.jitter)} must not be negative, and its hue at most 0.5")

    @property
    def needs_colour(self) -> bool:
        return any(self.jitter) or self.grayscale > 0 or self.rand_augment is not None

    def draws(self, seed: int, epoch: int | Tensor, index: int | Tensor) -> Tensor:
        """All randomness of images, uniform (B, DRAWS); RandAugment alone draws for itself."""
        return uniform("augment", seed, epoch, index, n=DRAWS)

    def place(self, images: Tensor, draws: Tensor, size: tuple[int, int]) -> Tensor:
        """Crop and flip of images (B, C, h, w), uint8 or float in [0, 1]: float (B, C, H, W) in [0, 1]."""
        flip = draws[:, FLIP] < self.flip if self.flip else None
        if self.crop_scale is None:
            placed = fit(in_unit(images), size, 1.0, self.interpolation, flip)
        else:
            placed = crop(images, self._boxes(draws, images), size, self.interpolation, flip)
            if not images.is_floating_point():
                placed.div_(255)  # afterwards, since the crop converts them on its way: a pass over them less
        return placed.clamp(0, 1) if self.interpolation == "bicubic" else placed

    def place_squares(self, squares: Tensor, shapes: Tensor, draws: Tensor, size: tuple[int, int]) -> Tensor:
        """The same of uint8 squares (B, C, s, s) that images of `shapes` (B, 2) were stretched to: float (B, C, H, W).

        They get the boxes that the images would have got.
        """
        boxes = central_boxes(shapes, size) if self.crop_scale is None else random_boxes(
            draws[:, :BOX_DRAWS], *shapes.unbind(1), self.crop_scale, self.crop_ratio)
        flip = draws[:, FLIP] < self.flip if self.flip else None
        sides = crop_weights(stretched(boxes, shapes, squares.shape[-1]), squares.shape[-2:], size, self.interpolation,
                             flip)
        piece = SQUARES if squares.device.type == "cpu" else len(squares)
        parts = zip(*(part.split(piece) for part in (squares, *sides)), strict=True)
        # Only what is left is divided by 255: a pass over all that is stored would cost as much as the crop.
        return torch.cat([resample(some, *of_some) for some, *of_some in parts]).div_(255).clamp_(0, 1)

    def place_each(self, images: Sequence[Tensor], draws: Tensor, size: tuple[int, int]) -> Tensor:
        """Crop and flip of uint8 images (C, h, w) of any sizes, whose `draws` are (B, DRAWS): uint8 (B, C, H, W)."""
        if self.crop_scale is None:
            placed = [fit_one(image, size, 1.0, self.interpolation) for image in images]
        else:
            shapes = torch.tensor([image.shape[-2:] for image in images])
            boxes = random_boxes(draws[:, :BOX_DRAWS], *shapes.unbind(1), self.crop_scale, self.crop_ratio)
            placed = [crop_one(image, tuple(box), size, self.interpolation)
                      for image, box in zip(images, torch.stack(boxes, 1).tolist(), strict=True)]
        flips = (draws[:, FLIP] < self.flip).tolist()
        return torch.stack([image.flip(-1) if flip else image for image, flip in zip(placed, flips, strict=True)])

    def _boxes(self, draws: Tensor, images: Tensor) -> Boxes:
        return random_boxes(draws[:, :BOX_DRAWS], *images.shape[-2:], self.crop_scale, self.crop_ratio)

    def colour(self, images: Tensor, draws: Tensor) -> Tensor:
        """Jitter of float images (B, 3, H, W) in [0, 1]."""
        if not any(self.jitter):
            return images
        reach = constant(self.jitter, images)
        neutral = constant((1.0, 1.0, 1.0, 0.0), images)
        low = (neutral - reach).clamp(constant((0.0, 0.0, 0.0, -0.5), images))
        factors = low + (neutral + reach - low) * draws[:, FACTORS]
        jittered = draws[:, JITTER, None] < self.jitter_probability
        factors = torch.where(jittered, factors, neutral)
        return colour.jitter(images, factors, draws[:, ORDER].argsort(1))

    def greyed(self, draws: Tensor) -> Tensor | None:
        """Which images lose their colour, bool (B,)."""
        return draws[:, GREY] < self.grayscale if self.grayscale else None

    def batch(
        self, images: Tensor, draws: Tensor, size: tuple[int, int] | None, mean: Tensor, std: Tensor,
        shapes: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """uint8 images (B, C, h, w), or squares of images of `shapes`, to float (B, C, H, W), augmented and normalised.

        With `size` None they are placed already.
        """
        if shapes is not None:
            images, size = self.place_squares(images, shapes, draws, size), None
        if images.device.type != "cpu":
            return self._batch(images, draws, size, mean, std)
        # In pieces that stay in a core's cache, the result's too: 1.8 times as fast as 1024 at once.
        batch = mean.new_empty(*images.shape[:2], *(size or images.shape[2:]))
        for piece, *inputs in zip(batch.split(PIECE), images.split(PIECE), draws.split(PIECE), strict=True):
            piece.copy_(self._batch(*inputs, size, mean, std))
        return batch

    def _batch(
        self, images: Tensor, draws: Tensor, size: tuple[int, int] | None, mean: Tensor, std: Tensor
    ) -> Tensor:
        images = in_unit(images) if size is None else self.place(images, draws, size)
        return colour.normalised(self.colour(images, draws), mean, std, self.greyed(draws))


PLAIN = Augment()


def in_unit(images: Tensor) -> Tensor:
    """Images as floats in [0, 1], where they are not."""
    return images if images.is_floating_point() else images.float() / 255
