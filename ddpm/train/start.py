"""Starting a run: which one a command line means, its data, and the state that it goes on from."""

import logging
import math
import os
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Size, Tensor, nn

from ddpm.config import build
from ddpm.config.compose import Composed
from ddpm.config.schema import Config, config_of, training_config
from ddpm.data.batches import Batches
from ddpm.data.image_set import ImageSet, goes_on_device
from ddpm.data.stored import Packed
from ddpm.diffusion.process import GaussianDiffusion
from ddpm.evaluate.measure import check_extractor
from ddpm.runs import checkpoint
from ddpm.runs.folder import RunFolder
from ddpm.runs.identity import flat, identity, locate
from ddpm.system.devices import compile_in_place, decide, device
from ddpm.train.meter import Meter
from ddpm.train.state import EMA, TrainingState
from ddpm.weights import folders

Changes = dict[str, list[Any]]  # what is computed otherwise than before: key -> [before, now]

log = logging.getLogger("ddpm")


def which_run(composed: Composed) -> tuple[Config, RunFolder, Changes]:
    """The run that a command line means: its configuration, its folder, and what changed.

    Raises:
        ValueError: For a configuration that cannot be, or a resume= that would make another run.
    """
    if composed.cfg.resume is not None:
        return load_resumed(composed)
    config = folders.with_initial_weights(training_config(composed))
    return config, locate(config, composed), {}


def load_resumed(composed: Composed) -> tuple[Config, RunFolder, Changes]:
    """The run at resume=DIR with the values of the command line.

    Raises:
        ValueError: If there is no such run, or for what would make it another run: a group on the
            command line, another network, less than it has done.
    """
    path = Path(str(composed.cfg.resume)).expanduser()
    instead = f"a new run can start from its weights: init_from={path}"
    overrides = OverridesParser.create().parse_overrides(composed.overrides)
    given = [override for override in overrides if override.key_or_group != "resume"]
    for override in given:
        if override.key_or_group in composed.choices or override.is_delete():
            raise ValueError(f"{override.input_line}: resume= changes single values; {instead}")
    run = RunFolder(path)
    before = run.config(list(composed.cfg.runtime.trusted_modules), key="resume")
    plain = OmegaConf.create(before.model_dump(mode="json"))
    for override in given:
        adds = override.is_add() or override.is_force_add()
        try:
            OmegaConf.update(plain, override.key_or_group, override.value(), force_add=adds)
        except OmegaConfBaseException as error:
            raise ValueError(f"{override.input_line}: {str(error).splitlines()[0]}") from error
    values = cast(dict[str, Any], OmegaConf.to_container(plain))
    config = folders.with_initial_weights(config_of(values, composed.overrides))
    old, new = flat(identity(before)), flat(identity(config))
    keys = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    if keys and _shapes(before) != _shapes(config):
        raise ValueError(
            f"{', '.join(keys)}: resume= keeps the network, and this would be another; {instead}"
        )
    _check_duration(config, run)
    return config, run, {key: [old.get(key), new.get(key)] for key in keys}


def check_history(config: Config, run: RunFolder, resumes: bool) -> None:
    """Refuses to go on by its configuration with a run that resume= has changed since.

    Raises:
        ValueError: If it was.
    """
    if resumes or not run.record().get("changes"):
        return
    if identity(config) != identity(run.config(config.runtime.trusted_modules)):
        raise ValueError(
            f"run {run.path} was carried on with other settings (run.json, changes): go on with "
            f"resume={run.path}, or start anew with another outputs="
        )


def check_initial_weights(config: Config, run: RunFolder) -> None:
    """Looks whether what lies at init_from fits, where that is known before the data is read.

    Raises:
        ValueError: If it does not.
    """
    if not _starts_from_weights(config, run):
        return
    if config.training.conditional and config.data.num_classes is None:
        return
    meta = torch.device("meta")
    _initial_weights(config, build.network(config, meta, config.data.num_classes or 1))


