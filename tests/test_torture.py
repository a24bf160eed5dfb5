"""Whatever a cluster does to a run, it carries on to the same bytes.

The tests kill and signal it at any instant, damage its files, fill and slow its disk, and start it
twice at once. The suite runs a short form; DDPM_TORTURE_KILLS=20 selects a long one, with up to 40
signals.
"""

import json
import os
import random
import shutil
import signal
import time

import forked
import pytest
import torch

from ddpm.runs import checkpoint

KILLS = int(os.environ.get("DDPM_TORTURE_KILLS", "2"))
LAST = 12
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def settings(tiny):
    changed = [
        f"training.steps={LAST}",
        "model.dropout=0.1",
        "lr_schedule.warmup_steps=3",
        "sampler.num_steps=6",
        "evaluation.metrics=[colour,losses]",
        "evaluation.num_samples=4",
        "evaluation.num_images=4",
        "evaluation.batch_size=4",
        "runtime.device_batch=3",
        "runtime.log_every=2",
        "runtime.sample_every=4",
        "runtime.evaluate_every=6",
        "runtime.checkpoint_every=5",
        "runtime.keep_checkpoints=3",
    ]
    # starts without a cache, and may be killed while it writes one
    changed.append("data.cache=${outputs}/cache")
    return [
        *(one for one in tiny if not one.startswith(("training.steps=", "data.cache="))),
        *changed,
    ]


@pytest.fixture(scope="module")
def whole(ddpm, settings, tmp_path_factory):
    """The undisturbed run, in one process or several."""
    kept = {}

    def call(processes=1):
        if processes not in kept:
            outputs = f"outputs={tmp_path_factory.mktemp('whole')}"
            done = ddpm("train", outputs, *settings, processes=processes)
            assert done.code == 0, done.err
            kept[processes] = done.run
        return kept[processes]

    return call


def start(settings, outputs, *more, processes=1, before=None):
    """Starts all processes of a run."""
    words = (f"outputs={outputs}", *settings, *more)
    if processes > 1:
        return forked.group("train", *words, processes=processes)
    return [forked.command("train", *words, before=before)]


def run_of(outputs):
    return next(outputs.glob("*/*/run.json")).parent


def of_run(run):
    """Everything a run produces, byte for byte: pictures, figures, records, weights."""
    last = checkpoint.find(run / "checkpoints", LAST).folder
    files = [run / "metrics.jsonl", run / "evaluation.json"]
    files += [last / "model.safetensors", last / "ema.safetensors"]
    files += [*run.glob("samples/*"), *run.glob("evaluation/*")]
    return {str(file.relative_to(run)): file.read_bytes() for file in files if file.is_file()}


def assert_same(run, whole):
    found, expected = of_run(run), of_run(whole)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []
    torch.testing.assert_close(
        checkpoint.find(run / "checkpoints", LAST).state(),
        checkpoint.find(whole / "checkpoints", LAST).state(),
        rtol=0,
        atol=0,
    )
    assert json.loads((run / "run.json").read_text())["status"] == "complete"


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)


def dying():
    """Kills the process at fsync number DYING (from 0), in the middle of writing a file."""
    left, really = int(os.environ["DYING"]), os.fsync

    def fsync(handle):
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        really(handle)

    os.fsync = fsync


def test_killed_at_many_instants_it_ends_with_the_same_bytes_and_never_loses_a_checkpoint(
    settings, whole, tmp_path
):
    chance = random.Random(0)
    newest = 0
    for turn in range(KILLS):
        words = (f"outputs={tmp_path}", *settings)
        if turn % 2:
            process = forked.command("train", *words)
            until(lambda process=process: process.out)
            time.sleep(chance.uniform(0, 1.5))
            process.send(signal.SIGKILL)
        else:
            dies = str(chance.randrange(2, 60))
            process = forked.command("train", *words, before="test_torture:dying", DYING=dies)
        process.wait()
        there = list(tmp_path.glob("*/*/checkpoints"))
        found = checkpoint.newest_whole(there[0]) if there else None
        step = found.step if found else 0
        assert step >= newest
        newest = step
    (process,) = start(settings, tmp_path)
    assert process.wait() == 0, process.err
    assert_same(run_of(tmp_path), whole())
    assert not list((run_of(tmp_path) / "checkpoints").glob(".*"))
    hidden = {file.name for file in run_of(tmp_path).glob(".*")}
    assert hidden == {".hydra", ".lock", ".evaluation.json.lock"}


