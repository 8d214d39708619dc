"""How a training step's time and memory grow with the number of tokens and with the width, beside the formulas.

Every model has the same few blocks, whatever its size has by the table: cost is linear in depth. A step is forward,
backward and AdamW of one image, every pixel a token, in fp32.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from common.benchmark.interleaving import Spread
from common.benchmark.memory import kept_bytes
from common.benchmark.peers import training_step
from common.figure import save
from common.model import VisionTransformer
from common.model.flops import activation_bytes, training_flops

if TYPE_CHECKING:
    from matplotlib.axes import Axes

IMAGES = ((8, 8), (14, 14), (16, 16), (28, 28), (32, 32), (48, 64), (64, 64), (96, 96), (128, 128), (224, 224))
SIZE = "tiny"  # of the model that sees all of these
WIDTHS = ("nano", "tiny", "small", "base", "large")  # sizes of the models that see one of them
IMAGE = (32, 32)  # which is this
CLASSES = 10
LONG = 4096  # tokens from which on the exponent is taken: attention is most of the work of ViT-Tiny
COLUMNS = ("model", "pixels", "tokens", "GFLOP", "attention's share", "steps", "ms (quartiles)", "ms by fit",
           "MB kept", "MB by formula")  # fmt: skip


class Case(NamedTuple):
    """A size of the table with `depth` blocks, and the pixels (height, width) of the image it sees."""

    size: str
    image: tuple[int, int]
    depth: int

    def net(self) -> VisionTransformer:
        # No class token: the number of tokens is the number of pixels.
        return VisionTransformer(self.image, 1, 3, CLASSES, self.size, depth=self.depth, class_token=False, pool="avg")

    @property
    def name(self) -> str:
        return f"{self.size} at {self.image[0]}x{self.image[1]}"


def cases(depth: int) -> list[Case]:
    """One size on all images, then the other sizes on one of them."""
    sizes = [Case(size, IMAGE, depth) for size in WIDTHS if size != SIZE]
    return [Case(SIZE, image, depth) for image in IMAGES] + sizes


class Work(NamedTuple):
    """What a step of a case costs by the formulas.

    Args:
        linear: FLOPs that grow with the tokens, of forward and backward.
        attention: FLOPs that grow with their square.
        kept: bytes for the backward, in fp32.
    """

    tokens: int
    width: int
    linear: float
    attention: float
    kept: float

    @classmethod
    def of(cls, case: Case) -> Work:
        with torch.device("meta"):
            net = case.net()
        attention = 3 * net.depth * 4 * net.tokens**2 * net.width
        return cls(net.tokens, net.width, training_flops(net) - attention, attention, activation_bytes(net, 1))


class Fit(NamedTuple):
    """Seconds of a FLOP in linear layers and in attention, and of what every step costs: launches, AdamW."""

    linear: float
    attention: float
    fixed: float

    @classmethod
    def of(cls, works: Sequence[Work], seconds: Sequence[float]) -> Fit:
        """Nonnegative least squares of the relative deviations, so that a short step counts as much as a long one."""
        from scipy.optimize import nnls

        terms = np.array([[work.linear, work.attention, 1.0] for work in works]) / np.array(seconds)[:, None]
        scale = np.linalg.norm(terms, axis=0)
        return cls(*(nnls(terms / scale, np.ones(len(works)))[0] / scale).tolist())

    def parts(self, work: Work) -> tuple[float, float, float]:
        """Seconds of the linear layers, of attention, and of the rest."""
        return self.linear * work.linear, self.attention * work.attention, self.fixed

    def seconds(self, work: Work) -> float:
        return sum(self.parts(work))


class Point(NamedTuple):
    """A case, measured or left out.

    Args:
        times: seconds of its steps; none where it was left out.
        kept: bytes for the backward; none where it was left out.
        left_out: why; empty where it was measured.
    """

    case: Case
    work: Work
    times: tuple[float, ...] = ()
    kept: int | None = None
    left_out: str = ""

    @property
    def seconds(self) -> float:
        return statistics.median(self.times)


def measured(cases: Sequence[Case], rounds: int, limit: float, memory: float = 8e9) -> list[Point]:
    """The steps of the cases, which take turns.

    A case's first step warms up, and counts only where there is time for no second one.

    Args:
        rounds: steps of a case, at most.
        limit: seconds that a step may take, and after which a case takes no more steps. Whether a step would take
            longer is extrapolated from the cases before it.
        memory: bytes that a step may keep for its backward, by formula.
    """
    works = {case: Work.of(case) for case in cases}
    steps, times, kept, left_out = {}, {}, {}, {}
    for case in cases:
        left_out[case] = _excess(works[case], [(works[other], own[0]) for other, own in times.items()], limit, memory)
        if not left_out[case]:
            steps[case], kept[case] = begin(case)
            times[case] = [steps[case]()]
        print(f"{case.name}: {left_out[case] or f'{times[case][0]:.3f} s, first step'}", file=sys.stderr)
    for _ in range(rounds):
        for case, step in steps.items():
            if sum(times[case]) + times[case][-1] <= limit:
                times[case].append(step())
    return [Point(case, works[case], tuple(times[case][1:] or times[case]) if case in times else (), kept.get(case),
                  left_out[case]) for case in cases]  # fmt: skip


def _excess(work: Work, before: Sequence[tuple[Work, float]], limit: float, memory: float) -> str:
    """Which limit a step would exceed, in words; empty where it would not."""
    if work.kept > memory:
        return f"keeps {work.kept / 1e9:.1f} GB"
    expected = Fit.of(*zip(*before, strict=True)).seconds(work) if before else 0.0
    return f"takes about {expected:,.{int(expected < 10)}f} s" if expected > limit else ""


def begin(case: Case) -> tuple[Callable[[], float], int]:
    """The step of a case, which returns its seconds, and the bytes that its forward keeps."""
    torch.manual_seed(0)
    net, image, label = case.net(), torch.randn(1, 3, *case.image), torch.zeros(1, dtype=torch.long)
    return clocked(training_step(net, image, label, "fp32")), kept_bytes(lambda: net(image), net.parameters())


def clocked(step: Callable[[], float]) -> Callable[[], float]:
    """The seconds of a step instead of its loss.

    A step of minutes has no other beside it that the machine's load could be told from. On one thread the processor's
    time is what the step takes where nothing else runs; threads that wait for each other spend it too.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter

    def seconds() -> float:
        start = clock()
        step()
        return clock() - start

    return seconds


