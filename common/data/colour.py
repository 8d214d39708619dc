"""Colour operations on batches of RGB images in [0, 1], every image with parameters and an order of its own.

They equal torchvision's operators on single float images. PIL's pipeline rounds to 8 bits after each step; they do not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.device import constant

GREY = (0.2989, 0.587, 0.114)  # luma of ITU-R BT.601, as torchvision rounds it
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


def _blend(images: Tensor, operation: Tensor, factor: Tensor) -> None:
    """One operation (B,) on images (B, 3, N), in place: image + (1 - factor) * (target - image), within [0, 1].

    The target is black for brightness, the image's mean grey for contrast, each pixel's own grey for saturation.
    """
    rest = 1 - factor
    grey = torch.bmm(constant(GREY, images).expand(len(images), 1, 3), images)
    mean = torch.where(operation == CONTRAST, rest * grey.mean((1, 2)), 0)
    own = torch.where(operation == SATURATION, rest, 0)
    target = grey.mul_(own[:, None, None]).add_(mean[:, None, None])
    images.mul_(factor[:, None, None]).add_(target).clamp_(0, 1)


def shift_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turns the hue of images (B, 3, N) by `shift` (B,) of the colour circle.

    Sorts the channels by minima and maxima: on a CPU one `torch.where` costs as much as twenty of these operations.
    """
    red, green, blue = images.unbind(1)
    swapped = torch.lt(green, blue, out=torch.empty_like(red))
    middle, least = torch.maximum(green, blue), torch.minimum(green, blue)
    turned = torch.lt(red, middle, out=torch.empty_like(red))
    value, middle = torch.maximum(red, middle), torch.minimum(red, middle)
    # Hue in sixths of the circle: the sector's start, signed by its direction, and the way into it. Grey counts as red.
    start = swapped.mul_(-6)
    start = start - turned.mul_(2).mul_(start + 1)
    way = middle - least
    least = torch.minimum(middle, least)
    chroma = value - least
    hue = way.div_(chroma.clamp(min=1e-30)).add_(start).abs_().add_(6 * shift[:, None])
    hue -= (hue / 6).floor_() * 6
    # Back: each channel's share of the chroma is a trapezium over the circle.
    shares = torch.empty_like(images)
    for channel, (peak, sign, base) in enumerate([(3, 1, -1), (2, -1, 2), (4, -1, 2)]):
        torch.sub(hue, peak, out=shares[:, channel]).abs_().mul_(sign).add_(base)
    return shares.clamp_(0, 1).mul_(chroma[:, None]).add_(least[:, None])


def jitter(images: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue of images (B, 3, H, W) by `factors` (B, 4), in `order` (B, 4).

    A row of `order` is a permutation of the four. Hue is turned once for all images, between what precedes and what
    follows it in each image's order. With the images sorted by hue's place, those that still have an operation to come
    before it are the last ones, and those that have had it are the first. A GPU is not asked how many these are, for it
    would be waited for: there every step takes all images, and those without an operation keep factor 1.
    """
    place, sorting = (order == HUE).int().argmax(1).sort(stable=True)
    factors, order, pixels = (x.index_select(0, sorting) for x in (factors, order, images.flatten(2)))
    steps = torch.arange(4, device=images.device)
    factors = factors.gather(1, order)  # by step, as `order` is
    before, after = torch.where(steps < place[:, None], factors, 1), torch.where(steps > place[:, None], factors, 1)
    ends = torch.searchsorted(place, steps).tolist() if images.device.type == "cpu" else None

    for step in range(3):
        some = slice(ends[step + 1], None) if ends else slice(None)
        _blend(pixels[some], order[some, step], before[some, step])
    pixels = shift_hue(pixels, factors.gather(1, place[:, None])[:, 0])
    for step in range(1, 4):
        some = slice(ends[step]) if ends else slice(None)
        _blend(pixels[some], order[some, step], after[some, step])
    return pixels.index_select(0, sorting.argsort()).view_as(images)


def normalised(images: Tensor, mean: Tensor, std: Tensor, grey: Tensor | None = None) -> Tensor:
    """Images (B, C, H, W) with `mean` and `std` (C,) taken out, those that `grey` (B,) chooses without colour first."""
    matrix = torch.eye(len(mean), device=images.device).expand(len(images), -1, -1)
    if grey is not None:
        matrix = torch.where(grey[:, None, None], constant(GREY, images).expand_as(matrix), matrix)
    pixels = torch.baddbmm((-mean / std)[:, None], matrix / std[:, None], images.flatten(2))
    return pixels.view_as(images)
