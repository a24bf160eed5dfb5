"""A dropout mask depends on the seed, the step, the image's place in the batch and the layer alone.

So a batch may be split in any way, across any number of devices.
"""

import json
import os
import socket

import forked
import numpy as np
import pytest
import torch
from torch.func import functional_call, grad, vmap

from ddpm.config import build
from ddpm.config.compose import compose
from ddpm.config.schema import training_config
from ddpm.data.batches import Batches
from ddpm.models.layers import Dropout
from ddpm.system import randomness
from ddpm.system.processes import accelerator_for
from ddpm.train.loop import backward, micro_batches
from ddpm.train.run import run as train
from ddpm.train.start import notes_on_dropout, prepare

BATCH, SEED, STEP = 13, 3, 7
UNET = [
    *("schedule=linear", "objective=epsilon", "training.conditional=false"),
    *("data=digits", "model.dropout=0.3", "model.base_channels=8", "model.norm_groups=4"),
    *("model.channel_multipliers=[1,2]", "model.attention_resolutions=[8]"),
    "model.num_res_blocks=1",
]


ONE_LEVEL = ["model.channel_multipliers=[1]", "model.attention_resolutions=[]"]


def layer(p, number=0):
    made = Dropout(p)
    made.number = number
    return made


def keys(step, positions, seed=SEED):
    return randomness.stream_keys(randomness.TRAIN_DROPOUT, seed, step, torch.as_tensor(positions))


def mask(step, positions, p=0.3, number=0, shape=(6, 8, 10)):
    return layer(p, number)(torch.ones(len(positions), *shape), keys(step, positions)) != 0


def splitmix(state):
    z = state % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


@pytest.mark.parametrize("shape", [(4, 3, 5), (3, 5, 5)])
def test_a_mask_is_16_bits_an_element_of_a_splitmix64_stream(shape):
    gamma, key = 0x9E3779B97F4A7C15, 0
    for part in (randomness.TRAIN_DROPOUT, SEED, STEP):
        key = splitmix((key ^ part) + gamma)
    start = splitmix((11 ^ key % 2**63) + gamma)
    channels, height, width = shape
    expected = torch.empty(shape, dtype=torch.bool)
    for element, (y, x, c) in enumerate(np.ndindex(height, width, channels)):
        word = splitmix(start + gamma * (2 * 2**40 + element // 4 + 1))
        draw = word >> 16 * (element % 4) & 0xFFFF
        expected[c, y, x] = (draw + 2**15) % 2**16 >= round(0.3 * 2**16)  # as signed int16
    assert torch.equal(mask(STEP, [11], 0.3, 2, shape)[0], expected)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9999])
def test_dropout_zeroes_its_share_and_keeps_the_mean(p, layout):
    x = torch.ones(32, 7, 31, 33).contiguous(memory_format=layout).requires_grad_()
    y = layer(p)(x, keys(0, range(32)))
    y.sum().backward()
    spread = (p * (1 - p) / x.numel()) ** 0.5
    assert (y == 0).double().mean().item() == pytest.approx(p, abs=5 * spread + 2**-17)
    scale = 2**16 / (2**16 - round(p * 2**16))
    torch.testing.assert_close(y[y != 0], torch.full_like(y[y != 0], scale), rtol=1e-6, atol=0)
    assert torch.equal(x.grad, y)
    assert torch.equal(layer(p).eval()(x), x)
    assert torch.equal(layer(0.0)(x, keys(0, range(32))), x)


def correlation(one, other):
    """Returns the correlation in standard deviations of that of independent masks."""
    one, other = one.double() - 0.5, other.double() - 0.5
    return float((one * other).mean() / 0.25 * one.numel() ** 0.5)


def test_masks_of_images_steps_layers_and_neighbours_are_independent():
    shape, places = (8, 32, 32), range(64)
    masks = mask(0, places, 0.5, 0, shape)
    for other in (
        mask(0, [*places[1:], 64], 0.5, 0, shape),  # the next image
        mask(1, places, 0.5, 0, shape),
        mask(0, places, 0.5, 1, shape),
        mask(1, places, 0.5, 1, shape),
        *(masks.roll(1, dim) for dim in (1, 2, 3)),
        *(masks.roll(step, 1) for step in (2, 4)),
    ):
        assert abs(correlation(masks, other)) < 4.5


