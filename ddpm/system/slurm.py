"""What Slurm says of the job that this process is part of, and the group that srun started.

Nothing here needs torch, and outside of Slurm nothing is asked.
"""

import os
import re
import signal
import subprocess
import time
from contextlib import suppress

from ddpm.system.signals import JOB_ENDS, Clock

ANSWER = 10.0  # seconds that Slurm's commands have to answer
PORTS = range(10_000, 30_000)  # below those that systems hand out by themselves


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
        ends.append((end, JOB_ENDS))
    return Clock(*min(ends)) if ends else None


def end_time() -> float | None:
    """Returns when Slurm ends this job, as time.time() counts.

    None outside of Slurm, where the job has no end, and where Slurm does not say.
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
    """Makes the tasks that `srun -n N` started a group, as torchrun does with its processes.

    Where torchrun or the like has started this process, or srun only one task, nothing changes.
    """
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if "WORLD_SIZE" in os.environ or int(tasks) < 2:
        return
    said = {name: os.environ[f"SLURM_{name}"] for name in ("PROCID", "LOCALID", "NODEID")}
    here = _tasks_per_node(os.environ.get("SLURM_STEP_TASKS_PER_NODE", tasks))
    local = int(said["LOCALID"])
    # --gpus-per-task shows each task its own ones alone
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
    """Returns whether this process is a job that submitit gave to Slurm."""
    return os.environ.get("SUBMITIT_EXECUTOR") == "slurm"


def for_submitit(why: str, number: signal.Signals | None) -> signal.Signals | None:
    """Returns the signal to hand on to submitit, in a job of its own, that was told to stop.

    It queues a job again for one signal alone, and only logs SIGTERM, which preempts.

    Args:
        why: The job was told to stop.
        number: Of the signal that told it so; None if none did.
    """
    if queued_again():
        return None
    if why == JOB_ENDS or (number == signal.SIGTERM and preempted()):
        return signal.Signals["SIG" + os.environ.get("SUBMITIT_PREEMPT_SIGNAL", "USR2")]
    return number


def preempted() -> bool:
    """Returns whether Slurm preempts this job, and has given it time to save.

    Slurm then ends it for good, unless it is queued again meanwhile.
    """
    job = _this_job()
    return job.get("JobState") == "RUNNING" and job.get("PreemptTime", "")[:1].isdigit()


def queued_again() -> bool:
    """Returns whether Slurm has queued this job again, while this process of it still ends."""
    before = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    return int(_this_job().get("Restarts", "0")) > before


def still_queued(jobs: list[str]) -> set[str] | None:
    """Returns those of these jobs that wait or run; None where Slurm does not answer.

    Args:
        jobs: As 26, or 26_0 of an array.
    """
    try:
        done = _run("squeue", "-h", "-r", "-j", ",".join(jobs), "-o", "%i")
    except (OSError, subprocess.SubprocessError):
        return None
    if done.returncode and "Invalid job id" not in done.stderr:  # none of them is known any more
        return None
    return set(done.stdout.split())


def _this_job() -> dict[str, str]:
    """What `scontrol show job` says of this job, by field; empty where it says nothing."""
    job = os.environ.get("SLURM_JOB_ID")
    text = _answer("scontrol", "show", "job", job) if job else ""
    return dict(re.findall(r"(\w+)=(\S*)", text))


def _first_host() -> str:
    """The host of task 0, by any name that the other tasks can find."""
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
    """What a command of Slurm prints; nothing if it fails.

    Slurm signals all processes of a job, so it may be killed; then it is asked once more.
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
