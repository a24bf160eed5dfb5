"""The commands as users type them, in their own processes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ddpm.runs import checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory, train):
    """The outcome of a run of 6 steps, with intervals that do not divide 6."""
    return train(
        tmp_path_factory.mktemp("outputs"),
        "runtime.checkpoint_every=4",
        "runtime.log_every=4",
        "runtime.sample_every=100",
    )


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def pixels(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file), dtype=np.int16)


def test_a_run_leaves_what_a_user_was_promised(finished):
    run = finished.run
    assert finished.out.splitlines()[-1].count(str(run)) == 1
    assert [found.step for found in checkpoint.all_in(run / "checkpoints")] == [4, 6]
    assert (run / "checkpoints" / "latest").read_text().strip() == "step_00000006"
    files = {file.name for file in (run / "checkpoints" / "step_00000006").iterdir()}
    assert files == {"model.safetensors", "ema.safetensors", "state.pt", "meta.json"}
    assert [file.name for file in (run / "samples").iterdir()] == ["step_00000006.png"]
    assert pixels(run / "samples" / "step_00000006.png").min() < 255
    assert [record["step"] for record in metrics(run)] == [4, 6]
    assert {"train/loss", "train/grad_norm", "train/lr"} <= metrics(run)[0].keys()
    assert (run / "train.log").read_text()
    assert (run / ".hydra").is_dir()
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (
        config["training"]["steps"],
        config["model"]["base_channels"],
        config["data"]["name"],
    ) == (6, 8, "digits")


def test_run_json_tells_how_the_run_stands_and_what_it_was_made_with(finished):
    record = json.loads((finished.run / "run.json").read_text())
    assert (record["status"], record["step"]) == ("complete", 6)
    assert record["data"]["images"] == 1797
    assert record["data"]["fingerprint"]
    start = record["starts"][0]
    assert "training.steps=6" in start["command"]
    assert start["versions"]["torch"] == torch.__version__
    assert record.keys() >= {"format", "identity", "created", "updated"}
    assert start.keys() >= {"git", "versions", "device", "started", "from_step", "to_step"}


def test_tensorboard_shows_scalars_the_sample_grid_and_the_configuration(finished):
    board = EventAccumulator(str(finished.run)).Reload()
    assert [(scalar.step, scalar.value) for scalar in board.Scalars("train/loss")] == [
        (record["step"], pytest.approx(record["train/loss"])) for record in metrics(finished.run)
    ]
    assert [image.step for image in board.Images("samples")] == [6]
    assert any(tag.startswith("config") for tag in board.Tags()["tensors"])


def test_a_complete_run_typed_again_says_so_and_is_left_as_it_is(finished, train):
    def state():
        return {file: file.stat().st_mtime_ns for file in finished.run.rglob("*")}

    before = state()
    again = train(finished.run.parent.parent)
    assert again.out.splitlines()[0] == f"run {finished.run} is complete: 6 steps"
    assert state() == before


def test_parts_of_a_batch_train_as_the_whole_batch_does(finished, train, tmp_path):
    parts = train(tmp_path, "runtime.device_batch=3", "runtime.log_every=4").run
    for record, expected in zip(metrics(parts), metrics(finished.run), strict=True):
        assert record == pytest.approx(expected, rel=1e-4)
    whole = checkpoint.find(finished.run / "checkpoints").weights("raw")
    for name, tensor in checkpoint.find(parts / "checkpoints").weights("raw").items():
        torch.testing.assert_close(tensor, whole[name], rtol=0, atol=1e-5)


def test_the_average_and_the_weights_both_move(finished):
    first, last = (found.folder for found in checkpoint.all_in(finished.run / "checkpoints"))
    for name in ("model.safetensors", "ema.safetensors"):
        before, after = load_file(first / name), load_file(last / name)
        assert not any(
            torch.equal(before[key], after[key]) for key in ("conv_in.weight", "conv_out.weight")
        )


def test_an_image_is_the_same_whatever_it_is_drawn_with(finished, typed, tmp_path):
    for name, overrides in (
        ("alone", ["num_samples=3", "batch_size=1"]),
        ("together", ["num_samples=8", "batch_size=7"]),
    ):
        done = typed(
            "sample",
            f"run={finished.run}",
            f"to={tmp_path / name}",
            "sampler.num_steps=5",
            *overrides,
        )
        assert done.code == 0, done.err
    assert sorted(file.name for file in (tmp_path / "together").glob("[!.]*")) == [
        *(f"{index:05d}.png" for index in range(8)),
        "grid.png",
        "protocol.json",
    ]
    together = [pixels(tmp_path / "together" / f"{index:05d}.png") for index in range(8)]
    assert {image.shape for image in together} == {(16, 16)}
    for index in range(3):
        assert np.abs(pixels(tmp_path / "alone" / f"{index:05d}.png") - together[index]).max() <= 1
    assert np.abs(together[0] - together[1]).max() > 1


@pytest.fixture(scope="module")
def draw(tmp_path_factory, train, typed):
    """Draws 4 images from a class-conditional run that moved far in its 6 steps."""
    settings = [
        "training.conditional=true",
        "optimizer.lr=0.01",
        "lr_schedule=constant",
        "lr_schedule.warmup_steps=0",
        "runtime.checkpoint_every=3",
    ]
    run = train(tmp_path_factory.mktemp("outputs"), *settings).run

    def call(*overrides: str) -> np.ndarray:
        done = typed(
            "sample",
            f"run={run}",
            "num_samples=4",
            "sampler=ddim",
            "sampler.num_steps=4",
            *overrides,
        )
        assert done.code == 0, done.err
        grid = Path(done.out.splitlines()[-1].removeprefix("samples "))
        assert grid.is_relative_to(run / "samples")
        return pixels(grid)

    return call


@pytest.fixture(scope="module")
def plain_draw(draw):
    return draw("classes=[5]")


@pytest.mark.parametrize(
    "override", ["weights=raw", "step=3", "seed=1", "classes=[3]", "sampler.guidance_scale=3"]
)
def test_what_is_asked_for_changes_the_images(draw, plain_draw, override):
    asked = ["classes=[5]"] * (not override.startswith("classes"))
    assert np.abs(draw(override, *asked) - plain_draw).max() > 1


def test_a_picture_that_does_not_decode_is_left_out_of_training(train, pictures, tmp_path):
    folder = pictures("set", [f"{index:02d}.png" for index in range(12)])
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more")
    own = ["data=folder", f"data.path={folder}", "training.steps=2"]
    run = train(tmp_path / "outputs", *own).run
    record = json.loads((run / "run.json").read_text())
    assert (record["status"], record["data"]["images"], record["data"]["unreadable"]) == (
        "complete",
        12,
        ["broken.jpg"],
    )


def test_a_run_is_not_carried_on_with_other_pictures(train, typed, tiny, pictures, tmp_path):
    folder = pictures("set", [f"{index:02d}.png" for index in range(8)])
    own = ["data=folder", f"data.path={folder}", "training.steps=2"]
    run = train(tmp_path / "outputs", *own).run
    (run / "run.json").write_text((run / "run.json").read_text().replace('"complete"', '"failed"'))
    Image.new("RGB", (12, 10)).save(folder / "00.png")
    done = typed("train", *tiny, f"outputs={tmp_path / 'outputs'}", *own)
    assert done.code == 1
    assert "are not those of" in done.err


@pytest.mark.parametrize(
    ("command", "overrides", "named"),
    [
        ("train", ["trainig.steps=3"], "training"),
        ("train", ["training.batch_size=5000"], "training.batch_size=5000"),
        ("train", ["data=folder"], "data.path"),
        ("train", ["data=butterflies", "model=quickstart"], "data.path"),
        ("sample", [], "run is missing"),
        ("sample", ["run=/nowhere"], "run=/nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_error_is_one_line_that_names_what_to_change(typed, tmp_path, command, overrides, named):
    done = typed(command, f"outputs={tmp_path}", *overrides)
    assert done.code == 1
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1
    assert named in done.err


def test_the_traceback_is_there_for_who_asks_for_it(ddpm, tmp_path):
    done = ddpm("train", f"outputs={tmp_path}", "training.steps=0", HYDRA_FULL_ERROR="1")
    assert done.code != 0
    assert "Traceback" in done.err


def test_the_configuration_can_be_looked_at_without_training(ddpm):
    done = ddpm("train", "experiment=cifar10", "--cfg", "job")
    assert done.code == 0
    assert yaml.safe_load(done.out)["training"]["steps"] == 800_000


def test_ctrl_c_ends_a_command_in_one_line(typed, monkeypatch):
    def interrupted(composed):
        raise KeyboardInterrupt

    monkeypatch.setattr("ddpm.config.build.check", interrupted)
    done = typed("train")
    assert (done.code, done.err) == (130, "interrupted\n")