def network_and_inputs(*overrides):
    generator = torch.Generator().manual_seed(0)
    config = training_config(compose([*UNET, *overrides]))
    network = build.network(config, torch.device("cpu"), 10).train()
    with torch.no_grad():
        for parameter in network.parameters():  # the last convolutions start at zero
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    x = torch.randn(3, 1, 16, 16, generator=generator)
    return network, x, torch.tensor([0, 500, 999])


def test_each_layer_of_a_network_has_masks_of_its_own():
    network, x, t = network_and_inputs("model.dropout=0.5", *ONE_LEVEL)
    seen = []
    for module in network.modules():
        if isinstance(module, Dropout):
            module.register_forward_hook(lambda *call: seen.append(call[2] != 0))
    network(x, t, dropout_keys=keys(0, [0, 1, 2]))
    assert len(seen) == 5  # one on the way down, two in the middle, two on the way up
    for number, one in enumerate(seen):
        for other in seen[:number]:
            assert abs(correlation(one, other)) < 4.5


def test_a_mask_does_not_depend_on_the_batch_or_the_memory_format():
    whole = mask(STEP, range(20))
    assert torch.equal(mask(STEP, [17, 4]), whole[[17, 4]])
    x = torch.randn(20, 6, 8, 10)
    last = x.contiguous(memory_format=torch.channels_last)
    one, other = (layer(0.3)(images, keys(STEP, range(20))) for images in (x, last))
    assert torch.equal(one, other)
    assert torch.equal(one != 0, whole)


def test_images_networks_compute_by_keys_are_the_same_alone_and_by_functional_calls():
    network, x, t = network_and_inputs()
    drawn = keys(STEP, [4, 5, 6])
    out = network(x, t, dropout_keys=drawn)
    assert not torch.allclose(out, network(x, t, dropout_keys=drawn + 1), atol=1e-3)
    for place in range(3):
        one = slice(place, place + 1)
        torch.testing.assert_close(
            network(x[one], t[one], dropout_keys=drawn[one]), out[one], rtol=1e-4, atol=1e-5
        )
    weights = dict(network.named_parameters())
    assert torch.equal(functional_call(network, weights, (x, t), {"dropout_keys": drawn}), out)
    out.square().flatten(1).mean(1).sum().backward()

    def loss(weights, x, t, key):
        given = (x[None], t[None]), {"dropout_keys": key[None]}
        return functional_call(network, weights, *given).square().mean()

    with pytest.warns(UserWarning, match="performance drop"):  # torch warns on a CPU
        each = vmap(grad(loss), in_dims=(None, 0, 0, 0))(weights, x, t, drawn)
    for name, parameter in weights.items():
        torch.testing.assert_close(each[name].sum(0), parameter.grad, rtol=1e-4, atol=1e-5)


def test_a_network_takes_what_it_took_and_one_key_an_image():
    network, x, t = network_and_inputs()
    assert network(x, t).shape == x.shape  # in training, from torch's generator
    evaluated = network.eval()(x, t)
    assert torch.equal(network(x, t, dropout_keys=keys(0, [0, 1, 2])), evaluated)
    with pytest.raises(ValueError, match=r"dropout_keys must be \(3,\), one per image; got \(2,\)"):
        network(x, t, dropout_keys=keys(0, [0, 1]))


class Typed(Batches):
    """Batches of another dtype."""

    dtype = torch.float64

    def images(self, *span):
        return super().images(*span).to(self.dtype)


def loss_and_gradient(dtype, device_batch):
    """Returns both for a batch of 13, split across processes and then into device batches."""
    config = training_config(compose(UNET))
    with accelerator_for("cpu", "fp32") as accelerator:
        network, *_ = network_and_inputs()
        diffusion = build.diffusion(config)
        state = prepare(config, accelerator, diffusion, network.to(dtype))
        pixels = np.random.default_rng(0).integers(0, 256, (40, 1, 16, 16), dtype=np.uint8)
        batches = Typed(pixels, BATCH, SEED, torch.device("cpu"), drop_last=True, flip=False)
        batches.dtype = dtype
        ranks = accelerator.num_processes, accelerator.process_index
        spans = micro_batches(BATCH, *ranks, device_batch)
        total = torch.zeros((), dtype=torch.float64)
        for span in spans[:-1]:
            with accelerator.no_sync(state.model):
                total += backward(state, diffusion, batches, SEED, 2, *span)[1].double().sum()
        total += backward(state, diffusion, batches, SEED, 2, *spans[-1])[1].double().sum()
        gradient = torch.cat([each.grad.flatten() for each in network.parameters()])
        return accelerator.reduce(total) / BATCH, gradient


