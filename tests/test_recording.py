import json

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ddpm.recording import Recorder


def record(folder, first_step, *steps):
    recorder = Recorder(folder, first_step)
    for step in steps:
        recorder.scalars(step, {"train/loss": 1 / step})
    recorder.close()


def written(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def shown(folder):
    board = EventAccumulator(str(folder)).Reload()
    return [scalar.step for scalar in board.Scalars("train/loss")]


def test_records_past_the_step_that_a_run_resumes_from_are_dropped(tmp_path):
    record(tmp_path, 0, 2, 4, 6)
    record(tmp_path, 4, 6, 8)
    assert written(tmp_path) == shown(tmp_path) == [2, 4, 6, 8]


def test_a_run_that_starts_over_shows_nothing_twice(tmp_path):
    record(tmp_path, 0, 2, 4)
    record(tmp_path, 0, 2, 4, 6)
    assert written(tmp_path) == shown(tmp_path) == [2, 4, 6]


def test_a_line_that_a_crash_cut_short_is_dropped(tmp_path):
    record(tmp_path, 0, 2, 4)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "train/l')
    record(tmp_path, 5, 6)
    assert written(tmp_path) == [2, 4, 6]


def test_values_come_back_from_both_files(tmp_path):
    recorder = Recorder(tmp_path, 0)
    recorder.scalars(3, {"train/loss": 0.25, "train/lr": 1e-4})
    recorder.speed(3, {"train/images_per_second": 100.0})
    recorder.picture(3, "samples", np.zeros((4, 6, 3), dtype=np.uint8))
    recorder.text("config", "seed: 0")
    recorder.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 3, "train/loss": 0.25, "train/lr": 1e-4}
    board = EventAccumulator(str(tmp_path)).Reload()
    shown = {tag: board.Scalars(tag)[0].value for tag in board.Tags()["scalars"]}
    assert shown == pytest.approx({"train/loss": 0.25, "train/lr": 1e-4, "train/images_per_second": 100.0})
    assert (board.Images("samples")[0].height, board.Images("samples")[0].width) == (4, 6)
    assert any(tag.startswith("config") for tag in board.Tags()["tensors"])
