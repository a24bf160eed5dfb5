"""What Hydra is told beyond its own rules, while it composes.

The unit of the duration, the words that stand for a whole sweep, and what is not for the user.
"""

from collections.abc import Sequence
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from omegaconf import DictConfig, OmegaConf, open_dict

UNITS = {"steps": "epochs", "epochs": "steps"}  # of the duration: each with the other one
NETWORK = (  # keys that say what a file of weights is a network of
    *("experiment", "model", "data", "schedule", "objective", "training", "init_attention"),
)
RUNS_FOLDER = {  # as conf/hydra/run.yaml has them
    "hydra.run.dir": ".",
    "hydra.sweep.dir": "${outputs}",
    "hydra.sweep.subdir": ".",
    "hydra.job.chdir": False,
}


def one_unit(path: str, package: str | None, config: DictConfig) -> None:
    """Has a file that gives one unit of the duration undo the other one, said before it.

    Args:
        path: The option, as experiment/cifar10.
        package: Where its keys go; empty or None for the top.
        config: Its content, in place.

    Raises:
        ValueError: For an experiment whose keys would not go to the top.
    """
    if path.startswith("experiment/") and (package or "").split(".")[0] == "experiment":
        raise ValueError(needs_package(path))
    training = config.get("training")
    if not isinstance(training, DictConfig):
        return
    given = given_units(OmegaConf.to_container(training, resolve=False))
    if len(given) == 1:
        with open_dict(training):
            training[UNITS[given.pop()]] = None


def needs_package(path: str) -> str:
    """Returns what an experiment is told that forgot its first line."""
    return (
        f"{path}.yaml: its first line must be '# @package _global_', for its keys to be those of "
        "the run"
    )


def given_units(training: object) -> set[str]:
    """Returns the units of the duration that have a value."""
    return {unit for unit in UNITS if isinstance(training, dict) and training.get(unit) is not None}


def words_to_compose(
    typed: Sequence[str], loader: ConfigLoader, sweeps: bool, config_name: str
) -> list[str]:
    """Returns the overrides that Hydra composes in place of those typed.

    A sweep's settings are composed for its first job: Hydra would take the default options, which
    need not have the keys that are set. And experiment=null is the same as no experiment. What
    ddpm.sample from=FILE is told of the file's network is left out: a composition of its own.

    Args:
        typed: The overrides.
        loader: Of the configuration, which knows what a glob() finds.
        sweeps: Whether several jobs are to come of it.
        config_name: Of the command's file in conf/.

    Raises:
        ValueError: For a sweep over nothing.
    """
    parsed = OverridesParser.create(loader).parse_overrides(list(typed))
    if config_name == "sample" and any(one.key_or_group == "from" for one in parsed):
        parsed = [one for one in parsed if not says_network(one)]
    words = [_first_value(one) if sweeps else str(one.input_line) for one in parsed]
    experiments = [word for word in words if word.startswith("experiment=")]
    if experiments[-1:] != ["experiment=null"]:
        return words
    return [word for word in words if word not in experiments]


def says_network(override: Override) -> bool:
    """Whether an override of ddpm.sample tells the network and process of a file of weights."""
    key = str(override.key_or_group)
    return key.split(".")[0] in NETWORK and key != "data.path"


def _first_value(override: Override) -> str:
    if override.is_hydra_override() or not override.is_discrete_sweep():
        return str(override.input_line)
    first = next(override.sweep_string_iterator(), None)
    if first is None:
        why = (
            f"no option of {override.key_or_group} has such a name"
            if isinstance(override.value(), Glob)
            else "there is no number in that range"
        )
        raise ValueError(f"{override.input_line}: a sweep over nothing, {why}")
    return f"{override.get_key_element()}={first}"


def keep_runs_folder(cfg: DictConfig) -> None:
    """Refuses to have Hydra name the folder of a run, which it would not be in.

    Raises:
        ValueError: If that is what was typed, or set in a file.
    """
    for key, ours in RUNS_FOLDER.items():
        parent, _, name = key.rpartition(".")
        section: Any = OmegaConf.to_container(OmegaConf.select(cfg, parent), resolve=False)
        value = section[name]
        if value != ours:
            raise ValueError(
                f"{key}={str(value).lower() if isinstance(value, bool) else value}: a run's folder "
                "follows from its configuration; outputs=DIR says where"
            )
