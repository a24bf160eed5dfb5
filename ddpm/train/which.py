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

Changes = dict[str, list[Any]]  # what is computed otherwise than before: key -> [before, now]
# What resume= may change, since it says how a run goes on; all else says what its weights are.
GOES_ON = (
    *("optimizer.", "lr_schedule.", "training.", "seed"),
    *("objective.loss", "objective.vlb_weight", "objective.min_snr_gamma"),
    "objective.timestep_sampling",
)
STAYS = ("training.conditional", "optimizer._target_", "lr_schedule._target_")


@dataclass(frozen=True)
class Start:
    """What a command line means.

    Attributes:
        config: The run's configuration, with the fingerprints of what it is made from.
        folder: The run's.
        identity: What the run began as.
        changes: What resume= changes of what is computed.
        source: The pictures, where they had to be looked at to know which run is meant.
        notes: What a user should know, a line each.
    """

    config: Config
    folder: RunFolder
    identity: dict[str, Any]
    changes: Changes = field(default_factory=dict)
    source: Source | None = None
    notes: list[str] = field(default_factory=list)


def which_run(composed: Composed) -> Start:
    """The run that a command line means.

    What can be refused before pictures are read is refused first.

    Raises:
        ValueError: For a configuration that cannot be, a resume= that would make another run, or
            a run beside it that another start should not be mistaken for.
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
                "training.steps=MORE carries it on"
            ]
        elif before is not None:
            raise ValueError(
                f"run {before.path} is this configuration, trained by an earlier version: "
                f"resume={before.path} carries it on, another outputs= starts anew"
            )
        other = finding.with_other_pictures(config)
        if before is None and other is not None and config.pictures is not None:
            if other.status() != "complete":
                pictures.check(other, config.pictures, source)
            notes = [f"a new run beside {other.path}, which has other pictures of the same place"]
    return Start(config, run, identity(config), source=source, notes=notes)


def _without_its_pictures(config: Config) -> Start | None:
    """The complete run that was trained on what lay at data.path, where that is gone."""
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
    """Looks whether all processes mean the same run, of the same pictures, before one starts it.

    Raises:
        ValueError: If they do not.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    mine = f"{begun.folder.path} (pictures {begun.config.pictures})"
    found = sorted(set(gather([mine], find_processes(begun.config.runtime.device))))
    if len(found) > 1:
        raise ValueError(f"the processes find different runs: {', '.join(found)}")


def load_resumed(composed: Composed) -> Start:
    """The run at resume=DIR with the values of the command line.

    Raises:
        ValueError: If there is no such run, or for what would make it another run or train no step.
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
                f"{key}={new.get(key)}: resume= changes how a run goes on, not what its weights "
                f"are, which says {key}={old.get(key)}; {instead}"
            )
    if keys and _shapes(before) != _shapes(config):
        raise ValueError(
            f"{', '.join(keys)}: resume= keeps the network, and this would be another; {instead}"
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
    """Refuses to go on by its configuration with a run that resume= has changed since.

    Raises:
        ValueError: If it was.
    """
    run = begun.folder
    if resumes or not any(start.get("changed") for start in run.record().get("starts", [])):
        return
    if begun.identity != identity(run.config(begun.config.runtime.trusted_modules)):
        raise ValueError(
            f"run {run.path} was carried on with other settings (run.json, starts): go on with "
            f"resume={run.path}, or start anew with another outputs="
        )


def check_initial_weights(config: Config) -> None:
    """Looks whether what lies at init_from fits, where that is known before the data is read.

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
    """Of the network's weights."""
    network = build.network(config, torch.device("meta"), config.data.num_classes or 1)
    return {name: weight.shape for name, weight in network.state_dict().items()}


def _check_duration(config: Config, run: RunFolder, changed: list[str], instead: str) -> None:
    """Refuses a duration that is shorter than what the run has done, or changes without a step."""
    record = run.record()
    training, done = config.training, record.get("step", 0)
    steps = training.steps or (training.epochs or 0) * record.get("steps_per_epoch", 0)
    unit = "epochs" if training.steps is None else "steps"
    if 0 < steps < done:
        raise ValueError(
            f"training.{unit}={getattr(training, unit)} is less than what {run.path} has done "
            f"already, {done} steps"
        )
    if changed and steps == done > 0:
        raise ValueError(
            f"{', '.join(changed)}: {run.path} is complete at {done} steps, and would train none: "
            f"give more training.{unit}=; {instead}"
        )


def check_job(composed: Composed, here: bool) -> None:
    """Looks, before a sweep trains its first job, whether this one could start.

    Args:
        composed: The job.
        here: Whether it would run on this machine; then the device, the pictures and first weights
            are looked for.

    Raises:
        ValueError: If it could not.
    """
    if not here and composed.cfg.resume is None:
        build.check(training_config(composed))
        return
    begun = which_run(composed)
    config, run = begun.config, begun.folder
    check_history(begun, resumes=composed.cfg.resume is not None)
    if run.record().get("status") == "complete" and not begun.changes:
        return
    if not here:
        return
    device(config.runtime.device)
    if begun.source is None and (config.data.path is not None or "repo" not in config.data.source):
        build.source(config)
    if config.runtime.evaluate_every is not None:
        check_extractor(config.evaluation, torch.device("cpu"))
