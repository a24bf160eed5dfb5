"""The command line that all entry points share: where the YAML lies, composing it with Hydra, and errors in one line."""

import copy
import difflib
import functools
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, cast

import hydra
import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ddpm import launchers, sweep
from ddpm.help import help_text

PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE / "_bundled" if (PACKAGE / "_bundled" / "conf").is_dir() else PACKAGE.parent  # an installed wheel, else a checkout
CONF = ROOT / "conf"
EXPERIMENTS = ROOT / "experiments"
_broken: dict[str, str] = {}  # files of experiments/ that cannot be options: name -> what is wrong


@dataclass(frozen=True)
class Composed:
    """A composed configuration.    choices: the option chosen in each group.    overrides: what the command line said, as typed.

    config_dir: the folder of the user's own options (--config-dir), if there is one.
    """

    cfg: DictConfig
    choices: dict[str, str]
    overrides: list[str]
    config_dir: str | None = None


def compose(overrides: Sequence[str], config_name: str = "config", config_dir: str | None = None) -> Composed:
    """What the command line `overrides` would compose to.    config_dir: of the user's own options, as --config-dir has it.

    Raises Hydra's errors, as the command itself does, and ValueError for a path as an option.
    """
    register_experiments()
    _refuse_paths(overrides)
    running = GlobalHydra.instance().hydra  # set when called from within a command
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            own = [f"hydra.searchpath=['file://{config_dir}']"] if config_dir else []
            cfg = hydra.compose(config_name, overrides=[*map(_at_home, overrides), *own], return_hydra_config=True)
    finally:
        GlobalHydra.instance().hydra = running
    return _composed(cfg, cfg.hydra)


def command(
    config_name: str,
    task: Callable[[Composed], None],
    what: str,
    examples: Sequence[str],
    facts: Callable[[Composed], dict[str, str]] = lambda composed: {},
) -> Callable[[], None]:
    """The main function of an entry point: compose conf/<config_name>.yaml with the command line, then run `task`; in a sweep, once a job.

    what, examples: for --help.    facts: what to show of a job in the table at the end of a sweep, by column.
    An error is one line on standard error, and exit code 1; Ctrl-C another, and 130; HYDRA_FULL_ERROR=1 brings the traceback of either. A failing job of a
    sweep does not stop the others.
    """

    @functools.wraps(task)
    def main() -> None:
        if {"--help", "-h"} & set(sys.argv[1:]):
            print(help_text(CONF, EXPERIMENTS, config_name, what, examples))
            return
        wants_traceback = os.environ.get("HYDRA_FULL_ERROR", "0") not in ("", "0")
        sys.argv[1:] = typed = [_at_home(word) for word in sys.argv[1:]]
        process = os.getpid()
        outcomes: list[sweep.Outcome] = []

        def job(cfg: DictConfig) -> sweep.Outcome:
            hydra_cfg = HydraConfig.get()
            composed, code, ended = _composed(cfg, hydra_cfg), 0, {"status": "done"}
            elsewhere = os.getpid() != process  # where the launcher has put the job
            if elsewhere:
                sys.argv[1:] = typed
                if str(hydra_cfg.launcher.get("_target_")).endswith(".JoblibLauncher"):
                    sweep.claim_device(launchers.visible_devices())
            try:
                task(composed)
            except Exception as error:
                if wants_traceback:
                    raise
                code, ended = 1, {"status": "failed"}
                print(f"error: {explain(error)}", file=sys.stderr, flush=True)
            except SystemExit as stopped:
                if not (elsewhere and stopped.code == sweep.CARRIES_ON):
                    raise
                code, ended = sweep.CARRIES_ON, {"status": "preempted"}
            if hydra_cfg.mode != RunMode.MULTIRUN:
                outcomes.append(sweep.Outcome(composed.overrides, code))
                return outcomes[-1]
            try:
                shown = facts(composed)
            except (OSError, ValueError):  # a configuration that is none has no run
                shown = {}
            return sweep.Outcome(composed.overrides, code, {**ended, **shown, **(ended if code else {})})

        register_experiments()
        launchers.set_defaults(typed)
        os.environ["HYDRA_FULL_ERROR"] = "1"  # have Hydra raise rather than print its own several lines
        try:
            _refuse_paths(_overrides_in(typed))
            sweep.refuse_in_process_group(typed)
            with launchers.collecting(outcomes):
                hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(functools.wraps(task)(job))()
        except KeyboardInterrupt:
            if wants_traceback:
                raise
            print("interrupted", file=sys.stderr, flush=True)
            sys.exit(130)
        except Exception as error:  # what a job raises is caught above: this is a composition that failed
            if wants_traceback:
                raise
            sys.exit(f"error: {_explain_composition(error, typed, config_name)}")
        if any(outcome.facts for outcome in outcomes):
            print(f"\n{sweep.table(outcomes)}", flush=True)
        codes = {outcome.code for outcome in outcomes} - {0}
        if codes:
            sys.exit(max(codes))

    return main


@functools.cache
def register_experiments(folder: Path = EXPERIMENTS) -> None:
    """Make each file of experiments/ an option of the group `experiment`, from whatever folder the command is started.

    One that cannot be is an error only for who asks for it.
    """
    for file in sorted(folder.glob("*.yaml")):
        try:
            node = OmegaConf.load(file)
            _check_recipe(node)
        except (yaml.YAMLError, OmegaConfBaseException, ValueError, OSError) as error:
            _broken[file.stem] = f"experiment={file.stem}: {file.name} cannot be used: {' '.join(str(error).split())}"
        else:
            ConfigStore.instance().store(group="experiment", name=file.stem, node=node, package="_global_", provider=f"experiments/{file.name}")


