"""Finds runs, and tabulates their differences and results."""

import csv
import glob
import io
import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from datetime import UTC
from pathlib import Path
from typing import Any

from ddpm.config.sweeps import align
from ddpm.runs.folder import RunFolder
from ddpm.runs.identity import flat
from ddpm.runs.progress import progress
from ddpm.runs.reader import (
    At,
    Compared,
    format_steps,
    format_value,
    hours,
    images_per_second,
    summary,
)
from ddpm.runs.results import Result
from ddpm.system.files import as_key
from ddpm.system.text import cell

Row = dict[str, Any]  # column -> value, in order; None if a run has no such value
CHOICES = ("model", "data", "schedule", "objective", "optimizer", "lr_schedule")


def find(runs: str | Sequence[str] | None, outputs: str) -> tuple[list[RunFolder], list[str]]:
    """Finds the runs to compare.

    Args:
        runs: A run's folder, a folder with runs anywhere below, a glob of these, or a list of them,
            whose order is kept; None for all runs below `outputs`, newest first.
        outputs: Parent folder of all runs.

    Returns:
        The runs, and the given paths without any run.

    Raises:
        ValueError: If there is no run at all.
    """
    found: dict[Path, None] = {}
    empty = []
    for pattern in [runs] if isinstance(runs, str) else runs if runs is not None else [outputs]:
        path = Path(pattern).expanduser()
        matches = (
            [path]
            if path.exists()
            # Path.glob takes no absolute pattern
            else [Path(match) for match in sorted(glob.glob(str(path)))]  # noqa: PTH207
        )
        here = [folder for match in matches for folder in _runs_in(match)]
        found.update(dict.fromkeys(here))
        if not here:
            empty.append(pattern)
    if not found:
        asked = f"outputs={outputs}" if runs is None else f"runs={runs}"
        raise ValueError(
            f"{asked}: no run there; give a folder that ddpm.train made, a folder above it, "
            "a list of these, or a quoted glob"
        )
    folders = list(found)
    if runs is None:
        folders.sort(key=lambda folder: (folder / "run.json").stat().st_mtime, reverse=True)
    return [RunFolder(folder) for folder in folders], empty


def _runs_in(folder: Path) -> list[Path]:
    """Returns the folder itself if it is a run's, else all run folders below it."""
    if (folder / "config.yaml").is_file():
        return [folder] if (folder / "run.json").is_file() else []
    found = []
    for place, below, files in os.walk(folder):
        if "config.yaml" in files and "run.json" in files:
            found.append(place)
            below[:] = set(below) - {"checkpoints", "samples", ".hydra"}  # large, and hold no runs
    # strings: thousands of Paths take seconds
    found.sort(key=lambda place: place.split(os.sep))  # noqa: PTH206
    return [Path(place) for place in found]


def once(compared: Sequence[Compared]) -> tuple[list[Compared], list[str]]:
    """Drops copies of runs: those with the same identity, pictures and weights.

    Returns:
        The runs without copies, and one line per copy left out.
    """

    def key(one: Compared) -> str:
        fingerprint = (one.record.get("data") or {}).get("fingerprint")
        # identities are canonical already, so the slower as_key is not needed
        return json.dumps(
            [one.identity, fingerprint, one.weights or str(one.run.path)], sort_keys=True
        )

    chosen: dict[str, Compared] = {}
    for one in sorted(compared, key=lambda one: one.status != "complete"):
        chosen.setdefault(key(one), one)
    kept = [one for one in compared if chosen[key(one)] is one]
    left_out = [
        f"{one.run.path} is left out: a copy of {chosen[key(one)].run.path}"
        for one in compared
        if chosen[key(one)] is not one
    ]
    return kept, left_out


def list_runs(compared: Sequence[Compared]) -> list[Row]:
    """Returns one row per run, without its settings: last update, hours and status.

    If any run is training now, columns for speed and expected end are added.
    """
    some_train = any(one.status == "running" for one in compared)
    return [
        {
            "updated": str(one.record.get("updated", "-"))[:16],
            "hours": hours(one.record),
            **(_pace(one) if some_train else {}),
            **summary(one),
        }
        for one in compared
    ]


def _pace(one: Compared) -> Row:
    """Returns the speed and expected end of a run that is training now; None for other runs."""
    if one.status != "running":
        return {"images/s": None, "expected end (UTC)": None}
    found = progress(one.run, one.record)
    ends = found.ends and found.ends.astimezone(UTC).isoformat()[:16]
    return {"images/s": found.images_per_second, "expected end (UTC)": ends}


