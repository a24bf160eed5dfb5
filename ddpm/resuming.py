"""ddpm.train resume=DIR: carry a run on in its own folder with some settings changed, and keep a record of what changed."""

from pathlib import Path
from typing import Any, cast

import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Size

from ddpm import build
from ddpm.cli import Composed
from ddpm.config import Config, settled
from ddpm.run_folder import RunFolder, computed, flat


def resumed(composed: Composed) -> tuple[Config, RunFolder, dict[str, list[Any]]]:
    """The run at `resume` with the values of the command line: (configuration, folder, what is computed otherwise than before: key -> [before, now]).

    Raises ValueError, one line, if there is no such run, or for what would make it another run: a group on the command line, another network, less
    than it has done.
    """
    path = Path(str(composed.cfg.resume)).expanduser()
    given = [override for override in OverridesParser.create().parse_overrides(composed.overrides) if override.key_or_group != "resume"]
    for override in given:
        if override.key_or_group in composed.choices or override.is_delete():
            raise ValueError(f"{override.input_line}: resume= changes single values; a new run can start from its weights: init_from={path}")
    run = RunFolder(path)
    before = run.config(list(composed.cfg.runtime.trusted_modules), key="resume")
    plain = OmegaConf.create(before.model_dump(mode="json"))
    for override in given:
        try:
            OmegaConf.update(plain, override.key_or_group, override.value(), force_add=override.is_add() or override.is_force_add())
        except OmegaConfBaseException as error:
            raise ValueError(f"{override.input_line}: {str(error).splitlines()[0]}") from error
    config = settled(cast(dict[str, Any], OmegaConf.to_container(plain)), composed.overrides)
    old, new = flat(computed(before)), flat(computed(config))
    changes = {key: [old.get(key), new.get(key)] for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)}
    if changes and _shapes(before) != _shapes(config):
        raise ValueError(f"{', '.join(changes)}: resume= keeps the network, and this would be another; a new run can start from its weights: init_from={path}")
    _check_duration(config, run)
    return config, run, changes


def _shapes(config: Config) -> dict[str, Size]:
    """Of the network's weights."""
    return {name: weight.shape for name, weight in build.network(config, torch.device("meta"), config.data.num_classes or 1).state_dict().items()}


def _check_duration(config: Config, run: RunFolder) -> None:
    """Raises ValueError for a duration that is shorter than what the run has done already."""
    record, unit = run.record(), "epochs" if config.training.steps is None else "steps"
    steps_per_epoch, done = record.get("steps_per_epoch", 0), record.get("step", 0)
    steps = config.training.steps or (config.training.epochs or 0) * steps_per_epoch
    if 0 < steps < done:
        raise ValueError(f"training.{unit}={getattr(config.training, unit)} is less than what {run.path} has done already, {done} steps")
