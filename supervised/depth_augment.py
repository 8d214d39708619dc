"""Joint augmentation of an image and its depth map: rotation, flip, colour (DINOv2's recipe for NYU-v2, after BTS)."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

DRAWS = 9  # uniform numbers per image


def augment(image: Tensor, depth: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate by up to 2.5 degrees, flip, and shift the colours, each with probability 0.5.

    What a rotation brings in from outside is black in the image and unknown (0) in the depth map.

    Args:
        image: (3, H, W) in [0, 1].
        depth: (1, H, W) in metres, 0 where unknown; sampled at the nearest pixel, so that depths never mix.
        draws: `DRAWS` uniform numbers in [0, 1).
    """
    rotated, angle, flipped, coloured, gamma, brightness, *tint = draws.tolist()
    if rotated < 0.5:
        angle = between(angle, -2.5, 2.5)
        image = tv.rotate(image, angle, InterpolationMode.BILINEAR)
        depth = tv.rotate(depth, angle, InterpolationMode.NEAREST)
    if flipped < 0.5:
        image, depth = image.flip(-1), depth.flip(-1)
    if coloured < 0.5:
        factors = between(brightness, 0.75, 1.25) * torch.tensor([between(value, 0.9, 1.1) for value in tint])
        image = (image ** between(gamma, 0.9, 1.1) * factors[:, None, None]).clamp(max=1)
    return image, depth


def between(draw: float, low: float, high: float) -> float:
    return low + (high - low) * draw


def resize_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Image (3, H, W) -> (3, *size), bilinear with antialiasing."""
    return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]


def resize_depth(depth: Tensor, size: tuple[int, int]) -> Tensor:
    """Depth (1, H, W) -> (1, *size) at the nearest pixel: a mean over an edge or a hole is the depth of nothing."""
    return F.interpolate(depth[None], size, mode="nearest-exact")[0]
