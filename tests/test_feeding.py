"""Three ways to feed the device give the same data."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm.data import sources
from ddpm.data.batches import Batches
from ddpm.data.decoding import Decoding
from ddpm.data.image_set import decodes_later, goes_on_device, image_set
from ddpm.data.listing import listed
from ddpm.data.stored import Packed

CPU = torch.device("cpu")
DECODING = Decoding(8, 8, 3, "center", "white")


@pytest.fixture
def folder(pictures):
    return pictures("set", [f"{name}/{index}.png" for name in ("a", "b") for index in range(7)])


def ready(folder, cache, later, **more):
    return image_set(sources.folder(str(folder)), DECODING, cache, 2, 0.2, later, **more)


def test_all_ways_give_the_same_batches(folder, tmp_path):
    (folder / "a" / "broken.png").write_bytes(b"no picture")
    file, later = (
        ready(folder, tmp_path / "cache", decode_later) for decode_later in (False, True)
    )
    assert isinstance(later.stored, Packed)
    assert (later.fingerprint, later.classes, later.unreadable) == (
        file.fingerprint,
        file.classes,
        file.unreadable,
    )
    assert np.array_equal(later.images, file.images)
    assert np.array_equal(later.labels, file.labels)

    def fed(data, on_device):
        train, _ = data.split(0.2)
        return Batches(
            train.stored,
            4,
            0,
            CPU,
            False,
            True,
            labels=train.labels,
            rows=train.rows,
            on_device=on_device,
        )

    ways = [fed(file, False), fed(file, True), fed(later, False)]
    for step in range(7):  # past the end of an epoch with a short last batch
        size = ways[0].size(step)
        for start, stop in ((0, size // 2), (size // 2, size)):
            first, *others = (way.images(step, start, stop) for way in ways)
            assert all(torch.equal(other, first) for other in others)
            first, *others = (way.classes(step, start, stop) for way in ways)
            assert all(torch.equal(other, first) for other in others)


def test_what_was_decoded_ahead_is_dropped_where_another_step_is_asked_for(folder, tmp_path):
    data = ready(folder, tmp_path / "cache", True)
    jumping, straight = (Batches(data.stored, 4, 0, CPU, True, False) for _ in range(2))
    for step in (0, 5, 2):
        assert torch.equal(jumping.images(step, 1, 3), straight.images(step, 1, 3))


def test_a_picture_that_does_not_decode_is_left_out_however_it_is_fed(folder, tmp_path):
    cut = folder / "a" / "0.png"
    Image.effect_noise((64, 64), 50).save(cut)
    cut.write_bytes(cut.read_bytes()[:300])  # the header stays intact
    file, later = (
        ready(folder, tmp_path / "cache", decode_later) for decode_later in (False, True)
    )
    assert file.reasons == later.reasons == {"a/0.png": "truncated"}
    assert np.array_equal(file.images, later.images)
    assert file.fingerprint == later.fingerprint


def test_what_is_not_encoded_in_its_source_is_packed_without_loss(tmp_path):
    grey = Decoding(8, 8, 1, "center", "white")
    file, later = (
        image_set(sources.digits(), grey, tmp_path, 1, 0.0, decode_later)
        for decode_later in (False, True)
    )
    assert later.fingerprint == file.fingerprint
    assert np.array_equal(later.stored[[3, 1700]], file.stored[[3, 1700]])


@pytest.mark.parametrize(
    ("free", "later"), [(14 * 3 * 64 * 2 + 2, False), (14 * 3 * 64 * 2 - 2, True)]
)
def test_by_itself_a_set_is_decoded_where_that_takes_half_of_the_disk_at_most(
    folder, tmp_path, monkeypatch, free, later
):
    monkeypatch.setattr(
        shutil, "disk_usage", lambda where: SimpleNamespace(free=free) if where.exists() else None
    )
    cache = tmp_path / "not" / "yet"
    source = listed(sources.folder(str(folder)), tmp_path, 1)
    assert decodes_later("auto", source, DECODING, cache) == later
    assert decodes_later("decode", source, DECODING, cache)
    assert not decodes_later("file", source, DECODING, cache)
    image_set(source, DECODING, cache, 1, 0.0)
    assert not decodes_later("auto", source, DECODING, cache)  # the cache is there now
    shutil.rmtree(cache)


def test_only_what_is_decoded_can_go_on_the_device(folder, tmp_path):
    file, later = (
        ready(folder, tmp_path / "cache", decode_later) for decode_later in (False, True)
    )
    assert goes_on_device("device", file, CPU)
    assert not any(
        goes_on_device(feed, data, CPU)
        for feed, data in (("auto", file), ("file", file), ("device", later), ("decode", later))
    )
