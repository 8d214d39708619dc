"""python -m locality_ablation.segments IMAGE... --figure FILE: segments drawn over images, beside patches.

Below each cut is what a token of it knows: the mean colour of its pixels.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.command import Parser, run_command
from common.errors import InputError
from common.figure import check_file, save
from common.model.vit import patch_grid
from locality_ablation.picture import image_of
from locality_ablation.segmentation import Felzenszwalb, Segments, Slic


def patches(image: Tensor, patch_size: int) -> Segments:
    """The cut that a Vision Transformer makes of an image (C, H, W)."""
    h, w = patch_grid(tuple(image.shape[1:]), patch_size)
    numbers = torch.arange(h * w).view(h, w)
    return Segments(numbers.repeat_interleave(patch_size, 0).repeat_interleave(patch_size, 1), 0.0)


def mean_colours(image: Tensor, labels: Tensor) -> np.ndarray:
    """An image uint8 (C, H, W) whose pixels have the mean of their segment: (H, W, C) in [0, 1]."""
    pixels, labels = image.flatten(1).numpy() / 255, labels.flatten().numpy()
    means = [np.bincount(labels, channel) / np.maximum(np.bincount(labels), 1) for channel in pixels]
    return np.stack([mean[labels] for mean in means], axis=-1).reshape(*image.shape[1:], -1)


def main(arguments: list[str]) -> int:
    parser = Parser("python -m locality_ablation.segments", __doc__)
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="pictures of any size")
    parser.add_argument("--figure", type=Path, required=True, metavar="FILE", help="a .png, .pdf or .svg")
    parser.add_argument("--size", type=int, default=224, help="side of their central squares; default: 224")
    parser.add_argument("--patch_size", type=int, default=16)
    parser.add_argument("--iterations", type=int, nargs="+", default=[1, 2, 10], help="of SLIC, a cut each; "
                                                                                      "default: 1 2 10")
    parser.add_argument("--scale", type=float, default=30.0, help="of Felzenszwalb and Huttenlocher; default: 30")
    options = parser.parse_args(arguments)
    check_file(options.figure)
    if options.size < 1:
        raise InputError(f"--size {options.size}: give a number of pixels, 1 or more")
    h, w = patch_grid((options.size, options.size), options.patch_size, "--patch_size")
    cuts = {"patches": lambda image: patches(image, options.patch_size)}
    cuts |= {f"SLIC, {n} iteration{'s' * (n > 1)}": Slic(n, h * w) for n in options.iterations}
    cuts[f"FH, scale {options.scale:g}"] = Felzenszwalb(options.scale)

    from matplotlib.figure import Figure
    from skimage.segmentation import mark_boundaries

    rows = 2 * len(options.images)
    figure = Figure(figsize=(2.5 * len(cuts), 2.75 * rows), dpi=150, layout="constrained")
    axes = figure.subplots(rows, len(cuts), squeeze=False)
    for number, file in enumerate(options.images):
        image = image_of(file, options.size)
        for column, (name, cut) in enumerate(cuts.items()):
            labels, merged = cut(image)
            over, below = axes[2 * number, column], axes[2 * number + 1, column]
            over.imshow(mark_boundaries(image.permute(1, 2, 0).numpy(), labels.numpy(), color=(1, 1, 0)))
            over.set_title(f"{name}: {len(labels.unique())} tokens\nmerged: {merged:.0%} of the pixels", fontsize=9)
            below.imshow(mean_colours(image, labels))
            for axis in (over, below):
                axis.set_axis_off()
    save(figure, options.figure)
    return 0


if __name__ == "__main__":
    run_command(main)
