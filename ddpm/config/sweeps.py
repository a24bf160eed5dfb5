"""Sweeps: checks before the first job, one device per job, and a table of outcomes at the end."""

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import Timeout
from hydra.core.config_store import ConfigLoadError, ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from omegaconf import DictConfig, OmegaConf, open_dict

from ddpm.config.compose import Composed, from_hydra
from ddpm.system import text
from ddpm.system.files import lock

_claimed: list[str] = []
_claims = ExitStack()  # never closed: the operating system drops its locks with the process
PLUGINS: dict[str, dict[str, Any]] = {  # defaults that replace the plugins' own
    "launcher/joblib": {"n_jobs": "${num_devices:}"},
    "launcher/submitit_slurm": {
        "timeout_min": 1440,
        "max_num_timeout": 100,
        "signal_delay_s": 300,
    },
    # a failed job prints its own line and does not end the search
    "sweeper/optuna": {"n_jobs": 1, "max_failure_rate": 1.0},
    # repeating the command repeats the search
    **{
        f"sweeper/sampler/{name}": {"seed": "${search_seed:${hydra.sweeper.storage}}"}
        for name in ("tpe", "random", "cmaes", "nsgaii")
    },
}


HERE = ("BasicLauncher", "JoblibLauncher", "LocalLauncher")  # launchers that use this machine
Check = Callable[[Composed, bool], Path | None]
Facts = Callable[[Composed], dict[str, str]]


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        overrides: The job's overrides, as typed.
        code: The exit code that it would have on its own.
        facts: Its cells of the table, by column.
    """

    overrides: list[str]
    code: int
    facts: dict[str, str] = field(default_factory=dict)


class ResumedTwice(ValueError):
    """Two jobs of a sweep would resume the same run, the second where the first one ends."""


class WrongJobs(Exception):
    """Jobs of a sweep that cannot run, one line per job."""


def check_jobs(
    check: Check | None,
    explain: Callable[[Exception, Sequence[str]], str],
    compose_job: Callable[[list[str]], DictConfig],
    jobs: Sequence[list[str]],
    distinct: bool = True,
) -> None:
    """Checks before the first job that every job of a sweep can run.

    Args:
        check: Raises ValueError for a job that cannot run, and returns the folder of its run if
            that is known yet; None checks only that jobs compose.
        explain: Turns an error into one line, given the job's overrides.
        compose_job: Composes the overrides of a job.
        jobs: The overrides of each job.
        distinct: Whether each job must be another run; a search may try a value twice.

    Raises:
        WrongJobs: If some jobs cannot run.
        ValueError: If there are no jobs.
    """
    if not jobs:
        raise ValueError("hydra.sweeper.params: nothing to sweep over")
    wrong: dict[int, str] = {}
    optional = True  # whether runtime.check_sweep=false would start the other jobs
    first: Exception | None = None
    resumed: dict[Path, int] = {}
    runs: dict[Path, int] = {}
    for number, words in enumerate(jobs):
        composes = False
        try:
            cfg = compose_job(words)
            composes = True
            run = _check_job(check, cfg, number, resumed)
            if distinct and run is not None and runs.setdefault(run, number) != number:
                raise ValueError(
                    f"jobs {runs[run]} and {number} of this sweep are the same run, since nothing "
                    "that changes its weights differs: sweep over seed to repeat a run, and with "
                    "ddpm.evaluate -m over sampler and evaluation"
                )
        except Exception as error:
            first = first or error
            wrong[number] = explain(error, words)
            optional &= composes and not isinstance(error, ResumedTwice)
    if wrong:
        raise WrongJobs(_listed(wrong, jobs, optional)) from first


def _check_job(
    check: Check | None, cfg: DictConfig, number: int, resumed: dict[Path, int]
) -> Path | None:
    """Checks one job; returns the folder of its run if that is known."""
    with as_job(cfg, number) as composed:
        if composed.cfg.get("resume") is not None:
            run = Path(str(composed.cfg.resume)).expanduser().resolve()
            other = resumed.setdefault(run, number)
            if other != number:
                raise ResumedTwice(f"jobs {other} and {number} of this sweep both resume {run}")
        if check is not None and OmegaConf.select(cfg, "runtime.check_sweep"):
            return check(composed, str(cfg.hydra.launcher.get("_target_")).endswith(HERE))
    return None


@contextmanager
def as_job(cfg: DictConfig, number: int) -> Iterator[Composed]:
    """Yields the composed configuration of a job, with HydraConfig set as in the job itself."""
    before = HydraConfig.instance().cfg
    try:
        with open_dict(cfg):
            cfg.hydra.job.id = cfg.hydra.job.num = number
        HydraConfig.instance().set_config(cfg)
        yield from_hydra(cfg, cfg.hydra)
    finally:
        HydraConfig.instance().cfg = before


def shown(facts: Facts, composed: Composed) -> dict[str, str]:
    """Returns the facts of a job, or none if its configuration is invalid and names no run."""
    try:
        return facts(composed)
    except (OSError, ValueError):
        return {}


def left(composed: Composed, facts: Facts, code: int, lost: bool = False) -> Outcome:
    """Returns the outcome of a job that reported none, from its run's folder.

    Args:
        composed: The job's configuration.
        facts: Returns the job's columns of the table.
        code: The exit code, unless the run is complete or has failed.
        lost: Whether the job may have started.
    """
    known = {"status": "lost" if lost else "not started", **shown(facts, composed)}
    own = {"complete": 0, "failed": 1}
    return Outcome(composed.overrides, own.get(known["status"], code), known)


def _listed(wrong: dict[int, str], jobs: Sequence[Sequence[str]], optional: bool) -> str:
    """Returns one line per wrong job, or a single one if all jobs fail for the same reason."""
    if len(wrong) == len(jobs) and len(set(wrong.values())) == 1:
        return f"error: {text.shown(wrong[0])}"
    lines = [
        text.shown(f"error: {why} (job {number}: {' '.join(differing(jobs)[number]) or '-'})")
        for number, why in wrong.items()
    ]
    starts = optional and len(wrong) < len(jobs)
    more = "; runtime.check_sweep=false starts the others" if starts else ""
    return "\n".join([*lines, f"none of the {len(jobs)} jobs was started{more}"])


def differing(jobs: Sequence[Sequence[str]]) -> list[list[str]]:
    """Returns, for each job, the overrides that not all jobs share."""
    everywhere = set.intersection(*map(set, jobs)) if jobs else set()
    return [[word for word in words if word not in everywhere] for words in jobs]


def job_table(outcomes: Sequence[Outcome]) -> str:
    """Returns a table with one line per job: number, what differs, and the job's facts."""
    differ = differing([outcome.overrides for outcome in outcomes])
    rows = [
        {
            "job": str(number),
            "what differs": " ".join(differ[number]) or "-",
            **outcome.facts,
        }
        for number, outcome in enumerate(outcomes)
    ]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return align([columns, *([row.get(column, "-") for column in columns] for row in rows)])


