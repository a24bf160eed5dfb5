"""What clusters do to a run: kills at any instant, signals, damaged files, full disks, two starts at once. It carries on, to the same bytes.

DDPM_TORTURE_KILLS=20 makes the long form; the suite runs a short one.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ddpm.runs import checkpoint

ROOT = Path(__file__).resolve().parent.parent
KILLS = int(os.environ.get("DDPM_TORTURE_KILLS", "5"))
pytestmark = pytest.mark.slow

# Starts a command in which the n-th fsync, that is some instant within writing a checkpoint, run.json or metrics.jsonl, is a kill.
DYING = """
import os, runpy, signal, sys
left, really = int(sys.argv[1]), os.fsync
def fsync(handle):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    really(handle)
os.fsync = fsync
sys.argv = ["ddpm.train", *sys.argv[2:]]
runpy.run_module("ddpm.train", run_name="__main__")
"""


@pytest.fixture(scope="module")
def settings(tiny):
    changed = [
        "training.steps=40",
        "model.dropout=0.1",
        "runtime.device_batch=3",
        "runtime.log_every=7",
        "runtime.keep_checkpoints=3",
        "runtime.sample_every=100",
    ]
    return [*(one for one in tiny if one != "training.steps=6"), *changed]


@pytest.fixture(scope="module")
def whole(ddpm, settings, tmp_path_factory):
    """The run that nothing happened to."""
    done = ddpm(
        "train",
        f"outputs={tmp_path_factory.mktemp('whole')}",
        *settings,
        "runtime.checkpoint_every=5",
    )
    assert done.code == 0, done.err
    return done.run


def start(settings, outputs, *more, program=("-m", "ddpm.train")):
    environment = {**os.environ, "HYDRA_FULL_ERROR": "0"}
    words = [
        sys.executable,
        *program,
        f"outputs={outputs}",
        *settings,
        "runtime.checkpoint_every=5",
        *more,
    ]
    return subprocess.Popen(
        words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run_of(outputs):
    return next(outputs.glob("*/*/run.json")).parent


def assert_same(run, whole):
    last = checkpoint.find(run / "checkpoints", 40)
    expected = checkpoint.find(whole / "checkpoints", 40)
    for name in ("model.safetensors", "ema.safetensors"):
        assert (last.folder / name).read_bytes() == (expected.folder / name).read_bytes()
    torch.testing.assert_close(last.state(), expected.state(), rtol=0, atol=0)
    assert (run / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert json.loads((run / "run.json").read_text())["status"] == "complete"


def test_killed_at_many_instants_a_run_ends_with_the_same_bytes_and_never_loses_a_checkpoint(
    settings, whole, tmp_path
):
    chance = random.Random(0)
    newest = 0
    for turn in range(KILLS):
        if turn % 2:
            process = start(settings, tmp_path)
            time.sleep(chance.uniform(3, 6))
            process.kill()
        else:
            process = start(settings, tmp_path, program=("-c", DYING, str(chance.randrange(2, 45))))
        process.communicate(timeout=120)
        found = (
            checkpoint.newest_whole(run_of(tmp_path) / "checkpoints")
            if list(tmp_path.glob("*/*/checkpoints"))
            else None
        )
        step = found.step if found else 0
        assert step >= newest
        newest = step
    process = start(settings, tmp_path)
    _, error = process.communicate(timeout=200)
    assert process.returncode == 0, error
    assert_same(run_of(tmp_path), whole)
    assert not list((run_of(tmp_path) / "checkpoints").glob(".*"))
    assert {file.name for file in run_of(tmp_path).glob(".*")} == {".hydra", ".lock"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_told_to_stop_it_saves_and_carries_on_to_the_same_bytes(settings, whole, tmp_path, number):
    process = start(settings, tmp_path)
    until = time.monotonic() + 60
    while not list(tmp_path.glob("*/*/checkpoints/step_*")) and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(number)
    process.communicate(timeout=100)
    run = run_of(tmp_path)
    record = json.loads((run / "run.json").read_text())
    assert (process.returncode, record["status"]) == (75, "preempted")
    assert signal.Signals(number).name in record["error"]
    assert checkpoint.newest_whole(run / "checkpoints").step == record["step"]
    process = start(settings, tmp_path)
    process.communicate(timeout=200)
    assert process.returncode == 0
    assert_same(run, whole)


@pytest.mark.parametrize("hurt", ["cut", "flipped", "gone"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(settings, whole, tmp_path, hurt):
    shutil.copytree(whole.parent, tmp_path / whole.parent.name)
    run = tmp_path / whole.parent.name / whole.name
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "status": "running"}))
    file = run / "checkpoints" / "step_00000040" / "state.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    {
        "cut": lambda: file.write_bytes(content[: len(content) // 2]),
        "flipped": lambda: file.write_bytes(content),
        "gone": file.unlink,
    }[hurt]()
    process = start(settings, tmp_path)
    out, error = process.communicate(timeout=200)
    assert process.returncode == 0, error
    assert "carrying on from step 35" in out
    assert "step_00000040: state.pt" in error
    assert_same(run, whole)


def test_a_second_start_in_the_same_folder_is_refused_and_names_the_first(settings, tmp_path):
    first = start([*settings, "training.steps=100000"], tmp_path)
    until = time.monotonic() + 60
    while not list(tmp_path.glob("*/*/run.json")) and time.monotonic() < until:
        time.sleep(0.01)
    second = start([*settings, "training.steps=100000"], tmp_path)
    _, error = second.communicate(timeout=60)
    first.kill()
    first.communicate(timeout=60)
    assert second.returncode == 1
    assert f"process {first.pid}" in error.splitlines()[-1]


def test_a_folder_that_cannot_be_written_is_one_line(settings, tmp_path):
    (tmp_path / "file").write_text("in the way")
    process = start(settings, tmp_path / "file" / "outputs")
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert [
        line for line in error.splitlines() if line.startswith("error: ")
    ] == error.splitlines()[-1:]


def test_a_gradient_that_is_not_finite_stops_before_the_weights_are_touched(settings, tmp_path):
    process = start(
        [
            *settings,
            "optimizer.lr=1e30",
            "lr_schedule=constant",
            "lr_schedule.warmup_steps=0",
            "runtime.log_every=1000",
        ],
        tmp_path,
        "runtime.checkpoint_every=1000",
    )
    _, error = process.communicate(timeout=100)
    assert process.returncode == 1
    run = run_of(tmp_path)
    kept = torch.load(next(run.glob("trouble_step_*.pt")), weights_only=True)
    assert (
        f"step {kept['update'] + 1}: " in error.splitlines()[-1]
    )  # noticed at the last step, the first bad update named
    assert kept["update"] < 39
    assert kept["images"].shape == (8, 1, 16, 16)
    assert len(kept["indices"]) == 8
    assert not list((run / "checkpoints").glob("step_*"))
