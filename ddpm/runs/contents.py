"""The files of a run's folder, each read by one function.

Whatever somebody or a crash has left there, it is plain values of ddpm.runs.shapes that come out,
or Unreadable.
"""

import os
import re
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from ddpm.runs.shapes import Figure, Meta, Record, Scalar, Settings
from ddpm.system.plain import Unreadable, is_there, read_bytes, read_json, read_yaml

BYTES = 32 * 2**20  # at most of run.json and evaluation.json
BYTES_OF_SETTINGS = 2**20  # at most of config.yaml, choices.yaml and meta.json
BYTES_OF_LINES = 256 * 2**20  # at most of metrics.jsonl and costs.jsonl, a million reports

_RECORD, _SETTINGS, _META = TypeAdapter(Record), TypeAdapter(Settings), TypeAdapter(Meta)
_CHOICES = TypeAdapter(dict[str, Annotated[str, Field(pattern=r"^[\w.@/+-]*$")]])
_FIGURES = TypeAdapter(list[Figure])
_SCALARS = TypeAdapter(dict[str, Scalar], config=ConfigDict(strict=True))
_COSTS = TypeAdapter(dict[str, Scalar | None], config=ConfigDict(strict=True))


def read_record(folder: Path) -> dict[str, Any]:
    """Returns run.json of a run's folder, empty if it is not there.

    Raises:
        Unreadable: If it is not one of ours.
    """
    file = folder / "run.json"
    found = read_json(file, BYTES)
    return {} if found in (None, {}) else _fitting(file, found, _RECORD)


def read_settings(folder: Path) -> dict[str, Any]:
    """Returns config.yaml of a run's folder, as it stands there; it says what is computed.

    Raises:
        Unreadable: If it is not there or not one of ours.
    """
    file = folder / "config.yaml"
    return _fitting(file, read_yaml(file, BYTES_OF_SETTINGS), _SETTINGS)


def read_choices(folder: Path) -> dict[str, str]:
    """Returns the option that was chosen in each group, empty if that is not written down.

    Raises:
        Unreadable: If the file is not one of ours.
    """
    file = folder / ".hydra" / "choices.yaml"
    found = read_yaml(file, BYTES_OF_SETTINGS)
    return {} if found is None else _fitting(file, found, _CHOICES)


def read_figures(file: Path) -> list[dict[str, Any]]:
    """Returns the entries of an evaluation.json, none if it is not there.

    Raises:
        Unreadable: If it is not one of ours.
    """
    found = read_json(file, BYTES)
    return [] if found is None else _fitting(file, found, _FIGURES)


def checkpoint_folders(checkpoints: Path) -> list[tuple[int, Path]]:
    """Returns step and folder of each checkpoint in a run's folder of them, oldest first."""
    try:
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
    """Returns meta.json of a checkpoint's folder, step_ and eight digits.

    Raises:
        Unreadable: If it is not there or not one of ours, or that of another step.
    """
    file = folder / "meta.json"
    meta: dict[str, Any] = _fitting(file, read_json(file, BYTES_OF_SETTINGS), _META)
    if meta["step"] != int(folder.name[-8:]):
        raise Unreadable(file, f"it is that of step {meta['step']}")
    return meta


def _fitting(file: Path, found: Any, schema: TypeAdapter[Any]) -> Any:
    """What was read, if it is what the schema says."""
    if found is None:
        raise Unreadable(file, "it is not there, or empty")
    try:
        schema.validate_python(found, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        why = "not a table" if first["type"] == "model_type" else first["msg"]
        raise Unreadable(file, f"{place}: {why}" if place else why) from None
    return found


class Line(NamedTuple):
    """A whole line of metrics.jsonl or costs.jsonl.

    Attributes:
        number: In the file, from 1.
        text: As it stands there.
        record: What it says, `step` and scalars by name; None where it is damaged.
    """

    number: int
    text: str
    record: dict[str, Any] | None


def read_lines(file: Path, gaps: bool = False) -> list[Line]:
    """Returns the lines of a metrics.jsonl or costs.jsonl, none if it is not there.

    A last line that a crash cut short is no line.

    Args:
        file: The file.
        gaps: Take a line with null for a value as whole: costs.jsonl has it where one is not known.

    Raises:
        Unreadable: If it is too large, or no file.
    """
    lines = (read_bytes(file, BYTES_OF_LINES) or b"").split(b"\n")[:-1]
    return [
        Line(number, line.decode(errors="replace"), _parse(line, gaps))
        for number, line in enumerate(lines, start=1)
        if line
    ]


def check(folder: Path) -> None:
    """Looks, before a run goes on, at what only its end would read.

    Raises:
        Unreadable: If it is not one of ours.
    """
    check_lines(folder)
    read_figures(folder / "evaluation.json")


def check_lines(folder: Path) -> None:
    """Looks at metrics.jsonl and costs.jsonl of a run's folder, without reading them.

    Raises:
        Unreadable: If one is too large, or no file.
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