def one_of_two(rank, port, file):
    torch.set_num_threads(1)
    together = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "RANK": rank, "LOCAL_RANK": rank}
    together |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in together.items()})
    found = [loss_and_gradient(dtype, None) for dtype in (torch.float64, torch.float32)]
    if rank == 0:
        torch.save(found, file)


def on_two_processes(file):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(forked.ROOT / "tests"), prepend=os.pathsep)
        forked.forkserver.ensure_running()
    started = [
        forked.CONTEXT.Process(target=one_of_two, args=(rank, port, file)) for rank in range(2)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(100)
    assert [process.exitcode for process in started] == [0, 0]
    return torch.load(file)


def test_a_batch_gives_one_loss_and_gradient_however_it_is_cut_up(tmp_path):
    two = on_two_processes(tmp_path / "found.pt")
    for number, (dtype, within) in enumerate([(torch.float64, 1e-10), (torch.float32, 1e-5)]):
        loss, gradient = loss_and_gradient(dtype, None)
        assert gradient.norm() > 0.1
        for other_loss, other in (loss_and_gradient(dtype, 5), two[number]):
            assert other_loss.item() == pytest.approx(loss.item(), rel=within)
            assert (other - gradient).norm() < within * gradient.norm()


TRAINED = [
    *(*UNET, *ONE_LEVEL),
    *("training.batch_size=8", "runtime.num_previews=1", "sampler=ddim", "sampler.num_steps=2"),
]


def test_a_run_of_an_earlier_version_says_that_its_masks_were_others(tmp_path):
    composed = compose([*TRAINED, f"outputs={tmp_path}", "training.steps=2"])
    begun = train(composed)
    record = json.loads((begun.path / "run.json").read_text())
    assert record["data"]["notes"] == []
    del record["starts"][0]["computation"]  # as in records of earlier versions
    (begun.path / "run.json").write_text(json.dumps(record))
    for steps in (3, 4):
        train(compose([f"resume={begun.path}", f"training.steps={steps}"]))
        (note,) = begun.record()["data"]["notes"]
        assert note.startswith("an earlier version made the steps up to 2 with other dropout masks")
    config = training_config(composed)
    assert notes_on_dropout(config, begun, 10) == [note]
    config.model["dropout"] = 0.0
    assert notes_on_dropout(config, begun, 10) == []


OWN = """
from torch import nn

class Net(nn.Module):
    def __init__(self, resolution: int, in_channels: int, out_channels: int, p: float):
        super().__init__()
        layers = nn.Conv2d(in_channels, 8, 3), nn.Dropout(p), nn.ConvTranspose2d(8, out_channels, 3)
        self.layers = nn.Sequential(*layers)

    def forward(self, x_t, t):
        return self.layers(x_t)

class Keyed(Net):
    def forward(self, x_t, t, dropout_keys=None):
        assert (dropout_keys is None) != self.training
        return self.layers(x_t)
"""


@pytest.mark.parametrize(("name", "p", "told"), [("Net", 0.2, 1), ("Net", 0, 0), ("Keyed", 0.2, 0)])
def test_a_network_of_ones_own_that_takes_no_keys_trains_and_is_told(
    tmp_path, monkeypatch, name, p, told
):
    (tmp_path / "owndropout.py").write_text(OWN)
    (tmp_path / "my" / "model").mkdir(parents=True)
    (tmp_path / "my" / "model" / "own.yaml").write_text(
        "# @package _global_\nmodel: {resolution: 16, in_channels: '${data.channels}', "
        f"_target_: owndropout.{name}, p: {p}}}\noptimizer: {{lr: 1e-3}}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    words = ["model=own", "data=digits", *TRAINED[-4:], f"outputs={tmp_path}", "training.steps=2"]
    words.append("runtime.trusted_modules=[owndropout]")
    trained = train(compose(words, config_dir=str(tmp_path / "my")))
    notes = trained.record()["data"]["notes"]
    assert len(notes) == told
    for note in notes:
        assert note.startswith("owndropout.Net has dropout masks that depend on how a batch is")
        assert "\n" not in note
