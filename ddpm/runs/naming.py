"""Names run folders, for people to read.

A name says what differs from the model's and the data's own settings, in terms of the options in
conf/ that match the values. Nothing depends on it: runs are found by their hash.
"""

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ddpm.config.compose import compose, shipped_option, shipped_options
from ddpm.config.schema import Config, training_config
from ddpm.runs.identity import canonical, flat, identity_of

LONGEST = 120  # characters of the name without the hash
GROUPS = ("schedule", "objective", "optimizer", "lr_schedule")  # named by their options
OTHERS = ("optimizer.lr", "lr_schedule.warmup_steps")  # model and data options may set these too
REPEATS = {"data.resolution": "model.resolution", "model.in_channels": "data.channels"}
ORDER = ("init_from", "optimizer", "training", "seed", "model", "data")


def name_of(config: Config, identity: Mapping[str, Any]) -> Path:
    """Returns <model>-<data>/<what differs from that pair's own settings>, without the hash."""
    mine = flat(identity)
    model, data = _model(mine), config.data.name
    own = _own_settings(
        model if model in shipped_options("model") else None,
        data if data in shipped_options("data") else "digits",
    )
    if data == "folder" and config.data.path is not None:
        data = Path(config.data.path).expanduser().resolve().name
    words = []
    for group in GROUPS:
        word, said = _option(group, mine, own)
        words += [word] if word else []
        own = {**own, **said}
    if config.init_from is not None:
        mine["init_from"] = Path(config.init_from).expanduser().resolve().name[-60:]
    differing = [
        key
        for key in _differing(mine, own) & mine.keys()
        if not key.endswith("_target_")
        and key != "data.pictures"
        and mine[key] != mine.get(REPEATS.get(key, ""), ...)
    ]
    differing.sort(key=lambda key: (_rank(key), key))
    words += [_typable(f"{_short(key, mine)}-{_shown(mine[key])}") for key in differing]
    while len("_".join(words)) > LONGEST:
        words.pop()
    return Path(f"{_typable(model)}-{_typable(data)}", "_".join(words) or "recipe")


@functools.cache
def _own_settings(model: str | None, data: str) -> dict[str, Any]:
    """Returns the settings of a model and a data set if nothing else is given.

    A model of one's own (None) has the process that Ho et al. 2020 publish.
    """
    papers = ["model=small32", "schedule=linear", "objective=epsilon"]
    words = papers if model is None else [f"model={model}"]
    config = training_config(compose([*words, f"data={data}"]))
    return flat(identity_of(config.model_dump(mode="json")))


def _model(mine: Mapping[str, Any]) -> str:
    """Returns the model option nearest to the network, or the class name if it is not ours."""
    mine, target = _of_group("model", mine), mine["model._target_"]
    said = {name: _settings("model", name) for name in shipped_options("model")}
    alike = [name for name in said if said[name]["model._target_"] == target]
    if not alike:
        return str(target).rpartition(".")[2]
    return min(alike, key=lambda name: (len(_differing(mine, said[name])), name))


def _option(
    group: str, mine: Mapping[str, Any], own: Mapping[str, Any]
) -> tuple[str, Mapping[str, Any]]:
    """Returns a group's word, empty if nearest to the pair's own, and that option's settings."""
    mine, own = _of_group(group, mine), _of_group(group, own)
    target = f"{group}._target_"
    said = {name: _settings(group, name) for name in shipped_options(group)}
    alike = [name for name in said if said[name][target] == own[target]]
    # set by the model or data option, whatever this group's option is
    set_by_others = {
        key: own[key] for key in OTHERS if key in own and own[key] != said[alike[0]].get(key)
    }
    found = {
        name: {
            **settings,
            **{key: value for key, value in set_by_others.items() if key in settings},
        }
        for name, settings in said.items()
        if settings[target] == mine[target]
    }
    nearest = min(found, key=lambda name: (len(_differing(mine, found[name])), name), default=None)
    far = len(mine) if nearest is None else len(_differing(mine, found[nearest]))
    if mine[target] == own[target] and len(_differing(mine, own)) <= far:
        return "", own
    if nearest is None:
        return f"{group}-{str(mine[target]).rpartition('.')[2]}", own
    earlier = GROUPS[: GROUPS.index(group)]
    shared = any(nearest in shipped_options(before) for before in earlier)
    return f"{group}-{nearest}" if shared else nearest, found[nearest]


@functools.cache
def _settings(group: str, option: str) -> dict[str, Any]:
    """Returns an option's settings in canonical form, as dotted keys."""
    return flat({group: canonical(shipped_option(group, option), group)})


def _of_group(group: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key.startswith(f"{group}.")}


def _differing(mine: Mapping[str, Any], said: Mapping[str, Any]) -> set[str]:
    """Returns the keys whose values differ; interpolations in `said` match anything."""
    return {
        key
        for key in said.keys() | mine.keys()
        if "${" not in str(said.get(key)) and said.get(key, ...) != mine.get(key, ...)
    }


def _rank(key: str) -> int:
    section = key.partition(".")[0]
    return ORDER.index(section) if section in ORDER else len(ORDER)


def _short(key: str, all_keys: Mapping[str, Any]) -> str:
    """Returns a key's last word, with its group in front if two groups share it."""
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
    """Returns text that is valid unquoted on Hydra's command line and in a file name."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", text).strip("-")[:LONGEST] or "unnamed"
