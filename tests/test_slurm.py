"""Slurm: when a job ends, whether it is preempted, what srun starts is a group, and a stopped job is queued again.

Below, and with `-m slurm` only, the scripts and submitit run on a real Slurm. It has to see the folder of the tests (--basetemp=), and lets
its user change a partition and a job's StartTime: DDPM_SLURM_PARTITION and DDPM_SLURM_URGENT name two, of which the second preempts the first.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import psutil
import pytest
import submitit
from hydra.core.utils import JobReturn, JobStatus
from submitit.core.utils import cloudpickle_dump
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from ddpm.config import submitit_jobs
from ddpm.config.sweeps import Outcome
from ddpm.runs.folder import RunFolder
from ddpm.system import signals, slurm, torchrun

ROOT = Path(__file__).resolve().parent.parent
RUNNING = "JobId=7 JobName=a b\n   JobState=RUNNING Reason=None Dependency=(null)\n   Requeue=1 Restarts=0 BatchFlag=1"


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Put a command of that name first on PATH, which prints a text; and take Slurm's variables away."""
    for name in os.environ:
        if name.startswith(("SLURM_", "SUBMITIT_", "TORCHELASTIC_")) or name == "WORLD_SIZE":
            monkeypatch.delenv(name)
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def make(name: str, text: str, code: int = 0) -> None:
        file = folder / name
        file.write_text(
            f"#!/bin/sh\necho {name} \"$@\" >> {tmp_path}/asked\ncat <<'END'\n{text}\nEND\nexit {code}\n"
        )
        file.chmod(0o755)

    return make


@pytest.mark.parametrize(
    ("environment", "said", "code", "ends"),
    [
        ({}, "2031-02-03T04:05:06", 0, None),
        (
            {"SLURM_JOB_ID": "7"},
            "2031-02-03T04:05:06",
            0,
            datetime(2031, 2, 3, 4, 5, 6).timestamp(),
        ),
        ({"SLURM_JOB_ID": "7"}, "NONE", 0, None),
        ({"SLURM_JOB_ID": "7"}, "N/A", 0, None),
        ({"SLURM_JOB_ID": "7"}, "2031-02-03T04:05:06", 1, None),
        ({"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": "1234"}, "N/A", 0, 1234.0),
    ],
)
def test_the_end_of_the_job_is_what_slurm_says_or_not_known(
    command, monkeypatch, environment, said, code, ends
):
    command("squeue", said, code)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert slurm.end_time() == ends


def test_outside_of_slurm_nothing_is_asked(command, tmp_path):
    command("squeue", "")
    command("scontrol", "")
    assert slurm.end_time() is None
    assert not slurm.preempted()
    assert not slurm.queued_again()
    assert not (tmp_path / "asked").exists()


@pytest.mark.parametrize(
    ("more", "hosts", "expected"),
    [
        (
            {},
            "n02\nn03",
            {"RANK": "5", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "n02"},
        ),
        ({}, None, {"MASTER_ADDR": "n02"}),
        ({"CUDA_VISIBLE_DEVICES": "3"}, "n02\nn03", {"LOCAL_RANK": "0"}),
        ({"CUDA_VISIBLE_DEVICES": "2,3"}, "n02\nn03", {"LOCAL_RANK": "1"}),
        ({"SLURM_STEP_NUM_NODES": "1"}, None, {"MASTER_ADDR": "127.0.0.1"}),
    ],
)
def test_what_srun_starts_without_torchrun_is_a_group(command, monkeypatch, more, hosts, expected):
    if hosts is not None:
        command("scontrol", hosts)
    else:
        command("scontrol", "", 1)
    said = {
        "JOB_ID": "41",
        "STEP_ID": "0",
        "STEP_NUM_TASKS": "6",
        "PROCID": "5",
        "LOCALID": "1",
        "NODEID": "1",
    }
    said |= {"STEP_TASKS_PER_NODE": "4,2", "STEP_NODELIST": "n[02-03]", "STEP_NUM_NODES": "2"}
    for name in (
        "WORLD_SIZE",
        "RANK",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    ):
        monkeypatch.setenv(name, "")  # put back afterwards
        monkeypatch.delenv(name)
    for name, value in {**{f"SLURM_{name}": value for name, value in said.items()}, **more}.items():
        monkeypatch.setenv(name, value)
    slurm.join_step()
    assert {name: os.environ[name] for name in expected} == expected
    assert os.environ["WORLD_SIZE"] == "6"
    port = os.environ["MASTER_PORT"]

    monkeypatch.setenv(
        "SLURM_PROCID", "0"
    )  # the others get the same place to meet at, another step another
    for step, same in (("0", True), ("1", False)):
        monkeypatch.setenv("SLURM_STEP_ID", step)
        monkeypatch.delenv("WORLD_SIZE")
        monkeypatch.delenv("MASTER_PORT")
        slurm.join_step()
        assert (os.environ["MASTER_PORT"] == port) == same


