"""What makes it faster never changes what is computed."""

import pytest
import torch
from torch.nn import functional as F

from ddpm import build
from ddpm.cli import compose
from ddpm.compilation import compile_in_place, decide
from ddpm.config import training_config
from ddpm.models.layers import Upsample

CPU = torch.device("cpu")
SMALL = ["model.base_channels=8", "model.norm_groups=4", "model.channel_multipliers=[1,2]", "model.attention_resolutions=[8]"]


def network(*overrides):
    return build.network(training_config(compose(["data=digits", *SMALL, *overrides])), CPU, 10)


def inputs(count=3):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 1, 16, 16, generator=generator), torch.tensor([0, 500, 999])[:count]


def loss_and_gradients(net, x, t):
    net.zero_grad()
    loss = (net(x, t) - x).square().mean()
    loss.backward()
    return loss.detach(), [parameter.grad.clone() for parameter in net.parameters()]


def test_the_layout_of_weights_and_images_changes_nothing_but_rounding():
    x, t = inputs()
    loss, gradients = loss_and_gradients(network(), x.contiguous(memory_format=torch.channels_last), t)
    plain = network().to(memory_format=torch.contiguous_format)
    expected_loss, expected = loss_and_gradients(plain, x, t)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", [(4, 4), (3, 5)])
def test_upsampling_with_fewer_products_is_the_convolution_of_the_enlarged_image(size):
    layer = Upsample(6, "torch").double()
    x = torch.randn(2, 6, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), layer.conv.weight, layer.conv.bias, padding=1)
    torch.testing.assert_close(layer(x, torch.empty(0)), expected, rtol=1e-12, atol=1e-12)


def test_bfloat16_autocast_keeps_the_loss_within_its_precision():
    x, t = inputs()
    net = network()
    expected = (net(x, t) - x).square().mean()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = net(x, t)
    assert (out.float() - x).square().mean().item() == pytest.approx(expected.item(), rel=2e-2)


def test_a_compiled_network_computes_the_same_and_its_weights_keep_their_names():
    x, t = inputs(2)
    plain, compiled = (network("model.channel_multipliers=[1]", "model.attention_resolutions=[]", "model.num_res_blocks=1") for _ in range(2))
    compile_in_place(compiled)
    loss, gradients = loss_and_gradients(compiled, x, t)
    expected_loss, expected = loss_and_gradients(plain, x, t)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradients, expected, rtol=1e-3, atol=1e-5)
    assert compiled.state_dict().keys() == plain.state_dict().keys()


def test_whether_to_compile_is_decided_by_what_was_measured_and_said():
    assert decide("auto", CPU) == (False, "runtime.compile=auto: on cpu it saves 0% of a step, after minutes of compiling")
    assert decide("auto", torch.device("cuda"))[0] is False
    assert "not been measured" in decide("auto", torch.device("cuda"))[1]
    assert decide(True, CPU)[0] is True
    assert decide(False, torch.device("cuda"))[0] is False
