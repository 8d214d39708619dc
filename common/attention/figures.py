"""Figures of attention: measures by layer and head (figures 6 and 7), maps over images (figure 8)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GROUPS = ("early", "middle", "late")


def layers_of(group: int, depth: int) -> range:
    """Thirds of the depth: layers 0 to 3, 4 to 7 and 8 to 11 of twelve."""
    return range(group * depth // 3, (group + 1) * depth // 3)


def by_layer_and_head(values: Mapping[str, Tensor], label: str) -> Figure:
    """A row for each run, a panel for each third of its layers; in a panel a line for each layer, its heads sorted.

    Args:
        values: name of a run -> (layers, heads).
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 0.7 + 2.7 * len(values)), dpi=150, layout="constrained")
    figure.supylabel(label, fontsize=9)
    panels = figure.subplots(len(values), 3, sharey=True, squeeze=False)
    for row, (name, table) in zip(panels, values.items(), strict=True):
        for group, axes in enumerate(row):
            layers = layers_of(group, len(table))
            for place, layer in enumerate(layers):
                heads = table[layer].sort().values.numpy()
                colour = colormaps["viridis"](0.85 * place / max(len(layers) - 1, 1))
                axes.plot(range(1, len(heads) + 1), heads, color=colour, marker="o", markersize=3, linewidth=1.4,
                          label=f"layer {layer + 1}")
            axes.set_title(f"{name}: {GROUPS[group]} layers", fontsize=9)
            axes.set_xlabel("heads, sorted")
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid(alpha=0.3, linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
            if len(layers):
                axes.legend(fontsize=7, frameon=False)
    panels[0][0].set_ylim(0, 1.08 * max(float(table.max()) for table in values.values()))
    return figure


def over_images(
    images: Tensor, maps: Sequence[Tensor], queries: Sequence[tuple[float, float]], titles: Sequence[str]
) -> Figure:
    """A row for each image: the image, and maps, each from its least to its largest value with a cross at its query.

    Args:
        images: (B, C, H, W) in [0, 1].
        maps: for each title the maps of all images, (B, rows, columns).
        queries: for each title where the cross is, from the top and from the left, as shares of the sides.
    """
    from matplotlib.figure import Figure

    count, columns = len(images), 1 + len(maps)
    height, width = images.shape[2:]
    figure = Figure(figsize=(1.9 * columns, 0.4 + 1.9 * count * height / width), dpi=150, layout="constrained")
    for i, row in enumerate(figure.subplots(count, columns, squeeze=False)):
        picture = images[i].expand(3, -1, -1).permute(1, 2, 0).numpy()
        extent = (0, width, height, 0)
        row[0].imshow(picture, extent=extent)
        for axes, title, (down, right), of_images in zip(row[1:], titles, queries, maps, strict=True):
            axes.imshow(of_images[i].numpy(), extent=extent, cmap="magma")
            axes.plot(right * width, down * height, "x", color="#56B4E9", markersize=5, markeredgewidth=1.5)
            if i == 0:
                axes.set_title(title, fontsize=8)
        for axes in row:
            axes.axis("off")
    return figure


def in_colours(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalised images (B, C, H, W) as they look, in [0, 1]."""
    scale, shift = (torch.tensor(np.asarray(values), dtype=images.dtype)[:, None, None] for values in (std, mean))
    return (images * scale + shift).clamp(0, 1)