@pytest.mark.parametrize("processes", [1, 2])
def test_told_to_stop_at_many_instants_it_ends_with_the_same_bytes(
    settings, whole, tmp_path, processes
):
    chance = random.Random(processes)
    signals = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
    outputs = tmp_path / "0"
    codes = []
    for turn in range(2 * KILLS if processes == 1 else KILLS):
        number, late = signals[turn % 3], chance.uniform(-0.3, 1.5)
        started = start(settings, outputs, processes=processes)
        leading, told = started[0], started[chance.randrange(processes)]
        early = late < 0 and processes == 1
        until(lambda c=leading, early=early: (c.begun if early else c.out) or not c.runs)
        time.sleep(abs(late))
        printed = leading.out
        told.send(number)
        ends = [one.wait() for one in started]
        codes.append(ends[0])
        errors = [one.err for one in started]
        assert len(set(ends)) == 1, errors
        run = run_of(outputs) if list(outputs.glob("*/*/run.json")) else None
        record = json.loads((run / "run.json").read_text()) if run else {}
        if ends[0] == 0:
            assert record["status"] == "complete"
            assert_same(run, whole(processes))
            outputs = tmp_path / str(turn + 1)
        elif ends[0] == 75:
            assert "the same command" in leading.out
            assert record.get("status", "preempted") == "preempted"
            saved = checkpoint.newest_whole(run / "checkpoints") if run else None
            assert (saved.step if saved else 0) == record.get("step", 0)
        else:
            assert not printed.startswith("run "), errors
            assert ends[0] in (-number, 130), errors
    assert 75 in codes
    started = start(settings, outputs, processes=processes)
    assert [one.wait() for one in started] == [0] * processes, [one.err for one in started]
    assert_same(run_of(outputs), whole(processes))


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(settings, whole, tmp_path):
    shutil.copytree(whole().parent, tmp_path / whole().parent.name)
    run = tmp_path / whole().parent.name / whole().name
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "status": "running"}))
    file = run / "checkpoints" / f"step_{LAST:08d}" / "state.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    (process,) = start(settings, tmp_path)
    assert process.wait() == 0, process.err
    assert "carrying on from step 10" in process.out
    assert f"step_{LAST:08d}: state.pt" in process.err
    assert_same(run, whole())


def test_a_second_start_in_the_same_folder_is_refused_and_names_the_first(settings, tmp_path):
    more = ("training.steps=100000", "runtime.sample_every=1000000", "runtime.evaluate_every=null")
    (first,) = start(settings, tmp_path, *more)
    until(lambda: list(tmp_path.glob("*/*/run.json")))
    (second,) = start(settings, tmp_path, *more)
    assert second.wait() == 1
    first.send(signal.SIGKILL)
    first.wait()
    assert f"process {first.pid}" in second.err.splitlines()[-1]


def test_a_folder_that_cannot_be_written_is_one_line(settings, tmp_path):
    (tmp_path / "file").write_text("in the way")
    (process,) = start(settings, tmp_path / "file" / "outputs")
    assert process.wait() == 1
    lines = process.err.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]


def test_a_gradient_that_is_not_finite_stops_before_the_weights_are_touched(settings, tmp_path):
    (process,) = start(
        settings,
        tmp_path,
        "optimizer.lr=1e30",
        "lr_schedule=constant",
        "lr_schedule.warmup_steps=0",
        "runtime.log_every=1000",
        "runtime.sample_every=1000",
        "runtime.evaluate_every=null",
        "runtime.checkpoint_every=1000",
    )
    assert process.wait() == 1
    run = run_of(tmp_path)
    kept = torch.load(next(run.glob("trouble_step_*.pt")), weights_only=True)
    # noticed at the last step, but the message names the first bad update
    assert f"step {kept['update'] + 1}: " in process.err.splitlines()[-1]
    assert kept["update"] < LAST - 1
    assert kept["images"].shape == (8, 1, 16, 16)
    assert len(kept["indices"]) == 8
    assert not list((run / "checkpoints").glob("step_*"))
