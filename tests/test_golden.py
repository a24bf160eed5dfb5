"""No change alters a recipe unnoticed: tests/golden/ records the results of its small twin.

If a change is meant to alter one, `python tests/small_twins.py` rewrites the files, and their diff
is part of the change.
"""

import pytest
from small_twins import GOLDEN, NAMES, differences, twin

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", NAMES)
def test_a_recipes_twin_comes_to_what_it_did(name):
    assert differences(name, twin(f"experiment={name}")) == []


def test_a_recipe_without_its_file_is_told_how_to_write_it_and_no_file_is_left_over():
    with pytest.raises(ValueError, match=r"golden/new\.txt is missing: python tests/small_twins"):
        differences("new", twin())
    assert [file.stem for file in sorted(GOLDEN.iterdir())] == NAMES


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("cifar10", "optimizer.lr=2.02e-4"),
        ("cifar10", "lr_schedule.warmup_steps=4900"),
        ("cifar10", "model.dropout=0"),
        ("cifar10", "schedule=cosine"),
        ("cifar10", "training.ema_decay=0.9998"),
        ("cifar10", "training.precision=fp32"),
        ("cifar10_vlb", "objective.timestep_sampling=uniform"),
        ("butterflies128", "lr_schedule=constant"),
        ("imagenet64_conditional", "training.label_dropout=0.1"),
    ],
)
def test_a_changed_recipe_is_noticed(name, change):
    assert differences(name, twin(f"experiment={name}", change)) != []
