import json
import shutil

import numpy as np
import pytest
from google.protobuf import json_format
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups, metadata
from tensorboard.summary.writer import event_file_writer

from ddpm.config.compose import compose
from ddpm.config.schema import training_config
from ddpm.runs import results
from ddpm.runs.folder import RunFolder
from ddpm.runs.identity import hparams
from ddpm.runs.recording import PICTURES, SIDE, Recorder, conclude, shows_picture


@pytest.fixture(autouse=True)
def first_files(monkeypatch):
    """Restarts the file counter; TensorBoard sorts files of one second by name, 10 before 9."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


def record(folder, first_step, *steps):
    recorder = Recorder(folder, first_step)
    for step in steps:
        recorder.scalars(step, {"train/loss": 1 / step})
    recorder.close()


def written(folder):
    return [
        json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


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


@pytest.mark.parametrize(
    "damage",
    [
        b'{"step": 4, "train/lo{"step": 4, "train/loss": 0.25}',
        b'{"train/loss": 0.25}',
        b'{"step": 4, "train/loss": "low"}',
        b"[4]",
        b'{"step": 4, "\xff": 0}',
        b"\0\0\0",
    ],
)
def test_a_damaged_line_is_left_out_and_said_and_no_other_is_lost(tmp_path, damage, caplog):
    record(tmp_path, 0, 2, 4, 6, 8)
    file = tmp_path / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([lines[0], damage + b"\n", *lines[2:]]))
    assert results.loss_curve(tmp_path) == [(2, 1 / 2), (6, 1 / 6), (8, 1 / 8)]
    record(tmp_path, 6, 8)
    assert file.read_bytes() == b"".join([lines[0], *lines[2:]])
    assert [line.getMessage().count(f"{file}, line 2") for line in caplog.records] == [1]


def test_training_carries_on_over_a_damaged_line_and_says_where_it_was(typed, tiny, tmp_path):
    command = [*tiny, f"outputs={tmp_path}", "runtime.log_every=1", "runtime.checkpoint_every=4"]
    run = typed("train", *command).run
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([lines[0], lines[1][:9] + lines[1], *lines[2:5]]))
    shutil.rmtree(run / "checkpoints" / "step_00000006")
    (run / "run.json").write_text((run / "run.json").read_text().replace('"complete"', '"running"'))
    done = typed("train", *command)
    assert done.code == 0, done.err
    assert "carrying on from step 4" in done.out
    assert f"{file}, line 2: damaged" in done.err
    assert file.read_text() == "".join([lines[0], *lines[2:]])


def test_values_come_back_from_both_files(tmp_path):
    recorder = Recorder(tmp_path, 0)
    recorder.scalars(3, {"train/loss": 0.25, "train/lr": 1e-4})
    recorder.speed(3, {"train/images_per_second": 100.0})
    recorder.picture(3, "samples", np.zeros((4, 6, 3), dtype=np.uint8))
    recorder.text("config", "seed: 0")
    recorder.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "step": 3,
        "train/loss": 0.25,
        "train/lr": 1e-4,
    }
    board = EventAccumulator(str(tmp_path)).Reload()
    shown = {tag: board.Scalars(tag)[0].value for tag in board.Tags()["scalars"]}
    assert shown == pytest.approx(
        {"train/loss": 0.25, "train/lr": 1e-4, "train/images_per_second": 100.0}
    )
    assert (board.Images("samples")[0].height, board.Images("samples")[0].width) == (4, 6)
    assert any(tag.startswith("config") for tag in board.Tags()["tensors"])


def ended(folder):
    board = EventAccumulator(str(folder)).Reload()
    content = board.SummaryMetadata(metadata.SESSION_END_INFO_TAG).plugin_data.content
    return metadata.parse_session_end_info_plugin_data(content).status, board


def test_how_a_run_ended_is_what_it_ended_with_last(tmp_path):
    record(tmp_path, 0, 2, 4)
    conclude(tmp_path, "failed", 4, {"train/loss_final": 0.5})
    assert ended(tmp_path)[0] == api_pb2.STATUS_FAILURE
    record(tmp_path, 4, 6)
    conclude(tmp_path, "complete", 6, {"train/loss_final": 0.25})
    conclude(tmp_path, "complete", 6, {"train/loss_final": 0.25, "eval/fid_final": 9.0})
    status, board = ended(tmp_path)
    assert status == api_pb2.STATUS_SUCCESS
    assert {tag: [(shown.step, shown.value) for shown in board.Scalars(tag)] for tag in ("train/loss_final", "eval/fid_final")} == {
        "train/loss_final": [(6, 0.25)], "eval/fid_final": [(6, 9.0)],
    }  # fmt: skip


def test_a_run_that_goes_on_has_not_ended(tmp_path):
    record(tmp_path, 0, 2)
    conclude(tmp_path, "failed", 2, {})
    recorder = Recorder(tmp_path, 2)
    recorder.settings(
        {"optimizer.lr": 1e-3, "model": "unet", "grad_clip": "none", "data.flip": True}
    )
    recorder.close()
    board = EventAccumulator(str(tmp_path)).Reload()
    assert metadata.SESSION_END_INFO_TAG not in board.Tags()["tensors"]
    start = metadata.parse_session_start_info_plugin_data(
        board.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    )
    assert (
        start.hparams["optimizer.lr"].number_value,
        start.hparams["data.flip"].number_value,
    ) == (1e-3, 1)
    assert (
        start.hparams["model"].string_value,
        start.hparams["grad_clip"].string_value,
    ) == ("unet", "none")


# typed value -> shown value; the first run also lacks warm-up, like a custom schedule
GRAD_CLIPS = {"null": "none", "1": "1.0", "0.5": "0.5"}


@pytest.fixture(scope="module")
def ask(tmp_path_factory):
    """Asks TensorBoard's HPARAMS backend for rows, given a column's parameters.

    The runs differ in a setting that may be null.
    """
    folder = tmp_path_factory.mktemp("board")
    for number, grad_clip in enumerate(GRAD_CLIPS):
        config = training_config(compose([f"training.grad_clip={grad_clip}"]))
        if number == 0:
            config.lr_schedule.pop("warmup_steps")
        run = RunFolder(folder / f"grad_clip={GRAD_CLIPS[grad_clip]}")
        run.path.mkdir()
        recorder = Recorder(run.path, 0)
        recorder.settings(hparams(run, config, 6))
        recorder.close()
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(folder)).Reload()
    provider = MultiplexerDataProvider(multiplexer, str(folder))
    context = backend_context.Context(TBContext(data_provider=provider))

    def call(**column):
        request = api_pb2.ListSessionGroupsRequest(
            allowed_statuses=[api_pb2.STATUS_RUNNING, api_pb2.STATUS_UNKNOWN],
            start_index=0,
            slice_size=100,
        )
        json_format.ParseDict(column, request.col_params.add())
        handler = list_session_groups.Handler(RequestContext(), context, "", request)
        return [group.hparams for group in handler.run().session_groups]

    return call


def kinds(rows, key):
    return {row[key].WhichOneof("kind") for row in rows}


def test_a_column_of_tensorboard_has_one_type_and_is_sorted_where_a_setting_may_be_null(ask):
    rows = ask(hparam="seed")
    assert len(rows) == 3
    assert {key: len(kinds(rows, key)) for key in rows[0]} == dict.fromkeys(rows[0], 1)
    assert kinds(rows, "lr_schedule.warmup_steps") == {"number_value"}
    assert {row["lr_schedule.warmup_steps"].number_value for row in rows} == {0, 100}
    for key in rows[0]:
        assert len(ask(hparam=key, order="ORDER_ASC")) == 3
    clips = [row["grad_clip"].string_value for row in ask(hparam="grad_clip", order="ORDER_DESC")]
    assert clips == ["none", "1.0", "0.5"]


def test_a_column_of_tensorboard_is_filtered_by_the_values_that_it_shows(ask):
    for kept in (["1.0", "0.5"], ["none"], ["1.0"], []):
        found = ask(hparam="grad_clip", filterDiscrete=kept)
        assert {row["grad_clip"].string_value for row in found} == set(kept)


@pytest.mark.parametrize(("every", "num_steps"), [(5000, 800_000), (1, 21), (7, 1000), (3, 60)])
def test_a_long_run_shows_tensorboard_few_of_its_previews_evenly_and_the_last(every, num_steps):
    due = [step for step in range(1, num_steps + 1) if step % every == 0 or step == num_steps]
    shown = [step for step in due if shows_picture(step, every, num_steps)]
    assert PICTURES / 2 < len(shown) <= PICTURES
    assert shown[-1] == num_steps
    places = [due.index(step) for step in shown]
    assert len(set(np.diff(places))) == 1


@pytest.mark.parametrize("channels", [1, 3])
def test_a_short_run_shows_all_of_its_previews_and_a_large_one_smaller(tmp_path, channels):
    steps = [*range(50, 1000, 50), 999]
    recorder = Recorder(tmp_path, 0)
    for step in steps:
        assert shows_picture(step, 50, 999)
        recorder.picture(step, "samples", np.full((8, 8, channels), 9, dtype=np.uint8))
    recorder.picture(999, "large", np.full((SIDE, 3 * SIDE, channels), 9, dtype=np.uint8))
    recorder.picture(999, "fits", np.full((SIDE, SIDE, channels), 9, dtype=np.uint8))
    recorder.close()
    board = EventAccumulator(str(tmp_path), size_guidance={"images": 0}).Reload()
    assert [one.step for one in board.Images("samples")] == steps
    [large], [fits] = board.Images("large"), board.Images("fits")
    assert (fits.height, fits.width) == (SIDE, SIDE)
    assert large.width == SIDE
    assert large.height == pytest.approx(SIDE / 3, abs=1)
