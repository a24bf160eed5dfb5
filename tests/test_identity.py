"""Which command lines are the same run, and how its folder is named."""

import functools
import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ddpm.config.compose import compose, shipped_option, shipped_options
from ddpm.config.schema import Data, Training, training_config
from ddpm.config.validation import own_arguments, public_names
from ddpm.runs.finding import locate
from ddpm.runs.identity import ADDED, identity_of

EXAMPLES = int(os.environ.get("DDPM_PROPERTY_EXAMPLES", "3"))


@functools.cache
def folder(words: str) -> Path:
    return locate(training_config(compose(words.split()))).path


SAME = [
    ("", "seed=0"),
    ("", "optimizer.lr=1e-3"),
    ("", "runtime.log_every=7 runtime.device_batch=3 sampler=ddim10 evaluation=paper"),
    ("", "data.num_images=5 data.num_classes=3 data.max_unreadable=0.5 data.cache=/elsewhere"),
    ("", "~model.dropout"),
    ("", "+model.num_heads=1"),
    ("", "data.white=null data.max_pixels=89478485 data.resize=bicubic"),
    ("", "training.grad_clip=1"),
    ("", "training.batch_size=6_4"),
    ("", "objective.min_snr_gamma=5"),
    ("", "training.conditional=true"),
    ("", "schedule=cosine objective=v"),
    ("schedule=linear", "schedule=linear schedule.beta_start=0.0001"),
    ("model.dropout=0", "model.dropout=0.0"),
    ("model.dropout=0", "model.dropout=-0.0"),
    ("optimizer.lr=1", "optimizer.lr=1.0"),
    ("optimizer.betas=[0,0.99]", "optimizer.betas=[0.0,0.99]"),
    ("optimizer=adamw optimizer.weight_decay=0", "optimizer=adamw optimizer.weight_decay=0.0"),
    ("lr_schedule.final_lr=0", "lr_schedule.final_lr=0.0"),
    ("schedule=sigmoid schedule.start=-3", "schedule=sigmoid schedule.start=-3.0"),
    ("objective=epsilon", "objective.prediction=epsilon"),
    ("seed=1 model.dropout=0.2", "model.dropout=0.2 seed=1"),
    ("model=unet128 data=butterflies", "experiment=butterflies128"),
    ("data=cifar10 model=unet32", "data=cifar10 model=unet32 data.path=/somewhere"),
]
ANOTHER = [
    ("", "seed=1"),
    ("", "optimizer.lr=1.0001e-3"),
    ("", "training.steps=1001"),
    ("training.steps=10", "training.epochs=10"),
    ("", "training.precision=bf16"),
    ("", "training.grad_clip=null"),
    ("", "training.conditional=false"),
    ("", "model.dropout=0.1"),
    ("", "+model.scale_shift_norm=true"),
    ("", "objective=epsilon"),
    ("", "schedule=linear"),
    ("", "lr_schedule=constant"),
    ("", "optimizer=adamw"),
    ("", "+optimizer.amsgrad=false"),  # torch's default, but only what is written counts
    ("+optimizer.amsgrad=true", "+optimizer.amsgrad=false"),
    ("", "data=emoji"),
    ("", "data.flip=true"),
    ("", "data.holdout=0.1"),
    ("", "data.white=4095"),
    ("", "data.resize=lanczos"),
    ("data=cifar10", "data=cifar10 data.revision=abc"),
    ("data=cifar10", "data=cifar10 data.source.split=test"),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_the_same_run_however_typed(one, other):
    assert folder(one) == folder(other)


@pytest.mark.parametrize(("one", "other"), ANOTHER)
def test_another_run(one, other):
    assert folder(one).name.rpartition("-")[2] != folder(other).name.rpartition("-")[2]


VALUES = {
    "seed": [0, 1, 2**62],
    "model.dropout": [0.0, 0.25, 1e-3],
    "optimizer.lr": [1e-3, 2.0, 3e-5],
    "optimizer.betas": [[0.0, 0.5], [0.9, 0.999]],
    "training.batch_size": [64, 7],
    "training.ema_decay": [0.0, 0.5],
    "training.grad_clip": [None, 1.0, 2.5],
    "objective.min_snr_gamma": [5.0, 1.0],
    "lr_schedule.final_lr": [0.0, 1e-9],
    "data.holdout": [0.0, 0.125],
}
ASSIGNMENTS = st.lists(st.sampled_from(sorted(VALUES)), unique=True, min_size=1, max_size=4)


def spelt(value, style: int) -> str:
    """Returns a value as one of several people would type it."""
    if isinstance(value, list):
        return f"[{','.join(spelt(one, style) for one in value)}]"
    if value is None:
        return ["null", "Null"][style % 2]
    if isinstance(value, int):
        return [str(value), f"{value:_}"][style % 2]
    plain = int(value) if value.is_integer() else value
    return [repr(value), f"{value:.12e}", str(plain), f"+{value:.6E}"][style % 4]


@settings(
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(ASSIGNMENTS, st.data())
def test_equal_values_are_one_folder_however_spelt_and_others_are_another(keys, data):
    values = {key: data.draw(st.sampled_from(VALUES[key]), label=key) for key in keys}
    styles = [data.draw(st.integers(0, 3), label="style") for _ in keys]
    plain = " ".join(f"{key}={spelt(value, 0)}" for key, value in values.items())
    typed = [f"{key}={spelt(values[key], style)}" for key, style in zip(keys, styles, strict=True)]
    shuffled = " ".join(data.draw(st.permutations(typed)))
    assert folder(shuffled) == folder(plain)
    changed = data.draw(st.sampled_from(keys))
    other = data.draw(st.sampled_from([one for one in VALUES[changed] if one != values[changed]]))
    assert folder(f"{plain} {changed}={spelt(other, styles[0])}") != folder(plain)


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("", "quickstart-digits/recipe"),
        (
            "training.steps=3000 objective=x0 training.batch_size=32 schedule=linear",
            "quickstart-digits/linear_x0_batch_size-32_steps-3000",
        ),
        (
            "training.steps=3000 objective=v training.batch_size=32 schedule=cosine",
            "quickstart-digits/batch_size-32_steps-3000",
        ),
        ("data=cifar10 model=unet32 lr_schedule=cosine", "unet32-cifar10/lr_schedule-cosine"),
        ("schedule=cosine schedule.offset=0.01", "quickstart-digits/offset-0.01"),
        ("schedule=sigmoid schedule.start=-2", "quickstart-digits/sigmoid_start--2"),
        ("optimizer=adamw optimizer.lr=3e-4 seed=1", "quickstart-digits/adamw_lr-0.0003_seed-1"),
        ("model.resolution=32", "quickstart-digits/model.resolution-32"),
        ("model.channel_multipliers=[1,2]", "quickstart-digits/channel_multipliers-1x2"),
        ("model=unet32 data=cifar10 model.dropout=0", "unet32-cifar10/dropout-0"),
        ("experiment=emoji32 training.batch_size=64", "small32-emoji/linear_steps-5000"),
    ],
)
def test_the_words_of_a_name_are_options_and_last_parts_of_keys(words, name):
    found = folder(words).relative_to("outputs").as_posix()
    assert found.rpartition("-")[0] == name


