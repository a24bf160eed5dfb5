"""Which run a command line means: its configuration, its folder, and what changed."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Size

from ddpm.config import build
from ddpm.config.compose import Composed
from ddpm.config.schema import Config, config_of, training_config
from ddpm.data.shards import Source
from ddpm.evaluate.measure import check_extractor
from ddpm.runs import finding, pictures
from ddpm.runs.folder import RunFolder
from ddpm.runs.identity import flat, identity
from ddpm.system.devices import device
from ddpm.system.processes import find_processes, gather
from ddpm.weights.initial import assumptions, initial_weights, with_initial_weights

Changes = dict[str, list[Any]]  # of what the run computes: key -> [before, now]
# What resume= may change: how training goes on. All other keys decide what the weights are.
GOES_ON = (
    *("optimizer.", "lr_schedule.", "training.", "seed"),
    *("objective.loss", "objective.vlb_weight", "objective.min_snr_gamma"),
    "objective.timestep_sampling",
)
STAYS = ("training.conditional", "optimizer._target_", "lr_schedule._target_")


@dataclass(frozen=True)
class Start:
    """The run that a command line means.

    Attributes:
        config: The run's configuration, with fingerprints of its pictures and initial weights.
        folder: The run's folder.
        identity: The identity that the run began with.
        changes: The settings that resume= changes, of those that affect what is computed.
        source: The source of the pictures, if they were read to find the run.
        notes: What a user should know, one line each.
    """

    config: Config
    folder: RunFolder
    identity: dict[str, Any]
    changes: Changes = field(default_factory=dict)
    source: Source | None = None
    notes: list[str] = field(default_factory=list)


def which_run(composed: Composed) -> Start:
    """Returns the run that a command line means.

    Whatever can be refused without reading pictures is refused first.

    Raises:
        ValueError: If the configuration is invalid, if resume= would make another run, or if an
            unfinished run of an earlier version, or with other pictures, may be meant instead.
    """
    if composed.cfg.resume is not None:
        return load_resumed(composed)
    config = with_initial_weights(training_config(composed))
    build.check(config)
    check_initial_weights(config)
    gone = _without_its_pictures(config)
    if gone is not None:
        return gone
    config, source = pictures.with_pictures(config)
    run, notes = finding.locate(config), assumptions(config)
    if not run.record():
        before = finding.earlier(config)
        if before is not None and before.record().get("status") == "complete":
            run = before
            notes = [
                f"{before.path} was trained by an earlier version; resume={before.path} "
                "training.steps=MORE continues it"
            ]
        elif before is not None:
            raise ValueError(
                f"run {before.path} has this configuration, but was trained by an earlier "
                f"version: resume={before.path} continues it, another outputs= starts a new run"
            )
        other = finding.with_other_pictures(config)
        if before is None and other is not None and config.pictures is not None:
            if other.status() != "complete":
                pictures.check(other, config.pictures, source)
            notes = [f"a new run beside {other.path}, which had other pictures at the same path"]
    return Start(config, run, identity(config), source=source, notes=notes)


def _without_its_pictures(config: Config) -> Start | None:
    """The complete run that was trained on the pictures of data.path, if these are gone."""
    path = config.data.path
    if config.data.name != "folder" or path is None or Path(path).expanduser().exists():
        return None
    run = finding.with_other_pictures(config)
    if run is None or run.status() != "complete":
        return None
    began = run.record()["identity"]
    config = config.model_copy(update={"pictures": began["data"]["pictures"]})
    return Start(config, run, began)


def check_agreement(begun: Start) -> None:
    """Checks that all processes mean the same run with the same pictures, before one starts it.

    Raises:
        ValueError: If they do not.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    mine = f"{begun.folder.path} (pictures {begun.config.pictures})"
    found = sorted(set(gather([mine], find_processes(begun.config.runtime.device))))
    if len(found) > 1:
        raise ValueError(
            f"the processes find different runs: {', '.join(found)}; give all the same command and "
            "pictures"
        )


