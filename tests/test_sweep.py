"""A sweep runs every job whatever becomes of the others, and trains nothing twice.

It leaves nothing behind in the process, and each job has a device of its own.
"""

import gc
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import forked
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState

from ddpm.config.cli import command
from ddpm.runs import checkpoint
from ddpm.runs.folder import RunFolder
from ddpm.system import signals

ROOT = Path(__file__).resolve().parent.parent

# Each job of this command writes down its device, then waits until two jobs have done so.
# The third job fails. The command needs no torch.
ASKING = """
import os, sys, time
from pathlib import Path
from ddpm.config.cli import command
def task(composed):
    said = Path(composed.cfg.outputs) / f"device_{composed.cfg.seed}"
    said.write_text(os.environ["CUDA_VISIBLE_DEVICES"])
    until = time.monotonic() + 60
    while len(list(said.parent.glob("device_*"))) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    if composed.cfg.seed == 2:
        raise ValueError("seed=2 is not wanted")
command("train", task, "Ask.", [], config_name="config")()
"""


def runs_of(outputs):
    """Maps each seed to its run's folder."""
    return {
        yaml.safe_load((file.parent / "config.yaml").read_text())["seed"]: file.parent
        for file in outputs.glob("*/*/run.json")
    }


def state(folder):
    return {file: file.stat().st_mtime_ns for file in folder.rglob("*")}


def dying_after_three_checkpoints():
    """Kills the command right after its third checkpoint."""
    left, save = 3, checkpoint.save

    def dying(*arguments):
        nonlocal left
        save(*arguments)
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.save = dying


