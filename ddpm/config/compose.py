"""Finds the YAML files, and composes command lines."""

import copy
import difflib
import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ddpm.config.rules import keep_runs_folder, one_unit, words_to_compose
from ddpm.config.trust import check_trust, is_shipped, refuse_code, say_environment
from ddpm.system.bounded import Bounded
from ddpm.system.internals import (
    Option,
    bound_yaml,
    compose_once,
    read_yaml_quickly,
    share_recipes,
    tap_composition,
)

PACKAGE = Path(__file__).resolve().parent.parent
# an installed wheel, else a checkout
ROOT = PACKAGE / "_bundled" if (PACKAGE / "_bundled" / "conf").is_dir() else PACKAGE.parent
CONF = ROOT / "conf"
EXPERIMENTS = ROOT / "experiments"
RENAMED = {"compile": "tune"}  # former key -> today's
BROKEN: dict[str, str] = {}  # unusable files of experiments/: name -> error


@dataclass(frozen=True)
class Composed:
    """A composed configuration.

    Attributes:
        cfg: The configuration without Hydra's own section.
        choices: The chosen option of each group.
        overrides: The overrides as typed.
        config_dir: The folder of the user's own options (--config-dir), if any.
    """

    cfg: DictConfig
    choices: dict[str, str]
    overrides: list[str]
    config_dir: str | None = None


def compose(
    overrides: Sequence[str], config_name: str = "config", config_dir: str | None = None
) -> Composed:
    """Returns the configuration that a command line composes to.

    Args:
        overrides: The command line's overrides.
        config_name: Name of the command's file in conf/.
        config_dir: The folder of the user's own options, as --config-dir takes it.

    Raises:
        HydraException: If the command line does not compose.
        ValueError: If an option is a path.
    """
    register_experiments()
    refuse_paths(overrides)
    own = [f"hydra.searchpath=['file://{config_dir}']"] if config_dir else []
    running = GlobalHydra.instance().hydra  # set when called from within a command
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            cfg = hydra.compose(
                config_name, overrides=[*map(at_home, overrides), *own], return_hydra_config=True
            )
    finally:
        GlobalHydra.instance().hydra = running
    return from_hydra(cfg, cfg.hydra)


@functools.cache
def shipped_option(group: str, name: str) -> dict[str, Any]:
    """Returns the values that an option of conf/ sets in its own group, interpolations unresolved.

    This reads the file itself, since Hydra takes a second to compose a dozen options.
    """
    node = cast(DictConfig, OmegaConf.load(CONF / group / f"{name}.yaml"))
    plain = cast(dict[str, Any], OmegaConf.to_container(node, resolve=False))
    bases = [entry for entry in plain.pop("defaults", []) if isinstance(entry, str)]
    found: dict[str, Any] = {}
    for base in bases:
        beside = Path(name).parent / base.partition("@")[0]
        found |= shipped_option(group, beside.as_posix())
    return found | plain.get(group, plain)


def shipped_options(group: str) -> list[str]:
    """Returns the names of a group's options in conf/."""
    return sorted(file.stem for file in (CONF / group).glob("*.yaml"))


@functools.cache
def register_experiments(folder: Path = EXPERIMENTS) -> None:
    """Registers each file of experiments/ as an option of group `experiment`.

    Commands can then start in any folder. A broken file is an error only if it is chosen.
    """
    for file in sorted(folder.glob("*.yaml")):
        try:
            node = OmegaConf.load(file)
            _check_recipe(node)
        except (yaml.YAMLError, OmegaConfBaseException, ValueError, OSError) as error:
            BROKEN[file.stem] = (
                f"experiment={file.stem}: {file.name} cannot be used: "
                f"{' '.join(str(error).split())}"
            )
        else:
            ConfigStore.instance().store(
                group="experiment",
                name=file.stem,
                node=node,
                package="_global_",
                provider=f"experiments/{file.name}",
            )


def _check_recipe(node: Any) -> None:
    """Rejects malformed recipes, and those that set hydra, whose targets Hydra calls unchecked."""
    if not isinstance(node, DictConfig):
        raise ValueError("it must be a table of keys")
    if "hydra" in node:
        raise ValueError("it sets hydra, which only the command line may set")
    defaults = cast(dict[Any, Any], OmegaConf.to_container(node)).get("defaults", [])
    if not isinstance(defaults, list):
        raise ValueError(f"defaults={defaults} must be a list")
    for entry in defaults:
        for key, option in entry.items() if isinstance(entry, dict) else [(str(entry), None)]:
            group = key.removeprefix("override ").strip("/ ")
            if "@" in key or not re.fullmatch(r"_self_=None|[\w/]+=[\w-]+", f"{group}={option}"):
                raise ValueError(
                    f"its defaults have {key}: {option}, which is not a group with an option"
                )
            if group != "_self_" and not group.startswith("hydra/") and not (CONF / group).is_dir():
                raise ValueError(
                    f"its defaults have {key}: there is no such group{nearest(group, _groups())}"
                )


def nearest(name: str, names: Sequence[str]) -> str:
    """Returns the end of an error message that suggests the closest valid name.

    It also lists the valid names if there are at most 24.
    """
    if RENAMED.get(name) in names:
        return f"; it is called {RENAMED[name]} now"
    names = [other for other in names if other != name]
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    listed = f"; there are {', '.join(sorted(names))}" if 0 < len(names) <= 24 else ""
    return (f"; did you mean {close[0]}?" if close else "") + listed


