"""The decision: whether to tune, which trials are remembered, and which way is chosen."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import ddpm
from ddpm.system.files import short_hash, write_text
from ddpm.system.trials import LATE
from ddpm.tune.search import Budget, Found, Try, fastest, search, table

log = logging.getLogger("ddpm")

Tune = bool | str  # "auto", or a name of ddpm.system.ways

AUTO = ("cuda",)  # devices that auto tunes; on others the default way stays, bits included
SHARE = 0.02  # of the work's time that auto may spend
SHORTEST = 60.0  # least seconds to spend on trials: generating code alone takes that long
ENOUGH = 1000  # least repeats for which it measures at all
EACH = 900.0  # seconds for a trial under tune=true, beside 200 repeats of the work


@dataclass(frozen=True)
class Choice:
    """The way in which a network runs, and why.

    Attributes:
        way: Name of the way, of ddpm.system.ways.
        why: The reason, in words.
        device_batch: Images at once; None if that was not tried.
        facts: What the choice holds for: device, versions, network, batch. Empty if nothing was
            tried.
        found: The trials' results.
        seconds: Seconds that the trials took.
    """

    way: str
    why: str
    device_batch: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    found: Sequence[Found] = ()
    seconds: float = 0.0

    def plain(self) -> dict[str, Any]:
        """Returns the choice as run.json keeps it."""
        return {
            "way": self.way,
            "why": self.why,
            "device_batch": self.device_batch,
            "facts": dict(self.facts),
            "found": [one.plain() for one in self.found],
            "seconds": round(self.seconds, 1),
        }

    @property
    def trial(self) -> Found | None:
        """The trial of the chosen way; None if it was not tried."""
        for one in self.found:
            if (one.way, one.device_batch) == (self.way, self.device_batch):
                return one
        return None


@dataclass(frozen=True)
class Work:
    """The work for which a way is chosen.

    Attributes:
        device: The device that does it.
        deterministic: Whether it must give the same bits each time.
        repeats: How often it is done.
        facts: Everything that a measured time depends on.
        names: The ways that can be tried, the device's default first.
        device_batch: Images at once to begin with; None if that is not to be chosen.
        may_split: Whether fewer images at once may be tried.
        seconds: Measures the seconds of one repeat.
        cache: The folder in which trials are remembered.
    """

    device: torch.device
    deterministic: bool
    repeats: int
    facts: Mapping[str, Any]
    names: Sequence[str]
    device_batch: int | None
    may_split: bool
    seconds: Callable[[], float]
    cache: Path


def without_trials(tune: Tune, work: Work, before: Mapping[str, Any] | None) -> Choice | None:
    """Returns the choice if it takes no trials, else None.

    Args:
        tune: runtime.tune, or a command's tune.
        work: The work for which a way is chosen.
        before: The run's last choice in plain form; None for none.
    """
    own = work.names[0]
    if isinstance(tune, str) and tune != "auto":
        return Choice(tune, f"tune={tune}")
    if tune is False:
        return Choice(own, "tune=false")
    if tune == "auto" and work.device.type not in AUTO:
        return Choice(own, f"tune=auto: nothing is gained on {work.device.type}")
    if tune == "auto" and work.deterministic:
        return Choice(own, "tune=auto: a choice by timing can differ each time (deterministic)")
    if before is not None and before.get("facts") == work.facts:
        found = [Found(**one) for one in before["found"]]
        return Choice(before["way"], "as before", before["device_batch"], work.facts, found)
    if tune == "auto" and work.repeats < ENOUGH:
        return Choice(own, f"tune=auto: {work.repeats} repeats are too few to pay for trials")
    return None


def budget_of(tune: Tune, work: Work) -> Budget | Choice:
    """Returns the budget for trials, or the choice without any. All processes must call it."""
    each = work.seconds()
    if tune is True:
        longest = EACH + 200 * each
        return Budget(10 * longest, longest)
    planned = each * work.repeats
    if SHARE * planned < SHORTEST:
        why = f"tune=auto: about {planned / 60:,.0f} minutes are too short to pay for trials"
        return Choice(work.names[0], why)
    return Budget(SHARE * planned, SHARE * planned)


def by_trials(work: Work, budget: Budget, try_way: Try, say: Callable[[str], None]) -> Choice:
    """Returns the choice that trials, new and remembered, show to be the fastest.

    Args:
        work: The work for which a way is chosen.
        budget: The time for trials.
        try_way: See `search`.
        say: Prints a line for the user, before and after the trials.
    """
    say(f"tuning: {', '.join(work.names)}, for {budget.total / 60:,.0f} minutes at most")
    file = work.cache / "tune" / f"{short_hash(dict(work.facts))}.json"
    known = _remembered(file, work.facts)
    searches = work.device.type == "cuda" and not work.deterministic

    found = search(
        try_way,
        work.names,
        work.device_batch,
        work.may_split,
        searches,
        work.repeats,
        budget,
        known,
        lambda one: _remember(file, work.facts, one),
    )
    if not found or found[0].why is not None:
        why = found[0].why if found else "no time was left"
        return Choice(work.names[0], f"the device's own way could not be tried: {why}")
    best, spent = fastest(found, work.repeats), budget.spent
    tried, share = sum(one not in known for one in found), spent / (best.median * work.repeats)
    why = (
        f"the fastest of {len(found)}"
        if best is not found[0]
        else f"none of {len(found)} is worth a change"
    )
    for line in table(found):
        log.info("tuning: %s", line)
    say(f"tuning: {best.way}, {why}; tried {tried} in {spent:.0f} s, {share:,.1%} of the work")
    return Choice(best.way, why, best.device_batch, work.facts, found, spent)


def facts_of_device(device: torch.device) -> dict[str, Any]:
    """Returns what a device's speed depends on: the card or the threads, and the versions."""
    facts: dict[str, Any] = {"device": device.type, "torch": torch.__version__}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        facts |= {"card": card.name, "memory": card.total_memory, "cuda": torch.version.cuda}
        facts["cudnn"] = torch.backends.cudnn.version()
    elif device.type == "cpu":
        facts |= {
            "threads": torch.get_num_threads(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
        }
    return {**facts, "ddpm": ddpm.__version__}


def changed(before: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """Returns in words which facts have changed since an earlier choice."""
    keys = [key for key in facts if facts[key] != before.get(key)]
    return ", ".join(f"{key} was {before.get(key)} and is {facts[key]} now" for key in keys)


def _remembered(file: Path, facts: Mapping[str, Any]) -> list[Found]:
    """The earlier trials on this device; none if the file cannot be read."""
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        return [Found(**one) for one in said["found"]] if said["facts"] == facts else []
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _remember(file: Path, facts: Mapping[str, Any], found: Found) -> None:
    """Remembers a trial, unless it only ran out of time.

    A trial that another process remembers meanwhile may be lost.
    """
    if (found.why or "").startswith(LATE):
        return
    both = {(one.way, one.asked): one for one in [*_remembered(file, facts), found]}
    file.parent.mkdir(parents=True, exist_ok=True)
    kept = {"facts": dict(facts), "found": [one.plain() for one in both.values()]}
    write_text(file, json.dumps(kept, indent=1) + "\n")