def rows(compared: Sequence[Compared]) -> list[Row]:
    """Returns one row per run.

    Its columns are the settings that differ, status, final and best values per protocol, speed,
    hours and folder.
    """
    differing = differences(compared)
    columns = metric_columns(compared)
    table = []
    for one, settings in zip(compared, differing, strict=True):
        row: Row = {**settings, "status": one.status, "steps": format_steps(one)}
        for column, protocol in columns.items():
            result = next((found for found in one.results if protocol_of(found) == protocol), None)
            row |= _values(column, result, one.steps)
        rate, spent = images_per_second(one.record), hours(one.record)
        row |= {"images/s": rate, "hours": spent, "run": str(one.run.path)}
        table.append(row)
    empty = (
        [column for column in table[0] if all(row[column] is None for row in table)]
        if table
        else []
    )
    return [
        {column: value for column, value in row.items() if column not in empty} for row in table
    ]


def over_seeds(compared: Sequence[Compared]) -> list[Row]:
    """Summarizes the final values of complete runs that differ only in their seed.

    Each group of two or more gets a row with mean and sample standard deviation.
    """
    columns = metric_columns(compared)
    differing = differences(compared)
    table = []
    for members in seed_groups(compared):
        row: Row = {key: value for key, value in differing[members[0]].items() if key != "seed"}
        row["seeds"] = " ".join(str(compared[index].settings.get("seed")) for index in members)
        for column, protocol in columns.items():
            values = [
                found.final[0]
                for index in members
                for found in compared[index].results
                if protocol_of(found) == protocol and found.final[1] == compared[index].steps
            ]
            if len(values) > 1:
                row |= {
                    f"{column} mean": statistics.mean(values),
                    f"{column} deviation": deviation(values),
                }
                if len(values) < len(members):
                    row[f"{column} runs"] = len(values)
        table.append(row)
    return table


def deviation(values: Sequence[float]) -> float:
    """Returns the sample standard deviation, or NaN if a value is not finite."""
    finite = all(map(math.isfinite, values))
    return statistics.stdev(values) if finite else math.nan


def seed_groups(compared: Sequence[Compared]) -> list[list[int]]:
    """Returns groups of two or more complete runs that differ only in their seed, as indices."""
    groups: dict[str, list[int]] = {}
    for index, one in enumerate(compared):
        if one.status == "complete":
            groups.setdefault(but_for_seed(one), []).append(index)
    return [members for members in groups.values() if len(members) > 1]


def but_for_seed(one: Compared) -> str:
    """Returns a key that runs share if they differ only in their seed."""
    identity = {key: value for key, value in one.identity.items() if key != "seed"}
    return json.dumps([identity, (one.record.get("data") or {}).get("fingerprint")], sort_keys=True)


def differences(compared: Sequence[Compared]) -> list[Row]:
    """Returns, for each run, the settings that differ between runs.

    If a group's settings follow from its option, only the option is listed.
    """
    readable = [one for one in compared if one.settings]
    keys = list(dict.fromkeys(key for one in readable for key in one.settings))
    differing = [key for key in keys if _differ([one.settings.get(key) for one in readable])]
    columns: list[str] = []
    for group in CHOICES:
        options = {one.choices.get(group) for one in readable}
        inside = [key for key in differing if key.startswith(f"{group}.")]
        if len(options) > 1 and inside:
            columns.append(group)
            by_option = [
                {
                    tuple(_comparable(one.settings.get(key)) for key in inside)
                    for one in readable
                    if one.choices.get(group) == option
                }
                for option in options
            ]
            if all(len(settings) == 1 for settings in by_option):
                differing = [key for key in differing if key not in inside]
    return [
        {column: one.choices.get(column) for column in columns}
        | {key: _plain(one.settings.get(key)) for key in differing if not key.endswith("._target_")}
        for one in compared
    ]


def _differ(values: list[Any]) -> bool:
    """Whether any two values are written differently."""
    first = values[0]
    if isinstance(first, str | int | None) and values.count(first) == len(values):
        return len(set(map(type, values))) > 1
    return len(set(map(_comparable, values))) > 1


def _comparable(value: Any) -> Any:
    """Returns a key that is equal for values written alike: True is not 1, and NaN is NaN."""
    exact = value is None or isinstance(value, str | int)
    return (type(value), value) if exact else json.dumps(value, sort_keys=True)


