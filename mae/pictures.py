"""Reconstructions for the eye."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from common.model import unpatchify

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MASKED = (0.35, 0.45, 0.65)  # no grey, which could be a pixel's own


def panels(images: Tensor, reconstructions: Tensor, mask: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """What is shown of each image, (B, 4, 3, H, W): itself, masked, reconstructed, and reconstructed with the visible
    pixels pasted in.

    Args:
        images: (B, C, H, W) in [0, 1], as the reconstructions.
        mask: (B, L), 1 where a patch is masked.
    """
    masked = unpatchify(mask[:, :, None].expand(-1, -1, patch_size**2), grid, patch_size).bool()
    # Three channels as colours; of others the first, as grey.
    images, reconstructions = (x if x.shape[1] == 3 else x[:, :1].expand(-1, 3, -1, -1)
                               for x in (images, reconstructions))  # fmt: skip
    hidden = torch.where(masked, images.new_tensor(MASKED).view(3, 1, 1), images)
    pasted = torch.where(masked, reconstructions, images)
    return torch.stack([images, hidden, reconstructions, pasted], dim=1).clamp(0, 1)


def figure(shown: Tensor, title: str) -> Figure:
    """A matplotlib figure of panels (B, 4, 3, H, W), one row per image, pixels as squares."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = len(shown)
    drawn = Figure(figsize=(8, 0.7 + 2 * rows), layout="constrained")
    FigureCanvasAgg(drawn)
    drawn.suptitle(title, fontsize=11)
    axes = drawn.subplots(rows, 4, squeeze=False)
    headings = ("original", "masked", "reconstruction", "with visible pixels")
    for heading, axis in zip(headings, axes[0], strict=True):
        axis.set_title(heading, fontsize=10)
    for row, images in zip(axes, shown.float().cpu(), strict=True):
        for axis, image in zip(row, images, strict=True):
            axis.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set_axis_off()
    return drawn
