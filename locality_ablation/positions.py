"""python -m locality_ablation.positions RUN_FOLDER... --figure FILE: which positions a model takes for alike.

Transformers on pixels are told nothing of the grid. For each run the picture shows the cosine similarity of each
position's embedding with those of all others, at its place (Dosovitskiy et al. 2021, figure 7). Printed is how often
the most similar other position is one of the neighbours in the grid, beside what chance would give. At patch size 1
under a permutation, a position is shown where its pixel comes from.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.command import Parser, run_command
from common.errors import InputError
from common.figure import check_file, save
from common.training.checkpoints import newest_readable
from common.training.initialisation import content_of, weights_in

SHOWN = 16  # positions along a side that have a map of their own


class Similarity(NamedTuple):
    """Cosines (L, L) of the positions of a grid (h, w)."""

    cosines: Tensor
    grid: tuple[int, int]

    def neighbours_found(self) -> tuple[float, float]:
        """The share of positions whose most similar other one touches them, corners included; and that of chance."""
        h, w = self.grid
        others = self.cosines.clone().fill_diagonal_(-torch.inf)
        place = torch.stack([torch.arange(h * w) // w, torch.arange(h * w) % w], dim=1)
        nearest = place[others.argmax(1)]
        found = ((nearest - place).abs().amax(1) <= 1).float().mean()
        touching = ((place[:, None] - place).abs().amax(2) == 1).float().sum(1).mean()
        return found.item(), touching.item() / (h * w - 1)


def similarity(folder: str) -> Similarity:
    """Of the position table in a run folder or a checkpoint.

    Raises:
        InputError: no run folder, or one whose model has no position table.
    """
    if not Path(folder).is_file() and newest_readable(Path(folder) / "checkpoints") is None:
        raise InputError(f"{folder}: not a run folder with a checkpoint")
    content = content_of(folder)
    table = weights_in(content, "ema", folder).get("pos_embed")
    if table is None:
        raise InputError(f"{folder}: its model has no position table (model.position: none, or no Vision Transformer)")
    if "beyond_shapes" not in content:
        raise InputError(f"{folder}: not a checkpoint of this suite, whose grid of positions would be known")
    h, w = content["beyond_shapes"]["grid"]
    table = table[0, table.shape[1] - h * w :].float()
    order = content["state_dict"].get("permuted.order")
    if order is not None and len(order) == h * w:  # one token a pixel, which comes from another place
        table = torch.empty_like(table).index_copy_(0, order.cpu(), table)
    normal = F.normalize(table, dim=1)
    return Similarity(normal @ normal.T, (h, w))


def tiles(similar: Similarity) -> np.ndarray:
    """The maps of the positions, every so many of a large grid, side by side with a gap of one cell."""
    h, w = similar.grid
    rows, columns = range(0, h, -(-h // SHOWN)), range(0, w, -(-w // SHOWN))
    canvas = np.full((len(rows) * (h + 1) - 1, len(columns) * (w + 1) - 1), np.nan)
    maps = similar.cosines.view(h, w, h, w).numpy()
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            canvas[i * (h + 1) : i * (h + 1) + h, j * (w + 1) : j * (w + 1) + w] = maps[row, column]
    return canvas


def main(arguments: list[str]) -> int:
    parser = Parser("python -m locality_ablation.positions", __doc__)
    parser.add_argument("folders", nargs="+", metavar="RUN_FOLDER", help="of a Vision Transformer with positions")
    parser.add_argument("--figure", type=Path, required=True, metavar="FILE", help="a .png, .pdf or .svg")
    options = parser.parse_args(arguments)
    check_file(options.figure)
    found = {folder: similarity(folder) for folder in options.folders}

    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(found), 6.2), dpi=150, layout="constrained")
    for axis, (folder, similar) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        share, chance = similar.neighbours_found()
        told = f"most similar position is a neighbour: {share:.0%} (chance {chance:.0%})"
        print(f"{folder}: {told}")
        others = similar.cosines[~torch.eye(len(similar.cosines), dtype=bool)]
        shown = axis.imshow(tiles(similar), vmin=others.min().item(), vmax=others.max().item(), cmap="viridis")
        axis.set_title(f"{Path(folder).name}\n{told}", fontsize=10)
        axis.set_axis_off()
        figure.colorbar(shown, ax=axis, shrink=0.75, label="cosine similarity")
    save(figure, options.figure)
    return 0


if __name__ == "__main__":
    run_command(main)
