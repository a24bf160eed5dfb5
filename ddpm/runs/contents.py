"""Reads the files of a run's folder, one function per file.

Whatever a person or a crash has left there, these return plain values that fit ddpm.runs.shapes, or
raise Unreadable.
"""

import os
import re
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from ddpm.runs.shapes import Figure, Meta, Record, Scalar, Settings
from ddpm.system.plain import Unreadable, is_there, read_bytes, read_json, read_yaml

BYTES = 32 * 2**20  # limit of run.json and evaluation.json
BYTES_OF_SETTINGS = 2**20  # limit of config.yaml, choices.yaml and meta.json
BYTES_OF_LINES = 256 * 2**20  # limit of metrics.jsonl and costs.jsonl, about a million reports

_RECORD, _SETTINGS, _META = TypeAdapter(Record), TypeAdapter(Settings), TypeAdapter(Meta)
_CHOICES = TypeAdapter(dict[str, Annotated[str, Field(pattern=r"^[\w.@/+-]*$")]])
_FIGURES = TypeAdapter(list[Figure])
_SCALARS = TypeAdapter(dict[str, Scalar], config=ConfigDict(strict=True))
_COSTS = TypeAdapter(dict[str, Scalar | None], config=ConfigDict(strict=True))


def read_record(folder: Path) -> dict[str, Any]:
    """Returns the content of a run's run.json, empty if there is none.

    Raises:
        Unreadable: If the file does not have the expected content.
    """
    file = folder / "run.json"
    found = read_json(file, BYTES)
    return {} if found in (None, {}) else _fitting(file, found, _RECORD)


def read_settings(folder: Path) -> dict[str, Any]:
    """Returns the content of a run's config.yaml, unchanged.

    Raises:
        Unreadable: If the file is missing or does not have the expected content.
    """
    file = folder / "config.yaml"
    return _fitting(file, read_yaml(file, BYTES_OF_SETTINGS), _SETTINGS)


def read_choices(folder: Path) -> dict[str, str]:
    """Returns the option chosen in each config group, empty if there is no choices.yaml.

    Raises:
        Unreadable: If the file does not have the expected content.
    """
    file = folder / ".hydra" / "choices.yaml"
    found = read_yaml(file, BYTES_OF_SETTINGS)
    return {} if found is None else _fitting(file, found, _CHOICES)


def read_figures(file: Path) -> list[dict[str, Any]]:
    """Returns the entries of an evaluation.json, empty if there is none.

    Raises:
        Unreadable: If the file does not have the expected content.
    """
    found = read_json(file, BYTES)
    return [] if found is None else _fitting(file, found, _FIGURES)


def checkpoint_folders(checkpoints: Path) -> list[tuple[int, Path]]:
    """Returns the step and folder of each checkpoint of a run, oldest first.

    Args:
        checkpoints: The run's folder of checkpoints.

    Raises:
        Unreadable: If the folder cannot be read.
    """
    try:
        # names, not Paths: with thousands of runs these take seconds
        there = os.listdir(checkpoints)  # noqa: PTH208
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise Unreadable(checkpoints, error.strerror or str(error)) from error
    return [
        (int(name[-8:]), checkpoints / name)
        for name in sorted(there)
        if re.fullmatch("step_[0-9]{8}", name) and (checkpoints / name / "meta.json").is_file()
    ]


def read_meta(folder: Path) -> dict[str, Any]:
    """Returns the content of a checkpoint's meta.json.

    Args:
        folder: The checkpoint's folder, named step_ and eight digits.

    Raises:
        Unreadable: If the file is missing, does not have the expected content, or belongs to
            another step.
    """
    file = folder / "meta.json"
    meta: dict[str, Any] = _fitting(file, read_json(file, BYTES_OF_SETTINGS), _META)
    if meta["step"] != int(folder.name[-8:]):
        raise Unreadable(file, f"it belongs to step {meta['step']}")
    return meta


def _fitting(file: Path, found: Any, schema: TypeAdapter[Any]) -> Any:
    """Returns `found` if it fits the schema, else raises Unreadable with the first error."""
    if found is None:
        raise Unreadable(file, "missing or empty")
    try:
        schema.validate_python(found, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        why = "not a table" if first["type"] == "model_type" else first["msg"]
        raise Unreadable(file, f"{place}: {why}" if place else why) from None
    return found


class Line(NamedTuple):
    """A complete line of metrics.jsonl or costs.jsonl.

    Attributes:
        number: The line number, from 1.
        text: The line as it is in the file.
        record: The line's content, `step` and scalars by name; None if the line is damaged.
    """

    number: int
    text: str
    record: dict[str, Any] | None


def read_lines(file: Path, gaps: bool = False) -> list[Line]:
    """Returns the lines of a metrics.jsonl or costs.jsonl, empty if there is none.

    A last line that a crash cut short is left out.

    Args:
        file: The file.
        gaps: Accept null values, which costs.jsonl has for unknown costs.

    Raises:
        Unreadable: If it is too large, or not a regular file.
    """
    lines = (read_bytes(file, BYTES_OF_LINES) or b"").split(b"\n")[:-1]
    return [
        Line(number, line.decode(errors="replace"), _parse(line, gaps))
        for number, line in enumerate(lines, start=1)
        if line
    ]


def check(folder: Path) -> None:
    """Checks, before a run resumes, the files that it would only read at its end.

    Raises:
        Unreadable: If one of them does not have the expected content.
    """
    check_lines(folder)
    read_figures(folder / "evaluation.json")


def check_lines(folder: Path) -> None:
    """Checks a run's metrics.jsonl and costs.jsonl without reading them.

    Raises:
        Unreadable: If one is too large, or not a regular file.
    """
    for name in ("metrics.jsonl", "costs.jsonl"):
        is_there(folder / name, BYTES_OF_LINES)


def _parse(line: bytes, gaps: bool) -> dict[str, Any] | None:
    try:
        record = (_COSTS if gaps else _SCALARS).validate_json(line)
    except ValidationError:
        return None
    step = record.get("step")
    return record if isinstance(step, int) and 0 <= step < 2**63 else None
