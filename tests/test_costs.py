"""A run's costs, its expected end, and the profiler traces that it writes."""

import gzip
import json
import shutil
from datetime import UTC, datetime

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ddpm import run
from ddpm.config.schema import read_config
from ddpm.data.batches import Batches
from ddpm.plan.sizes import sizes
from ddpm.runs.folder import RunFolder
from ddpm.train.loop import is_due
from ddpm.train.progress import in_words, seconds_left, times_due

CPU = torch.device("cpu")


def lines(path):
    return [json.loads(line) for line in (path / "costs.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def settings(tiny):
    return [*tiny, "runtime.log_every=2", "runtime.checkpoint_every=4", "runtime.device=cpu"]


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    """A run of 6 steps. Only read or copy it."""
    return run([*settings, f"outputs={tmp_path_factory.mktemp('outputs')}"])


def test_costs_are_those_of_the_images_and_of_the_network(whole):
    found = lines(whole.path)
    assert [(line["step"], line["images"]) for line in found] == [(2, 16), (4, 32), (6, 48)]
    flops = 3 * sizes(whole.config([]), CPU).forward_flops
    assert [line["flops"] for line in found] == [16 * flops, 32 * flops, 48 * flops]
    for line in found:
        assert 0 <= line["seconds_waiting"] <= line["seconds_in_steps"] <= line["seconds"]
        assert line["device_seconds"] == line["seconds"]  # one device
        assert line["share_of_peak"] > 0
        assert line["peak_memory_bytes"] > 0
    board = EventAccumulator(str(whole.path)).Reload()
    for name in found[0].keys() - {"step"}:
        shown = [(one.step, one.value) for one in board.Scalars(f"cost/{name}")]
        assert shown == [(line["step"], pytest.approx(line[name])) for line in found]


def test_costs_survive_a_resume_and_count_no_step_twice(whole, settings, tmp_path):
    folder = tmp_path / whole.path.parent.name / whole.path.name
    shutil.copytree(whole.path, folder)
    shutil.rmtree(folder / "checkpoints" / "step_00000006")
    cut = RunFolder(folder)
    timed = {**cut.record()["timed"], "seconds": 1000.0, "seconds_in_steps": 900.0}
    timed |= {"device_seconds": 4000.0}  # as if on four devices before the cut
    timed |= {"seconds_waiting": 50.0, "images": 32, "images_trained": 32}
    cut.update(status="running", step=4, timed=timed)
    before = lines(folder)
    run([*settings, f"outputs={tmp_path}"])
    after = lines(folder)
    assert after[:2] == before[:2]
    assert (after[2]["step"], after[2]["images"]) == (6, 48)
    assert after[2]["flops"] == before[2]["flops"]
    for name, least in (
        *(("seconds", 1000), ("device_seconds", 4000)),
        *(("seconds_in_steps", 900), ("seconds_waiting", 50)),
    ):
        assert least < after[2][name] < least + 100
    assert (folder / "metrics.jsonl").read_bytes() == (whole.path / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("drop_last", [True, False])
def test_the_images_before_a_step_are_those_of_all_batches_before(drop_last):
    images = np.zeros((10, 1, 2, 2), dtype=np.uint8)
    batches = Batches(images, 4, 0, CPU, drop_last, flip=False)
    for step in range(9):
        assert batches.images_before(step) == sum(batches.size(before) for before in range(step))


def test_a_trace_has_the_steps_that_were_asked_for_and_the_run_is_the_same(
    whole, settings, tmp_path
):
    traced = run([*settings, f"outputs={tmp_path}", "runtime.profile=[2,3]"])
    (file,) = (traced.path / "profile").iterdir()
    with gzip.open(file) as content:
        events = json.load(content)["traceEvents"]
    names = {event["name"] for event in events if "name" in event}
    assert {"step 2", "step 3"} <= names
    assert not names & {"step 1", "step 4"}
    assert any("conv" in name for name in names)
    assert traced.path.name == whole.path.name
    for name in ("model.safetensors", "ema.safetensors"):
        last = [one.checkpoints / "step_00000006" / name for one in (traced, whole)]
        assert last[0].read_bytes() == last[1].read_bytes()


def test_a_trace_that_ends_before_it_begins_is_refused(complaint):
    assert "runtime.profile=[3, 2]" in complaint("runtime.profile=[3,2]")
    assert "runtime.profile" in complaint("runtime.profile=[0,2]")


def test_a_run_of_before_has_no_trace(whole):
    plain = {key: value for key, value in whole.plain().items() if key != "format"}
    del plain["runtime"]["profile"]
    assert read_config(plain).runtime.profile is None


def test_what_is_still_due_is_what_the_loop_will_do():
    for last in (1, 7, 12):
        for first in range(1, last + 1):
            for saves, measures in ((3, 4), (4, 2), (100, None)):
                expected = sum(
                    is_due(step, saves, last) or is_due(step, measures, last)
                    for step in range(first, last + 1)
                )
                assert times_due(first, last, saves, measures) == expected
    assert times_due(1, 10, None) == 0


def test_the_time_left_has_previews_evaluations_and_checkpoints():
    due = {"checkpoint": 2, "preview": 3, "evaluation": 1}
    each = {"checkpoint": 5.0, "preview": 10.0, "evaluation": 60.0}
    assert seconds_left(40, 100, 0.5, due, each) == 30 + 10 + 30 + 60


def test_the_end_is_told_with_its_day_where_that_is_another():
    now = datetime(2026, 3, 31, 22, 30)
    assert in_words(125.2, now) == "2:05 left, ends 22:32"
    assert in_words(2 * 3600 + 61, now) == "2:01:01 left, ends 2026-04-01 00:31"


def test_a_run_says_when_it_ends_while_it_runs_and_not_after(settings, tmp_path, monkeypatch):
    said = []
    really = RunFolder.update

    def update(self, **values):
        really(self, **values)
        said.append(self.record()["expected_end"])

    monkeypatch.setattr(RunFolder, "update", update)
    began = datetime.now(UTC)
    done = run([*settings, f"outputs={tmp_path}", "runtime.log_every=1", "training.steps=12"])
    ends = [datetime.fromisoformat(end) for end in said if end is not None]
    assert len(ends) >= 2
    assert all((end - began).total_seconds() > -1 for end in ends)
    assert said[0] is None
    assert done.record()["expected_end"] is None
    reports = (done.path / "metrics.jsonl").read_text().splitlines()
    logged = [line for line in (done.path / "train.log").read_text().splitlines() if "loss" in line]
    assert len(reports) == 12
    assert 1 <= len(logged) < 12  # after the first lines, one line per minute
