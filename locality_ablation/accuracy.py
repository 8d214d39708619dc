"""python -m locality_ablation.accuracy RUN_FOLDER... --figure FILE: accuracy against the number of swaps, or against
how far they reach (the paper's figure 5). Runs that differ in seed alone are one point, mean and standard deviation.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from common.command import Parser, run_command
from common.errors import InputError
from common.figure import check_file, save
from common.identity import differing
from common.runs import Group, Statistic, find_runs, group_runs
from locality_ablation.permutation import Permutation

UNLIMITED = "inf"
VARIED = {"model.permutation.swaps", "model.permutation.share", "model.permutation.delta", "seed_everything"}


class Point(NamedTuple):
    """One arm: its swaps, its delta, all pairs of its images, and its accuracy."""

    swaps: int
    delta: int | str
    pairs: int
    accuracy: Statistic


def point(group: Group) -> Point:
    """What the figure needs of an arm.

    Raises:
        InputError: it was not trained under a permutation.
    """
    config = group.runs[0].config
    if "model.permutation.swaps" not in config:
        raise InputError(f"{group.runs[0].folder}: not a run of locality_ablation.PermutedClassification")
    side = config["data.image_size"]
    height, width = (side, side) if isinstance(side, int) else side
    pairs = height * width // 2
    permutation = Permutation(config["model.permutation.swaps"], config.get("model.permutation.share"))
    return Point(permutation.count(pairs), config["model.permutation.delta"], pairs, group.statistic("val/acc1"))


def check_alike(groups: Sequence[Group]) -> None:
    """Refuses arms that differ in more than how many pixels they swap and how far: one line would hide it."""
    for group in groups[1:]:
        found = differing(group.runs[0].config, groups[0].runs[0].config).keys() - VARIED
        if found:
            raise InputError(f"{group.runs[0].folder}: differs from {groups[0].runs[0].folder} in "
                             f"{', '.join(sorted(found))}, which the figure does not show; draw them apart")


def main(arguments: list[str]) -> int:
    parser = Parser("python -m locality_ablation.accuracy", __doc__)
    parser.add_argument("folders", nargs="+", metavar="RUN_FOLDER", help="of PermutedClassification")
    parser.add_argument("--figure", type=Path, required=True, metavar="FILE", help="a .png, .pdf or .svg")
    parser.add_argument("--against", choices=["swaps", "delta"], default="swaps")
    options = parser.parse_args(arguments)
    check_file(options.figure)
    groups, left_out = group_runs(find_runs(options.folders))
    for run in left_out:
        print(f"not drawn: {run.folder}, {run.status} {run.problem}")
    if not groups:
        raise InputError("no figure: there is no finished run")
    points = [point(group) for group in groups]
    check_alike(groups)
    if not any(p.swaps for p in points):
        raise InputError("no figure: none of the runs swaps any pixels")
    draw(points, options.against, options.figure)
    return 0


def draw(points: list[Point], against: str, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.9), dpi=150, layout="constrained")
    axes = figure.subplots()
    if against == "swaps":
        lines = {delta: [p for p in points if p.delta == delta or not p.swaps] for delta in _deltas(points)}
        for delta, line in lines.items():
            line = sorted(line)
            _line(axes, [p.swaps for p in line], line, f"δ = {'∞' if delta == UNLIMITED else delta}")
        pairs = points[0].pairs
        axes.set_xlabel("T, swapped pairs")
        axes.secondary_xaxis("top", (lambda t: 100 * t / pairs, lambda s: s * pairs / 100)).set_xlabel(
            f"share of all {pairs:,} pairs (%)")
    else:
        deltas = _deltas(points)
        for swaps in sorted({p.swaps for p in points if p.swaps}):
            line = sorted((p for p in points if p.swaps == swaps), key=lambda p: deltas.index(p.delta))
            _line(axes, [deltas.index(p.delta) for p in line], line, f"T = {swaps:,} ({swaps / line[0].pairs:.0%})")
        for p in points:
            if not p.swaps:
                axes.axhline(p.accuracy.mean, color="black", linestyle=":", linewidth=1.2, label="intact")
        axes.set_xticks(range(len(deltas)), ["∞" if delta == UNLIMITED else str(delta) for delta in deltas])
        axes.set_xlabel("δ, how far a swap reaches")
    axes.set_ylabel("validation Acc@1 (%)")
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.legend(frameon=False, fontsize=8.5)
    save(figure, path)


def _deltas(points: list[Point]) -> list[int | str]:
    """Of the arms that swap anything, the unlimited last."""
    return sorted({p.delta for p in points if p.swaps}, key=lambda delta: float(delta))


def _line(axes, x: list[float], points: list[Point], label: str) -> None:
    accuracies = [p.accuracy for p in points]
    axes.errorbar(x, [a.mean for a in accuracies], yerr=[a.std or 0 for a in accuracies], marker="o", markersize=4,
                  linewidth=1.6, capsize=2.5, label=label)


if __name__ == "__main__":
    run_command(main)