def load_resumed(composed: Composed) -> Start:
    """Returns the run at resume=DIR, with the values of the command line.

    Raises:
        ValueError: If there is no such run, or the values make it another run or train no step.
    """
    path = Path(str(composed.cfg.resume)).expanduser()
    instead = f"a new run can start from its weights: init_from={path}"
    overrides = OverridesParser.create().parse_overrides(composed.overrides)
    given = [override for override in overrides if override.key_or_group != "resume"]
    for override in given:
        if override.key_or_group in composed.choices or override.is_delete():
            raise ValueError(
                f"{override.input_line}: resume= can only change single values; {instead}"
            )
    run = RunFolder(path)
    before = run.config(list(composed.cfg.runtime.trusted_modules), key="resume")
    plain = OmegaConf.create(before.model_dump(mode="json"))
    for override in given:
        adds = override.is_add() or override.is_force_add()
        try:
            OmegaConf.update(plain, override.key_or_group, override.value(), force_add=adds)
        except OmegaConfBaseException as error:
            raise ValueError(f"{override.input_line}: {str(error).splitlines()[0]}") from error
    if (
        any(override.key_or_group == "data.path" for override in given)
        and "path" in plain.data.source
    ):
        plain.data.source.path = plain.data.path
    values = cast(dict[str, Any], OmegaConf.to_container(plain))
    config = with_initial_weights(config_of(values, composed.overrides))
    build.check(config)
    old, new = flat(identity(before)), flat(identity(config))
    keys = [
        key for key in sorted(old.keys() | new.keys()) if old.get(key, ...) != new.get(key, ...)
    ]
    for key in keys:
        if not key.startswith(GOES_ON) or key in STAYS:
            raise ValueError(
                f"{key}={new.get(key)}: resume= can change how a run goes on, but not what its "
                f"weights are, and the run has {key}={old.get(key)}; {instead}"
            )
    if keys and _shapes(before) != _shapes(config):
        raise ValueError(
            f"{', '.join(keys)}: resume= cannot change the network, and this would; {instead}"
        )
    _check_duration(config, run, keys, instead)
    found = None
    if config.data.name == "folder":
        config, found = pictures.with_pictures(config)
        pictures.check(run, str(config.pictures), found)
    changes = {key: [old.get(key), new.get(key)] for key in keys}
    began = run.record().get("identity", identity(before))
    return Start(config, run, began, changes, source=found)


def check_history(begun: Start, resumes: bool) -> None:
    """Checks that a run started by its configuration was not changed by resume= since.

    Raises:
        ValueError: If it was.
    """
    run = begun.folder
    if resumes or not any(start.get("changed") for start in run.record().get("starts", [])):
        return
    if begun.identity != identity(run.config(begun.config.runtime.trusted_modules)):
        raise ValueError(
            f"run {run.path} was resumed with other settings (see starts in run.json): continue "
            f"it with resume={run.path}, or start a new run with another outputs="
        )


def check_initial_weights(config: Config) -> None:
    """Checks that the weights of init_from fit, if that is known before the data is read.

    Raises:
        ValueError: If it does not.
    """
    if config.init_from is None:
        return
    if config.training.conditional and config.data.num_classes is None:
        return
    meta = torch.device("meta")
    initial_weights(config, build.network(config, meta, config.data.num_classes or 1))


def _shapes(config: Config) -> dict[str, Size]:
    """Name -> shape of the network's weights."""
    network = build.network(config, torch.device("meta"), config.data.num_classes or 1)
    return {name: weight.shape for name, weight in network.state_dict().items()}


def _check_duration(config: Config, run: RunFolder, changed: list[str], instead: str) -> None:
    """Refuses a duration shorter than what the run has done, and changes that train no step."""
    record = run.record()
    training, done = config.training, record.get("step", 0)
    steps = training.steps or (training.epochs or 0) * record.get("steps_per_epoch", 0)
    unit = "epochs" if training.steps is None else "steps"
    if 0 < steps < done:
        raise ValueError(
            f"training.{unit}={getattr(training, unit)} is less than the {done} steps "
            f"that {run.path} has already done"
        )
    if changed and steps == done > 0:
        raise ValueError(
            f"{', '.join(changed)}: {run.path} is complete at {done} steps, so this would train "
            f"nothing: give more training.{unit}=; {instead}"
        )


def check_job(composed: Composed, here: bool) -> Path | None:
    """Checks, before a sweep trains its first job, that this one can start.

    Args:
        composed: The job.
        here: Whether it would run on this machine. If so, the device, pictures and initial weights
            are checked, too.

    Returns:
        The folder of its run; None if only the machine that runs it can tell.

    Raises:
        ValueError: If it cannot.
    """
    if not here and composed.cfg.resume is None:
        build.check(training_config(composed))
        return None
    begun = which_run(composed)
    config, run = begun.config, begun.folder
    check_history(begun, resumes=composed.cfg.resume is not None)
    if not here or (run.record().get("status") == "complete" and not begun.changes):
        return run.path
    device(config.runtime.device)
    if begun.source is None and (config.data.path is not None or "repo" not in config.data.source):
        build.source(config)
    if config.runtime.evaluate_every is not None:
        check_extractor(config.evaluation, torch.device("cpu"))
    return run.path
