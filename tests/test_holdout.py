"""data.holdout: which pictures are held out, and that training never sees them."""

import json
import math
import shutil
from hashlib import sha256

import numpy as np
import pytest
import torch

import ddpm
from ddpm.config.compose import compose
from ddpm.config.schema import training_config
from ddpm.data import sources
from ddpm.data.batches import Batches
from ddpm.data.decoding import Decoding
from ddpm.data.image_set import image_set
from ddpm.runs.finding import locate

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return image_set(
        sources.digits(),
        Decoding(8, 8, 1, "center", "white"),
        tmp_path_factory.mktemp("cache"),
        workers=1,
        max_unreadable=0.0,
    )


@pytest.fixture
def many(pictures):
    return pictures("set", [f"{index % 2}/{index:03d}.png" for index in range(120)])


def decode(folder, size=(10, 12)):
    return image_set(
        sources.folder(str(folder)),
        Decoding(*size, 3, "center", "white"),
        folder.parent / "cache",
        workers=1,
        max_unreadable=0.0,
    )


def contents(images) -> set[bytes]:
    return {image.tobytes() for image in images}


def test_a_class_that_is_held_out_whole_is_named(tiny, tmp_path, pictures):
    folder = pictures("set", [f"common/{number}.png" for number in range(30)])
    digests = {
        sha256((folder / "common" / f"{number}.png").read_bytes()).digest()[0] / 256: number
        for number in range(30)
    }
    rare = folder / "common" / f"{digests[min(digests)]}.png"
    (folder / "rare").mkdir()
    rare.rename(folder / "rare" / "1.png")
    share = math.nextafter(min(digests) + 1 / 256, 1)
    settings = [*tiny, "data=folder", f"data.path={folder}", "training.steps=1"]
    run = ddpm.run([*settings, f"data.holdout={share}", f"outputs={tmp_path / 'outputs'}"])
    assert [note for note in run.record()["data"]["notes"] if "held out entirely" in note] == [
        f"class rare is held out entirely: training never sees it (data.holdout={share})"
    ]


@pytest.mark.parametrize("holdout", [0.05, 0.2, 0.7])
def test_about_the_share_is_held_out_and_each_picture_is_on_one_side(digits, holdout):
    trained_on, held_out = digits.split(holdout)
    assert len(held_out) == pytest.approx(
        holdout * 1797, abs=4 * math.sqrt(1797 * holdout * (1 - holdout))
    )
    assert sorted([*trained_on.rows, *held_out.rows]) == list(range(1797))
    for part in (trained_on, held_out):
        assert np.array_equal(part.images, digits.images[part.rows])
        assert np.array_equal(part.labels, digits.labels[part.rows])
        assert (part.fingerprint, part.classes) == (digits.fingerprint, digits.classes)


def test_a_larger_share_holds_out_the_same_pictures_and_more(digits):
    parts = [set(digits.split(holdout)[1].rows.tolist()) for holdout in (0.1, 0.2, 0.5)]
    assert parts[0] < parts[1] < parts[2]


def test_nothing_is_held_out_unless_asked_for(digits):
    trained_on, held_out = digits.split(0.0)
    assert len(held_out) == 0
    assert np.array_equal(trained_on.rows, np.arange(1797))
    plain = Batches(digits.images, 32, 0, CPU, drop_last=False, flip=True, labels=digits.labels)
    found = Batches(
        trained_on.stored,
        32,
        0,
        CPU,
        drop_last=False,
        flip=True,
        labels=trained_on.labels,
        rows=trained_on.rows,
    )
    assert found.steps_per_epoch == plain.steps_per_epoch
    for step in (0, 56, 57):
        assert torch.equal(
            found.images(step, 0, plain.size(step)), plain.images(step, 0, plain.size(step))
        )
        assert torch.equal(
            found.classes(step, 0, plain.size(step)), plain.classes(step, 0, plain.size(step))
        )


