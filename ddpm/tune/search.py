"""The search: tries ways one after another, and finds the one that ends all work soonest."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ddpm.system.trials import Failed
from ddpm.system.ways import SEARCH, WAYS

FEW = 8.0  # multiples of the plain way's rounding by which another way's results may be off
LEAST = 0.03  # share of the time that a way must save to be worth a change


@dataclass(frozen=True)
class Found:
    """What a trial of a way has found.

    Attributes:
        way: Name of the way, of ddpm.system.ways.
        device_batch: Images at once; None if that is not to be chosen.
        seconds: Seconds per repeat of the work (an update, a network call), one per round.
        first: Seconds of the first repeat, which generates code.
        differs: How far its results are from the plain way's, in multiples of the plain way's
            rounding.
        of: Name of the result that is farthest off.
        forward: For a way to train, (first, later) seconds of a network call as previews make it,
            plain and in this way; empty if the way cannot draw.
        why: Why the way is ruled out; None if it may be chosen.
        asked: The device_batch asked for; fewer images may have fit.
    """

    way: str
    device_batch: int | None = None
    seconds: list[float] = field(default_factory=list)
    first: float = 0.0
    differs: float = 0.0
    of: str = ""
    forward: list[list[float]] = field(default_factory=list)
    why: str | None = None
    asked: int | None = None

    @property
    def median(self) -> float:
        """Median seconds per repeat."""
        return statistics.median(self.seconds)

    def plain(self) -> dict[str, Any]:
        """Returns the result as plain values."""
        return asdict(self)


@dataclass
class Budget:
    """The seconds that tuning may take, and those that it has taken.

    Attributes:
        total: Seconds for all trials.
        each: Most seconds for one trial.
        began: When tuning began, by time.monotonic.
    """

    total: float
    each: float
    began: float = field(default_factory=time.monotonic)

    @property
    def spent(self) -> float:
        """Seconds since tuning began."""
        return time.monotonic() - self.began

    def for_one(self) -> float | None:
        """Returns the seconds that the next trial may take, None if it should not begin."""
        left = min(self.each, self.total - self.spent)
        return left if left >= 0.1 * min(self.each, self.total) else None


Try = Callable[[str, int | None, float], Found]


def search(
    try_way: Try,
    names: Sequence[str],
    device_batch: int | None,
    may_split: bool,
    may_search: bool,
    repeats: int,
    budget: Budget,
    known: Sequence[Found],
    keep: Callable[[Found], None],
) -> list[Found]:
    """Tries ways, each building on the best so far.

    First come all the ways by themselves, then the fastest with cuDNN's search added, then smaller
    and smaller device batches for as long as they are faster.

    Args:
        try_way: Tries a way, given its name, the images at once and the most seconds to take.
        names: The ways, the device's default first.
        device_batch: Images at once to begin with.
        may_split: Whether fewer images at once may be tried.
        may_search: Whether cuDNN's search may be tried.
        repeats: How often the work is done in the end.
        budget: The time for trials.
        known: Earlier results, which are not tried again.
        keep: Called with each result as soon as it is there.

    Returns:
        The results, known and new, the device's default way first.
    """
    found: dict[tuple[str, int | None], Found] = {}
    before = {(one.way, one.asked): one for one in known}

    def attempt(name: str, size: int | None) -> Found | None:
        if (name, size) in found:
            return None
        one = before.get((name, size))
        if one is None:
            seconds = budget.for_one()
            if seconds is None:
                return None
            try:
                one = try_way(name, size, seconds)
            except Failed as failed:
                one = Found(name, size, why=str(failed))
        found[name, size] = one = replace(checked(one), asked=size)
        keep(one)
        return one

    first = attempt(names[0], device_batch)
    if first is None or first.why is not None:
        return list(found.values())
    for name in names[1:]:
        if not WAYS[name].graphs or first.device_batch == device_batch:
            attempt(name, first.device_batch)
    if may_search:
        best = fastest(list(found.values()), repeats)
        attempt(best.way + SEARCH, best.device_batch)
    best = fastest(list(found.values()), repeats)
    while may_split and best.device_batch and best.device_batch > 1 and not WAYS[best.way].graphs:
        one = attempt(best.way, -(-best.device_batch // 2))
        if one is None or one.why is not None or one.median > (1 - LEAST) * best.median:
            break
        best = one
    return list(found.values())


def checked(one: Found) -> Found:
    """Rules out a way that does not compute the same."""
    if one.why is not None or one.differs <= FEW:
        return one
    how = f"{one.differs:.3g} times as far off as rounding is"
    return replace(one, why=f"computes something else: {one.of}, {how}")


def fastest(found: Sequence[Found], repeats: int) -> Found:
    """Returns the way that ends all work soonest, or the first if another saves too little.

    Args:
        found: The results, the device's default way first.
        repeats: How often the work is done. The time to generate code counts, too.
    """
    own, *others = found

    def total(one: Found) -> float:
        return one.first + repeats * one.median

    best = min((one for one in [own, *others] if one.why is None), key=total)
    return best if total(best) < (1 - LEAST) * total(own) else own


def table(found: Sequence[Found]) -> list[str]:
    """Returns one line per way: its time and how far it is off, or why it is ruled out."""
    lines, own = [], found[0]
    for one in found:
        at_once = "" if one.device_batch is None else f"{one.device_batch} at once"
        if one.why is not None:
            lines.append(f"{one.way:<22} {at_once:<14} out: {one.why}")
            continue
        share = one.median / own.median
        lines.append(
            f"{one.way:<22} {at_once:<14} {one.median * 1e3:,.4g} ms "
            f"({min(one.seconds) * 1e3:,.4g} to {max(one.seconds) * 1e3:,.4g}), {share:.2f} of "
            f"{own.way}'s, first {one.first:.1f} s"
            + (f", off by {one.differs:.2g} times rounding" if one is not own else "")
        )
    return lines
