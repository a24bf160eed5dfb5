"""The checked configuration: every key known, every value of its type and in its range, every named class trusted, before anything is built.

Groups with a `_target_` are checked against the signature of what they name; the settings that no constructor checks have their schema here.
"""

import importlib
import inspect
import json
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, create_model

from ddpm.cli import Composed, nearest

TRUSTED = ("ddpm.", "torch.optim.")

Node = dict[str, Any]  # {_target_: what to call, arguments...}
PositiveFloat = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Data(Section):
    """Which pictures, and how they are made ready. See conf/data/common/any.yaml for each key."""

    name: str
    source: Node
    path: str | None
    revision: str | None
    resolution: PositiveInt | tuple[PositiveInt, PositiveInt]
    channels: Literal[1, 3]
    num_classes: PositiveInt | None
    num_images: PositiveInt | None
    crop: Literal["center", "none"]
    flip: bool
    holdout: Share
    background: str
    max_unreadable: Share
    cache: str


class Training(Section):
    """Duration, batch, precision and averaging. See conf/training/default.yaml for each key."""

    steps: PositiveInt | None
    epochs: PositiveInt | None
    batch_size: PositiveInt
    drop_last: bool
    precision: Literal["fp32", "bf16", "fp16"]
    grad_clip: PositiveFloat | None
    ema_decay: Share
    ema_warmup: bool
    conditional: bool
    label_dropout: Share


class Runtime(Section):
    """How a run is carried out. See conf/runtime/default.yaml for each key."""

    device: Literal["auto", "cpu", "cuda", "mps"]
    device_batch: PositiveInt | None
    compile: bool
    workers: PositiveInt | None
    log_every: PositiveInt
    sample_every: PositiveInt
    checkpoint_every: PositiveInt
    keep_checkpoints: PositiveInt
    evaluate_every: PositiveInt | None
    num_previews: PositiveInt
    trusted_modules: list[str]


Split = Literal["train", "heldout", "test"]


class EvaluationSettings(Section):
    """Which metrics, by which protocol. See conf/evaluation/default.yaml for each key."""

    metrics: list[Literal["fd", "kd", "inception_score", "precision_recall", "nearest", "colour", "bits_per_dim", "losses"]]
    extractor: Literal["inception", "efficientnet_lite0"]
    weights_path: str | None
    download: bool
    num_samples: Annotated[int, Field(ge=2)]
    split: Split
    num_images: PositiveInt
    bound_split: Split
    batch_size: PositiveInt
    seed: Annotated[int, Field(ge=0, lt=2**63)]


class Metric(Section):
    """A published figure, with the protocol that it was measured by."""

    name: str
    value: float
    tolerance: PositiveFloat
    protocol: str


class Expect(Section):
    """What a recipe's run must come to; ddpm.plan checks it. Steps are optimizer updates counted from 0."""

    parameters: PositiveInt | None = None
    steps_per_epoch: PositiveInt | None = None
    last_step: PositiveInt | None = None
    lr: dict[int, float] = {}
    alphas_cumprod: dict[int, float] = {}
    metrics: list[Metric] = []


class Recipe(Section):
    """Where a named run comes from and what it should come to."""

    source: str
    takes: str | None = None
    note: str | None = None
    expect: Expect


class Config(Section):
    """A training run, whole (conf/config.yaml).    init_weights: digest of what lies at init_from, found when the run is (run_folder.with_content)."""

    init_from: str | None
    init_weights: str | None = None
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
    outputs: str
    recipe: Recipe | None


def training_config(composed: Composed) -> Config:
    """The configuration of a run, checked.    Raises ValueError, one line that names the key, the value and what is allowed."""
    plain = {**plain_config(composed), "init_weights": None}
    _settle_duration(plain["training"], composed.overrides)
    config = read_config(plain)
    if (config.training.steps is None) == (config.training.epochs is None):
        raise ValueError(f"training.steps={config.training.steps} and training.epochs={config.training.epochs}: give one of them")
    if "lr" not in config.optimizer:
        raise ValueError("optimizer.lr is missing: the learning rate schedule starts from it")
    if config.training.conditional and config.data.num_classes is None and config.data.name != "folder":
        raise ValueError(f"training.conditional=true needs labels, and data={config.data.name} has none (data.num_classes=null)")
    return config


def read_config(plain: Mapping[str, Any]) -> Config:
    """A configuration from plain values, such as a run folder's config.yaml, checked like one that was just composed."""
    config = validated(Config, plain)
    for group in ("model", "schedule", "objective", "optimizer", "lr_schedule", "sampler"):
        check_node(group, plain[group], config.runtime.trusted_modules)
    check_node("data.source", plain["data"]["source"], config.runtime.trusted_modules)
    return config


