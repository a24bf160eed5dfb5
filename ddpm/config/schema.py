"""The checked configuration.

Every key is known, every value of its type and in its range, and every named class trusted, before
anything is built. Groups with a `_target_` are checked against the signature of what they name; the
settings that no constructor checks have their schema here.
"""

import typing
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field

from ddpm.config.compose import Composed
from ddpm.config.rules import UNITS, given_units
from ddpm.config.validation import (
    Count,
    FileCount,
    Node,
    PositiveFloat,
    S,
    Section,
    Share,
    Text,
    check_node,
    entries,
    validate,
)
from ddpm.system.names import Name, Precision


class Data(Section):
    """Which pictures, and how they are made ready. See conf/data/common/any.yaml for each key."""

    name: str
    source: Node
    path: Text | None
    revision: str | None
    resolution: Count | tuple[Count, Count]
    channels: Literal[1, 3]
    num_classes: Count | None
    num_images: Count | None
    crop: Literal["center", "none"]
    flip: bool
    holdout: Share
    background: str
    white: PositiveFloat | None = None  # this and the next two: runs of before have none
    max_pixels: Count = 89_478_485
    resize: Literal["bicubic", "bilinear", "lanczos", "box", "box_bicubic"] = "bicubic"
    max_unreadable: Share
    license: str | None = None  # runs of before have none
    cache: Text


class Place(Section):
    """Where a run's pictures lie now, in commands that read a run; null: where they were."""

    path: Text | None


class Training(Section):
    """Duration, batch, precision and averaging. See conf/config.yaml for each key."""

    steps: Count | None
    epochs: Count | None
    batch_size: Count
    drop_last: bool
    precision: Precision
    grad_clip: PositiveFloat | None
    ema_decay: Share
    ema_warmup: bool
    conditional: bool
    label_dropout: Share


class Runtime(Section):
    """How a run is carried out. See conf/config.yaml for each key."""

    device: Literal["auto", "cpu", "cuda", "mps"]
    device_batch: Count | Literal["auto"]
    recompute: list[int]
    tune: bool | Literal["auto"] | Name
    feed: Literal["auto", "device", "file", "decode"]
    workers: Annotated[int, Field(gt=0, le=1024)] | None
    log_every: Count
    sample_every: Count
    checkpoint_every: Count
    keep_checkpoints: Count
    max_hours: Annotated[float, Field(gt=0)] | None = None  # runs of before have none
    evaluate_every: Count | None
    num_previews: Annotated[int, Field(gt=0, le=4096)]
    preview_sampler: Text = "auto"  # runs of before have none
    trusted_modules: list[str]
    check_sweep: bool = True  # this and the next two: runs of before have none
    deterministic: bool = False
    profile: tuple[Count, Count] | None = None


Split = Literal["train", "heldout", "validation", "test"]
Quantize = Literal["round", "truncate", "none"]


class EvaluationSettings(Section):
    """Which metrics, by which protocol. See conf/evaluation/default.yaml for each key."""

    metrics: list[
        Literal[
            "fd",
            "kd",
            "inception_score",
            "precision_recall",
            "classes",
            "nearest",
            "colour",
            "bits_per_dim",
            "losses",
        ]
    ]
    extractor: Literal["inception", "efficientnet_lite0", "digits"]
    weights_path: str | None
    download: bool
    num_samples: Annotated[int, Field(ge=2, le=1_000_000)]
    split: Split
    num_images: Count
    bound_split: Split
    reference: Text | None = None  # runs of before have none
    batch_size: Count
    precision: Precision = "tf32"  # runs of before have none
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    quantize: Quantize = "round"  # this and the next two: runs of before have none
    inception_splits: FileCount = 10
    num_reference: Count | None = None


class Metric(Section):
    """A published figure, with the protocol that it was measured by."""

    name: str
    value: float
    tolerance: PositiveFloat
    protocol: str