def test_the_words_come_from_values_and_not_from_what_was_typed():
    linear = "schedule.beta_start=1e-4 schedule.beta_end=0.02 schedule.num_timesteps=1000"
    typed = f"schedule=linear_readme {linear} objective=hybrid objective.loss=simple"
    typed += (
        " objective.variance=fixed_small objective.rescale_timesteps=false objective.prediction=v"
    )
    assert folder(typed) == folder("schedule=linear objective=v")
    assert folder(typed).name.startswith("linear-")


def test_a_long_name_keeps_the_words_before_and_a_hash_tells_it_apart():
    long = "model.base_channels=64 model.num_res_blocks=3 optimizer.lr=3e-4 training.batch_size=8 "
    long += "seed=1 model.norm_groups=16 objective.loss=bound schedule=linear data.holdout=0.25"
    long += (
        " data.background=darkolivegreen model.attention_resolutions=[8] training.ema_warmup=false"
    )
    paths = {folder(f"{long} training.ema_decay={decay}") for decay in (0.1, 0.2)}
    assert len(paths) == 2
    for path in paths:
        assert len(path.name) < 135
        assert path.name.startswith("linear_lr-0.0003_batch_size-8_ema_decay-0.")


def test_no_two_options_of_a_group_are_the_same_values():
    for group in ("model", "schedule", "objective", "optimizer", "lr_schedule"):
        values = [json.dumps(shipped_option(group, name)) for name in shipped_options(group)]
        assert len(set(values)) == len(values)


def test_an_option_is_read_as_it_is_composed():
    groups = {group: shipped_options(group) for group in ("schedule", "objective", "model")}
    for number in range(max(map(len, groups.values()))):
        chosen = {group: names[number % len(names)] for group, names in groups.items()}
        cfg = compose([f"{group}={name}" for group, name in chosen.items()]).cfg
        for group, name in chosen.items():
            for key, value in shipped_option(group, name).items():
                assert "${" in str(value) or cfg[group][key] == value, (name, key)


def test_what_was_added_since_is_no_part_of_the_identity_where_it_changes_nothing():
    plain = training_config(compose([])).model_dump(mode="json")
    assert identity_of(plain)["data"].keys().isdisjoint({"white", "max_pixels", "resize"})
    changed = {**plain, "data": {**plain["data"], "white": 4095.0}}
    assert identity_of(changed)["data"]["white"] == 4095


def test_every_argument_of_ours_is_known_to_identities_or_added():
    """A new argument needs an entry in ADDED, or every existing run gets another name."""
    file = Path(__file__).parent / "data" / "identity_arguments.json"
    known = json.loads(file.read_text())
    now = {name: sorted(own_arguments(name)) for name in public_names()}
    now |= {"data": sorted(Data.model_fields), "training": sorted(Training.model_fields)}
    new = {
        f"{owner}.{key}"
        for owner, keys in now.items()
        for key in set(keys) - set(known.get(owner, keys))
    }
    assert new <= ADDED.keys()
    assert not [key for owner, keys in known.items() for key in set(keys) - set(now[owner])]


def test_a_network_argument_that_follows_from_the_rest_is_not_typed():
    with pytest.raises(ValueError, match=r"model\.out_channels: no such key; it follows"):
        training_config(compose(["+model.out_channels=5"]))