def fit_of(points: Sequence[Point]) -> Fit:
    """The fit over what one size took on its images."""
    own = over_tokens(points)
    return Fit.of([point.work for point in own], [point.seconds for point in own])


def over_tokens(points: Sequence[Point]) -> list[Point]:
    """What was measured of the one size."""
    return [point for point in points if point.case.size == SIZE and point.times]


def deviations(points: Sequence[Point], fit: Fit) -> dict[Case, float]:
    """By how much the fit is above what was measured, as a share of that."""
    return {point.case: fit.seconds(point.work) / point.seconds - 1 for point in points if point.times}


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """e of the power law y ~ x^e, by least squares in logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def rows(points: Sequence[Point]) -> list[tuple[str, ...]]:
    """The rows of the table."""
    fit = fit_of(points)
    return [_row(point, fit) for point in points]


def _row(point: Point, fit: Fit) -> tuple[str, ...]:
    case, work = point.case, point.work
    flops = work.linear + work.attention
    times = Spread.of(1e3 * seconds for seconds in point.times) if point.times else None
    text = "left out"
    if times:
        digits = ".1f" if times.median < 100 else ",.0f"
        text = f"{times:{digits}}" if len(point.times) > 1 else f"{times.median:{digits}}"
    return (
        case.size, f"{case.image[0]}x{case.image[1]}", f"{work.tokens:,}", f"{flops / 1e9:,.2f}",
        f"{work.attention / flops:.0%}", str(len(point.times)), text, _milliseconds(fit.seconds(work)),
        "left out" if point.kept is None else f"{point.kept / 1e6:,.2f}", f"{work.kept / 1e6:,.2f}",
    )  # fmt: skip


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.1f}" if seconds < 0.1 else f"{1e3 * seconds:,.0f}"


def caption(points: Sequence[Point]) -> str:
    """What the table's figures are of, what the fit is, and what was left out."""
    clock = "the processor's time" if torch.get_num_threads() == 1 else "by the clock"
    text = (f"One image a step, every pixel a token, without a class token, fp32, and {points[0].case.depth} block(s) "
            "of each size, whatever its depth: cost is linear in depth. GFLOP are three times the forward's; ms are "
            f"{clock}. {_accuracy(points)}{_growth(over_tokens(points))}")
    left_out = [f"{point.case.name} ({point.left_out})" for point in points if point.left_out]
    return text + f" **Left out: {', '.join(left_out)}; the time by fit is extrapolated.**" * bool(left_out)


