"""Estimates a running run's progress, speed and end."""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from ddpm.runs.contents import read_lines
from ddpm.runs.costs import read_costs
from ddpm.runs.folder import RunFolder, starts_of
from ddpm.runs.reader import images_per_second


class Progress(NamedTuple):
    """The progress of a run that is training.

    Attributes:
        step: The last reported step.
        images_per_second: Speed of the updates alone; None before any were timed.
        ends: When it should end, with previews, evaluation and saving; None if the time per step is
            unknown.
    """

    step: int
    images_per_second: float | None
    ends: datetime | None


def progress(run: RunFolder, record: Mapping[str, Any]) -> Progress:
    """Returns the progress of a run that is training.

    The end is the run's own estimate, if run.json has one. Otherwise it is the time of the last
    report plus the average time per step for each step left.

    Args:
        run: The run's folder.
        record: The content of run.json.
    """
    costs = read_costs(run.path)
    start = (starts_of(dict(record)) or [{}])[-1]
    lines = read_lines(run.path / "metrics.jsonl")
    reported = [line.record["step"] for line in lines if line.record]
    step = max([record.get("step", 0), start.get("from_step", 0), *reported[-1:]])
    speed = images_per_second({"timed": costs[-1]} if costs else record)
    own = _time(record.get("expected_end"))
    if own is not None or not record.get("num_steps"):
        return Progress(step, speed, own)
    begun, timed = _time(start.get("started")), record.get("timed") or {}
    last = begun
    if reported and begun is not None:
        written = (run.path / "metrics.jsonl").stat().st_mtime
        last = max(begun, datetime.fromtimestamp(written, UTC))
    if costs and costs[-1]["step"]:
        each = costs[-1]["seconds"] / costs[-1]["step"]
    elif "seconds" in timed and record.get("step"):
        each = timed["seconds"] / record["step"]
    elif begun is not None and last is not None and step > start.get("from_step", 0):
        each = (last - begun).total_seconds() / (step - start["from_step"])
    else:
        return Progress(step, speed, None)
    try:
        left = timedelta(seconds=each * (record["num_steps"] - step))
        return Progress(step, speed, None if last is None else last + left)
    except (OverflowError, ValueError):  # past the year 9999; steps that took NaN seconds
        return Progress(step, speed, None)


def _time(text: Any) -> datetime | None:
    """Parses a time from run.json; None if it is missing or malformed."""
    try:
        found = datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return None
    return found if found.tzinfo is not None else found.replace(tzinfo=UTC)
