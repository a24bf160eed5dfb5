"""Starting a run: which run a command line means, what it starts from, and whether the data is what it was."""

from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Size, nn

from ddpm.config import build
from ddpm.config.compose import Composed
from ddpm.config.schema import Config, settled, training_config
from ddpm.data.image_set import ImageSet
from ddpm.diffusion.timesteps import LossSecondMoment, Uniform
from ddpm.runs import checkpoint
from ddpm.runs.folder import RunFolder
from ddpm.runs.identity import computed, flat, locate
from ddpm.train.state import EMA
from ddpm.weights import folders


def _starts_from_weights(config: Config, run: RunFolder) -> bool:
    return config.init_from is not None and not checkpoint.all_in(run.checkpoints)


def _first_weights(config: Config, network: nn.Module) -> dict[str, torch.Tensor]:
    """What lies at init_from, for this network.    Raises ValueError, one line, if it does not fit, or is no longer what the run is named after."""
    found = folders.find(str(config.init_from), "init_from")
    if found.digest() != config.init_weights:
        raise ValueError(f"init_from={config.init_from} has changed since the command was started; start it again")
    return found.fitting(network, config.model)


def _resume(
    found: checkpoint.Checkpoint,
    raw: nn.Module,
    ema: EMA,
    optimizer: torch.optim.Optimizer,
    timestep_sampler: Uniform | LossSecondMoment,
    accelerator: Accelerator,
) -> tuple[int, torch.Tensor]:
    """Put everything back as it was after the checkpoint's step; that step, and the sums of what is still to be reported."""
    state = found.state()
    raw.load_state_dict(found.weights("raw"))
    ema.load_state_dict(found.weights("ema"), state["ema_updates"])
    optimizer.load_state_dict(state["optimizer"])
    timestep_sampler.load_state_dict(state["timesteps"])
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(state["scaler"])
    return found.step, state["meter"]


def _check_data(data: ImageSet, config: Config, run: RunFolder, record: dict[str, Any]) -> None:
    """Refuse to carry a run on with other pictures, and labels that are not what the configuration says."""
    if config.training.conditional and len(data.classes) != (config.data.num_classes or max(len(data.classes), 1)):
        raise ValueError(
            f"training.conditional=true needs {config.data.num_classes or 'some'} classes (data.num_classes), and the data has {len(data.classes)}"
        )
    if config.training.conditional and data.labels is not None and (data.labels < 0).any():
        raise ValueError(f"training.conditional=true needs a class for each picture, and {(data.labels < 0).sum()} of {len(data)} have none")
    before = record.get("data", {}).get("fingerprint")
    if before is not None and before != data.fingerprint:
        raise ValueError(
            f"the data has changed since {run.path} was started: fingerprint {data.fingerprint}, was {before}; restore it, or start anew with another outputs="
        )


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
    before = run.config(list(composed.cfg.runtime.trusted_modules), key="resume")  # its init_weights stand in its config.yaml
    plain = OmegaConf.create(before.model_dump(mode="json"))
    for override in given:
        try:
            OmegaConf.update(plain, override.key_or_group, override.value(), force_add=override.is_add() or override.is_force_add())
        except OmegaConfBaseException as error:
            raise ValueError(f"{override.input_line}: {str(error).splitlines()[0]}") from error
    config = folders.with_content(settled(cast(dict[str, Any], OmegaConf.to_container(plain)), composed.overrides))
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


def _meant(composed: Composed) -> tuple[Config, RunFolder, dict[str, list[Any]] | None]:
    """The run of this command line: its configuration, its folder, and with resume= what is computed otherwise than before."""
    if composed.cfg.resume is not None:
        return resumed(composed)
    config = folders.with_content(training_config(composed))
    return config, locate(config, composed), None
