"""A run as its files tell of it: what it computed, how it stands, what it came to."""

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

WHY = 160  # characters of what is wrong with a file


def images_per_second(record: Mapping[str, Any]) -> float | None:
    """Returns images per second in updates, over all starts of a run; None if none was timed.

    Args:
        record: The content of run.json.
    """
    timed = record.get("timed") or {}
    return timed["images"] / timed["seconds_in_steps"] if timed.get("seconds_in_steps") else None


def hours(record: Mapping[str, Any]) -> float | None:
    """Returns the hours that the run has trained so far; None if unknown.

    Sampling, measuring and saving are counted.

    Args:
        record: The content of run.json.
    """
    timed = record.get("timed") or {}
    return timed["seconds"] / 3600 if "seconds" in timed else None


@dataclass(frozen=True)
class Compared:
    """A run as its files tell of it; a file that cannot be read tells nothing.

    Attributes:
        run: Its folder.
        identity: What it computed, in canonical form; and its changes on the way.
        settings: The same as dotted keys, in people's words.
        choices: The option chosen in each group.
        record: The content of run.json, less the identity that the run began with.
        results: As read_results gives them.
        status: As RunFolder.status says, or why the files cannot be read.
        weights: Digest of its newest weights, None where there are none.
        damaged: Lines of metrics.jsonl that are left out, from 1.
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
        return self.record.get("step", 0)


def read(run: RunFolder) -> Compared:
    """Returns what the files of a run tell; its status says where one cannot be read."""
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
    """Returns what there is to tell of a run that has no files yet."""
    return Compared(run, {}, {}, {}, {}, [], run.status())


def _in_words(changes: Sequence[Mapping[str, Any]]) -> str:
    """What resume= changed, and after which step."""
    return "; ".join(
        f"{key} {old} to {new} after step {change['step']}"
        for change in changes
        for key, (old, new) in change["changed"].items()
    )


def _weights(run: RunFolder) -> str | None:
    """A digest of the newest weights, from what was written beside them."""
    damages = []
    for _, folder in reversed(contents.checkpoint_folders(run.checkpoints)):
        try:
            sums = contents.read_meta(folder)["sha256"]
        except Unreadable as error:  # the one before counts
            damages.append(error)
        else:
            return short_hash([sums[f"{kind}.safetensors"] for kind in ("model", "ema")])
    if damages:
        raise damages[0]
    return None


def summary(found: Compared) -> dict[str, str]:
    """Returns how a run stands, by column, for a line of a table."""
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
    """A value, and the step that it is of."""

    value: float
    step: int


def format_steps(one: Compared) -> str:
    whole = one.record.get("num_steps")
    return f"{one.steps}" if whole in (None, one.steps) else f"{one.steps}/{whole}"


def format_value(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, At):
        return f"{format_value(value.value)} at {value.step}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
