"""Batched crops against torchvision's operators on single images."""

import pytest
import torch
from torchvision.transforms import InterpolationMode, v2

from common.data.crop import BOX_DRAWS, adm_crop, crop, fit, fit_one, fitted, random_boxes
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


def noise(*shape: int) -> torch.Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape, size, halvings, resized, corner", [
    ((700, 1000), 256, 1, (256, 366), (0, 55)),  # 350x500, whose long side becomes 365.7
    ((1000, 700), 256, 1, (366, 256), (55, 0)),
    ((512, 768), 64, 3, (64, 96), (0, 16)),  # the short side ends as the target: it was twice that before
    ((508, 768), 64, 2, (64, 97), (0, 16)),  # 127 is less than twice 64
    ((24, 31), 32, 0, (32, 41), (0, 4)),  # enlarged, to 41.3
], ids=str)  # fmt: skip
@pytest.mark.parametrize("channels", [1, 3])
def test_adm_equals_pooling_and_torchvision(
    shape: tuple[int, int], size: int, halvings: int, resized: tuple[int, int], corner: tuple[int, int], channels: int
) -> None:
    image = noise(channels, *shape)
    expected = image.float()
    for kernel in [(1, 2), (2, 1)] * halvings:  # halves round up, in each of PIL's two passes
        expected = (torch.nn.functional.avg_pool2d(expected, kernel) + 0.5).floor()
    expected = functional.resize(expected.byte(), list(resized), InterpolationMode.BICUBIC, antialias=True)
    expected = expected[:, corner[0] : corner[0] + size, corner[1] : corner[1] + size]
    ours = fit_one(image, (size, size), 1.0, "adm")
    assert ours.dtype == torch.uint8
    torch.testing.assert_close(ours.int(), expected.int(), atol=1, rtol=0)


def test_adm_rounds_the_margins_down() -> None:
    wide = noise(3, 256, 259)  # margins of 1.5, which round() would make 2
    assert adm_crop(wide, 256).equal(wide[:, :, 1:257])
    assert adm_crop(wide.mT.contiguous(), 256).equal(wide.mT[:, 1:257])


def test_adm_halves_blocks_exactly() -> None:
    image = noise(3, 32, 35)
    blocks = image.repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert adm_crop(blocks, 32).equal(image[:, :, 1:33])


def test_adm_halves_odd_sides_to_the_integer_below() -> None:
    image = torch.tensor([0, 0, 10, 20, 60, 0, 0], dtype=torch.uint8).expand(1, 2, 7).contiguous()
    assert adm_crop(image, 1).tolist() == [[[30]]]  # 7 columns become 3, the middle one of columns 2 to 4


def test_adm_of_a_batch_is_that_of_each_image() -> None:
    images = noise(3, 3, 70, 90)
    each = torch.stack([adm_crop(image, 32) for image in images]) / 255
    torch.testing.assert_close(fit(images / 255, (32, 32), 1.0, "adm"), each)
    flipped = fit(images / 255, (32, 32), 1.0, "adm", torch.tensor([True, False, True]))
    torch.testing.assert_close(flipped, torch.stack([each[0].flip(-1), each[1], each[2].flip(-1)]))


def test_adm_leaves_a_batch_of_the_final_size_alone() -> None:
    images = torch.rand(2, 1, 8, 8)
    assert fit(images, (8, 8), 1.0, "adm").equal(images)
    assert fit(images, (8, 8), 1.0, "adm", torch.tensor([False, True]))[1].equal(images[1].flip(-1))
