"""Joint augmentation: an image and its depth map stay aligned."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from supervised.depth_augment import augment, resize_depth, resize_image

OFF = 0.9  # a draw that leaves a step out
STILL = [OFF, 0.5, OFF, OFF, 0.5, 0.5, 0.5, 0.5, 0.5]


def draws(**changes: float) -> torch.Tensor:
    names = ["rotated", "angle", "flipped", "coloured", "gamma", "brightness", "red", "green", "blue"]
    return torch.tensor([changes.get(name, value) for name, value in zip(names, STILL, strict=True)])


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(3, 40, 60, generator=generator), 1 + torch.rand(1, 40, 60, generator=generator)


def test_nothing_drawn_changes_nothing(pair):
    image, depth = augment(*pair, draws())
    assert torch.equal(image, pair[0]) and torch.equal(depth, pair[1])


def test_a_flip_mirrors_both(pair):
    image, depth = augment(*pair, draws(flipped=0.1))
    assert torch.equal(image, pair[0].flip(-1)) and torch.equal(depth, pair[1].flip(-1))


@pytest.mark.parametrize(("draw", "degrees"), [(0.0, -2.5), (1.0, 2.5)])
def test_a_rotation_turns_both_alike_and_marks_what_comes_in_as_unknown(draw, degrees):
    rows, columns = np.mgrid[:60, :80].astype(np.float32)
    smooth = 1 + rows / 60 + columns / 40  # bilinear and nearest sampling agree to within a pixel's slope
    image, depth = augment(torch.tensor(smooth / 5).expand(3, -1, -1), torch.tensor(smooth)[None],
                           draws(rotated=0.1, angle=draw))
    reference = ndimage.rotate(smooth, degrees, reshape=False, order=1)
    inner = (slice(10, -10), slice(10, -10))
    np.testing.assert_allclose(image[0][inner] * 5, reference[inner], atol=0.01)
    np.testing.assert_allclose(depth[0][inner], reference[inner], atol=0.05)
    x, y, angle = columns - 39.5, rows - 29.5, np.deg2rad(degrees)
    source = np.stack([x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle)])
    covered = (np.abs(source[0]) < 40) & (np.abs(source[1]) < 30)
    assert (covered != (depth[0] > 0).numpy()).sum() <= 4 and covered.mean() < 0.99


def test_colours_are_gamma_then_brightness_and_tint_and_leave_depth_alone(pair):
    image, depth = augment(*pair, draws(coloured=0.1, gamma=0.0, brightness=1.0, red=0.0, green=0.5, blue=1.0))
    expected = pair[0].numpy() ** 0.9 * 1.25 * np.array([0.9, 1.0, 1.1]).reshape(3, 1, 1)
    np.testing.assert_allclose(image, expected.clip(0, 1), rtol=1e-5)
    assert torch.equal(depth, pair[1])


def test_resizing_depth_never_mixes_depths_and_resizing_images_averages():
    depth = torch.tensor([1.0, 0.0]).repeat(1, 4, 6)
    assert set(resize_depth(depth, (2, 4)).unique().tolist()) <= {0.0, 1.0}
    stripes = torch.tensor([1.0, 0.0]).repeat(3, 40, 30)
    assert resize_image(stripes, (4, 6)).sub(0.5).abs().max() < 0.05  # without antialiasing it would be 0 or 1