def align(lines: Sequence[Sequence[str]]) -> str:
    """Returns lines with equally many cells as text in aligned columns."""
    lines = [[text.shown(cell) for cell in line] for line in lines]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def refuse_in_process_group(arguments: Sequence[str]) -> None:
    """Rejects a sweep inside several processes started by torchrun, accelerate or srun.

    Raises:
        ValueError: If the arguments ask for a sweep in such a process.
    """
    sweeps = {"-m", "--multirun", "hydra.mode=MULTIRUN"} & set(arguments)
    if sweeps and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"{min(sweeps)}: a sweep cannot run inside torchrun, accelerate launch or srun -n: all "
            f"{os.environ['WORLD_SIZE']} processes work on one job; launch each job by itself, or "
            "sweep without a launcher, with hydra/launcher=joblib for one device per job"
        )


def claim_device(devices: Sequence[str]) -> str | None:
    """Claims one device for this process by setting CUDA_VISIBLE_DEVICES.

    No other job of this user claims the same device. If there are too few devices, the least shared
    one is shared. Call this before the devices are first used.

    Args:
        devices: Names of the devices, as in CUDA_VISIBLE_DEVICES.

    Returns:
        The claimed device, held until the process ends, or None if there are no devices.
    """
    if _claimed or not devices:
        return os.environ["CUDA_VISIBLE_DEVICES"] if _claimed else None
    folder = Path(tempfile.gettempdir()) / f"ddpm-devices-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise ValueError(
            f"{folder} belongs to another user, and this user's device claims go there: remove it"
        )
    slot = 0
    while True:
        for device in devices:
            try:
                _claims.enter_context(lock(folder / f"{device.replace('/', '-')}.{slot}", wait=0))
            except Timeout:
                continue
            _claimed.append(device)
            os.environ["CUDA_VISIBLE_DEVICES"] = device
            return device
        slot += 1


def set_defaults() -> None:
    """Sets the defaults of the installed launchers and sweepers (extras sweep and search).

    Launchers run one job per device, and requeue a Slurm job whenever its time runs out. Searches
    are seeded and repeat exactly; a search with a storage continues from there instead.
    """
    OmegaConf.register_new_resolver(
        "num_devices", lambda: max(1, len(visible_devices())), replace=True
    )
    OmegaConf.register_new_resolver(
        "search_seed", lambda storage: 0 if storage is None else None, replace=True
    )
    Plugins.instance()  # registers the plugins' options in the store
    store = ConfigStore.instance()
    for option, settings in PLUGINS.items():
        with suppress(ConfigLoadError):  # not installed
            group, _, name = f"hydra/{option}".rpartition("/")
            node = OmegaConf.merge(store.load(f"{group}/{name}.yaml").node, settings)
            store.store(group=group, name=name, node=node, provider="ddpm")


def visible_devices() -> list[str]:
    """Returns the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them.

    No device is initialized.
    """
    said = os.environ.get("CUDA_VISIBLE_DEVICES")
    if said is not None:
        return [name for name in said.split(",") if name]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]
