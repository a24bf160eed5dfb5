"""Samples belong to the network that drew them, and class names to their classes."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from weight_folders import SMALL, exported, finished

from ddpm import run
from ddpm.config.compose import compose
from ddpm.evaluate.run import run as evaluate
from ddpm.runs import checkpoint
from ddpm.sample.run import run as sample
from ddpm.sample.subject import class_number
from ddpm.system.devices import halve_to_fit

FEW = ["num_samples=2", "sampler=ddim", "sampler.num_steps=2"]
CLASSED = ["training.conditional=true", "data.num_classes=10"]


def drawn(*overrides):
    return sample(compose([*FEW, *overrides], "sample"))


@pytest.fixture
def two(tmp_path):
    """Two runs at the same step with different weights."""
    first, second = (finished(tmp_path / name, *SMALL) for name in ("one", "other"))
    saved = checkpoint.find(second.checkpoints).load()
    saved["ema"] = {name: tensor + 0.01 for name, tensor in saved["ema"].items()}
    checkpoint.save(second.checkpoints, saved, keep=1)
    return first, second


def test_samples_of_one_network_are_not_handed_out_as_anothers(two, tmp_path):
    first, second = two
    drawn(f"run={first.path}", f"to={tmp_path / 'same'}")
    before = (tmp_path / "same" / "00000.png").read_bytes()
    with pytest.raises(ValueError, match="same holds images of network="):
        drawn(f"run={second.path}", f"to={tmp_path / 'same'}")
    assert (tmp_path / "same" / "00000.png").read_bytes() == before
    drawn(f"run={first.path}", f"to={tmp_path / 'same'}")


def test_folders_of_weights_with_one_name_are_drawn_beside_each_other(two, tmp_path):
    folders = [exported(run, tmp_path / name) for run, name in zip(two, "ab", strict=True)]
    found = [drawn(f"from={folder}", f"outputs={tmp_path / 'outputs'}") for folder in folders]
    assert found[0] != found[1]
    assert (found[0] / "00000.png").read_bytes() != (found[1] / "00000.png").read_bytes()


def test_a_run_that_was_trained_anew_is_drawn_anew(two):
    first, second = two
    before = drawn(f"run={first.path}")
    checkpoint.save(first.checkpoints, checkpoint.find(second.checkpoints).load(), keep=1)
    assert drawn(f"run={first.path}") != before


def test_an_evaluation_does_not_measure_the_samples_of_other_weights(tiny, tmp_path):
    folder = run([*tiny, f"outputs={tmp_path}", "model.resolution=8"])
    settings = ["evaluation.metrics=[colour]", "evaluation.num_samples=4", *FEW[1:]]

    def measured():
        found = evaluate(compose([f"run={folder.path}", *settings], "evaluate"))
        entries = json.loads((folder.path / "evaluation.json").read_text())
        return [one.value for one in found], [entry["network"] for entry in entries]

    values, networks = measured()
    assert measured() == (values, networks)
    saved = checkpoint.find(folder.checkpoints).load()
    saved["ema"] = {name: torch.zeros_like(tensor) for name, tensor in saved["ema"].items()}
    checkpoint.save(folder.checkpoints, saved, keep=1)
    others, now = measured()
    assert others != values
    assert len(now) == len(networks)  # the new network's figure replaces the old one's
    assert set(now).isdisjoint(networks)


NUMERIC = sorted(str(number) for number in range(1, 13))  # 1, 10, 11, 12, 2, ...


@pytest.mark.parametrize(
    ("wanted", "names", "number"),
    [
        (2, NUMERIC, 4),
        ("2", NUMERIC, 4),
        (10, NUMERIC, 1),
        (3, [str(number) for number in range(10)], 3),
        (1, ["ant", "bee"], 1),
        ("bee", ["ant", "bee"], 1),
    ],
)
def test_a_number_that_is_a_name_means_the_name(wanted, names, number):
    assert class_number(wanted, names) == number


@pytest.mark.parametrize(
    ("wanted", "names"),
    [(0, NUMERIC), (13, NUMERIC), (2, ["ant", "bee"]), (-1, ["ant"]), (0, ["1", "other"])],
)
def test_a_number_that_is_none_is_refused_with_the_names(wanted, names):
    with pytest.raises(ValueError, match=f"classes has {wanted}; .*{names[0]}"):
        class_number(wanted, names)


def test_what_was_drawn_is_said_and_kept(tmp_path, capsys):
    trained = finished(tmp_path, *SMALL, *CLASSED)
    names = [f"{number}" for number in range(1, 11)]
    trained.update(data={**trained.record()["data"], "classes": sorted(names)})
    folder = drawn(f"run={trained.path}", "classes=[2,10]")
    assert "class 2: 2, class 1: 10" in capsys.readouterr().out
    assert json.loads((folder / "protocol.json").read_text())["classes"] == ["2", "10"]
    by_word = drawn(f"run={trained.path}", 'classes=["2","10"]')
    assert by_word == folder
    other = drawn(f"run={trained.path}", "classes=[1]")
    assert not np.array_equal(
        *(np.asarray(Image.open(one / "00000.png")) for one in (folder, other))
    )


def test_an_export_brings_the_names_of_its_classes(tmp_path, capsys):
    trained = finished(tmp_path, *SMALL, *CLASSED)
    trained.update(data={**trained.record()["data"], "classes": list("abcdefghij")})
    folder = exported(trained, tmp_path)
    from_folder = drawn(f"from={folder}", f"outputs={tmp_path / 'outputs'}", "classes=[c]")
    assert "class 2: c" in capsys.readouterr().out
    of_run = drawn(f"run={trained.path}", "classes=[c]")
    assert (from_folder / "00000.png").read_bytes() == (of_run / "00000.png").read_bytes()


@pytest.mark.parametrize("room", [1, 3, 4, 11])
def test_what_does_not_fit_the_memory_is_done_in_halves_in_its_order(room):
    tried = []

    def call(part):
        tried.append(part)
        if part.stop - part.start > room:
            raise torch.OutOfMemoryError("out of memory")
        return list(range(11))[part]

    assert [one for part in halve_to_fit(call, 11) for one in part] == list(range(11))
    assert tried[0] == slice(0, 11)


def test_one_thing_too_many_for_the_memory_is_an_error():
    def call(part):
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        halve_to_fit(call, 4)