def from_hydra(cfg: DictConfig, hydra_cfg: Any) -> Composed:
    """Returns what Hydra composed, separated from Hydra's own section."""
    task_cfg = copy.deepcopy(cfg)
    OmegaConf.set_struct(task_cfg, False)
    task_cfg.pop("hydra", None)
    choices = {
        group: str(option)
        for group, option in hydra_cfg.runtime.choices.items()
        if not group.startswith("hydra/")
    }
    own = next(
        (
            source.path
            for source in hydra_cfg.runtime.config_sources
            if source.provider.endswith("command-line")
        ),
        None,
    )
    return Composed(
        task_cfg,
        choices,
        cast(list[str], OmegaConf.to_container(hydra_cfg.overrides.task, resolve=False)),
        own,
    )


def at_home(override: str) -> str:
    """Expands the ~ of key=~/path, which the shell leaves alone and Hydra cannot parse."""
    key, equals, value = override.partition("=")
    quote = value[:1] if len(value) > 2 and value[:1] == value[-1:] and value[:1] in "'\"" else ""
    inner = value[1:-1] if quote else value
    if inner != "~" and not inner.startswith("~/"):
        return override
    return key + equals + quote + str(Path(inner).expanduser()) + quote


def _groups() -> list[str]:
    return [folder.name for folder in CONF.iterdir() if folder.is_dir()]


def refuse_paths(overrides: Sequence[str]) -> None:
    """Rejects overrides that give a group anything but the name of an option.

    A path could lead to any file, and a list would merge several options. Only the user's own
    experiments may lie in subfolders.

    Raises:
        ValueError: If an override does.
    """
    groups = {**{group: CONF / group for group in _groups()}, "experiment": EXPERIMENTS}
    for override in overrides:
        key, _, option = override.lstrip("+~").partition("=")
        group = re.split("[/@:]", key)[0]
        if not key:
            raise ValueError(f"{override}: settings have the form key=value")
        if group not in groups or "." in key.partition("@")[0]:
            continue
        if not all(_names_option(value, key == "experiment") for value in _options(override)):
            raise ValueError(
                f"{key}={option}: no such option of "
                f"{group}{nearest(option, [file.stem for file in groups[group].glob('*.yaml')])}"
            )


def _options(override: str) -> list[Any]:
    """Returns the options that an override of a group names; a sweep names several."""
    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException:
        return []  # Hydra reports it itself
    value = parsed.value()
    if isinstance(value, Glob):
        return [pattern.replace("[", "") for pattern in (*value.include, *value.exclude)]
    if isinstance(value, ChoiceSweep):
        return [one.text if isinstance(one, QuotedString) else one for one in value.list]
    return [] if parsed.is_delete() and value is None else [value]


def _names_option(value: Any, experiment: bool) -> bool:
    """Whether a group takes this value: an option's name, or a table of the group's keys."""
    if isinstance(value, str):
        nested = experiment and re.fullmatch(r"[\w-]+(/[\w-]+)+", value)
        return bool(nested) or not re.search(r"[/\\[]|\.\.|\.ya?ml", value)
    return isinstance(value, dict) or (experiment and value is None)


def searchpath(overrides: Sequence[str]) -> list[str]:
    """Returns the folders of own options that hydra.searchpath adds."""
    words = [word for word in overrides if word.startswith("hydra.searchpath=")]
    found = [override.value() for override in OverridesParser.create().parse_overrides(words)]
    return [str(folder) for value in found if isinstance(value, list) for folder in value]


def refuse_hidden(folders: Sequence[str]) -> None:
    """Rejects a file of the user's that has the name of a built-in one.

    Hydra would silently use the built-in one.

    Args:
        folders: Folders of the user's own options, as --config-dir or hydra.searchpath take them.

    Raises:
        ValueError: If there is such a file.
    """
    built_in = [(file, file.relative_to(CONF)) for file in sorted(CONF.rglob("*.yaml"))]
    built_in += [(file, Path("experiment", file.name)) for file in EXPERIMENTS.glob("*.yaml")]
    for folder in folders:
        for file, name in built_in:
            own = Path(folder.removeprefix("file://")) / name
            if own.is_file() and not own.samefile(file):
                option = f"{name.parent}={name.stem}" if name.parent.name else str(name)
                raise ValueError(
                    f"{own} is hidden by the built-in option {option} of the same name; rename "
                    "the file"
                )


def _look_at_file(option: Option) -> None:
    """Checks a file of options before Hydra merges it into the earlier ones."""
    if not is_shipped(option.place, option.provider, CONF):
        own = option.place.startswith("file://")
        place = option.place.removeprefix("file://") if own else "experiments"
        name = option.path if own else option.path.removeprefix("experiment/")
        refuse_code(f"{place}/{name.removesuffix('.yaml')}.yaml", option.config)
    one_unit(option.path, option.package, option.config)


def _look_at_all(cfg: DictConfig) -> None:
    check_trust(cfg)
    keep_runs_folder(cfg)


OmegaConf.register_new_resolver("given", lambda value: value is not None, replace=True)
compose_once()
read_yaml_quickly()
share_recipes()
bound_yaml(Bounded)
say_environment()
tap_composition(words_to_compose, _look_at_file, _look_at_all)
