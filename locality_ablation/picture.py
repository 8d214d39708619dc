"""python -m locality_ablation.picture --figure FILE: what a permutation does to an image (the paper's figure 4).

By default a toy image of 8x8 pixels in patches of 2x2 under 4 swaps, at delta 2, 4, 8 and inf, with a line between the
pixels that changed places. --image FILE takes any picture instead.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from common.command import Parser, run_command
from common.errors import InputError
from common.figure import check_file, save
from common.model.vit import patch_grid
from locality_ablation.permutation import Delta, Permutation, PixelPermutation

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LINES = 64  # swaps; more would hide the image


def toy(side: int) -> torch.Tensor:
    """An image uint8 (3, side, side) whose every pixel has a colour of its own: red by row, blue by column."""
    row = torch.linspace(40, 230, side)[:, None].expand(side, side)
    return torch.stack([row, 235 - (row + row.mT) / 2.2, row.mT]).round().byte()


def image_of(file: Path, side: int) -> torch.Tensor:
    """The central square of a picture, uint8 (3, side, side).

    Raises:
        InputError: no picture.
    """
    if not file.is_file():
        raise InputError(f"{file}: there is no such picture")
    from common.data.crop import fit_one
    from common.data.folders import decode

    return fit_one(decode(str(file), 3), (side, side), 1.0, "bicubic")


def show(axis: Axes, image: torch.Tensor, patch_size: int, title: str) -> None:
    """An image uint8 (3, H, W) with the borders of its patches."""
    side = image.shape[-1]
    axis.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
    axis.set_title(title, fontsize=9)
    axis.set_xticks(np.arange(patch_size, side, patch_size) - 0.5, minor=True)
    axis.set_yticks(np.arange(patch_size, side, patch_size) - 0.5, minor=True)
    axis.set(xticks=[], yticks=[])
    axis.grid(which="minor", color="white", linewidth=2.0 if side <= 32 else 0.3)
    axis.tick_params(which="minor", length=0)


def delta(text: str) -> Delta:
    if text != "inf" and not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text} is neither a whole number, 2 or more, nor inf")
    return "inf" if text == "inf" else int(text)


def main(arguments: list[str]) -> int:
    parser = Parser("python -m locality_ablation.picture", __doc__)
    parser.add_argument("--figure", type=Path, required=True, metavar="FILE", help="a .png, .pdf or .svg")
    parser.add_argument("--image", type=Path, metavar="FILE", help="a picture; default: the toy image")
    parser.add_argument("--size", type=int, metavar="N", help="its side in pixels; default: 224, 8 of the toy image")
    parser.add_argument("--patch_size", type=int, metavar="P", help="default: 16, 2 of the toy image")
    parser.add_argument("--swaps", type=int, metavar="T", help="default: 10000, 4 of the toy image")
    parser.add_argument("--delta", type=delta, nargs="+", default=[2, 4, 8, "inf"], metavar="D",
                        help="a panel each; default: 2 4 8 inf")
    parser.add_argument("--distance", choices=["window", "manhattan"], default="window")
    parser.add_argument("--pairs", choices=["anywhere", "within", "across", "shared"], default="anywhere")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    check_file(options.figure)
    usual = (224, 16, 10_000) if options.image else (8, 2, 4)
    side, patch_size, swaps = (usual_ if given is None else given for usual_, given in zip(
        usual, (options.size, options.patch_size, options.swaps), strict=True))
    if side < 1:
        raise InputError(f"--size {side}: give a number of pixels, 1 or more")
    patch_grid((side, side), patch_size, "--patch_size")
    image = image_of(options.image, side) if options.image else toy(side)
    orders = {reach: Permutation(swaps, None, reach, options.distance, options.pairs).order(
        (side, side), patch_size, options.seed) for reach in options.delta}

    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.3 * (len(orders) + 1), 2.75), dpi=150, layout="constrained")
    figure.suptitle(f"{swaps:,} of {side * side // 2:,} pairs of pixels swapped", fontsize=10)
    axes = figure.subplots(1, len(orders) + 1)
    show(axes[0], image, patch_size, "intact")
    for axis, (reach, order) in zip(axes[1:], orders.items(), strict=True):
        permuted = PixelPermutation(order, (side, side))(image[None])[0]
        show(axis, permuted, patch_size, f"δ = {'∞' if reach == 'inf' else reach}")
        if swaps <= LINES:
            for pixel in (order > torch.arange(len(order))).nonzero()[:, 0].tolist():
                (y, x), (v, u) = divmod(pixel, side), divmod(int(order[pixel]), side)
                axis.plot([x, u], [y, v], color="black", marker="o", markersize=3, linewidth=1.2)
    save(figure, options.figure)
    return 0


if __name__ == "__main__":
    run_command(main)
