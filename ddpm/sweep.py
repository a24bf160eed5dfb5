"""Sweeps: what each job came to, in a table at the end; a device for each of several jobs at once; and where no sweep can be."""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ddpm.files import lock

CARRIES_ON = 75  # EX_TEMPFAIL, the exit code of a run that was told to stop: the same command carries on


@dataclass(frozen=True)
class Outcome:
    """How a job ended.    overrides: its key=value, as typed.    code: the exit code that it would have had alone.    facts: what to show of it, by column."""

    overrides: list[str]
    code: int
    facts: dict[str, str] = field(default_factory=dict)


def table(outcomes: Sequence[Outcome]) -> str:
    """The jobs in lines: number, what differs between them, and their facts."""
    everywhere = set.intersection(*(set(outcome.overrides) for outcome in outcomes)) if outcomes else set()
    rows = [
        {"job": str(number), "what differs": " ".join(one for one in outcome.overrides if one not in everywhere) or "-", **outcome.facts}
        for number, outcome in enumerate(outcomes)
    ]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return aligned([columns, *([row.get(column, "-") for column in columns] for row in rows)])


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Lines of as many cells each as text in columns."""
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def refuse_in_process_group(arguments: Sequence[str]) -> None:
    """Raises ValueError, one line, if a sweep is asked for in one of several processes that torchrun or accelerate started."""
    sweeps = {"-m", "--multirun", "hydra.mode=MULTIRUN"} & set(arguments)
    if sweeps and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"{min(sweeps)}: no sweep inside torchrun or accelerate launch, whose {os.environ['WORLD_SIZE']} processes are one job's for good; "
            "start one of these for each job, or a sweep without, with hydra/launcher=joblib for a device each"
        )


def claim_device(devices: Sequence[str]) -> str | None:
    """Have this process see one device that no other such process of this user sees, or as few as may be; before the devices are first used.

    devices: as CUDA_VISIBLE_DEVICES names them.    Returns the one, held until the process ends, or None if there are none.
    """
    if _claimed or not devices:
        return os.environ["CUDA_VISIBLE_DEVICES"] if _claimed else None
    folder = Path(tempfile.gettempdir()) / f"ddpm-devices-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    slot = 0
    while True:
        for device in devices:
            file = (folder / f"{device.replace('/', '-')}.{slot}").open("a")
            if not lock(file):
                file.close()
                continue
            _claimed.append(file)
            os.environ["CUDA_VISIBLE_DEVICES"] = device
            return device
        slot += 1


_claimed: list[object] = []  # open files: the system lets go of their locks when the process ends
