"""Schemas of the files in a run's folder: the keys that this program reads, and their types.

Other keys are allowed. Keys with a default may be missing.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ddpm.system.plain import LARGEST

PARTS_OF_CHECKPOINT = ("ema.safetensors", "model.safetensors", "state.pt")
Step = Annotated[int, Field(ge=0, lt=2**63)]
Number = int | float
Scalar = Annotated[int, Field(gt=-LARGEST, lt=LARGEST)] | float  # larger integers become floats
Pixels = Annotated[int, Field(gt=0, lt=2**31)]
Resolution = Pixels | Annotated[list[Pixels], Field(min_length=2, max_length=2)]
Table = dict[str, Any]


class _Part(BaseModel):
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


class Record(_Part):
    """The content of run.json."""

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
    # the first format only: entries of the last start
    command: list[str] = []
    started: str | None = None
    git: _Git | None = None
    versions: dict[str, str] | None = None
    platform: str | None = None

    @model_validator(mode="after")
    def _ends_where_it_says(self) -> "Record":
        if self.status == "complete" and "step" not in self.model_fields_set:
            raise ValueError("status is complete but step is missing")
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


class Settings(_Part):
    """The content of config.yaml."""

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
                raise ValueError("sampler and seed do not match sampler_settings")
        return self


class Figure(_Part):
    """An entry of evaluation.json."""

    metric: str
    value: Number
    protocol: _Protocol
    id: str = ""
    deviation: Number | None = None
    floor: Number | None = None
    network: str | None = None


class Meta(_Part):
    """The content of a checkpoint's meta.json: the step, and each file's SHA-256."""

    step: Step
    sha256: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$")], str]

    @model_validator(mode="after")
    def _has_all_parts(self) -> "Meta":
        for name in PARTS_OF_CHECKPOINT:
            if name not in self.sha256:
                raise ValueError(f"sha256 has no {name}")
        return self
