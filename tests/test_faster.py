"""Optimizations never change results."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ddpm.config import build
from ddpm.config.compose import compose
from ddpm.config.schema import training_config
from ddpm.system import ways

CPU = torch.device("cpu")
SMALL = [
    *("schedule=linear", "objective=epsilon", "training.conditional=false"),
    "model.base_channels=8",
    "model.norm_groups=4",
    "model.channel_multipliers=[1,2]",
    "model.attention_resolutions=[8]",
]


def network(*overrides):
    return build.network(training_config(compose(["data=digits", *SMALL, *overrides])), CPU, 10)


def inputs(count=3):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 1, 16, 16, generator=generator), torch.tensor([0, 500, 999])[:count]


def loss_and_gradients(net, x, t, **given):
    net.zero_grad()
    loss = (net(x, t, **given) - x).square().mean()
    loss.backward()
    return loss.detach(), [parameter.grad.clone() for parameter in net.parameters()]


def test_the_layout_of_weights_and_images_changes_nothing_but_rounding():
    x, t = inputs()
    loss, gradients = loss_and_gradients(
        network(), x.contiguous(memory_format=torch.channels_last), t
    )
    plain = network().to(memory_format=torch.contiguous_format)
    expected_loss, expected = loss_and_gradients(plain, x, t)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-6)


class LayoutCopies(TorchDispatchMode):
    """Records operations that read images in one memory layout and write them in the other.

    A tensor counts as images if it has `batch` entries. The names are kept in `found`.
    """

    def __init__(self, batch):
        super().__init__()
        self.batch, self.found = batch, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if (
            len({x.stride(1) == 1 for x in tree_leaves((args, out)) if self.is_image(x)}) > 1
            and not func.is_view
        ):
            self.found.append(str(func))
        return out

    def is_image(self, x):
        return (
            isinstance(x, torch.Tensor)
            and x.dim() == 4
            and len(x) == self.batch
            and x.shape[1] > 1
            and x.shape[2:] != (1, 1)
        )


@pytest.mark.parametrize(
    "settings",
    [["model.dropout=0.1"], ["+model.scale_shift_norm=true"], ["+model.resample=resblock"]],
)
def test_a_training_step_copies_nothing_inside_the_network_into_another_layout(settings):
    config = training_config(compose(["data=digits", *SMALL, *settings]))
    net, diffusion = network(*settings), build.diffusion(config)
    x0, noise = torch.randn(2, 5, 1, 16, 16).unbind()
    with LayoutCopies(batch=5) as copies:
        model = partial(net, dropout_keys=torch.arange(5))
        diffusion.losses(model, x0, torch.arange(5), noise).sum().backward()
    assert copies.found == []


def test_bfloat16_autocast_keeps_the_loss_within_its_precision():
    x, t = inputs()
    net = network()
    expected = (net(x, t) - x).square().mean()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = net(x, t)
    assert (out.float() - x).square().mean().item() == pytest.approx(expected.item(), rel=2e-2)


def test_the_compiler_sees_the_whole_network_at_once():
    torch._dynamo.reset()
    given = {"dropout_keys": torch.arange(3)}
    seen = torch._dynamo.explain(network("model.dropout=0.3"))(*inputs(), **given)
    assert (seen.graph_count, seen.graph_break_count) == (1, 0), seen.break_reasons


def test_a_compiled_network_computes_the_same_and_its_weights_keep_their_names():
    x, t = inputs(2)
    plain, compiled = (
        network(
            "model.channel_multipliers=[1]",
            "model.attention_resolutions=[]",
            "model.num_res_blocks=1",
            "model.dropout=0.3",
        )
        for _ in range(2)
    )
    ways.put(compiled, "compiled")
    # compiled code must not treat keys as constants
    for keys in (torch.tensor([5, -6]), torch.tensor([7, 2**62])):
        loss, gradients = loss_and_gradients(compiled, x, t, dropout_keys=keys)
        expected_loss, expected = loss_and_gradients(plain, x, t, dropout_keys=keys)
        torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(gradients, expected, rtol=1e-3, atol=1e-5)
    assert compiled.state_dict().keys() == plain.state_dict().keys()


def test_dropout_of_torchs_own_draws_the_same_when_compiled():
    outs = []
    for compiles in (False, True):
        layer = nn.Dropout(0.3)
        if compiles:
            ways.put(layer, "compiled")
        torch.manual_seed(0)
        outs.append(layer(torch.ones(50)))
    assert torch.equal(*outs)


def test_networks_of_several_resolutions_are_each_compiled_for_their_own_shapes(monkeypatch):
    """Code for any resolution, which torch would make of the second, does not compile."""
    seen = []

    def compiler(graph, inputs):
        seen.append([size for x in inputs if x.dim() == 4 for size in x.shape])
        return graph

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=compiler))
    torch._dynamo.reset()
    for resolution in (16, 32):
        net = network(f"model.resolution={resolution}", "model.attention_resolutions=[]")
        ways.put(net, "compiled")
        x = torch.randn(2, 1, resolution, resolution)
        assert net(x, torch.zeros(2, dtype=torch.int64)).shape == x.shape
    assert len(seen) == 2
    for sizes, resolution in zip(seen, (16, 32), strict=True):
        assert all(type(size) is int for size in sizes)
        assert resolution in sizes
