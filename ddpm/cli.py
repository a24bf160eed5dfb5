"""The command line that all entry points share: where the YAML lies, composing it with Hydra, and errors in one line."""

import difflib
import functools
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf

from ddpm.help import help_text

PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE / "_bundled" if (PACKAGE / "_bundled" / "conf").is_dir() else PACKAGE.parent  # an installed wheel, else a checkout
CONF = ROOT / "conf"
EXPERIMENTS = ROOT / "experiments"


@dataclass(frozen=True)
class Composed:
    """A composed configuration.    choices: the option chosen in each group.    overrides: what the command line said, as typed."""

    cfg: DictConfig
    choices: dict[str, str]
    overrides: list[str]


def compose(overrides: Sequence[str], config_name: str = "config") -> Composed:
    """What the command line `overrides` would compose to.    Raises Hydra's errors, as the command itself does."""
    register_experiments()
    running = GlobalHydra.instance().hydra  # set when called from within a command
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            cfg = hydra.compose(config_name, overrides=list(overrides), return_hydra_config=True)
    finally:
        GlobalHydra.instance().hydra = running
    return _composed(cfg, cfg.hydra)


def command(config_name: str, task: Callable[[Composed], None], what: str, examples: Sequence[str]) -> Callable[[], None]:
    """The main function of an entry point: compose conf/<config_name>.yaml with the command line, then run `task`; in a sweep, once a job.

    what, examples: for --help.
    An error is one line on standard error, and exit code 1; HYDRA_FULL_ERROR=1 brings the traceback. A failing job of a sweep does not stop the others.
    """

    @functools.wraps(task)
    def main() -> None:
        if {"--help", "-h"} & set(sys.argv[1:]):
            print(help_text(CONF, EXPERIMENTS, config_name, what, examples))
            return
        wants_traceback = os.environ.get("HYDRA_FULL_ERROR", "0") not in ("", "0")
        failed: list[str] = []

        def job(cfg: DictConfig) -> None:
            try:
                task(_composed(cfg, HydraConfig.get()))
            except Exception as error:
                if wants_traceback:
                    raise
                failed.append(explain(error))
                print(f"error: {failed[-1]}", file=sys.stderr, flush=True)

        register_experiments()
        os.environ["HYDRA_FULL_ERROR"] = "1"  # have Hydra raise rather than print its own several lines
        try:
            hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(functools.wraps(task)(job))()
        except HydraException as error:
            if wants_traceback:
                raise
            sys.exit(f"error: {_explain_composition(error, sys.argv[1:], config_name)}")
        if failed:
            sys.exit(1)

    return main


@functools.cache
def register_experiments() -> None:
    """Make each file of experiments/ an option of the group `experiment`, from whatever folder the command is started."""
    for file in sorted(EXPERIMENTS.glob("*.yaml")):
        ConfigStore.instance().store(group="experiment", name=file.stem, node=OmegaConf.load(file), package="_global_", provider=f"experiments/{file.name}")


def explain(error: Exception) -> str:
    """An error in one line: the message alone where it is meant for the user, with its type where it is a surprise."""
    message = " ".join(str(error).split())
    return message if isinstance(error, ValueError) and message else f"{type(error).__name__}: {message}"


def nearest(name: str, names: Sequence[str]) -> str:
    """The part of a message that names the likeliest of the valid names, and the valid names if they are few."""
    names = [other for other in names if other != name]
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    listed = f"; there are {', '.join(sorted(names))}" if len(names) <= 24 else ""
    return (f"; did you mean {close[0]}?" if close else "") + listed


def _composed(cfg: DictConfig, hydra_cfg: Any) -> Composed:
    task_cfg = OmegaConf.create({key: value for key, value in cfg.items_ex(resolve=False) if key != "hydra"})
    choices = {group: str(option) for group, option in hydra_cfg.runtime.choices.items() if not group.startswith("hydra/")}
    return Composed(task_cfg, choices, list(hydra_cfg.overrides.task))


def _explain_composition(error: HydraException, arguments: Sequence[str], config_name: str) -> str:
    """Hydra's composition errors in one line, with the nearest valid name."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options is not None:
        group, _, option = error.missing_cfg_file.rpartition("/")
        return f"{group}={option}: no such option of {group}{nearest(option, error.options)}"
    message = " ".join(str(error).split("\n")[0].split())
    if message.startswith("Ambiguous value"):
        message += ": a sweep over values needs -m; a list needs [brackets]"
    unknown = re.search(r"Could not override '([^']+)'", str(error))
    if unknown is None:
        return message
    key = unknown[1].partition("@")[0]
    choices = [argument for argument in arguments if re.fullmatch(r"[\w/]+=[\w-]+", argument) and not argument.startswith(f"{key}=")]
    try:
        cfg = compose(choices, config_name).cfg
    except HydraException:
        return message
    parent, _, name = key.rpartition(".")
    while parent and not isinstance(OmegaConf.select(cfg, parent), DictConfig):
        parent, _, name = parent.rpartition(".")
    section = OmegaConf.select(cfg, parent) if parent else cfg
    names = [str(found) for found in section if not str(found).startswith("_")] + (["experiment"] if not parent else [])
    return f"{key}: no such key{' in ' + parent if parent else ''}{nearest(name, names)}"
