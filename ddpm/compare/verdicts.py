"""Tests whether a claim holds, from one number per seed."""

import math
import statistics
from collections.abc import Sequence
from typing import Literal, NamedTuple

from scipy.special import stdtrit

LEVEL = 0.95  # confidence level of the intervals
Verdict = Literal["holds", "does not hold here", "undecided at these seeds"]


class Interval(NamedTuple):
    """A confidence interval of a mean, by Student's t.

    Attributes:
        mean: The mean.
        low: The lower end.
        high: The upper end.
    """

    mean: float
    low: float
    high: float


def interval(numbers: Sequence[float], level: float = LEVEL) -> Interval:
    """Returns the mean of independent repetitions and its confidence interval.

    Args:
        numbers: One finite number per repetition.
        level: Confidence level; exact if the numbers are normally distributed.

    Raises:
        ValueError: If there are fewer than two numbers.
    """
    count = len(numbers)
    if count < 2:
        raise ValueError(f"an interval needs 2 seeds or more, got {count}")
    mean = statistics.fmean(numbers)
    half = stdtrit(count - 1, (1 + level) / 2) * statistics.stdev(numbers) / math.sqrt(count)
    return Interval(mean, mean - half, mean + half)


def verdict(numbers: Sequence[float]) -> Verdict:
    """Returns whether the mean of the numbers is below 0, as a claim says, given their spread.

    Args:
        numbers: One number per seed.
    """
    if len(numbers) < 2:
        return "undecided at these seeds"
    found = interval(numbers)
    if found.high < 0:
        return "holds"
    return "does not hold here" if found.low > 0 else "undecided at these seeds"


def slope(over: Sequence[float], values: Sequence[float]) -> float:
    """Returns the least-squares slope of `values` against log2 of `over`.

    Raises:
        ValueError: If there are fewer than two points, or a value of `over` is not positive.
    """
    if min(over) <= 0:
        raise ValueError(f"a slope over log2 needs values above 0, got {min(over)}")
    return statistics.linear_regression([math.log2(value) for value in over], values).slope