def load_data(config: Config, accelerator: Accelerator) -> ImageSet:
    """The run's pictures, made ready by the leading process first; see `build.images`."""
    workers = config.runtime.workers or _cores()
    source = build.source(config)
    with accelerator.main_process_first():
        return build.images(config, source, workers)


def check_data(data: ImageSet, config: Config, run: RunFolder) -> None:
    """Refuses to carry a run on with other pictures, and labels that are not what was said.

    Raises:
        ValueError: If so.
    """
    expected = config.data.num_classes
    if config.training.conditional and len(data.classes) != (expected or max(len(data.classes), 1)):
        raise ValueError(
            f"training.conditional=true needs {expected or 'some'} classes (data.num_classes), and "
            f"the data has {len(data.classes)}"
        )
    if config.training.conditional and data.labels is not None and (data.labels < 0).any():
        raise ValueError(
            "training.conditional=true needs a class for each picture, and "
            f"{(data.labels < 0).sum()} of {len(data)} have none ({'; '.join(data.notes)})"
        )
    before = run.record().get("data", {}).get("fingerprint")
    if before is not None and before != data.fingerprint:
        raise ValueError(
            f"the data has changed since {run.path} was started: fingerprint {data.fingerprint}, "
            f"was {before}; restore it, or start anew with another outputs="
        )


def check_own_pictures(config: Config, run: RunFolder) -> None:
    """Refuses to take a complete run for that of other pictures in a folder of the same name.

    Pictures that are gone are no reason to refuse.

    Raises:
        ValueError: If the pictures at data.path are others.
    """
    path = config.data.path
    if path is None or not Path(path).expanduser().exists():
        return
    source = build.source(config)
    if run.record().get("data", {}).get("cache") not in build.cache_folders(config, source):
        data = build.images(config, source, config.runtime.workers or _cores())
        check_data(data, config, run)


def batches_of(data: ImageSet, config: Config, device: torch.device) -> Batches:
    """The training batches of what is not held out."""
    training = config.training
    trained_on, _ = data.split(config.data.holdout)
    on_device = goes_on_device(config.runtime.feed, data, device)
    return Batches(
        trained_on.stored,
        training.batch_size,
        config.seed,
        device,
        training.drop_last,
        config.data.flip,
        labels=trained_on.labels if training.conditional else None,
        label_dropout=training.label_dropout,
        any_class=len(data.classes),
        rows=trained_on.rows,
        on_device=on_device,
    )


def notes_on(data: ImageSet, config: Config) -> list[str]:
    """What a user should know of the data and this run, a line each."""
    notes = []
    if config.data.flip and config.data.name == "folder":
        notes.append("half of the pictures are mirrored in training; data.flip=false does without")
    if config.data.holdout > 0 and data.labels is not None:
        trained_on, held_out = data.split(config.data.holdout)
        seen, kept = (
            {int(label) for label in part.labels if label >= 0}
            for part in (trained_on, held_out)
            if part.labels is not None
        )
        for number in sorted(kept - seen):
            notes.append(
                f"class {data.classes[number]} is held out whole: training never sees it "
                f"(data.holdout={config.data.holdout})"
            )
    return notes


def jump_of_rate(config: Config, run: RunFolder, num_steps: int) -> list[str]:
    """In a line, where the learning rate goes when other settings are carried on with.

    It is for a run that still has the settings of before.
    """
    record = run.record()
    step = record.get("step", 0)
    if not step:
        return []
    before = run.config(config.runtime.trusted_modules)
    old, new = (
        build.lr_schedule(settings)(step, total, float(settings.optimizer["lr"]))
        for settings, total in ((before, record["num_steps"]), (config, num_steps))
    )
    if math.isclose(old, new):
        return []
    last = build.lr_schedule(before)(step - 1, record["num_steps"], float(before.optimizer["lr"]))
    return [f"the learning rate jumps from {last:.3g} to {new:.3g} after step {step}"]


