"""Cropping and resizing of batches, every image by a box of its own, as two matrix products.

A resized row is a weighted sum of rows of the box, so a crop is `rows @ image @ columns.T`; mirroring permutes the
columns' weights and costs nothing. The weights are those of torchvision's and PIL's antialiased filters: their support
widens with the scale where a box shrinks. `nearest` copies single pixels instead (paper, App. G). ADM's preprocessing
(`adm`) is not of this kind and goes through PIL.
"""

from __future__ import annotations

import math
from itertools import accumulate
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Filter = Literal["bilinear", "bicubic", "nearest"]
Interpolation = Literal[Filter, "adm"]
TRIES = 10  # of torchvision's RandomResizedCrop, before it falls back to a central box
BOX_DRAWS = 2 * TRIES + 2


class Boxes(NamedTuple):
    """Where crops lie, in pixels: (B,) each."""

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor


def random_boxes(
    draws: Tensor, height: int | Tensor, width: int | Tensor, scale: tuple[float, float], ratio: tuple[float, float]
) -> Boxes:
    """Boxes in images of (height, width) by the rule of torchvision's RandomResizedCrop, from `draws` (B, BOX_DRAWS).

    Height and width may be (B,), one for each image.

    The area's share is uniform on `scale`, the logarithm of width/height uniform on that of `ratio`; the first of ten
    tries that fits is placed uniformly. Where none fits, the largest central box whose shape is within `ratio`.
    """
    height, width = (side.to(draws.device)[:, None] if isinstance(side, Tensor)
                     else torch.full((1, 1), side, device=draws.device) for side in (height, width))
    area = height * width * (scale[0] + (scale[1] - scale[0]) * draws[:, :TRIES])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    shape = (low + (high - low) * draws[:, TRIES : 2 * TRIES]).exp()
    widths, heights = (area * shape).sqrt().round(), (area / shape).sqrt().round()
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    first = fits.int().argmax(1, keepdim=True)
    w, h = widths.gather(1, first), heights.gather(1, first)
    top = (draws[:, -2:-1] * (height - h + 1)).floor()
    left = (draws[:, -1:] * (width - w + 1)).floor()
    found = fits.any(1, keepdim=True)
    highest = torch.minimum(height.double(), width / ratio[0]).round().long()
    widest = torch.minimum(width.double(), height * ratio[1]).round().long()
    central = (height - highest) // 2, (width - widest) // 2, highest, widest
    return Boxes(*(torch.where(found, x, c)[:, 0].long() for x, c in zip((top, left, h, w), central, strict=True)))


def stretched(boxes: Boxes, shapes: Tensor, side: int) -> Boxes:
    """The same boxes in images whose `shapes` (B, 2), height and width, have been stretched to squares of `side`.

    No less than a pixel, so that there is something to resize.
    """
    height, width = (side / shapes.to(boxes.top.device).float()).unbind(1)
    places = [boxes.top * height, boxes.left * width]
    lengths = [(boxes.height * height).clamp(min=1), (boxes.width * width).clamp(min=1)]
    starts = [torch.minimum(place, side - length) for place, length in zip(places, lengths, strict=True)]
    return Boxes(*starts, *lengths)


