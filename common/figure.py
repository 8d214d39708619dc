"""Training curves from TensorBoard's event files, the figure that compares arms, and where figures are written."""

from __future__ import annotations

import math
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import InputError
from common.runs import Group, Run, digits

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from tensorboard.compat.proto.event_pb2 import Event

# Okabe and Ito's palette without black and yellow: told apart by colour-blind readers, and dark enough on white.
_PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
# The patch size is told by the dash as well, so that /1 and /2 differ in print without colour: /1 is the solid line.
_DASHES = {1: "-", 2: (0, (5, 2)), 4: (0, (1, 1.2)), 8: (0, (5, 1.5, 1, 1.5)), 16: (0, (9, 2, 1, 2, 1, 2))}
_MARKERS = {1: "o", 2: "s", 4: "^", 8: "D", 16: "v"}

Curve = dict[float, float]


def check_file(path: Path) -> None:
    """Refuses a figure's file before anything is computed for it."""
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise InputError(f"--figure {path}: name a file that ends in .png, .pdf or .svg")


def save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    print(f"written: {path}")


def literal(text: str) -> str:
    """A name as it stands, where matplotlib would read a formula between two dollars, and leave out of a legend what
    begins with _.
    """
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def read_curves(folder: Path, tags: Sequence[str], x: Callable[[int], float] = float) -> dict[str, Curve]:
    """Value of each tag over all starts of a run; of a step that two starts logged, the later one's.

    Args:
        x: where a point goes, of what it was logged at.
    """
    curves: dict[str, Curve] = {tag: {} for tag in tags}
    for file in sorted(folder.glob("events.out.tfevents.*"), key=_started):
        for event in _events(file):
            for value in event.summary.value:  # HPARAMS starts each headline metric as NaN
                if value.tag in curves and value.HasField("simple_value") and math.isfinite(value.simple_value):
                    curves[value.tag][x(event.step)] = value.simple_value
    return {tag: dict(sorted(curve.items())) for tag, curve in curves.items()}


def _events(file: Path) -> Iterator[Event]:
    """All up to a damage, which is said: TensorBoard's own readers end there without a word."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.tensorflow_stub.errors import DataLossError, OutOfRangeError
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New

    reader = PyRecordReader_New(str(file))
    with suppress(OutOfRangeError):
        while True:
            try:
                reader.GetNext()
            except DataLossError:
                print(f"{file}: damaged or cut off; what it holds behind that is in no curve", file=sys.stderr)
                return
            yield Event.FromString(reader.record())


def _started(file: Path) -> tuple[float, float]:
    """The second in its name, then the time of writing, for two starts within a second."""
    stamp = file.name.removeprefix("events.out.tfevents.").partition(".")[0]
    return float(stamp) if stamp.isdigit() else 0.0, file.stat().st_mtime


def over_seeds(curves: Sequence[Curve]) -> tuple[list[float], list[float], list[float]]:
    """Points that all seeds have: x, mean, and sample standard deviation (0 for one seed)."""
    shared = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    values = [[curve[x] for curve in curves] for x in shared]
    spreads = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
    return shared, [statistics.fmean(v) for v in values], spreads


def smoothed(curve: Curve, points: int = 60) -> Curve:
    """Means over equal stretches of x, each placed at its stretch's end; a short curve stays as it is."""
    if len(curve) <= 2 * points:
        return curve
    steps = list(curve)
    bounds = [round(i * len(steps) / points) for i in range(points + 1)]
    return {steps[end - 1]: statistics.fmean(curve[x] for x in steps[start:end])
            for start, end in zip(bounds, bounds[1:], strict=False)}


