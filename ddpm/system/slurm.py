"""What Slurm says of the job that this process is part of."""

import os

from ddpm.system.signals import Clock


def clock_of(max_hours: float | None, began: float) -> Clock | None:
    """Returns the clock that a command must end by; None if nothing sets an end.

    Args:
        max_hours: From its beginning; None for no such end.
        began: When it began, as time.time() counts.
    """
    ends = []
    if max_hours is not None:
        ends.append((began + 3600 * max_hours, f"runtime.max_hours={max_hours:g}"))
    end = end_time()
    if end is not None:
        ends.append((end, "the end of the Slurm job"))
    return Clock(*min(ends)) if ends else None


def end_time() -> float | None:
    """Returns when Slurm ends this job, as time.time() counts; None outside of Slurm."""
    said = os.environ.get("SLURM_JOB_END_TIME")
    return float(said) if said else None
