"""Batched crops against torchvision's operators on single images."""

import pytest
import torch
from torchvision.transforms import InterpolationMode, v2

from common.data.crop import BOX_DRAWS, crop, fit, fit_one, fitted, random_boxes
from common.randomness import uniform

functional = v2.functional
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def draws(n: int) -> torch.Tensor:
    return uniform("test", 0, torch.arange(n), n=BOX_DRAWS)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(32, 32), (9, 20), (50, 33)], ids=str)  # enlarges, shrinks, and both at once
def test_a_crop_equals_torchvision(interpolation: str, size: tuple[int, int]) -> None:
    images = torch.rand(64, 3, 40, 32)
    boxes = random_boxes(draws(64), 40, 32, SCALE, RATIO)
    flip = torch.arange(64) % 3 == 0
    ours = crop(images, boxes, size, interpolation, flip)
    for i, box in enumerate(zip(*(side.tolist() for side in boxes), strict=True)):
        theirs = functional.resized_crop(images[i], *box, list(size), InterpolationMode(interpolation), antialias=True)
        torch.testing.assert_close(ours[i], theirs.flip(-1) if flip[i] else theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("height, width, ratio", [(32, 32, RATIO), (24, 60, RATIO), (30, 30, (0.2, 5.0))])
def test_boxes_are_distributed_as_torchvisions(height: int, width: int, ratio: tuple[float, float]) -> None:
    n = 4000
    ours = torch.stack(random_boxes(draws(n), height, width, SCALE, ratio), 1).double()
    top, left, high, wide = ours.unbind(1)
    assert min(top.min(), left.min()) >= 0 and min(high.min(), wide.min()) >= 1
    assert (top + high).max() <= height and (left + wide).max() <= width
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = torch.tensor([v2.RandomResizedCrop(1, SCALE, ratio).make_params([image])[k]
                           for _ in range(n) for k in ("top", "left", "height", "width")]).view(n, 4).double()
    for a, b in zip(ours.unbind(1), theirs.unbind(1), strict=True):  # Kolmogorov and Smirnov, at a level of 1e-4
        grid = torch.arange(max(height, width) + 1)
        distance = ((a[:, None] <= grid).double().mean(0) - (b[:, None] <= grid).double().mean(0)).abs().max()
        assert distance < 2.23 * (2 / n) ** 0.5


@pytest.mark.parametrize("height, width, box", [(100, 10, (43, 0, 13, 10)), (10, 100, (0, 43, 10, 13))])
def test_where_no_try_fits_the_box_is_central(height: int, width: int, box: tuple[int, ...]) -> None:
    boxes = random_boxes(draws(16), height, width, (1.0, 1.0), RATIO)  # all of so long an image has no such shape
    assert torch.stack(boxes, 1).tolist() == [list(box)] * 16


@pytest.mark.parametrize("size, short", [(14, 16), (28, 32), (56, 64), (64, 73), (112, 128), (224, 256)])
def test_evaluation_sizes_of_the_reference(size: int, short: int) -> None:
    assert fitted(375, 500, (size, size), 0.875) == (short, short * 500 // 375)
    assert fitted(500, 375, (size, size), 0.875) == (short * 500 // 375, short)


def test_a_wide_input_is_covered() -> None:
    assert fitted(480, 640, (48, 64), 1.0) == (48, 64)
    assert fitted(500, 500, (48, 64), 1.0) == (64, 64)
    assert fitted(100, 500, (48, 64), 1.0) == (48, 240)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("shape, size", [((37, 50), (28, 28)), ((50, 37), (12, 20)), ((8, 8), (16, 16))], ids=str)
def test_evaluation_equals_torchvision(interpolation: str, shape: tuple[int, int], size: tuple[int, int]) -> None:
    images = 0.3 + 0.4 * torch.rand(3, 3, *shape)  # so that 8 bits clip nothing between the two resizings
    mode = InterpolationMode(interpolation)
    resized = functional.resize(images, list(fitted(*shape, size, 0.875)), mode, antialias=True)
    theirs = functional.center_crop(resized, list(size))
    torch.testing.assert_close(fit(images, size, 0.875, interpolation), theirs, atol=1e-5, rtol=0)
    flipped = fit(images, size, 0.875, interpolation, torch.tensor([True, False, True]))
    torch.testing.assert_close(flipped, torch.stack([theirs[0].flip(-1), theirs[1], theirs[2].flip(-1)]),
                               atol=1e-5, rtol=0)
    one = fit_one((images[0] * 255).round().byte(), size, 0.875, interpolation)
    torch.testing.assert_close(one / 255, theirs[0], atol=2 / 255, rtol=0)


def test_an_image_of_the_final_size_is_left_alone() -> None:
    images = torch.rand(2, 1, 8, 8)
    assert fit(images, (8, 8), 1.0, "bicubic").equal(images)