@pytest.mark.parametrize(
    "environment",
    [{}, {"SLURM_STEP_NUM_TASKS": "1"}, {"SLURM_STEP_NUM_TASKS": "2", "WORLD_SIZE": "8"}],
)
def test_one_task_and_torchruns_processes_stay_what_they_are(command, monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    slurm.join_step()
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("said", "preempted", "queued"),
    [
        (
            f"{RUNNING}\n   PreemptEligibleTime=2026-11-26T13:35:59 PreemptTime=2026-11-26T13:36:02",
            True,
            False,
        ),
        (f"{RUNNING}\n   PreemptEligibleTime=2026-11-26T13:35:59 PreemptTime=None", False, False),
        (RUNNING, False, False),
        (
            f"{RUNNING}\n   PreemptTime=2026-11-26T13:36:02".replace("RUNNING", "COMPLETING"),
            False,
            False,
        ),  # cancelled meanwhile
        (
            RUNNING.replace("RUNNING", "COMPLETING").replace("Restarts=0", "Restarts=1"),
            False,
            True,
        ),  # without a grace time
        ("", False, False),
    ],
)
def test_preempted_is_what_slurm_says_of_this_job(command, monkeypatch, said, preempted, queued):
    command("scontrol", said)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert slurm.preempted() == preempted
    assert slurm.queued_again() == queued


@pytest.mark.parametrize(
    ("said", "told", "handed"),
    [
        (f"{RUNNING}\n   PreemptTime=2026-11-26T13:36:02", "SIGTERM", ["SIGUSR2"]),
        (f"{RUNNING}\n   PreemptTime=None", "SIGTERM", ["SIGTERM"]),
        (f"{RUNNING}\n   PreemptTime=None", "SIGUSR2", ["SIGUSR2"]),
        (f"{RUNNING}\n   PreemptTime=None", slurm.END, ["SIGUSR2"]),
        (f"{RUNNING}\n   PreemptTime=None", "runtime.max_hours=1", []),
        (RUNNING.replace("Restarts=0", "Restarts=1"), "SIGTERM", []),
    ],
)
def test_a_job_of_submitit_is_queued_again_by_submitit_where_slurm_does_not(
    command, monkeypatch, said, told, handed
):
    command("scontrol", said)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    heard: list[str] = []
    taken = (signal.SIGTERM, signal.SIGUSR2)
    before = {
        number: signal.signal(
            number, lambda number, frame: heard.append(signal.Signals(number).name)
        )
        for number in taken
    }
    try:
        with signals.listening():
            signals.tell(told)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert heard == handed


def ended(folder: Path, name: str, outcome: Outcome) -> None:
    job = submitit.SlurmJob(folder / "%j", name)
    job.paths.folder.mkdir(parents=True, exist_ok=True)
    returned = JobReturn(status=JobStatus.COMPLETED, _return_value=outcome)
    cloudpickle_dump(("success", returned), job.paths.result_pickle)


