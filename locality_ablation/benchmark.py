"""python -m locality_ablation.benchmark: what permuting costs a training step, and how many images a core segments.

A ViT-S/16 at 224 pixels takes steps (forward, loss, backward, AdamW; fp32 on the CPU) with and without a permutation,
in turns. Segmentations cut scikit-image's photographs, or those of --images, shrunk to 224 pixels, on one thread. The
result is Markdown for RESULTS.md.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from common.advice import quieten
from common.benchmark.interleaving import interleaved, ratios, timed
from common.benchmark.report import check_counts, circumstances, table
from common.command import Parser, run_command
from common.data.crop import fit_one
from common.data.folders import is_image
from common.errors import InputError
from common.model import VisionTransformer
from common.training.optim import Recipe, adamw
from locality_ablation.permutation import Permutation, PixelPermutation
from locality_ablation.picture import image_of
from locality_ablation.segmentation import Felzenszwalb, Segmentation, Slic

SIDE, PATCH = 224, 16
RECIPE = Recipe(lr=1e-4)
CUTS: dict[str, Segmentation] = {
    "SLIC, 1 iteration": Slic(1), "SLIC, 2 iterations": Slic(2), "SLIC, 10 iterations": Slic(10),
    "Felzenszwalb, scale 30": Felzenszwalb(30),
}  # fmt: skip


class Step:
    """A training step of a ViT-S/16 on one random batch, whose images may be permuted first."""

    def __init__(self, batch: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.net = VisionTransformer(SIDE, PATCH, size="small")
        self.images = torch.randn(batch, 3, SIDE, SIDE, generator=generator)
        self.labels = torch.randint(1000, (batch,), generator=generator)
        self.permuted = PixelPermutation(Permutation(swaps=25_000).order((SIDE, SIDE), PATCH, 0), (SIDE, SIDE))
        self.optimizer = adamw(self.net, RECIPE, RECIPE.lr)

    def __call__(self, permute: bool) -> float:
        images = self.permuted(self.images) if permute else self.images
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.net(images), self.labels)
        loss.backward()
        self.optimizer.step()
        return loss.item()


def permuting(batch: int, rounds: int) -> tuple[str, ...]:
    """A row: times of a step, their ratio, and the permutation alone as a share of a step."""
    step = Step(batch)
    step(True)  # the first allocates the optimiser's state
    sides = {"intact": timed(lambda: step(False)), "permuted": timed(lambda: step(True)),
             "alone": timed(lambda: step.permuted(step.images).sum().item())}  # fmt: skip
    seconds = interleaved(sides, rounds)
    intact, permuted, alone = (statistics.median(times) for times in seconds.values())
    share = ratios(seconds["intact"], seconds["alone"])
    return (f"{1e3 * intact:.0f}", f"{1e3 * permuted:.0f}", f"{ratios(seconds['intact'], seconds['permuted']):.3f}",
            f"{1e3 * alone:.1f}", f"{100 * share.median:.2f} %")  # fmt: skip


def photographs(folder: Path | None) -> list[Tensor]:
    """Images uint8 (3, 224, 224).

    Raises:
        InputError: a folder without images.
    """
    if folder is None:
        from skimage import data

        pictures = (data.astronaut(), data.chelsea(), data.coffee())
        whole = [torch.from_numpy(picture).permute(2, 0, 1) for picture in pictures]
        return [fit_one(image, (SIDE, SIDE), 1.0, "bicubic") for image in whole]
    files = sorted(path for path in folder.rglob("*") if is_image(path)) if folder.is_dir() else []
    if not files:
        raise InputError(f"--images {folder}: there are no images")
    return [image_of(file, SIDE) for file in files]


def segmenting(images: list[Tensor], rounds: int) -> list[tuple[str, ...]]:
    """A row for each segmentation: images/s of one core, segments before and after merging, merged pixels."""

    def run(cut: Segmentation) -> float:
        return float(sum(cut(image).merged for image in images))

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds = interleaved({name: timed(lambda cut=cut: run(cut)) for name, cut in CUTS.items()}, rounds)
    torch.set_num_threads(threads)
    rows = []
    for name, cut in CUTS.items():
        pixels = [image.permute(1, 2, 0).numpy() / 255 for image in images]
        before = statistics.fmean(len(set(cut.cut(picture).ravel().tolist())) for picture in pixels)
        merged = statistics.fmean(cut(image).merged for image in images)
        rows.append((name, f"{len(images) / statistics.median(seconds[name]):.1f}", f"{before:.0f}", f"{merged:.1%}"))
    return rows


def main(arguments: list[str]) -> int:
    parser = Parser("python -m locality_ablation.benchmark", __doc__)
    parser.add_argument("--batch", type=int, default=8, help="images of a training step; default: 8")
    parser.add_argument("--rounds", type=int, default=7, help="default: 7")
    parser.add_argument("--images", type=Path, metavar="DIR", help="photographs to segment")
    options = parser.parse_args(arguments)
    check_counts(options, batch=1, rounds=1)
    images = photographs(options.images)
    quieten()
    print("\n".join(circumstances("locality_ablation.benchmark", arguments, options.rounds)))
    print("\nA training step of ViT-S/16 at 224 pixels\n")
    columns = ("intact, ms", "permuted, ms", "ratio (quartiles)", "permutation alone, ms", "of a step")
    print("\n".join(table(columns, [permuting(options.batch, options.rounds)])))
    print(f"\nSegmentation of {len(images)} photographs at 224 pixels, at most 225 segments\n")
    columns = ("segmentation", "images/s of a core", "segments before merging", "merged pixels")
    print("\n".join(table(columns, segmenting(images, options.rounds))))
    return 0


if __name__ == "__main__":
    run_command(main)
