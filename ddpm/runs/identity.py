"""What makes a run that run: the half of its configuration that is computed, in one canonical form.

Two command lines that compose to equal objects have one identity, however they were typed; two that
differ in anything computed have two.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ddpm.config.schema import Config
from ddpm.config.validation import own_arguments, public_names
from ddpm.system.files import by_value

if TYPE_CHECKING:
    from ddpm.runs.folder import RunFolder

NOT_COMPUTED = {  # what never changes a result beyond rounding, and so is no part of the identity
    "runtime": True,
    "sampler": True,
    "evaluation": True,
    "outputs": True,
    "resume": True,
    "recipe": True,
    "init_weights": True,  # stands where init_from does
    "init_attention": True,  # is told there
    "pictures": True,  # for data=folder in data
    "data": {
        "path": True,
        "cache": True,
        "max_unreadable": True,
        "license": True,
        "num_images": True,  # as published
        "num_classes": True,  # as expected: what counts is in the data
        "source": {"path": True},
    },
}
FOLLOWS = ("num_classes", "path")  # arguments of ours that are given from elsewhere
# What was added since identities stand: key -> the value that does what was done without the key.
# There it is no part of the identity, so that the runs of before keep theirs. A key of a
# constructor of ours is TARGET.ARGUMENT.
ADDED: dict[str, Any] = {
    "data.white": None,
    "data.max_pixels": 89_478_485,
    "data.resize": "bicubic",
    "data.license": None,
    "ddpm.data.sources.emoji.only": None,
}


def identity(config: Config) -> dict[str, Any]:
    """Returns the half of a configuration that decides the numbers of a run, in canonical form.

    For data=folder it has the fingerprint of the pictures, for init_from that of the weights.
    """
    assert config.init_from is None or config.init_weights, "with_initial_weights comes first"
    assert config.data.name != "folder" or config.pictures, "with_pictures comes first"
    return identity_of(config.model_dump(mode="json"))


def identity_of(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the identity of the plain values that a configuration has, such as config.yaml."""
    half = without(plain, NOT_COMPUTED)
    del half["init_from"]
    if plain["init_from"] is not None:
        half["init_from"] = plain["init_weights"]
    # the unit not used
    del half["training"]["steps" if half["training"]["steps"] is None else "epochs"]
    if plain["data"]["name"] == "folder":
        half["data"]["pictures"] = plain["pictures"]
        if half["data"]["source"]["_target_"] == "ddpm.data.sources.folder":
            del half["data"]["source"]  # says where in the folder they were looked for
    return {key: canonical(value, key) for key, value in half.items()}


def canonical(value: Any, place: str) -> Any:
    """Returns a value as all have it that do the same.

    Numbers are told by value, booleans apart; what our own constructors do where nothing is said is
    filled in.

    Args:
        value: Plain.
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
    """Whether two canonical values are; Python holds True for 1."""
    return type(one) is type(other) and one == other


def _defaults(target: str) -> dict[str, Any]:
    """What a constructor of ours does where nothing is said; nothing for others, which change."""
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
    """Returns nested settings less those that are True in left_out."""
    kept = {}
    for key, value in tree.items():
        if left_out.get(key) is True:
            continue
        kept[key] = without(value, left_out.get(key, {})) if isinstance(value, Mapping) else value
    return kept


def hparams(run: RunFolder, config: Config, num_steps: int) -> dict[str, float | str]:
    """Returns what runs are told apart by, under the same keys and of the same types for all.

    TensorBoard cannot sort a column of text and numbers. So what may be null is text, as
    `grad_clip`: not under the key's own name, where runs of before have numbers.

    Returns:
        The options chosen, the numbers tuned most, and `differs`: all that is not the model's and
        data's own, in the words of the folder's name.
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
