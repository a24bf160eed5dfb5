import importlib
import re
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from ddpm.config.compose import Composed, compose
from ddpm.config.schema import training_config
from ddpm.sample import __main__ as sample

REFUSED = yaml.safe_load((Path(__file__).parent / "data" / "refused.yaml").read_text("utf-8"))


@pytest.mark.parametrize(("overrides", "key"), REFUSED["train"])
def test_a_bad_value_is_refused_in_one_line_that_names_its_key(complaint, overrides, key):
    assert re.search(key, complaint(*overrides.split()))


@pytest.mark.parametrize(
    ("name", "overrides", "key"),
    [(name, *case) for name in ("sample", "evaluate", "export", "plan") for case in REFUSED[name]],
)
def test_the_other_commands_refuse_in_one_line_too(refusal, run_folder, name, overrides, key):
    before = sorted(run_folder.rglob("*"))
    main = importlib.import_module(f"ddpm.{name}.__main__").main
    assert re.search(key, refusal(main, *overrides.format(run=run_folder).split()))
    assert sorted(run_folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"config.yaml": "model: [1\n}"}, "is not a run folder: its config.yaml cannot be read"),
        ({"config.yaml": "- 1"}, "its config.yaml cannot be read (not a table)"),
        ({"config.yaml": "runtime: {}"}, "config.yaml cannot be read (model: Field required)"),
        ({"run.json": '{"step": 6, "da'}, "run.json cannot be read"),
        ({"run.json": "{}"}, "has no class names in run.json"),
    ],
)
def test_a_run_folder_with_a_damaged_file_is_refused_by_its_name(
    refusal, run_folder, tmp_path, changed, message
):
    damaged = shutil.copytree(run_folder, tmp_path / "run")
    for name, text in changed.items():
        (damaged / name).write_text(text)
    assert message in refusal(sample.main, f"run={damaged}", "sampler=ddim10")


@pytest.mark.parametrize(("text", "message"), REFUSED["recipe"])
def test_a_recipe_that_is_wrong_is_refused_in_one_line(complaint, recipe, text, message):
    assert re.search(message, complaint(recipe(text)))


def test_a_recipe_that_is_wrong_harms_nobody_who_does_not_ask_for_it(recipe):
    recipe("training: {steps: 3\n")
    assert composed("experiment=cifar10").data.name == "cifar10"


def composed(*overrides: str):
    return training_config(compose(overrides))


def test_a_value_on_the_command_line_wins_over_every_file():
    config = composed(
        "experiment=cifar10",
        "model.dropout=0.3",
        "optimizer.lr=1e-3",
        "training.batch_size=64",
        "lr_schedule.warmup_steps=7",
    )
    found = (
        config.model["dropout"],
        config.optimizer["lr"],
        config.training.batch_size,
        config.lr_schedule["warmup_steps"],
    )
    assert found == (0.3, 1e-3, 64, 7)


def test_a_path_may_begin_at_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert composed("data=folder", "data.path=~/pictures").data.path == str(tmp_path / "pictures")


def test_a_group_on_the_command_line_wins_over_the_experiments():
    assert composed("experiment=butterflies128", "model=unet64").data.resolution == 64


@pytest.mark.parametrize(
    ("given", "expected"), [("training.steps=10", (10, None)), ("training.epochs=2", (None, 2))]
)
@pytest.mark.parametrize("data", ["butterflies", "digits"])  # published in epochs and in steps
def test_a_duration_on_the_command_line_takes_the_place_of_the_recipes(data, given, expected):
    training = composed(f"data={data}", given).training
    assert (training.steps, training.epochs) == expected


def test_the_resolution_of_the_data_follows_the_models():
    config = composed(
        "model.resolution=[16,24]",
        "model.attention_resolutions=[6]",
        "model.channel_multipliers=[1,2,2]",
    )
    assert config.data.resolution == (16, 24)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module that leaves a trace when it is imported."""
    (tmp_path / "stranger.py").write_text("def schedule(warmup_steps: int): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "stranger"
    sys.modules.pop("stranger", None)


@pytest.mark.parametrize(
    "overrides",
    [
        ["model._target_=stranger.schedule"],
        ["data.source._target_=stranger.schedule"],
        ["sampler.function._target_=stranger.schedule"],
        ["schedule._target_=stranger.schedule", "runtime.trusted_modules=[strange]"],
        ["+optimizer.params=[{_target_: stranger.schedule}]"],
        ["+optimizer.params=[{_target_: stranger.schedule, _partial_: true}]"],
        ["optimizer.betas=[{_target_: stranger.schedule}]"],
        ["+schedule._args_=[{_target_: stranger.schedule}]"],
    ],
)
def test_what_is_not_trusted_is_refused_without_being_imported(module, complaint, overrides):
    complaint(*overrides)
    assert module not in sys.modules


def test_what_the_user_trusts_is_taken_and_its_arguments_are_checked(module, complaint):
    trusting = [
        "lr_schedule=constant",
        "lr_schedule._target_=stranger.schedule",
        "runtime.trusted_modules=[stranger]",
    ]
    assert composed("data=folder", *trusting).lr_schedule["_target_"] == "stranger.schedule"
    assert "lr_schedule.warmup_steps=long" in complaint(
        "data=folder", *trusting, "lr_schedule.warmup_steps=long"
    )


def test_what_is_composed_holds_the_choices_and_the_overrides():
    found = compose(["experiment=butterflies128", "seed=3"])
    assert isinstance(found, Composed)
    assert {group: found.choices[group] for group in ("model", "data", "experiment")} == {
        "model": "unet128",
        "data": "butterflies",
        "experiment": "butterflies128",
    }
    assert found.overrides == ["experiment=butterflies128", "seed=3"]
    assert OmegaConf.select(found.cfg, "hydra") is None


def test_a_key_of_ones_own_network_is_suggested(typed, tmp_path):
    (tmp_path / "my" / "model").mkdir(parents=True)
    (tmp_path / "my" / "model" / "net.yaml").write_text(
        '# @package _global_\nmodel: {_target_: mylib.Net, in_channels: "${data.channels}", width: 64}\n'
    )
    done = typed("train", "--config-dir", str(tmp_path / "my"), "model=net", "model.widht=3")
    assert done.code == 1
    assert "model.widht: no such key in model; did you mean width" in done.err


@pytest.mark.parametrize(("command", "takes_recipes"), [("train", True), ("compare", False)])
def test_recipes_are_suggested_by_the_commands_that_take_them(typed, command, takes_recipes):
    done = typed(command, "exprmnt=cifar10")
    assert done.code == 1
    assert ("did you mean experiment?" in done.err) == takes_recipes
    assert (" experiment," in done.err) == takes_recipes
