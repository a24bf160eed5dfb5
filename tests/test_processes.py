"""Several processes (gloo) train the same run as one process.

If one dies or is told to stop, the others stop, too, and nothing is lost.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import forked
import psutil
import pytest
import torch

from ddpm.runs import checkpoint
from ddpm.runs.folder import RunFolder
from ddpm.system import processes
from ddpm.train import start

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def settings(tiny):
    return [
        *(one for one in tiny if one != "training.steps=6"),
        "training.steps=30",
        "training.batch_size=7",
        "model.dropout=0.3",
        "runtime.log_every=4",
        "runtime.checkpoint_every=5",
        "runtime.keep_checkpoints=9",
    ]


@pytest.fixture(scope="module")
def trained(ddpm, settings, tmp_path_factory):
    """Trains with a number of processes, once per combination of settings."""
    kept = {}

    def call(number, *more):
        if (number, more) not in kept:
            done = ddpm(
                "train",
                f"outputs={tmp_path_factory.mktemp('outputs')}",
                *settings,
                *more,
                processes=number,
            )
            assert done.code == 0, done.err
            kept[number, more] = done.run
        return kept[number, more]

    return call


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run, kind):
    return checkpoint.find(run / "checkpoints").weights(kind)


def assert_nearly_same(run, expected):
    found = metrics(run)
    assert [record["train/lr"] for record in found] == [
        record["train/lr"] for record in metrics(expected)
    ]
    for record, other in zip(found, metrics(expected), strict=True):
        assert record["train/loss"] == pytest.approx(other["train/loss"], rel=1e-6)
    for kind in ("raw", "ema"):
        torch.testing.assert_close(weights(run, kind), weights(expected, kind), rtol=0, atol=1e-5)


def assert_same(run, expected):
    assert (run / "metrics.jsonl").read_bytes() == (expected / "metrics.jsonl").read_bytes()
    for name in ("model.safetensors", "ema.safetensors"):
        files = (
            checkpoint.find(folder / "checkpoints").folder / name for folder in (run, expected)
        )
        assert len({file.read_bytes() for file in files}) == 1


@pytest.mark.parametrize(
    ("number", "parts"), [(1, ["runtime.device_batch=2"]), (2, ["runtime.device_batch=2"]), (2, [])]
)
def test_the_global_batch_cut_up_gives_the_same_losses_and_learning_rates(trained, number, parts):
    assert_nearly_same(trained(number, *parts), trained(1))


@pytest.mark.parametrize(("first", "then"), [(1, 2), (2, 1)])
def test_a_run_carries_on_with_another_number_of_processes(
    trained, ddpm, settings, tmp_path, first, then
):
    whole = trained(first)
    run = (
        shutil.copytree(whole.parent.parent, tmp_path / "outputs") / whole.parent.name / whole.name
    )
    for step in (15, 20, 25, 30):
        shutil.rmtree(run / "checkpoints" / f"step_{step:08d}")
    (run / "run.json").write_text((run / "run.json").read_text().replace('"complete"', '"running"'))
    done = ddpm("train", f"outputs={tmp_path / 'outputs'}", *settings, processes=then)
    assert done.code == 0, done.err
    assert "carrying on from step 10" in done.out
    assert_nearly_same(run, whole)


def until_checkpoint(outputs):
    """Waits for the first checkpoint and returns the run's folder."""
    until = time.monotonic() + 100
    while not list(outputs.glob("*/*/checkpoints/step_*")) and time.monotonic() < until:
        time.sleep(0.01)
    return next(outputs.glob("*/*/run.json")).parent


@pytest.mark.parametrize(("number", "dies"), [(2, 0), (3, 1)])
def test_when_one_dies_the_others_end_naming_it_and_the_same_command_carries_on(
    ddpm, settings, trained, tmp_path, number, dies
):
    started = forked.group("train", f"outputs={tmp_path}", *settings, processes=number)
    run = until_checkpoint(tmp_path)
    started[dies].send(signal.SIGKILL)
    codes = [one.wait(100) for one in started]
    assert codes == [-signal.SIGKILL if rank == dies else 1 for rank in range(number)]
    for rank, one in enumerate(started):
        if rank != dies:
            # torch may print its own messages about the lost connection before and after
            lines = [line for line in one.err.splitlines() if line.startswith("error: ")]
            assert len(lines) == 1, one.err
            assert f"process {dies} of {number}" in lines[0]
    assert RunFolder(run).status() == "cut off"
    if dies:
        assert f"process {dies} of {number}" in RunFolder(run).record()["error"]
    assert checkpoint.newest_whole(run / "checkpoints").step < 30
    done = ddpm("train", f"outputs={tmp_path}", *settings, processes=2)
    assert done.code == 0, done.err
    assert_nearly_same(run, trained(2))


def test_under_torchrun_a_signal_stops_all_after_the_same_step(ddpm, settings, trained, tmp_path):
    """Each process exits with 75, torchrun itself with 1."""
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    agent = subprocess.Popen(
        [sys.executable, *words, "-m", "ddpm.train", f"outputs={tmp_path}", *settings],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    run = until_checkpoint(tmp_path)
    second = next(
        process
        for process in psutil.Process(agent.pid).children()
        if process.environ().get("RANK") == "1"
    )
    os.kill(second.pid, signal.SIGUSR1)
    printed, _ = agent.communicate(timeout=100)
    record = json.loads((run / "run.json").read_text())
    assert record["status"] == "preempted"
    assert agent.returncode == 1
    assert re.findall(r"exitcode *: (\d+)", printed)[-1:] == ["75"]
    assert checkpoint.newest_whole(run / "checkpoints").step == record["step"] < 30
    done = ddpm("train", f"outputs={tmp_path}", *settings, processes=2)
    assert done.code == 0, done.err
    assert_same(run, trained(2))


def told_while_it_prepares():
    """Sends process number $TOLD a SIGTERM before the network is built, long before step 1."""
    really = start.state_of

    def state_of(*arguments):
        if os.environ["RANK"] == os.environ["TOLD"]:
            os.kill(os.getpid(), signal.SIGTERM)
        return really(*arguments)

    start.state_of = state_of


@pytest.mark.parametrize("told", ["0", "1"])
def test_told_while_it_prepares_one_process_does_not_leave_the_others_waiting(
    settings, tmp_path, told
):
    started = forked.group(
        "train",
        f"outputs={tmp_path}",
        *settings,
        "runtime.device_batch=4",  # auto would ask all processes while it searches
        processes=2,
        before="test_processes:told_while_it_prepares",
        TOLD=told,
    )
    assert [one.wait(60) for one in started] == [75, 75]
    run = next(tmp_path.glob("*/*/run.json")).parent
    record = RunFolder(run).record()
    assert record["status"] == "preempted"
    assert checkpoint.newest_whole(run / "checkpoints").step == record["step"] == 1


def test_processes_that_do_not_find_each_other_are_refused(monkeypatch):
    monkeypatch.setattr(
        processes, "PartialState", lambda cpu: SimpleNamespace(num_processes=1, process_index=0)
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE=2"):
        processes.find_processes("cpu")
