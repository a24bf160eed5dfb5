"""Slurm: when a job ends, whether it is preempted, srun's process group, and requeued jobs.

The last tests run only with `-m slurm` and use the scripts and submitit on a real Slurm. It must
see the tests' folder (--basetemp=) and let its user change a partition and a job's StartTime.
DDPM_SLURM_PARTITION and DDPM_SLURM_URGENT name two partitions; the second one preempts the first.
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
    """Puts a command that prints a text first on PATH, and removes Slurm's variables."""
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
        monkeypatch.setenv(name, "")  # makes monkeypatch restore it afterwards
        monkeypatch.delenv(name)
    for name, value in {**{f"SLURM_{name}": value for name, value in said.items()}, **more}.items():
        monkeypatch.setenv(name, value)
    slurm.join_step()
    assert {name: os.environ[name] for name in expected} == expected
    assert os.environ["WORLD_SIZE"] == "6"
    port = os.environ["MASTER_PORT"]

    # the other ranks get the same port, another step gets another
    monkeypatch.setenv("SLURM_PROCID", "0")
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
        ),  # canceled meanwhile
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
        (f"{RUNNING}\n   PreemptTime=None", signals.JOB_ENDS, ["SIGUSR2"]),
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
    """Accounting does not answer.

    Job 26_1 left the queue without a result; 26_2 was never seen there and ended well.
    """
    command("sacct", "Slurm accounting storage is disabled", 1)
    command("squeue", "26_0\n26_3")
    for name in ("LOOK", "ASK", "LATE"):
        monkeypatch.setattr(submitit_jobs, name, 0.05)
    jobs = [submitit.SlurmJob(tmp_path / "%j", f"26_{number}") for number in range(3)]
    ended(tmp_path, "26_2", Outcome(["seed=2"], 0, {"status": "complete"}))
    jobs[1].paths.folder.mkdir()
    jobs[1].paths.stderr.write_text("step 10\nerror: no room\n")
    seen: list[int] = []

    def of_folder(number: int) -> Outcome:
        seen.append(number)
        if number == 1:
            ended(tmp_path, "26_0", Outcome(["seed=0"], 75, {"status": "preempted"}))
        return Outcome(["seed=1"], 1, {"status": "cut off", "steps": "20/100"})

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
        submitit_jobs.wait_for(jobs, lambda number: Outcome([], 1))
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "jobs 26_0, 26_1 go on in Slurm; scancel 26 stops them\n"


