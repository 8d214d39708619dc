"""Whether a difference is more than what seeds do: the paired t-test."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Paired(NamedTuple):
    """A mean of differences between pairs, their sample standard deviation, the probability of one as large by chance
    (two-sided), and the number of pairs.

    One pair has neither deviation nor p.
    """

    mean: float
    std: float | None
    p: float | None
    n: int

    def text(self) -> str:
        if self.p is None:
            return f"n = {self.n}"
        return f"p {'< 0.001' if self.p < 0.001 else f'= {self.p:.2g}'}, n = {self.n}"


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Paired:
    """The t-test of `ours` minus `theirs`, value by value.

    Pairs that all differ by the same leave nothing to chance: p is 0, or 1 where that is no difference at all.
    """
    differences = [our - their for our, their in zip(ours, theirs, strict=True)]
    mean, n = statistics.fmean(differences), len(differences)
    if n < 2:
        return Paired(mean, None, None, n)
    std = statistics.stdev(differences)
    if std == 0:
        return Paired(mean, std, float(mean == 0), n)
    from scipy.special import stdtr  # Student's distribution; scipy takes a third of a second

    return Paired(mean, std, float(2 * stdtr(n - 1, -abs(mean) / (std / math.sqrt(n)))), n)
