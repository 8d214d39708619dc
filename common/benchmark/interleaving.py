"""Timing on a machine that others use too: sides take turns, and only what ran side by side is compared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch

from common.benchmark.device import CPU

WARM_UP = 2  # steps: the first allocates the optimiser's state, the second meets warm caches
QUEUED = 0.3  # seconds of steps that a GPU is given before it is waited for


def seconds_of(step: Callable[[], object], device: torch.device) -> float:
    """Of one step, until the device has done it.

    A GPU is given steps for a while and waited for once, as in training, which launches a step while the one before it
    is computed. Waited for after each, a small net would be charged with its launches as well.
    """
    _wait(device)
    start, steps = time.perf_counter(), 0
    while steps == 0 or device.type == "cuda" and time.perf_counter() - start < QUEUED:
        step()
        steps += 1
    _wait(device)
    return (time.perf_counter() - start) / steps


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(step: Callable[[], object], device: torch.device = CPU) -> Callable[[], float]:
    """The seconds of a step instead of its loss."""
    return partial(seconds_of, step, device)


def interleaved(sides: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Calls each side once a round: what it returned, a time, per side and round.

    Every round begins with another side, so that none always runs on the caches that the same other side left.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(sides[name]())
    return times


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        values = list(values)
        low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        return cls(statistics.median(values), low, high)

    def __format__(self, spec: str) -> str:
        return f"{self.median:{spec}} ({self.low:{spec}} to {self.high:{spec}})"


def ratios(times: Sequence[float], reference: Sequence[float]) -> Spread:
    """How many times as fast as the reference, from the pairs of the rounds: above 1 is faster."""
    return Spread.of(other / own for own, other in zip(times, reference, strict=True))


def differences(times: Sequence[float], reference: Sequence[float]) -> Spread:
    """How much longer than the reference, from the pairs of the rounds."""
    return Spread.of(own - other for own, other in zip(times, reference, strict=True))


def raced(
    ours: Callable[[], object], theirs: Callable[[], object], rounds: int, device: torch.device = CPU
) -> tuple[float, float, Spread]:
    """Two sides take turns, step by step: the median seconds of a step of each, and how many times as fast ours are."""
    for step in (ours, theirs):
        for _ in range(WARM_UP):
            step()
    times = interleaved({"ours": timed(ours, device), "theirs": timed(theirs, device)}, rounds)
    return *map(statistics.median, times.values()), ratios(times["ours"], times["theirs"])
