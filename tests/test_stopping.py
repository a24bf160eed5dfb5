"""A command told to stop does so in time, wherever it is, and continues when typed again.

tests/test_torture.py sends signals at random instants; here they hit rarer ones.
"""

import atexit
import json
import os
import shutil
import signal
import time
from types import SimpleNamespace

import forked
import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from ddpm.config import cli
from ddpm.evaluate import of_data
from ddpm.runs import checkpoint
from ddpm.runs.folder import RunFolder
from ddpm.system import files, signals
from ddpm.system.signals import Clock, Preempted
from ddpm.train import loop, saving

pytestmark = pytest.mark.slow


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)


def run_of(outputs):
    return RunFolder(next(outputs.glob("*/*/run.json")).parent)


def test_a_signal_is_noted_and_gives_up_what_looks_for_it_or_what_may_end_in_the_middle():
    with signals.listening():
        signal.raise_signal(signal.SIGUSR1)
        assert signals.told() == "SIGUSR1"
        with pytest.raises(Preempted, match="75"):
            signals.check()
    assert signals.told() is None
    reached = []

    def given_up():
        with signals.at_once():
            reached.append(1)
            signal.raise_signal(signal.SIGTERM)
            reached.append(2)

    with signals.listening(), pytest.raises(Preempted):
        given_up()
    assert reached == [1]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_two_ctrl_c_within_a_second_are_one_and_a_later_one_leaves_at_once(monkeypatch):
    with signals.listening():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert signals.told() == "SIGINT"
        monkeypatch.setattr(signals, "SAME_CTRL_C", 0.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_the_clock_leaves_time_for_the_longest_call_and_save(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(signals, "time", SimpleNamespace(time=lambda: now[0]))
    clock = Clock(ends=1100.0, why="end")
    clock.saved_in(10.0)
    for _ in range(13):
        assert clock.up() is None  # time is up 2 * (10 + 5) + 3 s before the end
        now[0] += 5.0
    assert now[0] == 1065.0
    assert clock.up() is None
    now[0] += 2.0
    assert clock.up() == "end"


def an_hour_passes():
    """Makes an hour pass for the clock that stops a run, once the run has looked at it 1,850 times.

    Decoding the digits takes 1,797 looks.
    """
    looks = iter(range(1_000_000))
    signals.time = SimpleNamespace(
        time=lambda: time.time() + (3600 if next(looks) >= 1850 else 0), monotonic=time.monotonic
    )


def test_max_hours_ends_a_run_that_can_be_carried_on(tiny, tmp_path):
    words = [*tiny, f"outputs={tmp_path}", f"data.cache={tmp_path / 'cache'}"]
    words += ["training.steps=100000", "runtime.max_hours=0.9"]
    process = forked.command("train", *words, before="test_stopping:an_hour_passes")
    assert process.wait() == 75, process.err
    run = run_of(tmp_path)
    record = run.record()
    assert (record["status"], record["error"]) == ("preempted", "runtime.max_hours=0.9")
    assert checkpoint.newest_whole(run.checkpoints).step == record["step"] > 0


@pytest.mark.parametrize("workers", [1, 2])
def test_told_to_stop_while_pictures_are_decoded_it_ends_and_so_do_its_workers(
    tiny, tmp_path, workers
):
    place = tmp_path / "pictures"
    place.mkdir()
    slope = np.linspace(0, 255, 3000).astype(np.uint8)
    Image.fromarray(np.tile(slope, (3000, 1))).save(place / "0.jpg", quality=95)
    for number in range(1, 140):
        os.link(place / "0.jpg", place / f"{number}.jpg")
    words = [*(one for one in tiny if one != "data=digits"), "data=folder", f"data.path={place}"]
    words += ["model=quickstart", f"outputs={tmp_path / 'outputs'}", f"runtime.workers={workers}"]
    process = forked.command("train", *words)
    until(lambda: process.out)
    if workers > 1:
        until(lambda: len(psutil.Process(process.pid).children()) >= workers)
    children = psutil.Process(process.pid).children()
    process.send(signal.SIGINT)
    assert process.wait() == 75, process.err
    assert "has saved nothing yet" in process.out
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    assert not list((tmp_path / "outputs").glob("*/*/run.json"))


def told_while_exiting():
    """Sends the process a SIGTERM while the interpreter shuts down."""
    atexit.register(signal.raise_signal, signal.SIGTERM)


@pytest.mark.parametrize(("stop", "code"), [([], 0), (["runtime.max_hours=1e-9"], 75)])
def test_a_signal_after_the_work_does_not_change_the_exit_code(tiny, tmp_path, stop, code):
    words = [*tiny, f"outputs={tmp_path}", *stop]
    process = forked.command("train", *words, before="test_stopping:told_while_exiting")
    assert process.wait() == code, process.err


def interrupted_in_a_library():
    """Presses Ctrl-C inside a library that answers with an error, as omegaconf may."""

    def from_hydra(*arguments):
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            raise AttributeError("'NoneType' object has no attribute '_invalidate_flags_cache'")

    cli.from_hydra = from_hydra


def test_an_interrupt_that_a_library_turns_into_an_error_is_still_an_interrupt(tiny, tmp_path):
    words = [*tiny, f"outputs={tmp_path}"]
    process = forked.command("train", *words, before="test_stopping:interrupted_in_a_library")
    assert process.wait() == 130
    assert process.err.splitlines()[-1] == "interrupted"


def drawn(folder):
    """Maps the name of each image in a folder to its bytes."""
    return {file.name: file.read_bytes() for file in folder.glob("[0-9]*.png")}


def test_drawing_that_was_stopped_goes_on_to_the_same_images(typed, run_folder, tmp_path):
    words = [f"run={run_folder}", "num_samples=12", "batch_size=4", "sampler.num_steps=4"]
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    told = {"before": "forked:signalled_after_five_images", "SIGNAL": str(int(signal.SIGTERM))}
    process = forked.command("sample", *words, f"to={stopped}", **told)
    assert process.wait() == 75, process.err
    assert f"images so far in {stopped}" in process.out
    assert len(drawn(stopped)) == 8
    assert not (stopped / "grid.png").exists()
    for place in (stopped, whole):
        done = typed("sample", *words, f"to={place}")
        assert done.code == 0, done.err
    assert drawn(stopped) == drawn(whole)
    assert len(drawn(whole)) == 12


def told_at_losses():
    """Makes the process tell itself to stop where the second metric begins."""
    really = of_data.losses

    def losses(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return really(*arguments)

    of_data.losses = losses


def test_measuring_that_was_stopped_goes_on_to_the_same_figures(typed, run_folder, tmp_path):
    words = [
        "evaluation.metrics=[colour,losses]",
        "evaluation.num_samples=4",
        "evaluation.num_images=4",
        "evaluation.bound_split=train",
        "sampler.num_steps=4",
    ]
    found = []
    for stops in (True, False):
        run = shutil.copytree(run_folder, tmp_path / str(stops))
        if stops:
            process = forked.command(
                "evaluate", f"run={run}", *words, before="test_stopping:told_at_losses"
            )
            assert process.wait() == 75, process.err
            kept = json.loads((run / "evaluation.json").read_text())
            assert {entry["metric"][:7] for entry in kept} == {"channel"}
            kept[0]["value"] = 123.0  # to see that it is not measured twice
            (run / "evaluation.json").write_text(json.dumps(kept))
        done = typed("evaluate", f"run={run}", *words)
        assert done.code == 0, done.err
        found.append(json.loads((run / "evaluation.json").read_text()))
    assert found[0][0].pop("value") == 123.0
    found[1][0].pop("value")
    assert found[0] == found[1]


def full_disk():
    """Makes the disk full once the process is told to stop."""
    really = checkpoint.save_file

    def save_file(tensors, file):
        if signals.told():
            raise OSError(28, "No space left on device")
        really(tensors, file)

    checkpoint.save_file = save_file


def slow_disk():
    """Slows each sync once the process is told to stop, and shortens the limits to match."""
    really, seconds = files._sync, float(os.environ["SLOW_DISK"])
    saving.SLOW, saving.LIMIT = 0.05, 3.0

    def sync(path):
        if signals.told():
            time.sleep(seconds)
        really(path)

    files._sync = sync


def stopped_with(disk, tiny, tmp_path, **environment):
    """Trains on such a disk and tells the run to stop after its first checkpoint."""
    words = [*tiny, "training.steps=100000", "runtime.checkpoint_every=3", f"outputs={tmp_path}"]
    process = forked.command(
        "train", *words, "runtime.sample_every=1000000", before=disk, **environment
    )
    until(lambda: list(tmp_path.glob("*/*/checkpoints/step_*")))
    process.send(signal.SIGTERM)
    return process, process.wait(), run_of(tmp_path)


def test_a_full_disk_while_stopping_is_one_line_and_leaves_the_last_whole_checkpoint(
    tiny, tmp_path
):
    process, code, run = stopped_with("test_stopping:full_disk", tiny, tmp_path)
    assert code == 1
    assert sum(line.startswith("error: ") for line in process.err.splitlines()) == 1
    assert "No space left on device" in process.err.splitlines()[-1]
    saved = checkpoint.newest_whole(run.checkpoints)
    assert run.record()["step"] == saved.step > 0
    assert not list(run.checkpoints.glob(".*"))


@pytest.mark.parametrize(("seconds", "ends"), [("0.05", 75), ("60", 1)])
def test_the_wait_for_a_slow_disk_is_announced_and_bounded(tiny, tmp_path, seconds, ends):
    process, code, run = stopped_with("test_stopping:slow_disk", tiny, tmp_path, SLOW_DISK=seconds)
    assert code == ends, process.err
    assert "still writing the checkpoint" in process.err
    saved = checkpoint.newest_whole(run.checkpoints)
    if ends == 1:
        assert "has not finished the checkpoint" in process.err.splitlines()[-1]
        assert saved.step > 0
    else:
        assert run.record()["step"] == saved.step


def test_a_disk_too_small_for_the_checkpoints_is_said_before_the_first_step(
    monkeypatch, caplog, tmp_path
):
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda path: SimpleNamespace(free=5e9))
    run = RunFolder(tmp_path)
    # 4 checkpoints of 16 bytes per parameter: 3.2 GB
    saving.look_at_disk(run, keep=3, parameters=50_000_000)
    assert not caplog.records
    saving.look_at_disk(run, keep=3, parameters=100_000_000)
    assert "runtime.keep_checkpoints" in caplog.text
    assert "5.0 GB free" in caplog.text


def test_the_first_step_of_a_start_is_given_up_in_the_middle():
    """The first step may spend minutes compiling."""
    accelerator = SimpleNamespace(num_processes=1, process_index=0)

    def prepare():
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("went on")

    state = SimpleNamespace(
        accelerator=accelerator,
        model=torch.nn.Linear(1, 1),
        step=0,
        optimizer=SimpleNamespace(param_groups=[{"params": []}]),
    )
    batches = SimpleNamespace(size=lambda step: prepare())
    updates = loop.updates(state, None, batches, lambda step: 0.0, 0, 10, None, None)
    with signals.listening(), pytest.raises(Preempted):
        next(updates)
