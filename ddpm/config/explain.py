"""One-line errors: what is wrong, what was given, what to type.

Hydra's own messages take several lines and speak of its internals.
"""

import re
from collections.abc import Sequence
from typing import Any

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf

from ddpm.config.compose import BROKEN, CONF, Composed, compose, nearest
from ddpm.config.rules import needs_package
from ddpm.config.validation import takes
from ddpm.system.text import shown


def explain(error: Exception) -> str:
    """Returns an error as one line.

    A ValueError is meant for the user and gives its message alone; any other error gets its type in
    front.
    """
    message = shown(" ".join(str(error).split()))
    return (
        message
        if isinstance(error, ValueError) and message
        else f"{type(error).__name__}: {message}"
    )


def explain_composition(
    error: Exception, words: Sequence[str], config_name: str, config_dir: str | None
) -> str:
    """Returns a composition error of Hydra's as one line that suggests the closest valid name.

    Args:
        error: The error.
        words: The overrides that were composed.
        config_name: Name of the command's file in conf/.
        config_dir: The folder of the user's own options, if any.
    """
    if isinstance(error, OverrideParseException):
        key, equals, _ = error.override.partition("=")
        what = f"{error.override} cannot be parsed" if equals else f"{key} is not a setting"
        return (
            f"{what}: settings have the form key=value; a value with spaces, brackets or other "
            "special characters needs quotes: 'key=\"value\"'"
        )
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _no_such_option(error.missing_cfg_file, error.options or [])
    if not isinstance(error, HydraException):
        return explain(error)
    message = " ".join(str(error).split("\n")[0].split())
    if message.startswith("Ambiguous value"):
        return f"{message}: a sweep over values needs -m; a list needs [brackets]"
    if "does not support sweep type" in message:
        word = next((word for word in words if "interval(" in word), message)
        return (
            f"{word}: a grid sweep cannot try an interval; list values (key=1e-4,2e-4 or "
            "'key=range(0,0.5,0.1)'), or let hydra/sweeper=optuna pick them"
        )
    twice = re.match(r"Multiple values for ([\w/]+)", message)
    if twice:
        return f"{twice[1]} has an option already; replace it with {twice[1]}=..."
    in_file = re.match(r"In '(?P<file>[^']+)': Could not override '(?P<group>[^']+)'", message)
    if in_file:
        return _wrong_override(in_file["file"], in_file["group"], message)
    unknown = re.search(r"Could not override '([^']+)'", str(error))
    if unknown is None:
        return message
    if "@" in unknown[1]:
        return (
            f"{unknown[1]}: the command line takes no packages (@); choose an option with "
            f"{unknown[1].partition('@')[0]}=..."
        )
    return _no_such_key(unknown[1], words, config_name, config_dir) or message


def _no_such_option(file: str, options: Sequence[str]) -> str:
    group, _, option = file.rpartition("/")
    if group == "experiment" and option in BROKEN:
        return BROKEN[option]
    more = ""
    if group == "hydra/launcher" and "joblib" not in options:
        more = "; pip install -e '.[sweep]' adds joblib, submitit_local and submitit_slurm"
    if group == "hydra/sweeper" and "optuna" not in options:
        more = "; pip install -e '.[search]' adds optuna"
    return f"{group}={option}: no such option of {group}{nearest(option, options)}{more}"


def _wrong_override(file: str, group: str, message: str) -> str:
    """Returns what is wrong with `override group: option` in a file of options."""
    if "@experiment." in group:
        return needs_package(file)
    name = group.partition("@")[0].removeprefix(f"{file.rpartition('/')[0]}/")
    if (CONF / name).is_dir() and group.startswith(f"{file.rpartition('/')[0]}/"):
        return f"{file}.yaml: 'override {name}: ...' needs a slash: override /{name}: ..."
    return message


def _no_such_key(
    key: str, words: Sequence[str], config_name: str, config_dir: str | None
) -> str | None:
    """Returns that there is no such key, its nearest neighbors and the options that have it."""
    choices = [  # those of a sweep's first job
        word.partition(",")[0]
        for word in words
        if re.fullmatch(r"[\w/]+=[\w/,-]+", word) and not word.startswith(f"{key}=")
    ]
    try:
        composed = compose(choices, config_name, config_dir)
    except (HydraException, ValueError):
        return None
    cfg = composed.cfg
    parent, _, name = key.rpartition(".")
    while parent and not isinstance(OmegaConf.select(cfg, parent), DictConfig):
        parent, _, name = parent.rpartition(".")
    section = OmegaConf.select(cfg, parent) if parent else cfg
    names = [str(found) for found in section if not str(found).startswith("_")]
    if parent:
        others = _options_with(key, composed)
        return f"{key}: no such key in {parent}{nearest(name, names)}{others}"
    groups = {
        str(group): inner
        for group, inner in cfg.items_ex(resolve=False)
        if isinstance(inner, DictConfig)
    }
    deeper = [f"{group}.{name}" for group, inner in groups.items() if name in inner]
    names += [group for group in composed.choices if group == "experiment"]  # null, so no section
    if deeper:
        return f"{key}: no such key{nearest('', names)}; did you mean {' or '.join(deeper)}?"
    return f"{key}: no such key{nearest(name, names)}"


def _options_with(key: str, composed: Composed) -> str:
    """Returns the end of a message that names the options which have the key."""
    group, _, inner = key.partition(".")
    having = [
        file.stem
        for file in sorted((CONF / group).glob("*.yaml"))
        if _has(node := OmegaConf.to_container(OmegaConf.load(file)), inner) or _has(node, key)
    ]
    if not having or group not in composed.choices:
        return ""
    target = OmegaConf.select(composed.cfg, f"{group}._target_")
    adds = f"; ++{key}=... adds it" if takes(group, target, inner) else ""
    have = f"{', '.join(having)} {'have' if having[1:] else 'has'}"
    return f"; {group}={have} it, {composed.choices[group]} does not{adds}"


def _has(tree: Any, key: str) -> bool:
    for name in key.split("."):
        if not isinstance(tree, dict) or name not in tree:
            return False
        tree = tree[name]
    return True