def test_a_pictures_side_does_not_follow_its_name_its_class_or_its_place(many, tmp_path):
    (tmp_path / "moved").mkdir()
    for place, file in enumerate(sorted(many.rglob("*.png"), reverse=True)):
        shutil.copyfile(file, tmp_path / "moved" / f"picture {place * 7 % 120:03d}.png")
    before, after = decode(many), decode(tmp_path / "moved")
    assert contents(before.images) == contents(after.images)
    assert not np.array_equal(before.images, after.images)
    assert contents(before.split(0.3)[1].images) == contents(after.split(0.3)[1].images)


def test_pictures_that_are_added_do_not_move_those_there_were(many, tmp_path):
    shutil.copytree(many, tmp_path / "fewer")
    for file in sorted((tmp_path / "fewer").rglob("*.png"))[::3]:
        file.unlink()
    fewer = decode(tmp_path / "fewer")
    assert len(fewer) == 80
    assert contents(fewer.split(0.3)[1].images) == contents(fewer.images) & contents(
        decode(many).split(0.3)[1].images
    )


def test_the_same_pictures_are_held_out_at_every_resolution(many):
    assert np.array_equal(
        decode(many, size=(5, 6)).split(0.3)[1].rows, decode(many).split(0.3)[1].rows
    )


def test_equal_pictures_are_on_the_same_side(many):
    for file in list(many.rglob("*.png")):
        shutil.copyfile(file, file.with_name(f"copy of {file.name}"))
    trained_on, held_out = decode(many).split(0.3)
    assert len(held_out) == 2 * len(contents(held_out.images))
    assert not contents(trained_on.images) & contents(held_out.images)


def test_the_side_is_kept_in_the_cache_and_not_upset_by_a_file_that_does_not_decode(many):
    held_out = contents(decode(many).split(0.3)[1].images)
    assert contents(decode(many).split(0.3)[1].images) == held_out
    (many / "0" / "000 broken.png").write_bytes(b"no picture")
    found = image_set(
        sources.folder(str(many)),
        Decoding(10, 12, 3, "center", "white"),
        many.parent / "cache",
        workers=1,
        max_unreadable=0.1,
    )
    assert found.unreadable == ["0/000 broken.png"]
    assert contents(found.split(0.3)[1].images) == held_out


def test_batches_show_every_picture_trained_on_and_none_held_out(digits):
    trained_on, _ = digits.split(0.4)
    found = Batches(
        trained_on.stored,
        50,
        0,
        CPU,
        drop_last=False,
        flip=False,
        labels=trained_on.labels,
        rows=trained_on.rows,
    )
    assert found.num_images == len(trained_on)
    shown = [
        (found.images(step, 0, found.size(step)), found.classes(step, 0, found.size(step)))
        for step in range(found.steps_per_epoch)
    ]
    seen = torch.cat([images for images, _ in shown]).add(1).mul(127.5).round().byte().numpy()
    labels = torch.cat([classes for _, classes in shown]).tolist()
    pairs = sorted((image.tobytes(), label) for image, label in zip(seen, labels, strict=True))
    assert pairs == sorted(
        (image.tobytes(), label)
        for image, label in zip(trained_on.images, trained_on.labels.tolist(), strict=True)
    )


def test_a_share_that_leaves_one_side_empty_is_refused(pictures):
    few = decode(pictures("set", ["1.png", "2.png"]))
    for holdout in (1e-9, 1 - 1e-9):
        with pytest.raises(ValueError, match=r"data\.holdout=.* of the 2 pictures"):
            few.split(holdout)


def test_a_run_trains_on_what_is_not_held_out(train, tmp_path, digits):
    run = train(tmp_path, "data.holdout=0.2", "training.steps=1").run
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    trained_on, held_out = digits.split(0.2)
    assert (record["data"]["images"], record["data"]["held_out"]) == (1797, len(held_out))
    assert record["steps_per_epoch"] == len(trained_on) // 8


def test_the_held_out_share_is_part_of_what_is_computed_and_the_name_says_so():
    def folder(*overrides):
        composed = compose(overrides)
        return locate(training_config(composed)).path

    assert folder("data.holdout=0") == folder()
    assert folder("data.holdout=0.1") != folder()
    assert folder("data.holdout=0.1").name.startswith("holdout-0.1-")