def plain_config(composed: Composed) -> dict[str, Any]:
    """The composed configuration as plain values.    Raises ValueError, one line, for a value that is missing or refers to nothing."""
    try:
        return typing.cast(dict[str, Any], OmegaConf.to_container(composed.cfg, resolve=True, throw_on_missing=True))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        raise ValueError(f"{key}: {str(error).splitlines()[0]}") from error


S = typing.TypeVar("S", bound=BaseModel)


def validated(schema: type[S], plain: Mapping[str, Any]) -> S:
    """`plain` as `schema`.    Raises ValueError, one line that names the first wrong key, its value and what is allowed."""
    try:
        return schema.model_validate_json(json.dumps(plain))
    except ValidationError as error:
        raise ValueError(_first(error, plain, schema)) from None


def check_node(key: str, node: Mapping[str, Any], trusted: list[str]) -> None:
    """Check that a group names something trusted, and gives it arguments that it takes, of their types.

    Only names that start with "ddpm.", "torch.optim." or a prefix of runtime.trusted_modules are imported (design rule: nothing loaded runs code).
    Raises ValueError, one line.
    """
    _check_trust(key, {"_target_": None, **node}, (*TRUSTED, *(f"{name.rstrip('.')}." for name in trusted)))
    function = _imported(key, node["_target_"])
    signature = inspect.signature(function)
    hints = typing.get_type_hints(function.__init__ if inspect.isclass(function) else function, include_extras=True)
    arguments = {name: value for name, value in node.items() if name not in ("_target_", "_partial_")}
    fields: dict[str, Any] = {}
    for name in signature.parameters:
        nested = isinstance(arguments.get(name), Mapping) and "_target_" in arguments[name]
        if nested:
            check_node(f"{key}.{name}", arguments[name], trusted)
        fields[name] = (Any if nested else hints.get(name, Any), None)
    settings = ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=True, allow_inf_nan=False, protected_namespaces=())
    schema = create_model("Arguments", __config__=settings, **fields)
    try:
        schema.model_validate_json(json.dumps(arguments))
    except ValidationError as error:
        raise ValueError(_first(error, arguments, schema, prefix=f"{key}.")) from None


def _check_trust(key: str, value: Any, prefixes: tuple[str, ...]) -> None:
    """Look at every `_target_` there is, however deep: Hydra would call each."""
    if isinstance(value, list):
        for index, inner in enumerate(value):
            _check_trust(f"{key}.{index}", inner, prefixes)
    if not isinstance(value, Mapping):
        return
    target = value.get("_target_")
    if "_target_" in value and not (isinstance(target, str) and target.startswith(prefixes)):
        raise ValueError(f"{key}._target_={target} is not trusted: it must start with {', '.join(prefixes)} (runtime.trusted_modules adds to these)")
    for name, inner in value.items():
        _check_trust(f"{key}.{name}", inner, prefixes)


def _imported(key: str, target: str) -> Any:
    module_name, _, name = target.rpartition(".")
    if not all(part.isidentifier() for part in target.split(".")):
        raise ValueError(f"{key}._target_={target} is not a dotted name")
    try:
        return getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{key}._target_={target} cannot be imported: {error}") from error


def _settle_duration(training: dict[str, Any], overrides: list[str]) -> None:
    """A duration on the command line takes the place of the recipe's, whichever unit that is in."""
    given = {key for override in overrides for key in ("steps", "epochs") if override.lstrip("+").startswith(f"training.{key}=")}
    if len(given) == 1:
        training["epochs" if given == {"steps"} else "steps"] = None


def _first(error: ValidationError, plain: Mapping[str, Any], schema: type[BaseModel], prefix: str = "") -> str:
    """The first of pydantic's complaints in one line."""
    complaint = error.errors()[0]
    path: list[str] = []
    value: Any = plain
    for part in complaint["loc"]:  # loc also names the branch of a union: stop where the value has no such part
        inside = part in value if isinstance(value, Mapping) else isinstance(value, list) and isinstance(part, int) and part < len(value)
        if inside or complaint["type"] == "missing":
            path.append(str(part))
        if not inside:
            break
        value = value[part]
    key = prefix + ".".join(path)
    if complaint["type"] == "extra_forbidden":
        names = list(_fields_at(schema, path[:-1]))
        return f"{key}: no such key{nearest(path[-1], names)}"
    if complaint["type"] == "missing":
        return f"{key} is missing"
    choices = [
        wrong["msg"] for wrong in error.errors() if wrong["loc"][: len(path)] == complaint["loc"][: len(path)] and wrong["type"] != "needs_python_object"
    ]
    wanted = " or ".join(dict.fromkeys(message.removeprefix("Input should be ") for message in choices))
    return f"{key}={value if isinstance(value, str) else json.dumps(value)} should be {wanted}"


def _fields_at(schema: type[BaseModel], path: list[str]) -> dict[str, Any]:
    fields: dict[str, Any] = schema.model_fields
    for part in path:
        inner = fields[part].annotation
        fields = inner.model_fields if inspect.isclass(inner) and issubclass(inner, BaseModel) else {}
    return fields