@pytest.mark.slow
def test_killed_in_the_second_of_three_jobs_a_sweep_typed_again_does_what_is_missing_and_no_more(
    typed, tiny, tmp_path
):
    three = ["-m", *tiny, "runtime.checkpoint_every=3", "runtime.log_every=2", "seed=0,1,2"]
    words = [*three, f"outputs={tmp_path / 'cut'}"]
    killed = forked.command("train", *words, before="test_sweep:dying_after_three_checkpoints")
    assert killed.wait() == -signal.SIGKILL, killed.err
    runs = runs_of(tmp_path / "cut")
    assert runs.keys() == {0, 1}
    first = state(runs[0])

    again = typed("train", *three, f"outputs={tmp_path / 'cut'}")

    assert again.code == 0, again.err
    assert state(runs[0]) == first
    assert again.out.count("carrying on from step 3") == 1
    runs = runs_of(tmp_path / "cut")
    assert {
        seed: json.loads((run / "run.json").read_text())["status"] for seed, run in runs.items()
    } == dict.fromkeys(range(3), "complete")
    whole = typed(
        "train",
        *tiny,
        "runtime.checkpoint_every=3",
        "runtime.log_every=2",
        "seed=1",
        f"outputs={tmp_path / 'whole'}",
    ).run
    for name in ("model.safetensors", "ema.safetensors"):
        ours, expected = (
            checkpoint.find(run / "checkpoints", 6).folder / name for run in (runs[1], whole)
        )
        assert ours.read_bytes() == expected.read_bytes()
    assert (runs[1] / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_a_job_that_fails_stops_no_other_and_the_table_tells_of_all(typed, tiny, tmp_path):
    done = typed(
        "train", "-m", *tiny, f"outputs={tmp_path}", "seed=0,1", "training.batch_size=5000,8"
    )
    assert done.code == 1
    assert done.err.count("error: training.batch_size=5000") == 2
    runs = {str(file.parent) for file in tmp_path.glob("*/*/run.json")}
    head, *rows = done.out.split("\n\n")[-1].splitlines()
    assert head.split()[:3] == ["job", "what", "differs"]
    assert [("failed" in row, "complete" in row) for row in rows] == [
        (True, False),
        (True, False),
        (False, True),
        (False, True),
    ]
    assert {row.split()[-1] for row in rows[2:]} == runs
    assert "training.batch_size=8 seed=1" in rows[3]
    assert "training.steps" not in rows[3].replace(rows[3].split()[-1], "")


def test_nothing_leaks_from_one_job_of_a_sweep_to_the_next(typed, tiny, tmp_path):
    """The jobs differ in network and in precision, which Accelerate stores per process."""

    def kept():
        gc.collect()
        tensors = sum(
            one.numel() for one in gc.get_objects() if issubclass(type(one), torch.Tensor)
        )
        handlers = [
            signal.getsignal(number)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
        ]
        states = [dict(AcceleratorState._shared_state), dict(GradientState._shared_state)]
        return (
            tensors,
            handlers,
            states,
            threading.active_count(),
            list(logging.getLogger("ddpm").handlers),
            torch.get_default_dtype(),
        )

    # loads what stays in memory after its first use
    typed("train", *tiny, f"outputs={tmp_path}", "seed=7")
    before = kept()
    sweep = [
        "training.precision=fp32,bf16",
        "model=quickstart,improved_unet32",
        "model.resolution=16",
    ]
    done = typed("train", "-m", *tiny, f"outputs={tmp_path}", *sweep)
    assert done.code == 0, done.err
    assert len(list(tmp_path.glob("*/*/run.json"))) == 5
    assert kept() == before


@pytest.mark.parametrize(
    "asked",
    [["-m", "seed=0,1"], ["--multirun", "seed=0,1"], ["hydra.mode=MULTIRUN", "seed=0,1"]],
    ids=lambda asked: asked[0],
)
def test_no_sweep_starts_inside_a_process_group(complaint, monkeypatch, asked):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "torchrun" in complaint(*asked)


@pytest.mark.slow
def test_jobs_at_once_have_a_device_each_and_how_they_end_is_known(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    words = [
        sys.executable,
        "-c",
        ASKING,
        "-m",
        "seed=0,1,2",
        f"outputs={tmp_path}",
        "hydra/launcher=joblib",
    ]
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "3,GPU-b",
        "HYDRA_FULL_ERROR": "0",
        "TMPDIR": str(tmp_path),
    }
    done = subprocess.run(
        words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
    )
    devices = [(tmp_path / f"device_{seed}").read_text() for seed in range(3)]
    assert set(devices[:2]) == {"3", "GPU-b"}
    assert devices[2] in devices[:2]
    assert done.returncode == 1, done.stderr
    assert [row.split()[-1] for row in done.stdout.splitlines()[-3:]] == ["done", "done", "failed"]


def test_a_run_that_another_process_trains_is_called_so_and_the_others_go_on(typed, tiny, tmp_path):
    words = [*tiny, f"outputs={tmp_path}"]
    folder = RunFolder(typed("train", *words, "seed=0").run)
    (folder.path / "run.json").unlink()
    with folder.lock():
        done = typed("train", "-m", *words, "seed=0,1")
    assert done.code == 75
    assert done.err.count("error: ") == done.err.count(f"process {os.getpid()}") == 1
    rows = done.out.splitlines()[-2:]
    assert ["running elsewhere" in row for row in rows] == [True, False]
    assert "complete" in rows[1]


@pytest.mark.parametrize("more", [[], ["hydra/launcher=joblib", "hydra.launcher.n_jobs=1"]])
def test_a_sweep_of_one_job_at_a_time_stops_with_its_table(more, tmp_path, monkeypatch, capsys):
    if more:
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher")

    def task(composed):
        if composed.cfg.seed == 1:
            signal.raise_signal(signal.SIGTERM)
        signals.check()

    words = ["ddpm", "-m", "seed=0,1,2,3", f"outputs={tmp_path}", *more]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    with pytest.raises(SystemExit) as stopped:
        command("train", task, "Stop.", [], config_name="config", heeds=True)()
    assert stopped.value.code == 75
    rows = [row.split(maxsplit=2)[2] for row in capsys.readouterr().out.splitlines()[-4:]]
    assert rows == ["done", "preempted", "not started", "not started"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_launcher_that_is_not_there_is_named_with_those_that_are(complaint):
    assert "there are basic" in complaint("-m", "hydra/launcher=nope", "seed=0,1")


def test_a_signal_is_handed_on_to_who_held_it_once_the_run_has_let_go():
    came = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: came.append(number))
    try:
        with signals.listening():
            signal.raise_signal(signal.SIGUSR2)
            assert signals.told() == "SIGUSR2"
            assert came == []
        assert came == [signal.SIGUSR2]
    finally:
        signal.signal(signal.SIGUSR2, before)
