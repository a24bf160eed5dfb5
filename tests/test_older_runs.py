"""Runs of earlier versions still work: they can be sampled from, measured, compared, resumed."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from ddpm.config.compose import compose
from ddpm.config.schema import training_config
from ddpm.runs import checkpoint
from ddpm.runs.finding import locate
from ddpm.runs.folder import RunFolder
from ddpm.runs.format import FORMAT
from ddpm.train.run import run as train

FIXTURE = Path(__file__).parent / "data" / "run_b7d7171"
# what it was trained with, apart from how it is executed
AGAIN = [
    *("schedule=linear", "objective=epsilon", "training.conditional=false"),
    *("data=digits", "model.resolution=8", "model.base_channels=8", "model.norm_groups=4"),
    *("model.channel_multipliers=[1]", "model.attention_resolutions=[]", "training.steps=4"),
    *("training.batch_size=8", "runtime.num_previews=4", "sampler=ddim", "sampler.num_steps=2"),
]


@pytest.fixture
def old(tmp_path):
    place = tmp_path / "outputs" / "quickstart-digits" / "recipe-0123abcd"
    place.parent.mkdir(parents=True)
    shutil.copytree(FIXTURE, place)
    return place


def test_it_is_read_under_todays_names_and_with_todays_ways_of_carrying_out(old):
    config = RunFolder(old).config([])
    assert config.model["_target_"] == "ddpm.models.UNet"
    assert config.schedule["_target_"] == "ddpm.diffusion.schedules.linear"
    assert config.lr_schedule["_target_"] == "ddpm.train.lr_schedules.Cosine"
    assert config.sampler["function"]["_target_"] == "ddpm.diffusion.samplers.ddim"
    assert config.sampler["num_steps"] == 2
    assert config.data.white is None
    assert config.training.steps == 4


def test_it_is_drawn_from_as_before(typed, old, tmp_path):
    done = typed(
        *("sample", f"run={old}", "sampler=ddim", "sampler.num_steps=2", "sampler.clip=false"),
        *("sampler.spacing=linear", "num_samples=4", f"to={tmp_path / 'drawn'}"),
    )
    assert done.code == 0, done.err
    before = np.asarray(Image.open(old / "samples" / "step_00000004.png")).astype(int)
    now = np.asarray(Image.open(tmp_path / "drawn" / "grid.png")).astype(int)
    assert now.shape == before.shape
    assert np.abs(now - before).max() <= 1  # same noise and weights: only rounding differs


def test_it_is_measured_and_compared(typed, old, tmp_path):
    asked = ["evaluation.metrics=[losses]", "evaluation.num_images=4", "evaluation.num_samples=2"]
    done = typed("evaluate", f"run={old}", *asked)
    assert done.code == 0, done.err
    assert "loss_t" in (old / "evaluation.json").read_text()
    new = train(compose([*AGAIN, "training.steps=2", f"outputs={tmp_path / 'more'}"]))
    done = typed("compare", f"runs=[{old},{new.path}]")
    assert done.code == 0, done.err
    assert "unreadable" not in done.out
    assert "training.steps" in done.out
    assert "schedule" not in done.out  # the same schedule under two names


def test_it_is_carried_on_and_its_history_goes_on(old):
    train(compose([f"resume={old}", "training.steps=6"]))
    run = RunFolder(old)
    record = run.record()
    assert (record["status"], record["step"], record["format"]) == ("complete", 6, FORMAT)
    first, second = record["starts"]
    assert first["git"]["commit"].startswith("b7d7171")
    assert first["command"][0] == "train.py"
    assert (first["from_step"], first["to_step"]) == (0, 4)
    assert (second["from_step"], second["to_step"]) == (4, 6)
    assert second["changed"] == {"training.steps": [4, 6]}
    assert "command" not in record
    assert yaml.safe_load((old / "config.yaml").read_text())["format"] == FORMAT
    assert checkpoint.find(run.checkpoints).step == 6


@pytest.mark.parametrize("status", ["preempted", "running", "failed"])
def test_the_same_configuration_typed_today_names_an_unfinished_one(old, tmp_path, status):
    RunFolder(old).update(status=status)
    with pytest.raises(ValueError, match=f"trained by an earlier version: resume={old} continues"):
        train(compose([*AGAIN, f"outputs={tmp_path / 'outputs'}"]))
    assert len(list((tmp_path / "outputs").glob("*/*"))) == 1


def test_the_same_configuration_typed_today_finds_a_complete_one(old, tmp_path, capsys):
    before = (old / "run.json").read_bytes()
    found = train(compose([*AGAIN, f"outputs={tmp_path / 'outputs'}"]))
    assert found.path == old
    said = capsys.readouterr().out
    assert "trained by an earlier version" in said
    assert f"resume={old}" in said
    assert (old / "run.json").read_bytes() == before


def test_another_configuration_is_not_taken_for_it(old, tmp_path):
    other = train(compose([*AGAIN, "seed=1", f"outputs={tmp_path / 'outputs'}"]))
    assert other.path != old


def test_what_is_computed_must_be_there(old, typed, tmp_path):
    file = old / "config.yaml"
    plain = yaml.safe_load(file.read_text())
    del plain["training"]["ema_warmup"]
    file.write_text(yaml.safe_dump(plain))
    done = typed("sample", f"run={old}", f"to={tmp_path / 'drawn'}")
    assert done.code == 1
    assert done.err == (
        f"error: {file} was written by another version (format 1, commit b7d71717): "
        "training.ema_warmup is missing\n"
    )


def test_what_is_carried_out_may_be_missing_or_be_no_more(old):
    file = old / "config.yaml"
    plain = yaml.safe_load(file.read_text())
    del plain["runtime"]["feed"], plain["evaluation"]["bound_split"], plain["sampler"]["clip"]
    plain["runtime"]["turbo"] = plain["evaluation"]["lpips"] = plain["sampler"]["order"] = 3
    file.write_text(yaml.safe_dump(plain))
    config = RunFolder(old).config([])
    assert config.runtime.feed == "auto"
    assert config.evaluation.bound_split == "train"
    assert "order" not in config.sampler


def test_a_run_of_a_later_version_says_so(old):
    file = old / "config.yaml"
    file.write_text(f"format: {FORMAT + 1}\n{file.read_text()}")
    with pytest.raises(ValueError, match=rf"config\.yaml .*format {FORMAT + 1} is newer than"):
        RunFolder(old).config([])


def test_a_run_of_today_is_written_with_its_format(run_folder):
    record = json.loads((run_folder / "run.json").read_text())
    assert record["format"] == FORMAT
    assert yaml.safe_load((run_folder / "config.yaml").read_text())["format"] == FORMAT


@pytest.fixture
def quick_start_of_before(run_folder, tmp_path):
    """A run under the folder name that an earlier version gave to the quick start.

    That quick start had a linear schedule, predicted epsilon and had no classes.
    """
    digest = run_folder.name.rpartition("-")[2]
    place = tmp_path / "outputs" / "quickstart-digits" / f"recipe-{digest}"
    return Path(shutil.copytree(run_folder, place))


def test_the_quick_start_of_before_keeps_its_hash():
    # its previews (36 every 900 steps) do not enter the hash
    before = [
        *("schedule=linear", "objective=epsilon", "training.conditional=false"),
        *("model.base_channels=32", "model.channel_multipliers=[1,2,2]", "training.steps=1800"),
    ]
    assert locate(training_config(compose(before))).path.name.endswith("-fd78a6ee")


def test_a_run_of_small32_of_before_keeps_its_hash():
    before = ["model=small32", "data=emoji", "schedule=linear", "objective=epsilon"]
    assert locate(training_config(compose(before))).path.name.endswith("-2a1e038a")


def test_a_quick_start_of_before_is_drawn_from_measured_and_compared_as_what_it_is(
    typed, tiny, quick_start_of_before, tmp_path
):
    old = quick_start_of_before
    few = ["sampler=ddim", "sampler.num_steps=2"]
    done = typed("sample", f"run={old}", *few, "num_samples=2", f"to={tmp_path / 'drawn'}")
    assert done.code == 0, done.err
    refused = typed("sample", f"run={old}", *few, "num_samples=2", "classes=[3]")
    assert "training.conditional=true" in refused.err
    asked = ["evaluation.metrics=[losses]", "evaluation.num_images=4", "evaluation.num_samples=2"]
    done = typed("evaluate", f"run={old}", *asked, *few)
    assert done.code == 0, done.err
    new = train(compose([*tiny[3:], "training.steps=2", f"outputs={tmp_path / 'more'}"]))
    done = typed("compare", f"runs=[{old},{new.path}]")
    assert done.code == 0, done.err
    rows = {line.split()[0] for line in done.out.splitlines() if line.strip()}
    assert {"schedule", "objective", "training.conditional"} <= rows


def test_a_quick_start_of_before_is_found_under_its_old_name_and_carried_on(
    tiny, quick_start_of_before, tmp_path
):
    old = quick_start_of_before
    assert train(compose([*tiny, f"outputs={tmp_path / 'outputs'}"])).path == old
    train(compose([f"resume={old}", "training.steps=8"]))
    run = RunFolder(old)
    assert (run.record()["status"], run.record()["step"]) == ("complete", 8)
    config = run.config([])
    assert config.schedule["_target_"] == "ddpm.diffusion.schedules.linear"
    assert (config.objective["prediction"], config.training.conditional) == ("epsilon", False)