def draw(groups: Sequence[Group], path: Path, title: str, metric: str | None = None) -> list[str]:
    """Draws the headline metric and the training loss of each group over training: mean, and a band over seeds.

    The x axis is optimiser steps, or images seen where batches differ or every run was logged so.

    Args:
        path: a PNG, PDF or SVG.
        metric: the tag of the first panel; by default the first group's headline.

    Returns:
        The labels of groups that have no such curve.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    metric = metric or groups[0]["headline"]
    tags = list(dict.fromkeys([metric, "train/loss"]))
    all_runs = [run for group in groups for run in group.runs]
    in_images = (len({run.results.get("batch_size") for run in all_runs}) > 1
                 or all(run.results.get("x_axis") == "images" for run in all_runs))
    curves = [[read_curves(run.folder, tags, _axis(run, in_images)) for run in group.runs] for group in groups]
    drawn = [tag for tag in tags if any(run[tag] for runs in curves for run in runs)]

    figure = Figure(figsize=(1.2 + 4.8 * max(len(drawn), 1), 3.9 + 0.22 * len(groups)), dpi=150, layout="constrained")
    figure.suptitle(literal(title), fontsize=11, fontweight="bold")
    for axes, tag in zip(figure.subplots(1, len(drawn), squeeze=False)[0] if drawn else [], drawn, strict=True):
        for group, runs, colour in zip(groups, curves, _colours(len(groups)), strict=True):
            x, mean, spread = over_seeds([smoothed(run[tag]) for run in runs])
            if not x:
                continue
            few = len(x) <= 40
            axes.plot(x, mean, color=colour, linestyle=_DASHES.get(group["patch_size"], "-"), linewidth=1.7,
                      marker=_MARKERS.get(group["patch_size"], "x") if few else None, markersize=3.5,
                      label=_legend(group, metric))
            axes.fill_between(x, [m - s for m, s in zip(mean, spread, strict=True)],
                              [m + s for m, s in zip(mean, spread, strict=True)], color=colour, alpha=0.18, linewidth=0)
        axes.set_xlabel("images seen" if in_images else "optimiser steps")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_ylabel(_axis_title(tag))
        axes.grid(alpha=0.3, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    if drawn:
        # The first panel's lines go last, so that theirs are kept: they carry the markers.
        handles = {label: handle for axes in reversed(figure.axes)
                   for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        averaged = any(len(group.runs) > 1 for group in groups)
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", fontsize=8.5, frameon=False,
                      ncols=1 if len(handles) < 4 else 2, handlelength=3.4, title_fontsize=8,
                      title="mean ± standard deviation (seeds)" if averaged else None)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return [group.label for group, runs in zip(groups, curves, strict=True) if not any(run[metric] for run in runs)]


def _axis(run: Run, in_images: bool) -> Callable[[int], float]:
    """From what a run's points were logged at to what the figure is over."""
    batch, logged_in_images = run.results.get("batch_size"), run.results.get("x_axis") == "images"
    if logged_in_images == in_images:
        return float
    return (lambda step: float(step * batch)) if in_images else (lambda images: float(images // batch))


def _colours(count: int) -> Sequence[str]:
    """As many colours; past the palette, even steps of viridis, whose lightness alone tells them apart."""
    if count <= len(_PALETTE):
        return _PALETTE[:count]
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colormaps["viridis"](0.92 * i / (count - 1))) for i in range(count)]


def _legend(group: Group, metric: str) -> str:
    value = group.statistic(metric)
    size = group["patch_size"]
    patch = f" (patch {size})" if size and not re.search(rf"(/|p){size}\b", group.label) else ""
    label = literal(group.label)
    return f"{label}{patch}: {value.text(digits(metric, value.mean))}" if value else f"{label}{patch}"


def _axis_title(tag: str) -> str:
    split, _, name = tag.partition("/")
    names = {"acc1": "Acc@1 (%)", "acc5": "Acc@5 (%)", "rmse": "RMSE (m)", "rae": "RAE", "loss": "loss"}
    splits = {"val": "validation", "test": "test", "train": "training"}
    return f"{splits.get(split, split)} {names.get(name, name)}"
