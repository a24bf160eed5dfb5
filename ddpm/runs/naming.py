"""What a run's folder is called: words for people, made from values.

They say what differs from the model's and the data's own settings, by the options of conf/ that the
values are. They decide nothing: a run is found by its hash.
"""

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ddpm.config.compose import compose, shipped_option, shipped_options
from ddpm.config.schema import Config, training_config
from ddpm.runs.identity import canonical, flat, identity_of

LONGEST = 120  # characters of words
GROUPS = ("schedule", "objective", "optimizer", "lr_schedule")  # of options that do not set others
OTHERS = {"optimizer.lr": "model", "lr_schedule.warmup_steps": "data"}  # key -> who sets it
REPEATS = {"data.resolution": "model.resolution", "model.in_channels": "data.channels"}
ORDER = ("init_from", "optimizer", "training", "seed", "model", "data")


def name_of(config: Config, identity: Mapping[str, Any], typed: Mapping[str, str]) -> Path:
    """Returns <model>-<data>/<what differs from that pair's own settings>, without the hash.

    Args:
        config: The run's configuration.
        identity: Its identity.
        typed: The options that were typed, by group, which are looked at first. They change
            nothing in the outcome.
    """
    mine = flat(identity)
    model, data = _model(identity, typed.get("model", "")), config.data.name
    own = _own_settings(
        model if model in shipped_options("model") else "quickstart",
        data if data in shipped_options("data") else "digits",
    )
    if data == "folder" and config.data.path is not None:
        data = Path(config.data.path).expanduser().resolve().name
    words, said = [], set()
    for group in GROUPS:
        word, keys = _option(group, mine, own, typed.get(group, ""))
        words += [word] if word else []
        said |= {key for key in mine if key.startswith(f"{group}.")} - keys
    if config.init_from is not None:
        mine["init_from"] = Path(config.init_from).expanduser().resolve().name[-60:]
    differing = [
        key
        for key, value in mine.items()
        if key not in said
        and not key.endswith("_target_")
        and key != "data.pictures"
        and value != mine.get(REPEATS.get(key, ""), ...)
        and (key not in own or own[key] != value)
    ]
    differing.sort(key=lambda key: (_rank(key), key))
    words += [_typable(f"{_short(key, mine)}-{_shown(mine[key])}") for key in differing]
    while len("_".join(words)) > LONGEST:
        words.pop()
    return Path(f"{_typable(model)}-{_typable(data)}", "_".join(words) or "recipe")


@functools.cache
def _own_settings(model: str, data: str) -> dict[str, Any]:
    """What a model and a data set are computed with if nothing else is said."""
    config = training_config(compose([f"model={model}", f"data={data}"]))
    return flat(identity_of(config.model_dump(mode="json")))


def _model(identity: Mapping[str, Any], first: str) -> str:
    """The option that a network is or is nearest to; the class's name if it is none of ours."""
    options = shipped_options("model")
    if first in options and not _differing("model", first, identity):
        return first
    target = identity["model"]["_target_"]
    alike = [name for name in options if shipped_option("model", name)["_target_"] == target]
    if not alike:
        return str(target).rpartition(".")[2]
    return min(alike, key=lambda name: (len(_differing("model", name, identity)), name))


def _option(
    group: str, mine: Mapping[str, Any], own: Mapping[str, Any], first: str
) -> tuple[str, set[str]]:
    """The word for what a group is, none if it is the pair's own, and the keys still to be said."""
    here = {key: value for key, value in mine.items() if key.startswith(f"{group}.")}
    changed = {key for key, value in here.items() if own.get(key, ...) != value}
    if not changed:
        return "", set()
    options = shipped_options(group)
    if first in options and not _beside_others(_differing(group, first, _tree(group, here))):
        options = [first]
    found = {name: _differing(group, name, _tree(group, here)) for name in options}
    nearest = min(found, key=lambda name: (len(_beside_others(found[name])), name))
    same_class = own[f"{group}._target_"] == here[f"{group}._target_"]
    if same_class and len(_beside_others(changed)) <= len(_beside_others(found[nearest])):
        return "", changed
    if shipped_option(group, nearest)["_target_"] != here[f"{group}._target_"]:
        return f"{group}-{str(here[f'{group}._target_']).rpartition('.')[2]}", set(here)
    others = {key for key in OTHERS if key in changed}
    earlier = GROUPS[: GROUPS.index(group)]
    shared = any(nearest in shipped_options(before) for before in earlier)
    return f"{group}-{nearest}" if shared else nearest, _beside_others(found[nearest]) | others


def _differing(group: str, option: str, identity: Mapping[str, Any]) -> set[str]:
    """The keys of a group in which an identity is not what an option of conf/ says."""
    said = flat({group: canonical(shipped_option(group, option), group)})
    mine = flat({group: identity[group]})
    return {
        key
        for key in said.keys() | mine.keys()
        if "${" not in str(said.get(key)) and said.get(key, ...) != mine.get(key, ...)
    }


def _tree(group: str, here: Mapping[str, Any]) -> dict[str, Any]:
    return {group: {key.removeprefix(f"{group}."): value for key, value in here.items()}}


def _beside_others(keys: set[str]) -> set[str]:
    return {key for key in keys if key not in OTHERS}


def _rank(key: str) -> int:
    section = key.partition(".")[0]
    return ORDER.index(section) if section in ORDER else len(ORDER)


def _short(key: str, all_keys: Mapping[str, Any]) -> str:
    """A key's last word, the group before it where two groups have it."""
    section, _, rest = key.partition(".")
    last = key.rpartition(".")[2]
    shared = any(
        other.rpartition(".")[2] == last and other.partition(".")[0] != section
        for other in all_keys
    )
    return f"{section}.{rest}" if shared and rest else last


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return "x".join(map(_shown, value))
    return (
        "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    )


def _typable(text: str) -> str:
    """Text that Hydra's command line takes as it is."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", text).strip("-") or "unnamed"