def _accuracy(points: Sequence[Point]) -> str:
    """The fit's speeds, and how far it is from what it was fitted to and from the other sizes."""
    fit, own = fit_of(points), over_tokens(points)
    off = deviations(own, fit)
    worst = max(off, key=lambda case: abs(off[case]))
    parts = [f"{_speed(cost)} in {name}" for name, cost in
             (("linear layers", fit.linear), ("attention", fit.attention)) if cost]
    text = (f"The fit is over the {len(own)} point(s) of {SIZE}: {', '.join(parts)}, and {1e3 * fit.fixed:.1f} ms a "
            f"step besides; at most it is {off[worst]:+.0%} off them ({worst.name}).")
    others = deviations([point for point in points if point.case.size != SIZE], fit)
    return text + f" Off the other sizes: {', '.join(f'{o:+.0%} {case.size}' for case, o in others.items())}." * bool(
        others)


def _speed(seconds: float) -> str:
    return f"{1e-9 / seconds:.1f} GFLOP/s"


def _growth(own: Sequence[Point]) -> str:
    """The exponents over long sequences, of which there must be two."""
    long = [point for point in own if point.work.tokens >= LONG]
    if len(long) < 2:
        return ""
    tokens = [point.work.tokens for point in long]
    seconds = exponent(tokens, [point.seconds for point in long])
    flops = exponent(tokens, [point.work.linear + point.work.attention for point in long])
    kept = exponent(tokens, [point.kept for point in long])
    return (f" From {LONG:,} tokens on, time grows as their power of {seconds:.2f} (FLOPs: {flops:.2f}), memory as "
            f"that of {kept:.2f}.")


# The figure

KEPT = "MB kept for the backward"
MEASURED, FITTED, LINEAR, ATTENTION, FIXED = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#777777"


