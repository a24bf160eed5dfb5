"""Reads Slurm's information on this process's job, and connects the tasks that srun started.

It needs no torch, and runs no Slurm command outside of a Slurm job.
"""

import os
import re
import signal
import subprocess
import time
from contextlib import suppress

from ddpm.system.signals import JOB_ENDS, Clock

ANSWER = 10.0  # timeout of Slurm's commands in seconds
PORTS = range(10_000, 30_000)  # below the ephemeral ports


def clock_of(max_hours: float | None, began: float) -> Clock | None:
    """Returns a clock with the command's deadline, or None if it has none.

    Args:
        max_hours: Hours that the command may take; None for no limit.
        began: When it began, in seconds as in time.time().
    """
    ends = []
    if max_hours is not None:
        ends.append((began + 3600 * max_hours, f"runtime.max_hours={max_hours:g}"))
    end = end_time()
    if end is not None:
        ends.append((end, JOB_ENDS))
    return Clock(*min(ends)) if ends else None


def end_time() -> float | None:
    """Returns when Slurm ends this job, in seconds as in time.time().

    Returns None outside of Slurm, if the job has no time limit, or if Slurm does not answer.
    """
    said = os.environ.get("SLURM_JOB_END_TIME")  # since Slurm 23
    if said and said.isdecimal():
        return float(said)
    job = os.environ.get("SLURM_JOB_ID")
    if not job:
        return None
    local = _answer("squeue", "-h", "-j", job, "-o", "%e").strip()
    with suppress(ValueError):  # NONE, N/A, UNLIMITED
        return time.mktime(time.strptime(local, "%Y-%m-%dT%H:%M:%S"))
    return None


def join_step() -> None:
    """Connects the tasks of `srun -n N` by setting the environment variables that torchrun sets.

    Does nothing if a launcher such as torchrun started this process, or if srun started one task.
    """
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if "WORLD_SIZE" in os.environ or int(tasks) < 2:
        return
    said = {name: os.environ[f"SLURM_{name}"] for name in ("PROCID", "LOCALID", "NODEID")}
    here = _tasks_per_node(os.environ.get("SLURM_STEP_TASKS_PER_NODE", tasks))
    local = int(said["LOCALID"])
    # --gpus-per-task shows each task only its own GPUs
    devices = [one for one in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if one]
    job, step = int(os.environ["SLURM_JOB_ID"]), int(os.environ.get("SLURM_STEP_ID", "0"))
    os.environ |= {
        "WORLD_SIZE": tasks,
        "RANK": said["PROCID"],
        "LOCAL_RANK": str(local % len(devices) if devices else local),
        "LOCAL_WORLD_SIZE": str(here[int(said["NODEID"])]),
        "MASTER_ADDR": os.environ.get("MASTER_ADDR", _first_host()),
        "MASTER_PORT": os.environ.get("MASTER_PORT", str(PORTS[(job * 101 + step) % len(PORTS)])),
    }


def submitted_by_submitit() -> bool:
    """Returns whether submitit submitted this process as a Slurm job."""
    return os.environ.get("SUBMITIT_EXECUTOR") == "slurm"


def for_submitit(why: str, number: signal.Signals | None) -> signal.Signals | None:
    """Returns the signal to pass on to submitit when one of its jobs was told to stop.

    submitit requeues a job on one signal only, and merely logs SIGTERM, which Slurm sends to
    preempt a job.

    Args:
        why: Why the job was told to stop.
        number: The signal that told it to; None if it was not a signal.

    Returns:
        The signal, or None for none.
    """
    if queued_again():
        return None
    if why == JOB_ENDS or (number == signal.SIGTERM and preempted()):
        return signal.Signals["SIG" + os.environ.get("SUBMITIT_PREEMPT_SIGNAL", "USR2")]
    return number


def preempted() -> bool:
    """Returns whether Slurm is preempting this job, with a grace period to save.

    Slurm then cancels the job, unless it is requeued in time.
    """
    job = _this_job()
    return job.get("JobState") == "RUNNING" and job.get("PreemptTime", "")[:1].isdigit()


def queued_again() -> bool:
    """Returns whether Slurm has already requeued this job while this process is still exiting."""
    before = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    return int(_this_job().get("Restarts", "0")) > before


def still_queued(jobs: list[str]) -> set[str] | None:
    """Returns the jobs that are pending or running; None if Slurm does not answer.

    Args:
        jobs: Job ids such as 26, or 26_0 in an array.
    """
    try:
        done = _run("squeue", "-h", "-r", "-j", ",".join(jobs), "-o", "%i")
    except (OSError, subprocess.SubprocessError):
        return None
    if done.returncode and "Invalid job id" not in done.stderr:  # "Invalid": all have ended
        return None
    return set(done.stdout.split())


def _this_job() -> dict[str, str]:
    """Returns the fields of `scontrol show job` for this job; empty if it fails."""
    job = os.environ.get("SLURM_JOB_ID")
    text = _answer("scontrol", "show", "job", job) if job else ""
    return dict(re.findall(r"(\w+)=(\S*)", text))


def _first_host() -> str:
    """Returns the host of task 0, under a name that the other tasks can resolve."""
    hosts = os.environ.get("SLURM_STEP_NODELIST", "")
    if os.environ.get("SLURM_STEP_NUM_NODES", "1") == "1":
        return "127.0.0.1"
    listed = _answer("scontrol", "show", "hostnames", hosts).split()
    if listed:
        return listed[0]
    # n[01-04,07],m3 -> n01
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", re.split(r",(?![^\[]*\])", hosts)[0])


def _tasks_per_node(said: str) -> list[int]:
    """4(x2),3 -> [4, 4, 3]."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", said)
    return [int(tasks) for tasks, times in found for _ in range(int(times or 1))]


def _answer(*words: str) -> str:
    """Returns the output of a Slurm command; empty if it fails.

    Slurm signals all processes of a job, this command included. If it is killed, it is retried.
    """
    for _ in range(3):
        try:
            done = _run(*words)
        except (OSError, subprocess.SubprocessError):
            return ""
        if done.returncode >= 0:
            return done.stdout if done.returncode == 0 else ""
    return ""


def _run(*words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(words, capture_output=True, text=True, timeout=ANSWER, check=False)