def test_all_jobs_are_waited_for_and_the_folder_tells_of_one_that_was_killed(
    command, monkeypatch, tmp_path, capsys
):
    """Accounting does not answer; job 26_1 left the queue and no result, 26_2 is never known and ends well."""
    command("sacct", "Slurm accounting storage is disabled", 1)
    command("squeue", "26_0\n26_3")
    for name in ("LOOK", "ASK", "LATE"):
        monkeypatch.setattr(submitit_jobs, name, 0.05)
    jobs = [submitit.SlurmJob(tmp_path / "%j", f"26_{number}") for number in range(3)]
    ended(tmp_path, "26_2", Outcome(["seed=2"], 0, {"status": "complete"}))
    jobs[1].paths.folder.mkdir()
    jobs[1].paths.stderr.write_text("step 10\nerror: no room\n")
    seen: list[int] = []

    def of_folder(number: int) -> dict[str, str]:
        seen.append(number)
        if number == 1:
            ended(tmp_path, "26_0", Outcome(["seed=0"], 75, {"status": "preempted"}))
        return {"status": "cut off", "steps": "20/100"}

    outcomes = submitit_jobs.wait_for(jobs, of_folder)
    assert [outcome.code for outcome in outcomes] == [75, 1, 0]
    assert outcomes[1].facts == {"status": "cut off", "steps": "20/100"}
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"Slurm has jobs 26_0, 26_1, 26_2; their logs are in {tmp_path}"
    assert said[1:] == [
        "job 26_2: complete",
        f"job 26_1: cut off, error: no room ({jobs[1].paths.stderr})",
        "job 26_0: preempted",
    ]
    assert "sacct" not in (tmp_path / "asked").read_text()


def test_where_slurm_does_not_answer_no_job_is_given_up(command):
    command("squeue", "slurm_load_jobs error: Unable to contact slurm controller", 1)
    assert slurm.still_queued(["26_0"]) is None


def test_ctrl_c_while_jobs_are_waited_for_says_that_they_go_on(
    command, monkeypatch, tmp_path, capsys
):
    command("squeue", "26_0\n26_1")
    monkeypatch.setattr(submitit_jobs, "LOOK", 0.05)
    jobs = [submitit.SlurmJob(tmp_path / "%j", f"26_{number}") for number in range(2)]
    monkeypatch.setattr(
        submitit_jobs.time, "sleep", lambda seconds: signal.raise_signal(signal.SIGINT)
    )
    with pytest.raises(SystemExit) as stopped:
        submitit_jobs.wait_for(jobs, lambda number: {})
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "jobs 26_0, 26_1 go on in Slurm; scancel 26 stops them\n"


def test_torchrun_reads_why_one_of_its_processes_ended(command, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    torchrun.leave_word("told to stop: SIGTERM")
    assert not (
        tmp_path / "error.json"
    ).exists()  # torchrun itself may have such a file, for its parent
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    torchrun.leave_word("told to stop: SIGTERM")
    failure = ProcessFailure(
        local_rank=0, pid=1, exitcode=75, error_file=str(tmp_path / "error.json")
    )
    assert failure.message["message"] == "told to stop: SIGTERM"
    assert abs(failure.timestamp - time.time()) < 60


def test_the_time_that_torchrun_grants_is_known(command, monkeypatch):
    assert torchrun.seconds_to_stop() is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)
    assert torchrun.seconds_to_stop() == 30
    parent = psutil.Process().parent()
    for words, seconds in (
        (["torchrun", "--shutdown-timeout", "240", "-m", "ddpm.train"], 240),
        (["torchrun", "--shutdown_timeout=100"], 100),
        (["torchrun", "--signals-to-handle", "SIGHUP"], None),
        (["torchrun", "--signals-to-handle=SIGTERM,SIGUSR1"], 30),
    ):
        monkeypatch.setattr(type(parent), "cmdline", lambda self, words=words: words)
        assert torchrun.seconds_to_stop() == seconds