class Expect(Section):
    """What a recipe's run must come to; ddpm.plan checks it.

    Steps are optimizer updates counted from 0; `settings` are values by dotted key.
    """

    parameters: Count | None = None
    steps_per_epoch: Count | None = None
    last_step: Count | None = None
    lr: dict[int, float] = Field(default_factory=dict)
    alphas_cumprod: dict[int, float] = Field(default_factory=dict)
    settings: dict[str, Any] = Field(default_factory=dict)
    metrics: list[Metric] = Field(default_factory=list)


class Recipe(Section):
    """Where a named run comes from and what it should come to.

    Attributes:
        source: The paper, README or code.
        takes: How long, on what.
        note: What the source leaves open, of this run alone.
        differs: What is done otherwise than in the source's code and can change a number.
        departs: Of that, what a setting undoes: the source's values by dotted key.
        expect: What it must come to.
    """

    source: str
    takes: str | None = None
    note: str | None = None
    differs: str | None = None
    departs: dict[str, Any] = Field(default_factory=dict)
    expect: Expect


class Config(Section):
    """A training run, whole (conf/config.yaml).

    Attributes:
        init_weights: Digest of what lies at init_from, found when the run is
            (initial.with_initial_weights).
        pictures: Fingerprint of what lies at data.path for data=folder, found when the run is
            (pictures.with_pictures).
    """

    resume: Text | None = None
    init_from: Text | None
    init_attention: Literal["by_head", "whole"] = "by_head"  # runs of before have none
    init_weights: str | None = None
    pictures: str | None = None
    model: Node
    data: Data
    schedule: Node
    objective: Node
    optimizer: Node
    lr_schedule: Node
    sampler: Node
    evaluation: EvaluationSettings
    training: Training
    runtime: Runtime
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    outputs: Text
    recipe: Recipe | None


# of a run's config.yaml, not typed
FOLLOWING = {"init_weights": "init_from", "pictures": "data.path"}


def training_config(composed: Composed) -> Config:
    """Returns the configuration of a run, checked.

    Raises:
        ValueError: For what is wrong; it names the key, the value and what is allowed.
    """
    plain = plain_config(composed)
    for key, source in FOLLOWING.items():
        if key in plain:
            raise ValueError(f"{key}: no such key; it follows from {source}")
    return config_of({**plain, **dict.fromkeys(FOLLOWING)}, composed.overrides)


def settings_and_config(schema: type[S], composed: Composed) -> tuple[S, Config]:
    """Returns what a command adds to a run's keys, and the run's configuration, both checked.

    Raises:
        ValueError: As `training_config` does.
    """
    cfg = composed.cfg.copy()
    own = OmegaConf.create({key: cfg.pop(key) for key in schema.model_fields})
    settings = validate(schema, plain_config(replace(composed, cfg=own)))
    return settings, training_config(replace(composed, cfg=cfg))


def config_of(plain: dict[str, Any], overrides: list[str]) -> Config:
    """Returns the configuration of a run from plain values, checked.

    Args:
        plain: The values.
        overrides: Of the command line, which settle the unit of the duration.

    Raises:
        ValueError: For what is wrong.
    """
    _resolve_duration(plain, overrides)
    config = read_config(plain)
    if (config.training.steps is None) == (config.training.epochs is None):
        raise ValueError(
            f"training.steps={config.training.steps} and training.epochs={config.training.epochs}: "
            "give one of them"
        )
    lr = config.optimizer.get("lr")
    if lr is None:
        raise ValueError("optimizer.lr is missing: the learning rate schedule starts from it")
    if lr <= 0:
        raise ValueError(f"optimizer.lr={lr} must be more than 0")
    for key in ("out_channels", "num_classes"):
        if key in config.model:
            raise ValueError(
                f"model.{key}: no such key; it follows from the data, the objective and "
                "training.conditional"
            )
    _check_shapes(config)
    _check_splits(config)
    span = config.runtime.profile
    if span is not None and span[0] > span[1]:
        raise ValueError(
            f"runtime.profile={list(span)}: give the first step to trace, then the last, such as "
            f"runtime.profile=[{span[1]},{span[0]}]"
        )
    if config.data.path is not None and "path" not in config.data.source:
        raise ValueError(
            f"data.path={config.data.path}: data={config.data.name} has pictures of its own; yours "
            "are data=folder data.path=..."
        )
    if (
        config.training.conditional
        and config.data.num_classes is None
        and config.data.name != "folder"
    ):
        raise ValueError(
            f"training.conditional=true needs labels, and data={config.data.name} has none "
            "(data.num_classes=null)"
        )
    return config


