import re
import sys

import pytest
from omegaconf import OmegaConf

from ddpm.cli import Composed, compose
from ddpm.config import training_config


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ("model=unet23", "model=unet23: .*did you mean unet32"),
        ("experiment=butterflies12", "experiment=butterflies12: .*butterflies128"),
        ("trainig.steps=3", "trainig.*did you mean training"),
        ("training.step=3", r"training\.step: .*did you mean steps"),
        ("model.dropuot=0.1", r"model\.dropuot: .*did you mean dropout"),
        ("optimizer=adamw optimizer.weight_deacy=0", r"optimizer\.weight_deacy: .*did you mean weight_decay"),
        ("+training.step=3", r"training\.step: .*did you mean steps"),
        ("+model.num_haeds=4", r"model\.num_haeds"),
        ("+sampler.function.eat=0.5 sampler=ddim", r"sampler\.function\.eat: .*did you mean eta"),
        ("~model.base_channels", "model.*base_channels"),
        ("training.steps=0", r"training\.steps=0"),
        ("training.steps=1.5", r"training\.steps=1\.5"),
        ("training.steps=many", r"training\.steps=many"),
        ("training.steps=3 training.epochs=3", r"training\.steps=3 and training\.epochs=3"),
        ("training.steps=null", r"training\.steps=null|training\.steps=None"),
        ("training.batch_size=0", r"training\.batch_size=0"),
        ("training.precision=fp8", r"training\.precision=fp8 .*'fp32'.*'bf16'.*'fp16'"),
        ("training.grad_clip=-1", r"training\.grad_clip=-1"),
        ("training.ema_decay=1", r"training\.ema_decay=1"),
        ("training.drop_last=2", r"training\.drop_last=2"),
        ("runtime.device=gpu", r"runtime\.device=gpu .*'cuda'"),
        ("runtime.device_batch=0", r"runtime\.device_batch=0"),
        ("runtime.log_every=0", r"runtime\.log_every=0"),
        ("runtime.trusted_modules=mylib", r"runtime\.trusted_modules=mylib"),
        ("seed=-1", "seed=-1"),
        ("seed=${nothing}", "nothing"),
        ("data.channels=2", r"data\.channels=2"),
        ("data.crop=centre", r"data\.crop=centre"),
        ("data.max_unreadable=1.5", r"data\.max_unreadable=1\.5"),
        ("data.background=wihte", r"data\.background=wihte"),
        ("data.resolution=[16,16,16]", r"data\.resolution=\[16, 16, 16\]"),
        ("data=cifar10 ++data.source.repo=???", r"data\.source\.repo"),
        ("model.resolution=18", r"model\.resolution=18 .*divisible by 4"),
        ("model.base_channels=7", r"model\.base_channels=7"),
        ("model.base_channels=[32]", r"model\.base_channels=\[32\]"),
        ("model.norm_groups=7", r"model\.channel_multipliers .*norm_groups=7"),
        ("model.channel_multipliers=[1,two]", r"model\.channel_multipliers"),
        ("model.channel_multipliers=[]", r"model\.channel_multipliers"),
        ("model.attention_resolutions=[5]", r"model\.attention_resolutions .*16, 8, 4"),
        ("model.dropout=1.0", r"model\.dropout=1\.0"),
        ("schedule.num_timesteps=1", r"schedule\.num_timesteps=1"),
        ("schedule.beta_end=2", r"schedule\.beta_end=2"),
        ("objective.prediction=noise", r"objective\.prediction=noise .*'epsilon'.*'v'"),
        ("optimizer.lr=fast", r"optimizer\.lr=fast"),
        ("optimizer.lr=-1", r"optimizer.*-1"),
        ("optimizer.lr=.nan", r"optimizer\.lr"),
        ("lr_schedule.warmup_steps=-1", r"lr_schedule\.warmup_steps=-1"),
        ("sampler.num_steps=1001", r"sampler\.num_steps=1001 .*1000"),
        ("sampler.spacing=even", r"sampler\.spacing=even .*'linear'"),
        ("sampler.function._target_=ddpm.samplers.dimm", r"sampler\.function\._target_=ddpm\.samplers\.dimm"),
        ("model._target_=UNet", r"model\._target_=UNet"),
        ("schedule=cosine,linear", "schedule.*-m"),
    ],
)
def test_a_bad_value_is_refused_in_one_line_that_names_its_key(complaint, overrides, key):
    assert re.search(key, complaint(*overrides.split()))


def composed(*overrides: str):
    return training_config(compose(overrides))


def test_a_value_on_the_command_line_wins_over_every_file():
    config = composed("experiment=cifar10", "model.dropout=0.3", "optimizer.lr=1e-3", "training.batch_size=64", "lr_schedule.warmup_steps=7")
    found = (config.model["dropout"], config.optimizer["lr"], config.training.batch_size, config.lr_schedule["warmup_steps"])
    assert found == (0.3, 1e-3, 64, 7)


def test_a_group_on_the_command_line_wins_over_the_experiments():
    assert composed("experiment=butterflies128", "model=unet64").data.resolution == 64


@pytest.mark.parametrize(("given", "expected"), [("training.steps=10", (10, None)), ("training.epochs=2", (None, 2))])
@pytest.mark.parametrize("data", ["butterflies", "digits"])  # published in epochs, in steps
def test_a_duration_on_the_command_line_takes_the_place_of_the_recipes(data, given, expected):
    training = composed(f"data={data}", given).training
    assert (training.steps, training.epochs) == expected


def test_the_resolution_of_the_data_follows_the_models():
    config = composed("model.resolution=[16,24]", "model.attention_resolutions=[6]", "model.channel_multipliers=[1,2,2]")
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
    trusting = ["lr_schedule._target_=stranger.schedule", "runtime.trusted_modules=[stranger]"]
    assert composed("data=folder", *trusting).lr_schedule["_target_"] == "stranger.schedule"
    assert "lr_schedule.warmup_steps=long" in complaint("data=folder", *trusting, "lr_schedule.warmup_steps=long")


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
