import numpy as np
import pytest
import torch

from ddpm.data.batches import Batches

IMAGES = np.random.default_rng(0).integers(0, 256, (10, 3, 4, 4), dtype=np.uint8)
CPU = torch.device("cpu")


def batches(batch_size=4, seed=0, drop_last=False, flip=False, images=IMAGES):
    return Batches(images, batch_size, seed, CPU, drop_last, flip)


def order(found, epoch):
    first = epoch * found.steps_per_epoch
    return [
        found.indices(step, 0, found.size(step))
        for step in range(first, first + found.steps_per_epoch)
    ]


def test_an_epoch_shows_every_image_once_the_last_batch_short():
    for epoch in (0, 1, 7):
        found = order(batches(), epoch)
        assert [len(batch) for batch in found] == [4, 4, 2]
        assert sorted(torch.cat(found).tolist()) == list(range(10))


def test_an_epoch_that_drops_its_short_batch_shows_no_image_twice():
    found = order(batches(drop_last=True), 0)
    assert [len(batch) for batch in found] == [4, 4]
    assert len(set(torch.cat(found).tolist())) == 8


def test_the_order_is_a_function_of_seed_and_epoch():
    assert torch.equal(torch.cat(order(batches(), 3)), torch.cat(order(batches(), 3)))
    assert len({str(order(batches(seed=seed), epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_a_step_does_not_depend_on_the_steps_before_it():
    walked = batches(flip=True)
    for step in range(5):
        walked.images(step, 0, 2)
    assert torch.equal(walked.images(5, 0, 2), batches(flip=True).images(5, 0, 2))


def test_pixels_0_and_255_become_minus_one_and_one():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    x0 = batches(1, images=levels).images(0, 0, 1)
    assert x0.dtype == torch.float32
    torch.testing.assert_close(x0, torch.linspace(-1, 1, 256).reshape(1, 1, 16, 16))


def test_parts_of_a_batch_are_those_of_the_whole():
    found = batches(flip=True)
    parts = [found.images(2, start, stop) for start, stop in ((0, 1), (1, 2))]
    assert torch.equal(torch.cat(parts), found.images(2, 0, 2))


def test_flips_mirror_about_half_of_the_images_left_to_right_and_change_with_the_epoch():
    asymmetric = np.broadcast_to(np.arange(4, dtype=np.uint8) * 80, (1000, 1, 4, 4)).copy()
    found = batches(1000, flip=True, images=asymmetric)
    plain = batches(1000, images=asymmetric).images(0, 0, 1000)
    mirrored = []
    for step in (0, 1):
        x0 = found.images(step, 0, 1000)
        mirrored.append(x0[:, 0, 0, 0] > x0[:, 0, 0, 3])
        assert torch.equal(torch.where(mirrored[-1][:, None, None, None], x0.flip(-1), x0), plain)
        assert 400 < mirrored[-1].sum() < 600
    assert not torch.equal(*mirrored)


def test_each_image_keeps_its_label_but_for_the_share_that_is_dropped():
    images, labels = np.zeros((5000, 1, 1, 1), dtype=np.uint8), np.arange(5000) % 10
    found = Batches(
        images,
        5000,
        0,
        CPU,
        drop_last=False,
        flip=False,
        labels=labels,
        label_dropout=0.2,
        any_class=10,
    )
    dropped = []
    for step in (0, 1):
        classes = found.classes(step, 0, 5000)
        dropped.append(classes == 10)
        assert torch.equal(
            classes[~dropped[-1]],
            torch.from_numpy(labels)[found.indices(step, 0, 5000)][~dropped[-1]],
        )
        assert dropped[-1].double().mean().item() == pytest.approx(0.2, abs=5 * 0.4 / 5000**0.5)
        assert torch.equal(found.classes(step, 7, 9), classes[7:9])
    assert not torch.equal(*dropped)
    assert batches().classes(0, 0, 4) is None


def test_a_batch_larger_than_the_data_set_is_refused_by_its_key():
    with pytest.raises(ValueError, match=r"training.batch_size=11 .* 10 images"):
        batches(11)
