"""Samples for the eye."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure


WRAPPED = 20  # letters of a row's name in a line, which is as long as the row is high


def grid(
    images: Tensor, names: Sequence[str], title: str, columns: int = 8, rows_named: Sequence[str] = ()
) -> Figure:
    """A matplotlib figure of uint8 images (B, C, H, W), pixels as squares, with their names above them, if any, and
    beside the rows theirs.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = -(-len(images) // columns)
    figure = Figure(figsize=(1.2 * columns, 0.5 + 1.4 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(rows, columns, squeeze=False).flat
    pictures = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()
    for number, axis in enumerate(axes):
        axis.set_axis_off()
        if number < len(pictures):
            axis.imshow(pictures[number], interpolation="nearest")
        if number < len(names):
            axis.set_title(names[number], fontsize=8)
    for row, name in enumerate(rows_named):
        axes[row * columns].text(-0.05, 0.5, fill(name, WRAPPED), fontsize=8, rotation=90, ha="right", va="center",
                                 transform=axes[row * columns].transAxes)  # fmt: skip
    return figure