def how_fed(data: ImageSet, batches: Batches) -> str:
    """In words, how the pictures come to the device."""
    if isinstance(data.stored, Packed):
        return "decoded as they are needed"
    return "whole on the device" if batches.on_device else "from the decoded file"


def prepare(
    config: Config, accelerator: Accelerator, diffusion: GaussianDiffusion, network: nn.Module
) -> TrainingState:
    """The state at step 0 of a network as it is, in training mode."""
    ema = EMA(network, config.training.ema_decay, config.training.ema_warmup)
    optimizer = build.optimizer(config, list(network.parameters()))
    model, optimizer = accelerator.prepare(network.train(), optimizer)
    timesteps = build.timestep_sampler(diffusion, accelerator.device)
    meter = Meter(diffusion.num_timesteps, accelerator)
    return TrainingState(accelerator, network, model, ema, optimizer, timesteps, meter)


def state_of(
    config: Config,
    run: RunFolder,
    accelerator: Accelerator,
    diffusion: GaussianDiffusion,
    num_classes: int,
) -> TrainingState:
    """The state of the run's newest whole checkpoint, or that of its start.

    Raises:
        ValueError: If all checkpoints are damaged, or init_from does not fit.
    """
    network = build.network(config, accelerator.device, num_classes)
    if _starts_from_weights(config, run):
        network.load_state_dict(_initial_weights(config, network))
    compiles, why = decide(config.runtime.compile, accelerator.device)
    if compiles:
        compile_in_place(network)
    log.info("compiled: %s (%s)", "yes" if compiles else "no", why)
    state = prepare(config, accelerator, diffusion, network)
    newest = checkpoint.newest_whole(run.checkpoints)
    if newest is not None:
        state.load_state_dict(newest.load())
    return state


def _starts_from_weights(config: Config, run: RunFolder) -> bool:
    return config.init_from is not None and not checkpoint.all_in(run.checkpoints)


def _initial_weights(config: Config, network: nn.Module) -> dict[str, Tensor]:
    """What lies at init_from, for this network; a ValueError if that is no longer what it was."""
    found = folders.find(str(config.init_from), "init_from")
    if found.digest() != config.init_weights:
        raise ValueError(
            f"init_from={config.init_from} has changed since the command was started; start it "
            "again"
        )
    return found.weights_for(network, config.model)


def _shapes(config: Config) -> dict[str, Size]:
    """Of the network's weights."""
    network = build.network(config, torch.device("meta"), config.data.num_classes or 1)
    return {name: weight.shape for name, weight in network.state_dict().items()}


def _check_duration(config: Config, run: RunFolder) -> None:
    """Refuses a duration that is shorter than what the run has done already."""
    record = run.record()
    training, done = config.training, record.get("step", 0)
    steps = training.steps or (training.epochs or 0) * record.get("steps_per_epoch", 0)
    if 0 < steps < done:
        unit = "epochs" if training.steps is None else "steps"
        raise ValueError(
            f"training.{unit}={getattr(training, unit)} is less than what {run.path} has done "
            f"already, {done} steps"
        )


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_job(composed: Composed, here: bool) -> None:
    """Looks, before a sweep trains its first job, whether this one could start.

    Args:
        composed: The job.
        here: Whether it would run on this machine; then the device and own pictures are looked for.

    Raises:
        ValueError: If it could not.
    """
    config, run, changes = which_run(composed)
    build.check(config)
    check_history(config, run, resumes=composed.cfg.resume is not None)
    if run.record().get("status") == "complete" and not changes:
        return
    check_initial_weights(config, run)
    if not here:
        return
    device(config.runtime.device)
    if config.data.path is not None or "repo" not in config.data.source:
        build.source(config)
    if config.runtime.evaluate_every is not None:
        check_extractor(config.evaluation, torch.device("cpu"))
