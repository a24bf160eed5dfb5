"""The forms that are faster on a CPU compute the same function as the plain ones."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ddpm.config import build
from ddpm.config.compose import compose
from ddpm.config.schema import training_config
from ddpm.models import fast
from ddpm.models.layers import Dropout, Upsample
from ddpm.plan.sizes import sizes
from ddpm.system.devices import memory_format

CPU, CUDA, MPS = (torch.device(kind) for kind in ("cpu", "cuda", "mps"))
SMALL = [
    "training.conditional=false",
    *("data=digits", "model.base_channels=8", "model.norm_groups=4", "model.dropout=0.3"),
    *("model.channel_multipliers=[1,2]", "model.attention_resolutions=[8]"),
]


def randn(*shape):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("size", [(4, 4), (3, 5)])
def test_upsampling_is_the_convolution_of_the_enlarged_image(size):
    layer, x = Upsample(6, "torch").double(), randn(2, 6, *size)
    enlarged = F.interpolate(x, scale_factor=2.0, mode="nearest")
    expected = F.conv2d(enlarged, layer.conv.weight, layer.conv.bias, padding=1)
    torch.testing.assert_close(layer(x, torch.empty(0)), expected, rtol=1e-12, atol=1e-12)
    with fast.as_on(CUDA):
        assert torch.equal(layer(x, torch.empty(0)), expected)


def test_a_layer_of_pixels_is_that_layer():
    layer, rows = nn.Linear(6, 5).double(), randn(2, 12, 6)
    expected = F.linear(rows, layer.weight, layer.bias)
    out = fast.linear(layer, rows, torch.Size((3, 4)))
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_dropout_keeps_the_same_elements():
    layer, x, keys = Dropout(0.3), randn(4, 6, 5, 7), torch.arange(4)
    dropped = layer(x, keys)
    with fast.as_on(CUDA):
        plain = layer(x, keys)
    assert 0.1 < (plain == 0).double().mean() < 0.5
    torch.testing.assert_close(dropped, plain, rtol=1e-12, atol=0)


def loss_and_gradients(network):
    x, t, keys = randn(3, 1, 16, 16), torch.tensor([0, 500, 999]), torch.arange(3)
    network.zero_grad()
    loss = (network(x, t, dropout_keys=keys) - x).square().mean()
    loss.backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in network.parameters())]


@pytest.mark.parametrize("settings", [[], ["+model.resample=resblock", "+model.num_heads=2"]])
@pytest.mark.parametrize("device", [CUDA, MPS])
def test_a_network_and_its_gradients_are_the_same_in_plain_forms(monkeypatch, device, settings):
    helps, taken = fast.helps, []
    monkeypatch.setattr(fast, "helps", lambda x: taken.append(helps(x)) or taken[-1])
    config = training_config(compose([*SMALL, *settings]))
    network = build.network(config, CPU, 10).double()
    with torch.no_grad():
        for number, weight in enumerate(network.parameters()):  # the last layers start at zero
            weight += 0.05 * randn(number + 1, *weight.shape)[-1]
    quick = loss_and_gradients(network)
    assert all(taken)
    count = len(taken)
    with fast.as_on(device):
        plain = loss_and_gradients(network)
    assert not any(taken[count:])
    assert count == len(taken) - count > 0
    torch.testing.assert_close(quick, plain, rtol=1e-9, atol=1e-12)


def test_a_plan_counts_the_products_that_a_device_makes():
    """Per input pixel, a transposed convolution takes 16 products and the plain form 36."""
    config = training_config(compose(SMALL))
    upsampling = 2 * (8 * 8) * (16 * 16)  # multiply and add; pixels; channels
    here, there = (sizes(config, device).forward_flops for device in (CPU, CUDA))
    assert there - here == (36 - 16) * upsampling


def test_a_network_lies_in_memory_as_is_fastest_on_its_device():
    assert memory_format(CPU) == torch.channels_last
    assert memory_format(CUDA) == memory_format(MPS) == torch.contiguous_format
