"""What the files of a run's folder hold, and one function that reads each of them.

Whatever somebody or a crash has left there, it is plain values of the kinds said here that come
out, or Unreadable.
"""

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from ddpm.system.plain import LARGEST, Unreadable, is_there, read_bytes, read_json, read_yaml

BYTES = 32 * 2**20  # at most of run.json and evaluation.json
BYTES_OF_SETTINGS = 2**20  # at most of config.yaml, choices.yaml and meta.json
BYTES_OF_LINES = 256 * 2**20  # at most of metrics.jsonl and costs.jsonl, a million reports
PARTS_OF_CHECKPOINT = ("ema.safetensors", "model.safetensors", "state.pt")

Step = Annotated[int, Field(ge=0, lt=2**63)]
Number = int | float
Scalar = Annotated[int, Field(gt=-LARGEST, lt=LARGEST)] | float  # of more digits: infinite
Pixels = Annotated[int, Field(gt=0, lt=2**31)]
Resolution = Pixels | Annotated[list[Pixels], Field(min_length=2, max_length=2)]
Table = dict[str, Any]


class _Part(BaseModel):
    """What is said of its keys; others may be there too, and those that have a default need not."""

    model_config = ConfigDict(extra="allow", strict=True)


class _Git(_Part):
    commit: str
    dirty: bool = False


class _Start(_Part):
    from_step: Step
    to_step: Step
    command: list[str] = []
    started: str | None = None
    computation: int = 1
    changed: dict[str, Annotated[list[Any], Field(min_length=2, max_length=2)]] | None = None
    git: _Git | None = None
    versions: dict[str, str] | None = None
    platform: str | None = None


class _Data(_Part):
    path: str | None = None
    fingerprint: str | None = None
    images: int | None = None
    held_out: int | None = None
    classes: list[str] = []
    unreadable: list[str] = []
    notes: list[str] = []


class _Tuned(_Part):
    way: str
    device_batch: int | None = None
    facts: Table = {}
    found: list[Table] = []


class _Timed(_Part):
    images: Number
    seconds: Number
    seconds_in_steps: Number
    device_seconds: Number = 0
    seconds_waiting: Number = 0
    images_trained: Number = 0
    seconds_each: dict[str, Number] = {}
    seconds_to_save: Number | None = None


class _Best(_Part):
    id: str
    value: Number
    step: Step


class _Record(_Part):
    """run.json."""

    status: Literal["running", "complete", "failed", "preempted"]
    format: int = 1
    created: str | None = None
    updated: str | None = None
    identity: Table = {}
    starts: list[_Start] = []
    step: Step = 0
    num_steps: Step | None = None
    steps_per_epoch: Step | None = None
    expected_end: str | None = None
    data: _Data | None = None
    tuned: _Tuned | None = None
    timed: _Timed | None = None
    best: _Best | None = None
    error: str | None = None
    # of the last start, in the first format
    command: list[str] = []
    started: str | None = None
    git: _Git | None = None
    versions: dict[str, str] | None = None
    platform: str | None = None

    @model_validator(mode="after")
    def _ends_where_it_says(self) -> "_Record":
        if self.status == "complete" and "step" not in self.model_fields_set:
            raise ValueError("complete, and no step")
        return self


class _DataSettings(_Part):
    name: str
    source: Table
    path: str | None = None
    resolution: Resolution | None = None


class _Model(_Part):
    resolution: Resolution | None = None


class _Duration(_Part):
    steps: int | None
    epochs: int | None


class _Runtime(_Part):
    num_previews: int = 8


class _Settings(_Part):
    """config.yaml."""

    format: int = 1
    model: _Model
    data: _DataSettings
    schedule: Table
    objective: Table
    optimizer: Table
    lr_schedule: Table
    sampler: Table = {}
    evaluation: Table = {}
    training: _Duration
    runtime: _Runtime
    init_from: str | None = None
    init_weights: str | None = None
    pictures: str | None = None
    outputs: str = "outputs"


class _Function(_Part):
    target: str = Field(alias="_target_")


class _Sampler(_Part):
    function: _Function
    guidance_scale: Number = 1


class _Protocol(_Part):
    step: Step
    count: Annotated[int, Field(ge=0)]
    reference: str = ""
    precision: str = ""
    sampler: str = ""
    sampler_settings: _Sampler | None = None
    weights: str = ""
    seed: int | None = None

    @model_validator(mode="after")
    def _names_its_sampler(self) -> "_Protocol":
        if self.sampler_settings is not None:
            function = self.sampler_settings.function.target.rpartition(".")[2]
            steps = self.sampler.removeprefix(function)
            if not re.fullmatch("[0-9]{1,9}", steps) or self.seed is None:
                raise ValueError("sampler, seed and sampler_settings do not go together")
        return self


class _Figure(_Part):
    """An entry of evaluation.json."""

    metric: str
    value: Number
    protocol: _Protocol
    id: str = ""
    deviation: Number | None = None
    floor: Number | None = None
    network: str | None = None


class _Meta(_Part):
    """meta.json of a checkpoint: the digest of each of its files, which lie beside it."""

    step: Step
    sha256: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$")], str]

    @model_validator(mode="after")
    def _has_all_parts(self) -> "_Meta":
        for name in PARTS_OF_CHECKPOINT:
            if name not in self.sha256:
                raise ValueError(f"sha256 has no {name}")
        return self


_RECORD, _SETTINGS, _META = TypeAdapter(_Record), TypeAdapter(_Settings), TypeAdapter(_Meta)
_CHOICES = TypeAdapter(dict[str, Annotated[str, Field(pattern=r"^[\w.@/+-]*$")]])
_FIGURES = TypeAdapter(list[_Figure])
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
