"""Waits for the jobs of a sweep that submitit has submitted to Slurm.

Slurm's queue tells whether a job still waits or runs (no accounting, sacct, needed). If a job
returns no result, its run's folder tells how it ended.
"""

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from ddpm.config.sweeps import Outcome
from ddpm.system import slurm
from ddpm.system.text import say

LOOK = 1.0  # seconds between checks for results
ASK = 10.0  # seconds between queries of Slurm's queue
LATE = 20.0  # seconds that a result may take after its job has left the queue


def wait_for(jobs: Sequence[Any], of_folder: Callable[[int], Outcome]) -> list[Outcome]:
    """Waits for all jobs of a sweep and prints how each ends.

    Args:
        jobs: submitit's jobs.
        of_folder: Takes a job's number; returns its outcome from its run's folder.

    Returns:
        The outcomes, in the order of the jobs.

    Raises:
        SystemExit: With code 130 on Ctrl-C; the jobs go on.
    """
    names = [str(job.job_id) for job in jobs]
    say(f"Slurm has {_listed(names)}; their logs are in {jobs[0].paths.folder.parent}")
    ended: dict[int, Outcome] = {}
    gone: dict[int, float] = {}  # job -> when it was first missing from the queue
    asked = time.monotonic()
    try:
        while len(ended) < len(jobs):
            time.sleep(LOOK)
            waiting = [number for number in range(len(jobs)) if number not in ended]
            if time.monotonic() - asked >= ASK:
                asked = time.monotonic()
                known = slurm.still_queued([names[number] for number in waiting])
                for number in waiting if known is not None else []:
                    if names[number] in (known or ()):
                        gone.pop(number, None)
                    else:
                        gone.setdefault(number, asked)
            for number in waiting:
                late = time.monotonic() - gone.get(number, float("inf")) > LATE
                if late or jobs[number].paths.result_pickle.exists():
                    ended[number] = _returned(jobs[number]) or of_folder(number)
                    _say(jobs[number], ended[number])
    except KeyboardInterrupt:
        left = [names[number] for number in range(len(jobs)) if number not in ended]
        stop = " ".join(dict.fromkeys(name.partition("_")[0] for name in left))
        say(f"{_listed(left)} go on in Slurm; scancel {stop} stops them", to_error=True)
        sys.exit(130)
    return [ended[number] for number in range(len(jobs))]


def _returned(job: Any) -> Outcome | None:
    """Returns a job's outcome, or None if it left no usable result."""
    if not job.paths.result_pickle.exists():
        return None
    try:
        returned: Outcome = job.task(0).result().return_value
    except Exception:  # submitit wraps whatever the job raised
        return None
    return returned


def _say(job: Any, outcome: Outcome) -> None:
    status = outcome.facts.get("status", "has ended")
    errors = []
    if outcome.code == 1 and job.paths.stderr.exists():
        text = job.paths.stderr.read_text(encoding="utf-8", errors="replace")
        errors = [line for line in text.splitlines() if line.startswith("error: ")]
    why = f", {errors[-1]}" if errors else ""
    where = f" ({job.paths.stderr})" if outcome.code == 1 else ""
    say(f"job {job.job_id}: {status}{why}{where}")


def _listed(names: Sequence[str]) -> str:
    """Job 26; jobs 26_0 to 26_7."""
    if len(names) > 4:
        return f"jobs {names[0]} to {names[-1]}"
    return f"{'jobs' if len(names) > 1 else 'job'} {', '.join(names)}"