def sort_runs(compared: Sequence[Compared]) -> list[Compared]:
    """Sorts runs by the settings that differ, numbers by value."""

    def place(settings: Row) -> list[tuple[bool, float, str]]:
        return [
            (False, value, "") if isinstance(value, int | float) else (True, 0.0, str(value))
            for value in settings.values()
        ]

    return [
        one
        for one, _ in sorted(
            zip(compared, differences(compared), strict=True), key=lambda pair: place(pair[1])
        )
    ]


def label(settings: Row) -> str:
    """Returns the settings that differ as one line."""
    return (
        ", ".join(
            f"{key.rpartition('.')[2]} {value}"
            for key, value in settings.items()
            if value is not None
        )
        or "-"
    )


def text(table: Sequence[Row], width: int) -> str:
    """Formats the table for a terminal of `width` columns.

    Each run gets a line; if that is too wide, the table is transposed.
    """
    shown = [{column: format_value(value) for column, value in row.items()} for row in table]
    names = list(dict.fromkeys(column for row in shown for column in row))
    lines = [names, *([row.get(name, "-") for name in names] for row in shown)]
    across = align(lines)
    down = align([list(cells) for cells in zip(*lines, strict=True)])
    widest = [max(map(len, drawn.splitlines())) for drawn in (across, down)]
    return down if widest[0] > width and widest[1] < widest[0] else across


def as_csv(table: Sequence[Row]) -> str:
    """Returns the table as CSV with all digits; a cell is empty if a run has no value."""
    file = io.StringIO()
    table = [
        {
            name: part
            for column, value in row.items()
            for name, part in (
                {column: value.value, f"{column} step": value.step}
                if isinstance(value, At)
                else {column: value}
            ).items()
        }
        for row in table
    ]
    names = list(dict.fromkeys(column for row in table for column in row))
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(map(cell, names))
    writer.writerows([cell(row.get(name, "")) for name in names] for row in table)
    return file.getvalue()


def as_json(compared: Sequence[Compared]) -> str:
    """Returns all that is known about each run as JSON, every value with its whole protocol."""
    entries = []
    for one, settings in zip(compared, differences(compared), strict=True):
        figures = [
            {
                "metric": found.metric,
                "protocol": found.protocol,
                "final": found.final,
                "best": found.best,
                "deviation": found.deviation,
            }
            for found in one.results
        ]
        about = {
            "run": str(one.run.path),
            "status": one.status,
            "error": one.record.get("error"),
            "step": one.steps,
            "num_steps": one.record.get("num_steps"),
        }
        speed = {"images_per_second": images_per_second(one.record), "hours": hours(one.record)}
        entries.append(
            {**about, **speed, "differs": settings, "settings": one.settings, "figures": figures}
        )
    return json.dumps(entries, indent=1) + "\n"


def _values(column: str, result: Result | None, steps: int) -> Row:
    if result is None:
        return {column: None, f"{column} best": None}
    final = result.final[0] if result.final[1] == steps else At(*result.final)
    return {
        column: final,
        f"{column} best": At(*result.best)
        if result.best is not None and result.best != result.final
        else None,
    }


def protocol_of(result: Result) -> tuple[str, str]:
    """Returns the key that results share if they have the same metric and protocol."""
    return result.measure


def metric_columns(compared: Sequence[Compared]) -> dict[str, tuple[str, str]]:
    """Returns a unique column name for each metric and protocol.

    If two names would be equal, the fields of the protocol that differ are added.
    """
    found = {protocol_of(result): result for one in compared for result in one.results}
    by_name: dict[str, list[tuple[str, str]]] = {}
    for protocol, result in found.items():
        by_name.setdefault(result.name, []).append(protocol)
    columns: dict[str, tuple[str, str]] = {}
    for name, protocols in by_name.items():
        details = [flat(found[protocol].protocol) for protocol in protocols]
        differing = [
            key
            for key in dict.fromkeys(key for detail in details for key in detail)
            if len({as_key(detail.get(key)) for detail in details}) > 1
        ]
        for protocol, detail in zip(protocols, details, strict=True):
            said = " ".join(in_a_word(key, detail.get(key)) for key in differing)
            columns[f"{name} {said}".strip()] = protocol
    return columns


def in_a_word(key: str, value: Any) -> str:
    """Returns a field of a protocol and its value as one word of a column's name."""
    return f"{key.removesuffix('._target_').rpartition('.')[2]}={_short(value)}"


def _short(value: Any) -> str:
    return value.rpartition(".")[2][:12] if isinstance(value, str) else format_value(value)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, list | Mapping) else value
