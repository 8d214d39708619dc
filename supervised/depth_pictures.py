"""Depth for the eye: previews and figures."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from supervised.depth_data import MEAN, STD

COLOURS = "turbo"


def preview(depth: np.ndarray) -> np.ndarray:
    """Depth (H, W) -> colours (H, W, 3) uint8, over the map's own range: near is blue, far is red."""
    from matplotlib import colormaps

    low, high = depth.min(), depth.max()
    return colormaps[COLOURS]((depth - low) / max(high - low, 1e-6), bytes=True)[..., :3]


def comparison(images: Tensor, truth: Tensor, prediction: Tensor, depth_range: tuple[float, float], title: str) -> Any:
    """A matplotlib figure with one row per image: image, true depth, predicted depth, error.

    Args:
        images: (B, 3, h, w), normalised.
        truth: (B, 1, H, W) in metres; outside `depth_range` it is unknown, and white.
        prediction: (B, 1, H, W) in metres. The colours of both depths cover the row's range of truths.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    pictures = (images.float().cpu() * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    depths, guesses = (maps[:, 0].float().cpu().numpy() for maps in (truth, prediction))
    known = (depths > depth_range[0]) & (depths < depth_range[1])
    errors = np.where(known, guesses - depths, np.nan)
    depths = np.where(known, depths, np.nan)
    limit = max(float(np.nanquantile(np.abs(errors), 0.98)), 1e-3) if known.any() else 1.0

    figure = Figure(figsize=(10, 0.5 + 1.75 * len(pictures)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    axes = figure.subplots(len(pictures), 4, squeeze=False)
    for heading, axis in zip(("image", "depth, m", "prediction, m", "prediction - depth, m"), axes[0], strict=True):
        axis.set_title(heading, fontsize=10)
    for row, picture, depth, guess, error in zip(axes, pictures, depths, guesses, errors, strict=True):
        span = {"vmin": np.nanmin(depth), "vmax": np.nanmax(depth)} if np.isfinite(depth).any() else {}
        row[0].imshow(picture)
        row[1].imshow(depth, cmap=COLOURS, **span)
        shown = row[2].imshow(guess, cmap=COLOURS, **span)
        off = row[3].imshow(error, cmap="RdBu_r", vmin=-limit, vmax=limit)
        figure.colorbar(shown, ax=row[1:3], shrink=0.9, aspect=12)
        figure.colorbar(off, ax=row[3], shrink=0.9, aspect=12)
        for axis in row:
            axis.set_axis_off()
    return figure
