"""A run's identity: the part of its configuration that decides its numbers, in canonical form.

Command lines that compose to equal objects have the same identity, however they were typed. If they
differ in anything that affects the numbers, their identities differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ddpm.config.schema import Config
from ddpm.config.validation import own_arguments, public_names
from ddpm.system.files import by_value

if TYPE_CHECKING:
    from ddpm.runs.folder import RunFolder

NOT_COMPUTED = {  # never changes a result beyond rounding, so it is not part of the identity
    "runtime": True,
    "sampler": True,
    "evaluation": True,
    "outputs": True,
    "resume": True,
    "recipe": True,
    "init_weights": True,  # replaces init_from in the identity
    "init_attention": True,  # covered by init_weights
    "pictures": True,  # for data=folder, part of data
    "data": {
        "path": True,
        "cache": True,
        "max_unreadable": True,
        "license": True,
        "num_images": True,  # as published
        "num_classes": True,  # as expected: the data decide
        "source": {"path": True},
    },
}
FOLLOWS = ("num_classes", "path")  # arguments that other settings fill in
# Keys added after identities were introduced -> the value with the old behavior. A key with that
# value is not part of the identity, so that older runs keep theirs. An argument of one of our
# constructors is TARGET.ARGUMENT.
ADDED: dict[str, Any] = {
    "data.white": None,
    "data.max_pixels": 89_478_485,
    "data.resize": "bicubic",
    "data.license": None,
    "ddpm.data.sources.emoji.only": None,
}


def identity(config: Config) -> dict[str, Any]:
    """Returns the part of a configuration that decides a run's numbers, in canonical form.

    With data=folder it includes the fingerprint of the pictures, with init_from that of the
    weights.
    """
    assert config.init_from is None or config.init_weights, "with_initial_weights comes first"
    assert config.data.name != "folder" or config.pictures, "with_pictures comes first"
    return identity_of(config.model_dump(mode="json"))


def identity_of(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the identity of a configuration given as plain values, such as config.yaml."""
    half = without(plain, NOT_COMPUTED)
    del half["init_from"]
    if plain["init_from"] is not None:
        half["init_from"] = plain["init_weights"]
    # drop the unused unit
    del half["training"]["steps" if half["training"]["steps"] is None else "epochs"]
    if plain["data"]["name"] == "folder":
        half["data"]["pictures"] = plain["pictures"]
        if half["data"]["source"]["_target_"] == "ddpm.data.sources.folder":
            del half["data"]["source"]  # only says where in the folder to look for pictures
    return {key: canonical(value, key) for key, value in half.items()}


def canonical(value: Any, place: str) -> Any:
    """Returns a value in canonical form, the same for values that do the same.

    Equal numbers become identical, booleans stay booleans, and defaults of our own constructors are
    filled in.

    Args:
        value: A plain value.
        place: Its dotted key.
    """
    if isinstance(value, Mapping):
        owner, settings = place, dict(value)
        if "_target_" in value:
            owner = str(value["_target_"])
            settings = {**_defaults(owner), **value}
            if settings.get("_partial_") is False:
                del settings["_partial_"]
        plain = {key: canonical(inner, f"{place}.{key}") for key, inner in settings.items()}
        return {
            key: inner
            for key, inner in plain.items()
            if not (f"{owner}.{key}" in ADDED and _same(inner, ADDED[f"{owner}.{key}"]))
        }
    return by_value(value)


def _same(one: Any, other: Any) -> bool:
    """Compares two canonical values; plain == would take True for 1."""
    return type(one) is type(other) and one == other


def _defaults(target: str) -> dict[str, Any]:
    """Returns the defaults of one of our constructors; empty for others, which may change."""
    if target not in public_names():
        return {}
    found = own_arguments(target)
    return {key: value for key, value in found.items() if value is not ... and key not in FOLLOWS}


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested settings as dotted keys."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves.update(
            flat(value, f"{prefix}{key}.")
            if isinstance(value, Mapping)
            else {f"{prefix}{key}": value}
        )
    return leaves


def without(tree: Mapping[str, Any], left_out: Mapping[str, Any]) -> dict[str, Any]:
    """Returns nested settings without those marked True in `left_out`."""
    kept = {}
    for key, value in tree.items():
        if left_out.get(key) is True:
            continue
        kept[key] = without(value, left_out.get(key, {})) if isinstance(value, Mapping) else value
    return kept


def hparams(run: RunFolder, config: Config, num_steps: int) -> dict[str, float | str]:
    """Returns a run's hyperparameters for TensorBoard, with the same keys and types for all runs.

    TensorBoard cannot sort a column that mixes text and numbers, so settings that may be null are
    text. Gradient clipping is called `grad_clip` instead of training.grad_clip, since older runs
    have numbers under that key.

    Args:
        run: The run's folder.
        config: The run's configuration.
        num_steps: Steps of the whole run.

    Returns:
        The chosen options, the most tuned numbers, and `differs`: all settings that are not the
        model's and data's own, as in the folder's name.
    """
    chosen = run.choices()
    options = {
        group: chosen.get(group, "None").replace("None", "none")
        for group in (
            "experiment",
            "model",
            "data",
            "schedule",
            "objective",
            "optimizer",
            "lr_schedule",
        )
    }
    half = flat(config.model_dump(mode="json"))
    numbers = {key: half[key] for key in ("optimizer.lr", "data.holdout", "data.flip", "seed")}
    elsewhere = ("training.steps", "training.epochs", "training.grad_clip")
    numbers |= {
        key: value
        for key, value in half.items()
        if key.startswith("training.") and key not in elsewhere
    }
    grad_clip = config.training.grad_clip
    name = run.path.name.rpartition("-")[0]
    return {
        **options,
        **numbers,
        "lr_schedule.warmup_steps": half.get("lr_schedule.warmup_steps") or 0,
        "training.steps": num_steps,
        "grad_clip": "none" if grad_clip is None else str(grad_clip),
        "resolution": str(config.data.resolution),
        "differs": name,
    }
