"""Whether a claim holds, from one number for each seed."""

import math
import statistics
from collections.abc import Sequence
from typing import Literal, NamedTuple

from scipy.special import stdtrit

LEVEL = 0.95  # of the intervals
Verdict = Literal["holds", "does not hold here", "undecided at these seeds"]


class Interval(NamedTuple):
    """Of a mean, by Student's t.

    Attributes:
        mean: Of the numbers.
        low: Lower end.
        high: Upper end.
    """

    mean: float
    low: float
    high: float


def interval(numbers: Sequence[float], level: float = LEVEL) -> Interval:
    """Returns the mean of independent repetitions, and its interval.

    Args:
        numbers: One for each repetition, finite.
        level: Share of such intervals that hold the true mean, where the numbers are normal.

    Raises:
        ValueError: If there are fewer than two.
    """
    count = len(numbers)
    if count < 2:
        raise ValueError(f"an interval needs 2 seeds or more, got {count}")
    mean = statistics.fmean(numbers)
    half = stdtrit(count - 1, (1 + level) / 2) * statistics.stdev(numbers) / math.sqrt(count)
    return Interval(mean, mean - half, mean + half)


def verdict(numbers: Sequence[float]) -> Verdict:
    """Says whether numbers that a claim has below 0 are, beyond what seeds move.

    Args:
        numbers: One for each seed.
    """
    if len(numbers) < 2:
        return "undecided at these seeds"
    found = interval(numbers)
    if found.high < 0:
        return "holds"
    return "does not hold here" if found.low > 0 else "undecided at these seeds"


def slope(over: Sequence[float], values: Sequence[float]) -> float:
    """Returns the slope of the line of least squares of `values` against log2 of `over`.

    Raises:
        ValueError: If there are fewer than two places, or one is not above 0.
    """
    if min(over) <= 0:
        raise ValueError(f"a slope over log2 needs values above 0, got {min(over)}")
    return statistics.linear_regression([math.log2(value) for value in over], values).slope
