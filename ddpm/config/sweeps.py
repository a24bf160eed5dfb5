"""Sweeps: how their jobs start, a device for each of several at once, and a table at the end.

The table says what each job came to.
"""

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
_claims = ExitStack()  # never closed: the system ends its locks with the process
PLUGINS: dict[str, dict[str, Any]] = {  # what is not as the plugins have it
    "launcher/joblib": {"n_jobs": "${num_devices:}"},
    "launcher/submitit_slurm": {
        "timeout_min": 1440,
        "max_num_timeout": 100,
        "signal_delay_s": 300,
    },
    # a job that fails is told by its own line, and ends no search
    "sweeper/optuna": {"n_jobs": 1, "max_failure_rate": 1.0},
    # typed again, a search is the same
    **{
        f"sweeper/sampler/{name}": {"seed": "${search_seed:${hydra.sweeper.storage}}"}
        for name in ("tpe", "random", "cmaes", "nsgaii")
    },
}


HERE = ("BasicLauncher", "JoblibLauncher", "LocalLauncher")  # have jobs run on this machine
Check = Callable[[Composed, bool], object]
Facts = Callable[[Composed], dict[str, str]]


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        overrides: Its key=value, as typed.
        code: The exit code that it would have had alone.
        facts: What to show of it, by column.
    """

    overrides: list[str]
    code: int
    facts: dict[str, str] = field(default_factory=dict)


class ResumedTwice(ValueError):
    """A run that two jobs would carry on, the second where the first has left it."""


class WrongJobs(Exception):
    """Jobs of a sweep that cannot run, a line for each."""


def check_jobs(
    check: Check | None,
    explain: Callable[[Exception, Sequence[str]], str],
    compose_job: Callable[[list[str]], DictConfig],
    jobs: Sequence[list[str]],
) -> None:
    """Looks whether each job of a sweep can run, before the first one does.

    Args:
        check: Raises ValueError for a job that cannot; None to look whether they compose, alone.
        explain: Puts an error into a line, given the job's overrides.
        compose_job: Composes the overrides of a job.
        jobs: The overrides of each job.

    Raises:
        WrongJobs: If some cannot run.
        ValueError: If there are none.
    """
    if not jobs:
        raise ValueError("hydra.sweeper.params: a sweep over nothing")
    wrong: dict[int, str] = {}
    optional = True  # whether runtime.check_sweep=false has the others run
    first: Exception | None = None
    resumed: dict[Path, int] = {}
    for number, words in enumerate(jobs):
        composes = False
        try:
            cfg = compose_job(words)
            composes = True
            _check_job(check, cfg, number, resumed)
        except Exception as error:
            first = first or error
            wrong[number] = explain(error, words)
            optional &= composes and not isinstance(error, ResumedTwice)
    if wrong:
        raise WrongJobs(_listed(wrong, jobs, optional)) from first


def _check_job(check: Check | None, cfg: DictConfig, number: int, resumed: dict[Path, int]) -> None:
    with as_job(cfg, number) as composed:
        if composed.cfg.get("resume") is not None:
            run = Path(str(composed.cfg.resume)).expanduser().resolve()
            other = resumed.setdefault(run, number)
            if other != number:
                raise ResumedTwice(
                    f"two jobs of this sweep carry on {run}: job {other} and job {number}"
                )
        if check is not None and OmegaConf.select(cfg, "runtime.check_sweep"):
            check(composed, str(cfg.hydra.launcher.get("_target_")).endswith(HERE))


@contextmanager
def as_job(cfg: DictConfig, number: int) -> Iterator[Composed]:
    """Gives what the job of this number is composed of, as in the job itself."""
    before = HydraConfig.instance().cfg
    try:
        with open_dict(cfg):
            cfg.hydra.job.id = cfg.hydra.job.num = number
        HydraConfig.instance().set_config(cfg)
        yield from_hydra(cfg, cfg.hydra)
    finally:
        HydraConfig.instance().cfg = before


def shown(facts: Facts, composed: Composed) -> dict[str, str]:
    """Returns the facts of a job; none where its configuration is none, and so has no run."""
    try:
        return facts(composed)
    except (OSError, ValueError):
        return {}


def left(composed: Composed, facts: Facts, code: int, lost: bool = False) -> Outcome:
    """Returns how a job stands that nothing was heard of, as its run's folder has it.

    Args:
        composed: Of the job.
        facts: What to show of it.
        code: Its exit code, unless its run is complete or has failed.
        lost: Whether it may have been started.
    """
    known = {"status": "lost" if lost else "not started", **shown(facts, composed)}
    own = {"complete": 0, "failed": 1}
    return Outcome(composed.overrides, own.get(known["status"], code), known)


def _listed(wrong: dict[int, str], jobs: Sequence[Sequence[str]], optional: bool) -> str:
    """The wrong jobs in lines; in one where all are wrong for the same reason."""
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
    """Returns of each job the overrides that not all have."""
    everywhere = set.intersection(*map(set, jobs)) if jobs else set()
    return [[word for word in words if word not in everywhere] for words in jobs]


def job_table(outcomes: Sequence[Outcome]) -> str:
    """Returns the jobs in lines: number, what differs between them, and their facts."""
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
    """Returns lines of as many cells each as text in columns."""
    lines = [[text.shown(cell) for cell in line] for line in lines]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def refuse_in_process_group(arguments: Sequence[str]) -> None:
    """Refuses a sweep in one of several processes that torchrun, accelerate or srun started.

    Raises:
        ValueError: If one is asked for there.
    """
    sweeps = {"-m", "--multirun", "hydra.mode=MULTIRUN"} & set(arguments)
    if sweeps and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"{min(sweeps)}: no sweep inside torchrun, accelerate launch or srun -n, whose "
            f"{os.environ['WORLD_SIZE']} processes are one job's for good; start one of these for "
            "each job, or a sweep without, with hydra/launcher=joblib for a device each"
        )


def claim_device(devices: Sequence[str]) -> str | None:
    """Has this process see one device that no other such process of this user sees.

    If there are too few devices, it shares one with as few processes as may be. Call it before the
    devices are first used.

    Args:
        devices: As CUDA_VISIBLE_DEVICES names them.

    Returns:
        The one, held until the process ends, or None if there are none.
    """
    if _claimed or not devices:
        return os.environ["CUDA_VISIBLE_DEVICES"] if _claimed else None
    folder = Path(tempfile.gettempdir()) / f"ddpm-devices-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise ValueError(
            f"{folder} is somebody else's, where this user's claims would lie: remove it"
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
    """Sets up the launchers and searches that are installed (extras sweep and search).

    Launchers run a job for each device, and queue a Slurm job again as often as its time runs out.
    Searches are the same each time, but for those with a storage, which go on from what it has.
    """
    OmegaConf.register_new_resolver(
        "num_devices", lambda: max(1, len(visible_devices())), replace=True
    )
    OmegaConf.register_new_resolver(
        "search_seed", lambda storage: 0 if storage is None else None, replace=True
    )
    Plugins.instance()  # which puts their options into the store
    store = ConfigStore.instance()
    for option, settings in PLUGINS.items():
        with suppress(ConfigLoadError):  # not installed
            group, _, name = f"hydra/{option}".rpartition("/")
            node = OmegaConf.merge(store.load(f"{group}/{name}.yaml").node, settings)
            store.store(group=group, name=name, node=node, provider="ddpm")


def visible_devices() -> list[str]:
    """Returns the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them.

    It starts none of them.
    """
    said = os.environ.get("CUDA_VISIBLE_DEVICES")
    if said is not None:
        return [name for name in said.split(",") if name]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]
