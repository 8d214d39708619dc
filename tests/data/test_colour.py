"""Batched colour operations against torchvision's operators on single images."""

import itertools

import pytest
import torch
from torchvision.transforms.v2 import functional

from common.data.colour import jitter, normalised, shift_hue

OPERATIONS = [functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation,
              functional.adjust_hue]  # fmt: skip


@pytest.mark.parametrize("gpu_steps", [False, True])
def test_jitter_equals_torchvision_in_every_order(gpu_steps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if gpu_steps:  # without counts, every step takes all images, as it does on a GPU
        monkeypatch.setattr(torch, "searchsorted", lambda *_: torch.tensor([]))
    order = torch.tensor(list(itertools.permutations(range(4))) * 2)
    order = order[torch.randperm(len(order))]
    images = torch.rand(len(order), 3, 7, 9)
    images[:8, 1] = images[:8, 0]  # ties between channels
    images[4:8] = images[4:8, :1]  # greys
    factors = torch.rand(len(order), 4) * 1.6 + 0.2
    factors[:, 3] = torch.rand(len(order)) - 0.5
    ours = jitter(images, factors, order)
    for i, image in enumerate(images):
        for operation in order[i].tolist():
            image = OPERATIONS[operation](image, factors[i, operation].item())
        torch.testing.assert_close(ours[i], image, atol=1e-5, rtol=0)


def test_the_input_is_not_written_to() -> None:
    images = torch.rand(4, 3, 5, 5)
    before = images.clone()
    jitter(images, torch.full((4, 4), 0.5), torch.arange(4).expand(4, 4))
    assert images.equal(before)


def test_hue_on_the_corners_of_the_cube() -> None:
    corners = torch.tensor(list(itertools.product([0.0, 1.0], repeat=3))).T[None]  # (1, 3, 8)
    turned = shift_hue(corners, torch.tensor([1 / 3]))
    torch.testing.assert_close(turned, corners.roll(1, dims=1), atol=1e-6, rtol=0)  # red to green to blue


def test_grey_and_normalisation_equal_torchvision() -> None:
    images, grey = torch.rand(6, 3, 4, 4), torch.arange(6) % 2 == 0
    mean, std = [0.49, 0.48, 0.44], [0.2, 0.19, 0.21]
    ours = normalised(images, torch.tensor(mean), torch.tensor(std), grey)
    for i, image in enumerate(images):
        image = functional.rgb_to_grayscale(image, 3) if grey[i] else image
        torch.testing.assert_close(ours[i], functional.normalize(image, mean, std), atol=1e-5, rtol=0)


def test_one_channel_is_normalised() -> None:
    images = torch.rand(2, 1, 3, 3)
    torch.testing.assert_close(normalised(images, torch.tensor([0.5]), torch.tensor([0.25])), (images - 0.5) / 0.25)