def _check_recipe(node: Any) -> None:
    """Raises ValueError for a recipe that is no table, or that reaches for Hydra itself, which would call what it names before anything is checked."""
    if not isinstance(node, DictConfig):
        raise ValueError("it is no table of keys")
    if "hydra" in node:
        raise ValueError("it sets hydra, which is for the command line alone")
    defaults = cast(dict[Any, Any], OmegaConf.to_container(node)).get("defaults", [])
    if not isinstance(defaults, list):
        raise ValueError(f"defaults={defaults} is no list")
    for entry in defaults:
        for key, option in entry.items() if isinstance(entry, dict) else [(str(entry), None)]:
            group = key.removeprefix("override ").strip("/ ")
            if "@" in key or not re.fullmatch(r"_self_=None|[\w/]+=[\w-]+", f"{group}={option}"):
                raise ValueError(f"its defaults have {key}: {option}, which is no group with one of its options")
            if group != "_self_" and not group.startswith("hydra/") and not (CONF / group).is_dir():
                raise ValueError(f"its defaults have {key}: there is no such group{nearest(group, _groups())}")


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
    task_cfg = copy.deepcopy(cfg)
    OmegaConf.set_struct(task_cfg, False)
    task_cfg.pop("hydra", None)
    choices = {group: str(option) for group, option in hydra_cfg.runtime.choices.items() if not group.startswith("hydra/")}
    own = next((source.path for source in hydra_cfg.runtime.config_sources if source.provider.endswith("command-line")), None)
    return Composed(task_cfg, choices, cast(list[str], OmegaConf.to_container(hydra_cfg.overrides.task, resolve=False)), own)


def _overrides_in(arguments: Sequence[str]) -> list[str]:
    """The overrides among a command line's arguments.    Ends the process, with one line, for flags that Hydra does not have."""
    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        wrong = next((word for word in arguments if re.match("-+[a-z_.]+=", word)), None)
        sys.exit(f"error: {message}" + (f"; settings are given without dashes, as {wrong.lstrip('-')}" if wrong else "; see --help"))

    parser.error = refuse  # type: ignore[method-assign]  # Hydra makes the parser, so there is no class to derive from
    return parser.parse_args(arguments).overrides


def _at_home(override: str) -> str:
    """key=~/path as a shell would have it, which leaves it alone since the key has a dot, and Hydra cannot read it."""
    key, equals, value = override.partition("=")
    return key + equals + str(Path(value).expanduser()) if value == "~" or value.startswith("~/") else override


def _groups() -> list[str]:
    return [folder.name for folder in CONF.iterdir() if folder.is_dir()]


def _refuse_paths(overrides: Sequence[str]) -> None:
    """Raises ValueError for an option of a group that is no name: a path could lead to any file, and two options would be mixed."""
    groups = {**{group: CONF / group for group in _groups()}, "experiment": EXPERIMENTS}
    for override in overrides:
        key, _, option = override.lstrip("+~").partition("=")
        group = re.split("[/@:]", key)[0]
        if not key:
            raise ValueError(f"{override}: settings are key=value")
        if group in groups and "." not in key.partition("@")[0] and re.search(r"[/\\[]|\.\.|\.ya?ml|^(null|true|false|[\d.]+)$", option):
            raise ValueError(f"{key}={option}: no such option of {group}{nearest(option, [file.stem for file in groups[group].glob('*.yaml')])}")


def _explain_composition(error: Exception, arguments: Sequence[str], config_name: str) -> str:
    """Hydra's composition errors in one line, with the nearest valid name."""
    if isinstance(error, OverrideParseException):
        key, equals, _ = error.override.partition("=")
        what = f"{error.override} cannot be read" if equals else f"{key} is no setting"
        return f"{what}: settings are key=value; spaces, brackets and other signs in a value need quotes: 'key=\"value\"'"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options is not None:
        group, _, option = error.missing_cfg_file.rpartition("/")
        if group == "experiment" and option in _broken:
            return _broken[option]
        more = (
            "; pip install -e '.[sweep]' brings joblib, submitit_local and submitit_slurm"
            if group == "hydra/launcher" and "joblib" not in error.options
            else ""
        )
        return f"{group}={option}: no such option of {group}{nearest(option, error.options)}{more}"
    if not isinstance(error, HydraException):
        return explain(error)
    message = " ".join(str(error).split("\n")[0].split())
    if message.startswith("Ambiguous value"):
        message += ": a sweep over values needs -m; a list needs [brackets]"
    unknown = re.search(r"Could not override '([^']+)'", str(error))
    if unknown is None:
        return message
    key = unknown[1].partition("@")[0]
    choices = [argument for argument in arguments if re.fullmatch(r"[\w/]+=[\w-]+", argument) and not argument.startswith(f"{key}=")]
    own = get_args_parser().parse_args(arguments).config_dir
    try:
        cfg = compose(choices, config_name, own and str(Path(own).resolve())).cfg
    except HydraException:
        return message
    parent, _, name = key.rpartition(".")
    while parent and not isinstance(OmegaConf.select(cfg, parent), DictConfig):
        parent, _, name = parent.rpartition(".")
    section = OmegaConf.select(cfg, parent) if parent else cfg
    names = [str(found) for found in section if not str(found).startswith("_")] + (["experiment"] if not parent else [])
    groups = {str(group): inner for group, inner in cfg.items_ex(resolve=False) if isinstance(inner, DictConfig)}
    deeper = [f"{group}.{name}" for group, inner in groups.items() if not parent and name in inner]
    if deeper:
        return f"{key}: no such key{nearest('', names)}; did you mean {' or '.join(deeper)}?"
    return f"{key}: no such key{' in ' + parent if parent else ''}{nearest(name, names)}"
