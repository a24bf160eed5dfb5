"""Pictures are copied to a GPU one step ahead, once each, and arrive bit for bit unchanged."""

import numpy as np
import pytest
import torch

from ddpm.config import build
from ddpm.config.compose import compose
from ddpm.config.schema import training_config
from ddpm.data.ahead import Ahead, copies_to
from ddpm.data.batches import Batches
from ddpm.system.processes import accelerator_for
from ddpm.train.loop import updates
from ddpm.train.start import prepare

IMAGES = np.random.default_rng(0).integers(0, 256, (21, 1, 16, 16), dtype=np.uint8)
CPU = torch.device("cpu")


class HostCopies:
    """Stands in for Copies on the host, where nothing is asynchronous."""

    def room(self, shape):
        return torch.empty(shape, dtype=torch.uint8)

    def send(self, pixels):
        return pixels.clone()

    def receive(self, sent):
        return sent


class Watched(Batches):
    """Batches that record the calls they get."""

    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named)
        self.asked = []

    def images(self, *span):
        self.asked.append(("take", *span))
        return super().images(*span)

    def send(self, *span):
        self.asked.append(("send", *span))
        super().send(*span)


def batches(kind=Batches, device=CPU, **named):
    labels = np.arange(len(IMAGES)) % 3
    given = {"labels": labels, "label_dropout": 0.5, "any_class": 3, **named}
    return kind(IMAGES, 5, 0, device, drop_last=False, flip=True, **given)


def trained(fed, first, last, device_batch, device="cpu"):
    """Trains a tiny network on batches. Returns the states of the meter and of the network."""
    overrides = [
        *("data=digits", "model.base_channels=8", "model.norm_groups=4", "training.precision=fp32"),
        *("model.channel_multipliers=[1,2]", "model.attention_resolutions=[]"),
        *("training.conditional=true", "optimizer.lr=1e-2"),
    ]
    config = training_config(compose(overrides))
    with accelerator_for(device, "fp32") as accelerator:
        diffusion = build.diffusion(config)
        network = build.network(config, accelerator.device, 3)
        state = prepare(config, accelerator, diffusion, network)
        state.step = first
        for _ in updates(state, diffusion, fed, lambda step: 1e-2, 0, last, device_batch, 1.0):
            pass
        return state.meter.state_dict(), state.network.state_dict()


def test_each_piece_is_sent_once_in_the_step_before_and_none_after_the_last():
    fed = batches(Watched)
    trained(fed, 3, 6, 2)
    # batch 4, the last of the epoch, has one image
    pieces = {3: [(0, 2), (2, 4), (4, 5)], 4: [(0, 1)], 5: [(0, 2), (2, 4), (4, 5)]}
    expected = []
    for step, spans in pieces.items():
        expected += [("take", step, *span) for span in spans]
        expected += [("send", step + 1, *span) for span in pieces.get(step + 1, [])]
    assert fed.asked == expected


@pytest.mark.parametrize(("first", "last", "device_batch"), [(0, 6, None), (3, 6, 2)])
def test_a_run_fed_ahead_is_the_run_fed_plainly_over_epochs_and_begun_anywhere(
    one_thread, first, last, device_batch
):
    losses, weights = trained(batches(copies=HostCopies()), first, last, device_batch)
    expected, their_weights = trained(batches(), first, last, device_batch)
    assert torch.equal(losses, expected)
    assert all(torch.equal(weights[name], their_weights[name]) for name in weights)


def test_nothing_that_was_sent_for_another_step_or_cut_is_taken():
    ahead, plain = batches(copies=HostCopies()), batches()
    for sent, asked in (
        ((1, 0, 5), (1, 0, 3)),
        ((2, 0, 3), (4, 0, 1)),
        # as when a device_batch search, or a read of an earlier step, comes between
        ((5, 0, 5), (0, 0, 5)),
        ((1, 0, 2), (5, 0, 5)),
    ):
        ahead.send(*sent)
        assert torch.equal(ahead.images(*asked), plain.images(*asked))


def test_what_was_begun_for_earlier_steps_is_dropped_and_what_is_there_begun_once():
    begun, dropped = [], []
    ahead = Ahead(lambda span: begun.append(span) or span, dropped.append)
    for span in ((0, 0, 4), (0, 4, 8), (1, 0, 4), (1, 0, 4)):
        ahead.start(span)
    assert ahead.take((1, 0, 4)) == (1, 0, 4)
    assert ahead.take((1, 4, 8)) == (1, 4, 8)
    assert begun == [(0, 0, 4), (0, 4, 8), (1, 0, 4), (1, 4, 8)]
    assert dropped == [(0, 0, 4), (0, 4, 8)]


def test_only_to_a_gpu_are_pictures_copied_ahead():
    assert copies_to(CPU) is None


@pytest.mark.gpu
@pytest.mark.parametrize("device_batch", [None, 2])
def test_pictures_copied_beside_the_step_are_those_that_lie_on_the_device(device_batch):
    device = torch.device("cuda")
    copied = batches(device=device, copies=copies_to(device))
    lying = batches(device=device, on_device=True)
    for step in range(60):
        spans = [(0, copied.size(step))]
        for span in spans:
            busy = torch.randn(2048, 2048, device=device)
            for _ in range(20):  # keeps the copies and their readers far apart
                busy = busy @ busy / 64
            assert torch.equal(copied.images(step, *span), lying.images(step, *span))
            assert torch.equal(copied.classes(step, *span), lying.classes(step, *span))
        copied.send(step + 1, 0, copied.size(step + 1))
    found, expected = (
        trained(one, 0, 9, device_batch, "cuda")[0]
        for one in (batches(device=device, copies=copies_to(device)), lying)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("device_batch", [None, 2])
def test_no_step_that_pictures_are_copied_beside_waits_for_the_host(device_batch):
    device = torch.device("cuda")
    fed = batches(device=device, copies=copies_to(device))
    trained(fed, 0, 3, device_batch, "cuda")  # what the first call allocates
    for step in range(3, 9):
        for span in [(0, 1)] if fed.size(step) == 1 else [(0, 3), (3, 5)]:
            torch.cuda.set_sync_debug_mode("error")
            try:
                fed.images(step, *span)
                fed.classes(step, *span)
                fed.send(step + 1, 0, fed.size(step + 1))
            finally:
                torch.cuda.set_sync_debug_mode("default")