def draw(points: Sequence[Point], path: Path) -> None:
    """Milliseconds, above, and MB, against tokens, on the left, and width: measured, and by fit or formula."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 8.2), dpi=120, layout="constrained")
    depth, fit, threads = points[0].case.depth, fit_of(points), torch.get_num_threads()
    figure.suptitle(f"A training step on one image, every pixel a token: {depth} block{'s' * (depth > 1)}, fp32, "
                    f"{threads} thread{'s' * (threads > 1)} of a CPU", fontsize=11, fontweight="bold")  # fmt: skip
    panels = figure.subplots(2, 2)
    for axes in panels.flat:
        axes.set(xscale="log", yscale="log")
    own = [point for point in points if point.case.size == SIZE]
    sizes = sorted((point for point in points if point.case.image == IMAGE), key=lambda point: point.work.width)
    _draw_time(panels[0, 0], own, fit)
    _draw_time_of_sizes(panels[0, 1], sizes, fit)
    _draw_memory(panels[1, 0], own, f"measured, {SIZE}", "tokens")
    _over_tokens(panels[1, 0], own, KEPT)
    _draw_memory(panels[1, 1], sizes, f"measured, {sizes[0].work.tokens:,} tokens", "width")
    _over_widths(panels[1, 1], sizes, KEPT)
    for axes in panels.flat:
        axes.grid(alpha=0.3, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.minorticks_off()
        axes.tick_params(labelsize=8)
        axes.legend(frameon=False, fontsize=8, loc="upper left")
    save(figure, path)


def _draw_time(axes: Axes, points: Sequence[Point], fit: Fit) -> None:
    curve = _between(points[0].case, points[-1].case)
    done, far = [p for p in points if p.times], [p.work for p in points if not p.times]
    end = max(point.work.tokens for point in done)
    within, beyond = [w for w in curve if w.tokens <= end], [w for w in curve if w.tokens >= end]
    _measured(axes, [p.work.tokens for p in done], [1e3 * p.seconds for p in done], f"measured, {SIZE}")
    _line(axes, within, [1e3 * fit.seconds(work) for work in within], "fit, the sum of:", FITTED)
    for number, (name, colour) in enumerate((("linear layers", LINEAR), ("attention", ATTENTION))):
        if fit[number]:
            _line(axes, curve, [1e3 * fit.parts(work)[number] for work in curve],
                  f"{name}, {_speed(fit[number])}", colour, ":", 1.3)
    if fit.fixed:
        axes.axhline(1e3 * fit.fixed, color=FIXED, linestyle=":", linewidth=1.3,
                     label=f"each step besides, {1e3 * fit.fixed:.1f} ms")
    if far:
        _line(axes, beyond, [1e3 * fit.seconds(work) for work in beyond], "extrapolated", FITTED, "--")
        axes.plot([work.tokens for work in far], [1e3 * fit.seconds(work) for work in far], "o", color=FITTED,
                  markerfacecolor="white", markersize=5)
    axes.set_ylim(bottom=0.3e3 * min(point.seconds for point in done))
    _over_tokens(axes, points, "milliseconds of a step")


def _draw_memory(axes: Axes, points: Sequence[Point], label: str, x: str) -> None:
    done = [point for point in points if point.times]
    _measured(axes, [getattr(p.work, x) for p in done], [p.kept / 1e6 for p in done], label)
    _line(axes, [p.work for p in points], [p.work.kept / 1e6 for p in points],
          "formula: 64 bytes per token, channel and block", FITTED, x=x)  # fmt: skip


def _draw_time_of_sizes(axes: Axes, points: Sequence[Point], fit: Fit) -> None:
    curve, done = [point.work for point in points], [point for point in points if point.times]
    _measured(axes, [p.work.width for p in done], [1e3 * p.seconds for p in done],
              f"measured, {curve[0].tokens:,} tokens")
    _line(axes, curve, [1e3 * fit.seconds(work) for work in curve], f"fit over {SIZE}, as on the left", FITTED,
          x="width")
    _over_widths(axes, points, "milliseconds of a step")


def _between(first: Case, last: Case, count: int = 25) -> list[Work]:
    """Works of square images of about as many tokens as from the first case to the last."""
    ends = [(case.image[0] * case.image[1]) ** 0.5 for case in (first, last)]
    sides = dict.fromkeys(round(side) for side in np.geomspace(*ends, count))
    return [Work.of(last._replace(image=(side, side))) for side in sides]


def _measured(axes: Axes, x: Sequence[float], y: Sequence[float], label: str) -> None:
    axes.plot(x, y, "o", color=MEASURED, markersize=5, label=label, zorder=3)


def _line(axes: Axes, works: Sequence[Work], y: Sequence[float], label: str, colour: str, style: str = "-",
          width: float = 1.7, x: str = "tokens") -> None:  # fmt: skip
    axes.plot([getattr(work, x) for work in works], y, style, color=colour, linewidth=width, label=label)


def _over_tokens(axes: Axes, points: Sequence[Point], label: str) -> None:
    axes.set(xlabel="tokens", ylabel=label)
    ticks = [tokens for tokens in (64, 256, 1024, 4096, 16384, 50176)
             if points[0].work.tokens <= tokens <= points[-1].work.tokens]
    axes.set_xticks(ticks, [f"{tokens:,}" for tokens in ticks])


def _over_widths(axes: Axes, points: Sequence[Point], label: str) -> None:
    axes.set(xlabel="width, channels of a token", ylabel=label)
    axes.set_xticks([p.work.width for p in points], [f"{p.case.size}\n{p.work.width}" for p in points])