def test_torchrun_reads_why_one_of_its_processes_ended(command, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    torchrun.leave_word("told to stop: SIGTERM")
    # without torchrun's run id, the file may be torchrun's own, for its parent
    assert not (tmp_path / "error.json").exists()
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


# On a real Slurm.

STEPS = 300
RUN = [
    *(
        "data=digits",
        "model.base_channels=8",
        "model.norm_groups=4",
        "model.channel_multipliers=[1,2]",
    ),
    *(
        "model.attention_resolutions=[8]",
        "training.batch_size=8",
        "runtime.num_previews=4",
        "sampler=ddim",
    ),
    *(
        "sampler.num_steps=2",
        "runtime.log_every=10",
        "runtime.sample_every=100000",
        "runtime.checkpoint_every=100000",
    ),
]
PARTITION = os.environ.get("DDPM_SLURM_PARTITION", "work")
URGENT = os.environ.get("DDPM_SLURM_URGENT", "urgent")
SLOW = """
import os, time
really = os.fsync
def fsync(handle):
    time.sleep(6)
    really(handle)
os.fsync = fsync
"""


def ask(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, timeout=60, check=False).stdout


def until(true, seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.2)


@pytest.fixture
def asked_for(request):
    """Skips a test unless -m slurm asks for it and Slurm answers."""
    if "slurm" not in request.config.option.markexpr:
        pytest.skip("-m slurm runs this")
    if not shutil.which("sbatch") or "is UP" not in ask("scontrol", "ping"):
        pytest.skip("no Slurm answers here")


class Job:
    """A job of experiments/slurm/ with two tasks on CPUs, and its run."""

    def __init__(
        self, folder: Path, *words: str, script="train.sh", options=(), **environment: str
    ) -> None:
        self.log, self.outputs = folder / "log", folder / "outputs"
        tasks = [
            "--ntasks-per-node=1",
            "--nodes=2",
            "--gpus-per-node=0",
            "--cpus-per-task=1",
            f"--partition={PARTITION}",
        ]
        own = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "PER_NODE": "1",
        }
        own |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", **environment}
        self.id = subprocess.run(
            [
                "sbatch",
                "--parsable",
                f"--output={self.log}",
                *tasks,
                *options,
                str(ROOT / "experiments" / "slurm" / script),
                *(*RUN, f"outputs={self.outputs}", *words),
            ],
            env={**os.environ, **own},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    def says(self, text: str, seconds: float = 90, times: int = 1) -> None:
        until(
            lambda: self.log.exists() and self.log.read_text().count(text) >= times,
            seconds,
            f"{text!r} is not in {self.log}",
        )

    def shown(self, field: str) -> str:
        return dict(re.findall(r"(\w+)=(\S*)", ask("scontrol", "show", "job", self.id)))[field]

    def is_in(self, *states: str, seconds: float = 60) -> None:
        until(
            lambda: self.shown("JobState") in states,
            seconds,
            f"{self.shown('JobState')}, not {states}: {self.log}",
        )

    def goes_on(self) -> None:
        """Checks that the job is requeued, starts at once, and trains to the end."""
        self.is_in("PENDING")
        assert self.shown("Restarts") == "1"
        ask("scontrol", "update", f"JobId={self.id}", "StartTime=now")
        self.says("carrying on from step")
        self.says("is complete", 120)
        self.is_in("COMPLETED")

    @property
    def run(self) -> RunFolder:
        return RunFolder(next(self.outputs.glob("*/*/run.json")).parent)

    def kill_task(self, rank: int) -> None:
        for process in psutil.process_iter():
            try:
                words, environment = process.cmdline(), process.environ()
            except psutil.Error:
                continue
            at = "SLURM_PROCID" if "torchrun" not in str(words[:3]) else "RANK"
            if (
                f"outputs={self.outputs}" in words
                and "python" in words[0]
                and environment.get(at) == str(rank)
            ):
                process.kill()


def content(run: RunFolder, steps: int = STEPS) -> dict[str, bytes]:
    last = [
        run.path / "metrics.jsonl",
        *(run.checkpoints / f"step_{steps:08d}").iterdir(),
        *run.samples.glob("*.png"),
    ]
    return {file.name: file.read_bytes() for file in last if file.name != "meta.json"}


@pytest.fixture(scope="module")
def undisturbed(request, tmp_path_factory):
    if "slurm" not in request.config.option.markexpr or not shutil.which("sbatch"):
        pytest.skip("-m slurm runs this")
    job = Job(tmp_path_factory.mktemp("undisturbed"), f"training.steps={STEPS}")
    job.says("is complete", 120)
    job.is_in("COMPLETED")
    return content(job.run)


def preempt(grace: int) -> None:
    ask("scontrol", "update", f"PartitionName={PARTITION}", f"GraceTime={grace}")
    if f"GraceTime={grace} " not in ask("scontrol", "show", "partition", PARTITION):
        pytest.skip("its user may not change the partition")
    ask("srun", f"--partition={URGENT}", "--nodes=2", "--exclusive", "--time=1", "sleep", "1")


@pytest.mark.slurm
@pytest.mark.parametrize("script", ["train.sh", "torchrun.sh"])
@pytest.mark.parametrize("happens", ["USR1", 0, 20])
def test_a_job_that_saves_is_queued_again_and_comes_to_the_same_bytes(
    asked_for, undisturbed, tmp_path, script, happens
):
    job = Job(tmp_path, f"training.steps={STEPS}", script=script)
    job.says("step 30 ")
    if happens == "USR1":
        ask("scancel", "--signal=USR1", job.id)
    else:
        preempt(happens)
    job.goes_on()
    assert content(job.run) == undisturbed


@pytest.mark.slurm
def test_out_of_time_a_job_saves_before_and_is_queued_again(asked_for, tmp_path):
    job = Job(tmp_path, "training.steps=1000000", options=["--time=1", "--signal=CONT@1"])
    job.says("step 30 ")
    end = datetime.fromisoformat(job.shown("EndTime"))
    job.is_in("PENDING", seconds=120)
    assert job.shown("Restarts") == "1"
    ask("scancel", job.id)
    assert datetime.now() < end
    assert (job.run.record()["status"], job.run.record()["error"]) == (
        "preempted",
        signals.JOB_ENDS,
    )
    assert job.run.record()["step"] > 30


@pytest.mark.slurm
@pytest.mark.parametrize("script", ["train.sh", "torchrun.sh"])
@pytest.mark.parametrize(
    "wrong",
    [
        ["training.steps=abc"],
        [
            "training.steps=90",
            "optimizer.lr=1e30",
            "training.grad_clip=null",
            "lr_schedule.warmup_steps=0",
        ],
    ],
)
def test_what_fails_is_failed_to_slurm(asked_for, tmp_path, script, wrong):
    job = Job(tmp_path, *wrong, script=script)
    job.is_in("FAILED", seconds=90)
    assert job.shown("ExitCode") == "1:0"
    assert "error: " in job.log.read_text()


@pytest.mark.slurm
@pytest.mark.parametrize("rank", [0, 1])
def test_a_task_that_is_killed_ends_the_job_and_is_named(asked_for, tmp_path, rank):
    job = Job(tmp_path, "training.steps=1000000")
    job.says("step 30 ")
    job.kill_task(rank)
    job.is_in("FAILED")
    assert f"process {rank} of 2" in job.log.read_text()
    assert job.run.status() == "cut off"


@pytest.mark.slurm
def test_cancelled_a_job_saves_and_is_not_queued_again(asked_for, tmp_path):
    job = Job(tmp_path, "training.steps=1000000")
    job.says("step 30 ")
    ask("scancel", job.id)
    job.is_in("CANCELLED")
    job.says("is saved at step")
    time.sleep(2)
    assert (job.shown("JobState"), job.shown("Restarts")) == ("CANCELLED", "0")


@pytest.mark.slurm
@pytest.mark.parametrize("script", ["train.sh", "torchrun.sh"])
def test_none_leaves_while_another_saves_to_a_slow_disk(asked_for, tmp_path, script):
    (tmp_path / "sitecustomize.py").write_text(SLOW)
    job = Job(
        tmp_path,
        "training.steps=1000000",
        script=script,
        SLURM_KILL_BAD_EXIT="1",
        PYTHONPATH=f"{ROOT}:{tmp_path}",
    )
    job.says("step 30 ", 240)
    ask("scancel", "--signal=USR1", job.id)
    job.is_in("PENDING", seconds=200)
    ask("scancel", job.id)
    job.says("is saved at step")
    assert job.run.status() == "preempted"
    assert (job.run.checkpoints / f"step_{job.run.record()['step']:08d}").is_dir()


@pytest.mark.slurm
@pytest.mark.parametrize("mpi", ["none", "pmi2"])
def test_srun_without_a_script_starts_a_group(asked_for, undisturbed, tmp_path, mpi):
    if (
        mpi
        not in ask("srun", "--mpi=list")
        + subprocess.run(["srun", "--mpi=list"], capture_output=True, text=True).stderr
    ):
        pytest.skip(f"this Slurm has no {mpi}")
    own = {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    words = [
        "srun",
        f"--mpi={mpi}",
        f"--partition={PARTITION}",
        "-n",
        "2",
        sys.executable,
        "-m",
        "ddpm.train",
        *RUN,
    ]
    words += [f"training.steps={STEPS}", f"outputs={tmp_path}"]
    done = subprocess.run(
        words, env={**os.environ, **own}, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert content(RunFolder(next(tmp_path.glob("*/*/run.json")).parent)) == undisturbed
    refused = subprocess.run(
        [*words, "-m", "seed=1,2"],
        env={**os.environ, **own},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert refused.returncode == 1
    assert "a sweep cannot run inside" in refused.stderr


class Sweep:
    """A sweep of two jobs that submitit submits to Slurm."""

    def __init__(self, folder: Path, *words: str) -> None:
        self.outputs, self.log = folder / "outputs", folder / "log"
        launcher = {
            "partition": PARTITION,
            "array_parallelism": 2,
            "cpus_per_task": 1,
            "timeout_min": 20,
        }
        own = {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "ddpm.train",
                    "-m",
                    "hydra/launcher=submitit_slurm",
                    *RUN,
                    f"outputs={self.outputs}",
                ]
                + [f"hydra.launcher.{key}={value}" for key, value in launcher.items()]
                + ["seed=0,1", *words],
                env={**os.environ, **own},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def says(self, text: str, seconds: float = 90) -> None:
        """Waits until both jobs have logged the text."""
        logs = self.outputs / ".submitit"
        until(
            lambda: sum(text in log.read_text() for log in logs.glob("*/*_log.err")) == 2,
            seconds,
            f"{text!r} is not in {logs}",
        )
        self.id = next(logs.glob("*_0")).name.partition("_")[0]

    def ends(self, seconds: float) -> tuple[int, str]:
        self.process.wait(seconds)
        return self.process.returncode, self.log.read_text()


@pytest.mark.slurm
@pytest.mark.parametrize("grace", [0, 20])
def test_jobs_of_submitit_that_are_preempted_are_queued_again_and_waited_for(
    asked_for, tmp_path, grace
):
    sweep = Sweep(tmp_path, f"training.steps={STEPS}")
    sweep.says("step 30 ")
    preempt(grace)
    until(
        lambda: ask("squeue", "-h", "-r", "-j", sweep.id, "-o", "%T").split() == ["PENDING"] * 2,
        60,
        "not queued again",
    )
    for number in (0, 1):
        ask("scontrol", "update", f"JobId={sweep.id}_{number}", "StartTime=now")
    code, said = sweep.ends(200)
    assert (code, said.count("complete")) == (0, 4), said  # one line and one row per job
    for log in sweep.outputs.glob(".submitit/*/*_log.out"):
        assert "carrying on from step" in log.read_text()


@pytest.mark.slurm
def test_a_job_of_submitit_that_is_killed_does_not_keep_the_others_from_their_end(
    asked_for, tmp_path
):
    sweep = Sweep(tmp_path, f"training.steps={STEPS}")
    sweep.says("step 10 ")
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        ours = "submitit.core._submit" in words and any(
            str(sweep.outputs) in word for word in words
        )
        if ours and "python" in words[0] and process.environ().get("SLURM_ARRAY_TASK_ID") == "0":
            process.kill()
    code, said = sweep.ends(200)
    assert code == 1
    assert f"job {sweep.id}_0: cut off (" in said
    assert f"job {sweep.id}_1: complete" in said
    table = said.splitlines()[-2:]
    assert "cut off" in table[0]
    assert "complete" in table[1]


@pytest.mark.slurm
def test_ctrl_c_leaves_the_jobs_of_submitit_and_typed_again_they_are_running_elsewhere(
    asked_for, tmp_path
):
    sweep = Sweep(tmp_path, "training.steps=1000000")
    sweep.says("step 10 ")
    sweep.process.send_signal(signal.SIGINT)
    code, said = sweep.ends(20)
    assert code == 130
    assert (
        said.splitlines()[-1]
        == f"jobs {sweep.id}_0, {sweep.id}_1 go on in Slurm; scancel {sweep.id} stops them"
    )
    try:
        code, said = Sweep(tmp_path, "training.steps=1000000").ends(100)
        assert said.count("running elsewhere") == 4, said
    finally:
        ask("scancel", sweep.id)
