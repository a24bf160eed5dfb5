"""Rules that the project adds to Hydra's composition.

They cover the unit of the duration, the overrides of a sweep, and keys that users may not set.
"""

from collections.abc import Sequence
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from omegaconf import DictConfig, OmegaConf, open_dict

UNITS = {"steps": "epochs", "epochs": "steps"}  # unit of the duration -> the other one
NETWORK = (  # keys that describe the network in a file of weights
    *("experiment", "model", "data", "schedule", "objective", "training", "init_attention"),
)
RUNS_FOLDER = {  # the values in conf/hydra/run.yaml
    "hydra.run.dir": ".",
    "hydra.sweep.dir": "${outputs}",
    "hydra.sweep.subdir": ".",
    "hydra.job.chdir": False,
}


def one_unit(path: str, package: str | None, config: DictConfig) -> None:
    """Lets a file that sets one unit of the duration reset the other, set by an earlier file.

    Args:
        path: The option, such as experiment/cifar10.
        package: Where its keys go; empty or None for the top level.
        config: The file's content, changed in place.

    Raises:
        ValueError: If an experiment's keys would not go to the top level.
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
    """Returns the error for an experiment without its first line."""
    return (
        f"{path}.yaml: its first line must be '# @package _global_'; without it, its keys do not "
        "reach the run"
    )


def given_units(training: object) -> set[str]:
    """Returns the units of the duration that have a value."""
    return {unit for unit in UNITS if isinstance(training, dict) and training.get(unit) is not None}


def words_to_compose(
    typed: Sequence[str], loader: ConfigLoader, sweeps: bool, config_name: str
) -> list[str]:
    """Returns the overrides that Hydra composes instead of those typed.

    A sweep composes the overrides of its first job: Hydra would use the default options, which need
    not have the keys that are set. experiment=null means no experiment. ddpm.sample from=FILE
    composes the keys that describe the file's network separately, so they are left out.

    Args:
        typed: The overrides as typed.
        loader: Hydra's config loader, which resolves glob().
        sweeps: Whether this is a sweep.
        config_name: Name of the command's file in conf/.

    Raises:
        ValueError: If a sweep has no values.
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
    """Whether an override of ddpm.sample describes the network or process of a file of weights."""
    key = str(override.key_or_group)
    return key.split(".")[0] in NETWORK and key != "data.path"


def _first_value(override: Override) -> str:
    if override.is_hydra_override() or not override.is_discrete_sweep():
        return str(override.input_line)
    first = next(override.sweep_string_iterator(), None)
    if first is None:
        why = (
            f"no option of {override.key_or_group} matches"
            if isinstance(override.value(), Glob)
            else "the range is empty"
        )
        raise ValueError(f"{override.input_line}: nothing to sweep over: {why}")
    return f"{override.get_key_element()}={first}"


def keep_runs_folder(cfg: DictConfig) -> None:
    """Rejects keys of Hydra that would name a run's folder: the run would not be in it.

    Raises:
        ValueError: If the command line or a file sets one.
    """
    for key, ours in RUNS_FOLDER.items():
        parent, _, name = key.rpartition(".")
        section: Any = OmegaConf.to_container(OmegaConf.select(cfg, parent), resolve=False)
        value = section[name]
        if value != ours:
            raise ValueError(
                f"{key}={str(value).lower() if isinstance(value, bool) else value}: a run's folder "
                "follows from its configuration; choose where it lies with outputs=DIR"
            )