def read_config(plain: Mapping[str, Any]) -> Config:
    """Returns a configuration from plain values, checked like one that was just composed.

    The values, such as a run folder's config.yaml, must be composed already. An interpolation left
    in them would be resolved when objects are built, and could read the environment.
    """
    _check_resolved("", plain)
    config = validate(Config, plain)
    for group in ("model", "schedule", "objective", "optimizer", "lr_schedule", "sampler"):
        check_node(group, plain[group], config.runtime.trusted_modules)
    check_node("data.source", plain["data"]["source"], config.runtime.trusted_modules)
    return config


def plain_config(composed: Composed) -> dict[str, Any]:
    """Returns the composed configuration as plain values.

    Raises:
        ValueError: For a value that is missing or refers to nothing.
    """
    try:
        return typing.cast(
            dict[str, Any],
            OmegaConf.to_container(composed.cfg, resolve=True, throw_on_missing=True),
        )
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        raise ValueError(f"{key}: {str(error).splitlines()[0]}") from error


def _check_resolved(key: str, value: Any) -> None:
    if isinstance(value, str) and "${" in value:
        raise ValueError(
            f"{key}={value} is an interpolation, which a composed configuration has no more"
        )
    for name, inner in entries(value):
        _check_resolved(f"{key}.{name}".removeprefix("."), inner)


def _check_shapes(config: Config) -> None:
    """Checks that the network is made for the pictures, where its arguments tell."""
    resolution = (
        config.data.resolution
        if isinstance(config.data.resolution, int)
        else list(config.data.resolution)
    )
    for key, theirs, wanted in (
        ("in_channels", "channels", config.data.channels),
        ("resolution", "resolution", resolution),
    ):
        if config.model.get(key, wanted) != wanted:
            raise ValueError(
                f"model.{key}={config.model[key]} and data.{theirs}={wanted} must be the same"
            )


def _check_splits(config: Config) -> None:
    """Checks before a run, not in the middle of it, that what it will measure is there."""
    if config.runtime.evaluate_every is None:
        return
    splits = (config.evaluation.split, config.evaluation.bound_split)
    if not config.evaluation.metrics and not config.data.holdout and {*splits} <= {"train"}:
        raise ValueError(
            f"runtime.evaluate_every={config.runtime.evaluate_every} with evaluation.metrics=[] "
            "measures nothing; with data.holdout=0.1 it has the loss on pictures held out"
        )
    for key, split in (
        ("split", config.evaluation.split),
        ("bound_split", config.evaluation.bound_split),
    ):
        if split == "heldout" and config.data.holdout == 0:
            raise ValueError(
                f"evaluation.{key}=heldout needs pictures that are kept from training, and "
                "data.holdout=0.0; give data.holdout=0.1, say"
            )
        if split in ("validation", "test") and "split" not in config.data.source:
            raise ValueError(
                f"evaluation.{key}={split}: data={config.data.name} has no {split} split; use "
                "heldout, with data.holdout=0.1"
            )


def _resolve_duration(plain: dict[str, Any], overrides: list[str]) -> None:
    """Puts a duration of the command line in place of the recipe's, whatever its unit."""
    given: set[str] = set()
    for override in OverridesParser.create().parse_overrides(overrides):
        if override.key_or_group == "training":
            given |= given_units(override.value())
        if override.key_or_group.startswith("training."):
            given |= given_units(
                {override.key_or_group.removeprefix("training."): override.value()}
            )
    if len(given) == 1 and isinstance(plain.get("training"), dict):
        plain["training"][UNITS[given.pop()]] = None
