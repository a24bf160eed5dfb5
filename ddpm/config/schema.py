"""The checked configuration.

Before anything is built, every key is known, every value has its type and range, and every named
class is trusted. Groups with a `_target_` are checked against that callable's signature; all other
settings have their schema here.
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
    """The pictures and their preprocessing. conf/data/common/any.yaml explains each key."""

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
    white: PositiveFloat | None = None  # older runs lack this key and the next two
    max_pixels: Count = 89_478_485
    resize: Literal["bicubic", "bilinear", "lanczos", "box", "box_bicubic"] = "bicubic"
    max_unreadable: Share
    license: str | None = None  # older runs lack this key
    cache: Text


class Place(Section):
    """Where a run's pictures lie now, for commands that read a run; null: where they were."""

    path: Text | None


class Training(Section):
    """Duration, batch, precision and averaging. conf/config.yaml explains each key."""

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
    """How a run is carried out. conf/config.yaml explains each key."""

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
    max_hours: Annotated[float, Field(gt=0)] | None = None  # older runs lack this key
    evaluate_every: Count | None
    num_previews: Annotated[int, Field(gt=0, le=4096)]
    preview_sampler: Text = "auto"  # older runs lack this key
    trusted_modules: list[str]
    check_sweep: bool = True  # older runs lack this key and the next two
    deterministic: bool = False
    profile: tuple[Count, Count] | None = None


Split = Literal["train", "heldout", "validation", "test"]
Quantize = Literal["round", "truncate", "none"]


class EvaluationSettings(Section):
    """Metrics and their protocol. conf/evaluation/default.yaml explains each key."""

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
    reference: Text | None = None  # older runs lack this key
    batch_size: Count
    precision: Precision = "tf32"  # older runs lack this key
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    quantize: Quantize = "round"  # older runs lack this key and the next two
    inception_splits: FileCount = 10
    num_reference: Count | None = None


class Metric(Section):
    """A published figure and the protocol that it was measured by."""

    name: str
    value: float
    tolerance: PositiveFloat
    protocol: str


class Expect(Section):
    """Values that a recipe's run must have; ddpm.plan checks them.

    Steps are optimizer updates, counted from 0. `settings` maps dotted keys to values.
    """

    parameters: Count | None = None
    steps_per_epoch: Count | None = None
    last_step: Count | None = None
    lr: dict[int, float] = Field(default_factory=dict)
    alphas_cumprod: dict[int, float] = Field(default_factory=dict)
    settings: dict[str, Any] = Field(default_factory=dict)
    metrics: list[Metric] = Field(default_factory=list)


class Recipe(Section):
    """The source of a named run, and the values that the run should have.

    Attributes:
        source: The paper, README or code.
        takes: Duration and hardware.
        note: What the source leaves open about this run.
        differs: Differences from the source's code that can change a number.
        departs: The source's values of settings that remove such a difference, by dotted key.
        expect: Values that the run must have.
    """

    source: str
    takes: str | None = None
    note: str | None = None
    differs: str | None = None
    departs: dict[str, Any] = Field(default_factory=dict)
    expect: Expect


class Config(Section):
    """The whole configuration of a training run (conf/config.yaml).

    Attributes:
        init_weights: Digest of the weights at init_from, computed when the run is located
            (initial.with_initial_weights).
        pictures: Fingerprint of the pictures at data.path for data=folder, computed when the run is
            located (pictures.with_pictures).
    """

    resume: Text | None = None
    init_from: Text | None
    init_attention: Literal["by_head", "whole"] = "by_head"  # older runs lack this key
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


# keys of a run's config.yaml that users cannot set -> the key that they follow from
FOLLOWING = {"init_weights": "init_from", "pictures": "data.path"}


def training_config(composed: Composed) -> Config:
    """Returns the checked configuration of a run.

    Raises:
        ValueError: If a setting is invalid; the message names the key, its value and what is
            allowed.
    """
    plain = plain_config(composed)
    for key, source in FOLLOWING.items():
        if key in plain:
            raise ValueError(f"{key}: no such key; it follows from {source}")
    return config_of({**plain, **dict.fromkeys(FOLLOWING)}, composed.overrides)


def settings_and_config(schema: type[S], composed: Composed) -> tuple[S, Config]:
    """Returns a command's own settings and the run's configuration, both checked.

    Raises:
        ValueError: As `training_config` does.
    """
    cfg = composed.cfg.copy()
    own = OmegaConf.create({key: cfg.pop(key) for key in schema.model_fields})
    settings = validate(schema, plain_config(replace(composed, cfg=own)))
    return settings, training_config(replace(composed, cfg=cfg))


def config_of(plain: dict[str, Any], overrides: list[str]) -> Config:
    """Returns the checked configuration of a run from plain values.

    Args:
        plain: The values.
        overrides: The command line's overrides, which settle the unit of the duration.

    Raises:
        ValueError: If a setting is invalid.
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
            f"data.path={config.data.path}: data={config.data.name} has its own pictures; use "
            "data=folder data.path=... for yours"
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
    """Returns the checked configuration of composed values, such as a run folder's config.yaml.

    The values must not hold interpolations: building objects would resolve them, and could read the
    environment.
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
        ValueError: If a value is missing or an interpolation cannot be resolved.
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
            f"{key}={value} is an interpolation; a composed configuration holds plain values"
        )
    for name, inner in entries(value):
        _check_resolved(f"{key}.{name}".removeprefix("."), inner)


def _check_shapes(config: Config) -> None:
    """Checks the network's channels and resolution, if it takes these, against the data's."""
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
    """Checks at the start of a run, not in the middle, that it can measure what it is to."""
    if config.runtime.evaluate_every is None:
        return
    splits = (config.evaluation.split, config.evaluation.bound_split)
    if not config.evaluation.metrics and not config.data.holdout and {*splits} <= {"train"}:
        raise ValueError(
            f"runtime.evaluate_every={config.runtime.evaluate_every} with evaluation.metrics=[] "
            "measures nothing; data.holdout=0.1 adds the loss on held-out pictures"
        )
    for key, split in (
        ("split", config.evaluation.split),
        ("bound_split", config.evaluation.bound_split),
    ):
        if split == "heldout" and config.data.holdout == 0:
            raise ValueError(
                f"evaluation.{key}=heldout needs held-out pictures, and data.holdout=0.0; set, "
                "say, data.holdout=0.1"
            )
        if split in ("validation", "test") and "split" not in config.data.source:
            raise ValueError(
                f"evaluation.{key}={split}: data={config.data.name} has no {split} split; use "
                "heldout with data.holdout=0.1"
            )


def _resolve_duration(plain: dict[str, Any], overrides: list[str]) -> None:
    """Replaces the recipe's duration with the command line's, whatever its unit."""
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