def central_boxes(shapes: Tensor, size: tuple[int, int]) -> Boxes:
    """What `fit` with a share of 1 keeps of images of `shapes` (B, 2), in their own pixels, unrounded."""
    height, width = shapes.unbind(1)
    by_height = size[0] * width >= size[1] * height
    resized = (torch.where(by_height, size[0], size[1] * height // width),
               torch.where(by_height, size[0] * width // height, size[1]))
    margins = [((new - kept) / 2).round() for new, kept in zip(resized, size, strict=True)]
    pixel = height / resized[0], width / resized[1]  # of the images, to one that is resized
    return Boxes(margins[0] * pixel[0], margins[1] * pixel[1], size[0] * pixel[0], size[1] * pixel[1])


def _filter(x: Tensor, interpolation: Filter) -> Tensor:
    x = x.abs()
    if interpolation == "bilinear":
        return (1 - x).clamp_(min=0)
    # Keys' cubic with a = -0.5, PIL's choice: one cubic on [0, 2], and what differs from it on [0, 1].
    return (1 - x).clamp(min=0).square() * (2 * x - 1) - (2 - x).clamp(min=0).square() * (x - 1) / 2


def weights(
    start: Tensor, length: Tensor, source: int, size: int, interpolation: Filter, flip: Tensor | None = None
) -> Tensor:
    """What each of `size` resized pixels takes of `source` pixels of which `length` count from `start`.

    Returns (B, size, source); `flip` (B,) bool mirrors the resized pixels.
    """
    place = torch.arange(size, device=start.device).expand(len(start), size)
    if flip is not None:
        place = torch.where(flip[:, None], size - 1 - place, place)
    if interpolation == "nearest":
        copied = start[:, None] + nearest(length, size).gather(1, place)
        return (copied[:, :, None] == torch.arange(source, device=start.device)).float()
    scale = (length / size)[:, None]
    centre = start[:, None] + (place + 0.5) * scale
    # No more pixels than the widest filter reaches, since most of the others' weights are 0.
    reach = (2 if interpolation == "bicubic" else 1) * max(source / size, 1)
    taps = min(math.ceil(2 * reach) + 1, source)
    first = (centre - reach).floor().clamp(0, source - taps).long()
    index = first[:, :, None] + torch.arange(taps, device=start.device)
    pixel = index + 0.5
    x = _filter((pixel - centre[:, :, None]) / scale.clamp(min=1)[:, :, None], interpolation)
    x = x * ((pixel >= start[:, None, None]) & (pixel < (start + length)[:, None, None]))
    x = x / x.sum(-1, keepdim=True)
    return x.new_zeros(len(start), size, source).scatter_(2, index, x)


def nearest(length: Tensor, size: int) -> Tensor:
    """Which of `length` pixels (B,) each of `size` resized ones copies, int64 (B, size): the one that its centre is in.

    Where that lies between two, PIL takes either by the rounding of its sums in float64, which are these.
    """
    step = length.double() / size
    centres = accumulate([step / 2, *[step] * (size - 1)])  # a GPU's cumsum would add them up in another order
    return torch.stack(list(centres), dim=1).long()


def resample(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Images (B, C, h, w), uint8 or float, by weights (B or 1, H, h) and (B or 1, W, w): float (B, C, H, W)."""
    batch, channels, height, width = images.shape
    if len(columns) == 1:
        return rows @ (images.to(rows.dtype) @ columns[0].mT)
    # With the channels of a row side by side, an image is two large products and not one for each channel. uint8 is
    # converted on the way there, in the same pass.
    lines = images.transpose(1, 2).to(rows.dtype, memory_format=torch.contiguous_format)
    low = torch.bmm(rows.expand(batch, -1, -1), lines.reshape(batch, height, channels * width))
    placed = torch.bmm(low.view(batch, -1, width), columns.mT)
    return placed.view(batch, -1, channels, placed.shape[-1]).transpose(1, 2)


def crop(
    images: Tensor, boxes: Boxes, size: tuple[int, int], interpolation: Filter, flip: Tensor | None = None
) -> Tensor:
    """The boxes of images (B, C, h, w), uint8 or float, resized to `size`: float (B, C, H, W).

    Bicubic may leave the images' range.
    """
    return resample(images, *crop_weights(boxes, images.shape[-2:], size, interpolation, flip))


def crop_weights(
    boxes: Boxes, source: tuple[int, int], size: tuple[int, int], interpolation: Filter, flip: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What `resample` needs of these boxes of images of `source` (h, w): (B, H, h) and (B, W, w)."""
    return (weights(boxes.top, boxes.height, source[0], size[0], interpolation),
            weights(boxes.left, boxes.width, source[1], size[1], interpolation, flip))


def fitted(height: int, width: int, size: tuple[int, int], share: float) -> tuple[int, int]:
    """What (height, width) is resized to, of which the central `size` remains, `share` of the side that binds.

    For square sizes the rule is the usual one: the short side becomes int(size / share), the long side is rounded down.
    """
    high, wide = (int(side / share) for side in size)
    if high * width >= wide * height:
        return high, high * width // height
    return wide * height // width, wide


def fit(
    images: Tensor, size: tuple[int, int], share: float, interpolation: Interpolation, flip: Tensor | None = None
) -> Tensor:
    """Whole float images (B, C, h, w) resized as `fitted` says and cropped centrally to `size`: (B, C, H, W).

    Where `adm` has to resize, it does so image by image on the CPU, of images rounded to uint8.
    """
    if interpolation == "adm":
        images = _adm_batch(images, size)
        return images if flip is None else torch.where(flip[:, None, None, None], images.flip(-1), images)
    source = images.shape[-2:]
    resized = fitted(*source, size, share)
    if resized == tuple(source) and flip is None:
        top, left = _margins(resized, size)
        return images[..., top : top + size[0], left : left + size[1]]
    sides = []
    for pixels, new, kept, margin in zip(source, resized, size, _margins(resized, size), strict=True):
        start, length = (torch.full((1,), float(number), device=images.device) for number in (0, pixels))
        sides.append(weights(start, length, pixels, new, interpolation)[:, margin : margin + kept])
    rows, columns = sides
    if flip is not None:
        columns = torch.where(flip[:, None, None], columns.flip(1), columns)
    return resample(images, rows, columns)


def _margins(resized: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    return round((resized[0] - size[0]) / 2), round((resized[1] - size[1]) / 2)


def crop_one(image: Tensor, box: tuple[int, int, int, int], size: tuple[int, int], how: Filter) -> Tensor:
    """The same crop of one uint8 image (C, h, w) of any size, rounded to uint8 as PIL does."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2.functional import resized_crop

    if how == "nearest":
        top, left, height, width = box
        return _copied(image[:, top : top + height, left : left + width], size)
    return resized_crop(image, *box, list(size), InterpolationMode(how), antialias=True)


def fit_one(image: Tensor, size: tuple[int, int], share: float, how: Interpolation) -> Tensor:
    """The same fit of one uint8 image (C, h, w) of any size, rounded to uint8 as PIL does."""
    if how == "adm":
        return adm_crop(image, size[0])
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2.functional import center_crop, resize

    resized = fitted(*image.shape[-2:], size, share)
    if how == "nearest":
        return center_crop(_copied(image, resized), list(size))
    return center_crop(resize(image, list(resized), InterpolationMode(how), antialias=True), list(size))


def _copied(image: Tensor, size: tuple[int, int]) -> Tensor:
    """An image (C, h, w) resized by copies of single pixels. torchvision's two ways of it fall otherwise than PIL's."""
    rows, columns = (nearest(torch.tensor([old]), new)[0] for old, new in zip(image.shape[1:], size, strict=True))
    return image[:, rows[:, None], columns]


def adm_crop(image: Tensor, size: int) -> Tensor:
    """The preprocessing of ADM (Dhariwal and Nichol 2021) and DiT, of one uint8 image (C, h, w): (C, size, size).

    A box filter halves the sides while the short one is at least twice `size`, bicubic does the rest, and the centre
    remains.
    """
    from PIL.Image import Resampling
    from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

    picture = to_pil_image(image)
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Resampling.BOX)
    scale = size / min(picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Resampling.BICUBIC)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return pil_to_tensor(picture.crop((left, top, left + size, top + size)))


def _adm_batch(images: Tensor, size: tuple[int, int]) -> Tensor:
    if images.shape[-2:] == size:
        return images
    levels = (images * 255).round().clamp(0, 255).byte().cpu()
    return torch.stack([adm_crop(image, size[0]) for image in levels]).to(images) / 255
