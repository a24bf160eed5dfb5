"""Reads a run from its files: settings, status and results."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ddpm.runs import contents
from ddpm.runs.folder import RunFolder
from ddpm.runs.format import upgraded
from ddpm.runs.identity import flat, identity_of
from ddpm.runs.results import Result, read_measurements, results_of
from ddpm.system.files import by_value, short_hash
from ddpm.system.plain import Unreadable

WHY = 160  # most characters of the reason why a file is unreadable


def images_per_second(record: Mapping[str, Any]) -> float | None:
    """Returns the images per second of the updates over all starts; None if none was timed.

    Args:
        record: The content of run.json.
    """
    timed = record.get("timed") or {}
    return timed["images"] / timed["seconds_in_steps"] if timed.get("seconds_in_steps") else None


def hours(record: Mapping[str, Any]) -> float | None:
    """Returns the hours that the run has trained so far; None if unknown.

    They include sampling, evaluation and saving.

    Args:
        record: The content of run.json.
    """
    timed = record.get("timed") or {}
    return timed["seconds"] / 3600 if "seconds" in timed else None


@dataclass(frozen=True)
class Compared:
    """A run as read from its files; empty apart from run and status if one is unreadable.

    Attributes:
        run: The run's folder.
        identity: The run's identity, plus the changes made when it was resumed.
        settings: The identity as dotted keys, for people to read.
        choices: The option chosen in each config group.
        record: The content of run.json, without the identity.
        results: The results, as `read_results` returns them.
        status: The status, as in `RunFolder.status`, or why a file cannot be read.
        weights: Digest of the newest weights, None if there are none.
        damaged: Line numbers of damaged lines in metrics.jsonl, from 1.
    """

    run: RunFolder
    identity: dict[str, Any]
    settings: dict[str, Any]
    choices: dict[str, str]
    record: dict[str, Any]
    results: list[Result]
    status: str
    weights: str | None = None
    damaged: Sequence[int] = ()

    @property
    def steps(self) -> int:
        """The optimizer updates done."""
        return self.record.get("step", 0)


def read(run: RunFolder) -> Compared:
    """Reads a run from its files; if one is unreadable, the status says which and why."""
    try:
        return _told(run)
    except Unreadable as error:
        file = error.file.relative_to(run.path)
        status = f"unreadable ({file}: {error.why[:WHY]})"
        return Compared(run, {}, {}, {}, {}, [], status, damaged=[])


def _told(run: RunFolder) -> Compared:
    record = contents.read_record(run.path)
    choices = contents.read_choices(run.path)
    settings = contents.read_settings(run.path)
    contents.check_lines(run.path)
    lines = contents.read_lines(run.path / "metrics.jsonl")
    measured = read_measurements(run.path / "evaluation.json")
    changes = by_value(
        [
            {"step": start["from_step"], "changed": start["changed"]}
            for start in record.get("starts", [])
            if start.get("changed")
        ]
    )
    try:
        plain = upgraded(settings, record)
        identity = {**identity_of(plain), **({"changes": changes} if changes else {})}
    except (KeyError, ValueError) as error:
        why = f"no {error.args[0]}" if isinstance(error, KeyError) else str(error)
        raise Unreadable(run.path / "config.yaml", why) from error
    shown = {key: value for key, value in flat(identity).items() if key != "changes"}
    if plain["data"]["name"] == "folder" and plain["data"]["path"]:
        shown["data.name"] = Path(plain["data"]["path"]).name
    if changes:
        shown["changed"] = _in_words(changes)
    return Compared(
        run,
        identity,
        shown,
        choices,
        {key: value for key, value in record.items() if key != "identity"},
        results_of(plain, record, lines, measured),
        run.status_of(record),
        _weights(run),
        [line.number for line in lines if not line.record],
    )


def not_started(run: RunFolder) -> Compared:
    """Returns a run that has no files yet."""
    return Compared(run, {}, {}, {}, {}, [], run.status())


def _in_words(changes: Sequence[Mapping[str, Any]]) -> str:
    """Returns in words what resume= changed, and after which step."""
    return "; ".join(
        f"{key} {old} to {new} after step {change['step']}"
        for change in changes
        for key, (old, new) in change["changed"].items()
    )


def _weights(run: RunFolder) -> str | None:
    """Returns a digest of the newest weights, from the checksums in meta.json."""
    damages = []
    for _, folder in reversed(contents.checkpoint_folders(run.checkpoints)):
        try:
            sums = contents.read_meta(folder)["sha256"]
        except Unreadable as error:  # try the checkpoint before
            damages.append(error)
        else:
            return short_hash([sums[f"{kind}.safetensors"] for kind in ("model", "ema")])
    if damages:
        raise damages[0]
    return None


def summary(found: Compared) -> dict[str, str]:
    """Returns a run's status and results by column, for one row of a table."""
    loss = next((result for result in found.results if result.metric == "loss"), None)
    best = next(
        (result for result in found.results if result.metric != "loss" and result.best is not None),
        None,
    )
    return {
        "status": found.status,
        "steps": format_steps(found),
        "loss": format_value(loss.final[0]) if loss else "-",
        "best metric": f"{best.metric} {format_value(At(*best.best))}"
        if best and best.best
        else "-",
        "folder": str(found.run.path),
    }


class At(NamedTuple):
    """A value, and its step."""

    value: float
    step: int


def format_steps(one: Compared) -> str:
    """Returns the steps done, and the planned number if it differs, such as 500/1000."""
    whole = one.record.get("num_steps")
    return f"{one.steps}" if whole in (None, one.steps) else f"{one.steps}/{whole}"


def format_value(value: Any) -> str:
    """Returns a table cell: floats with 4 digits, "-" for None."""
    if value is None:
        return "-"
    if isinstance(value, At):
        return f"{format_value(value.value)} at {value.step}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
