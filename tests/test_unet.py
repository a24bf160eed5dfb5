import math

import pytest
import torch
from diffusers import UNet2DModel

from ddpm.config import build
from ddpm.config.compose import compose
from ddpm.config.schema import training_config
from ddpm.models.layers import TimestepEmbedding, conv3x3
from ddpm.models.unet import UNet

SMALL = {
    "base_channels": 8,
    "channel_multipliers": [1, 2],
    "attention_resolutions": [8],
    "num_res_blocks": 1,
    "norm_groups": 4,
}


def of_option(name: str) -> tuple[dict, torch.nn.Module]:
    """A model option's settings, and its RGB network on the meta device."""
    config = training_config(compose([f"model={name}", "data=butterflies"]))
    return config.model, build.network(config, torch.device("meta"), num_classes=1)


def published(settings: dict) -> UNet2DModel:
    """diffusers' network with the options of the published google/ddpm-* weights."""
    sides = [
        settings["resolution"] >> level for level in range(len(settings["channel_multipliers"]))
    ]
    attends = [side in settings["attention_resolutions"] for side in sides]
    return UNet2DModel(
        sample_size=settings["resolution"],
        block_out_channels=[
            settings["base_channels"] * multiplier for multiplier in settings["channel_multipliers"]
        ],
        down_block_types=[
            "AttnDownBlock2D" if attention else "DownBlock2D" for attention in attends
        ],
        up_block_types=[
            "AttnUpBlock2D" if attention else "UpBlock2D" for attention in reversed(attends)
        ],
        layers_per_block=settings["num_res_blocks"],
        norm_num_groups=settings["norm_groups"],
        act_fn="silu",
        attention_head_dim=None,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
    )


@pytest.mark.parametrize(
    ("option", "count"),
    [
        ("unet32", 35_746_307),
        ("unet128", 71_436_803),
        ("unet256", 113_673_219),
        ("unet256_large", 255_677_955),
    ],
)
def test_the_papers_networks_have_their_number_of_parameters(option, count):
    assert sum(parameter.numel() for parameter in of_option(option)[1].parameters()) == count


@pytest.mark.parametrize(
    "option", ["quickstart", "unet32", "unet64", "unet128", "unet256", "unet256_large"]
)
def test_each_of_them_has_the_parameters_that_diffusers_gives_it_by_its_names(option):
    settings, network = of_option(option)
    with torch.device("meta"):
        theirs = published(settings)
    assert {name: tensor.shape for name, tensor in network.state_dict().items()} == {
        name: tensor.shape for name, tensor in theirs.state_dict().items()
    }


# the network is convolutional: 256 pixels would test the same, only slower
@pytest.mark.parametrize(("option", "side"), [("unet32", 32), ("unet256", 64)])
def test_the_network_computes_what_diffusers_does_with_the_same_weights(option, side):
    settings, _ = of_option(option)
    generator = torch.Generator().manual_seed(0)
    theirs = published(settings).eval()
    # moves the parameters that start at 0 or 1
    for parameter in theirs.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.01)
    arguments = {name: value for name, value in settings.items() if name != "_target_"}
    ours = UNet(**arguments, out_channels=3).eval()
    ours.load_state_dict(theirs.state_dict())
    x_t, t = torch.randn(2, 3, side, side, generator=generator), torch.tensor([0, 731])
    with torch.inference_mode():
        expected, output = theirs(x_t, t).sample, ours(x_t, t)
    assert (output - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize(("resolution", "channels"), [(16, 3), ((16, 24), 1), ((24, 16), 3)])
def test_the_output_has_the_shape_of_the_input(resolution, channels):
    side = resolution if isinstance(resolution, int) else max(resolution)
    network = UNet(
        resolution, channels, channels, **{**SMALL, "attention_resolutions": [side // 2]}
    )
    x_t = torch.zeros(2, channels, *((side, side) if isinstance(resolution, int) else resolution))
    assert network(x_t, torch.tensor([0, 999])).shape == x_t.shape
    # the longer side decides
    assert any(name.startswith("down_blocks.1.attentions.") for name in network.state_dict())


def test_a_fresh_network_predicts_nearly_nothing():
    network = UNet(16, 3, 3, **SMALL)
    output = network(torch.randn(4, 3, 16, 16), torch.tensor([0, 10, 500, 999]))
    assert output.abs().max() < 1e-3


def test_first_weights_are_uniform_within_the_average_fans_limit():
    """sqrt(6 / (fan_in + fan_out)), where fans include the kernel's area (Glorot & Bengio 2010)."""
    conv = conv3x3(64, 128)
    limit = math.sqrt(6 / (9 * 64 + 9 * 128))
    assert conv.weight.abs().max().item() == pytest.approx(limit, rel=1e-3)
    assert conv.weight.std().item() == pytest.approx(limit / math.sqrt(3), rel=0.01)
    assert conv.bias is not None
    assert not conv.bias.any()


def test_the_timestep_is_sines_then_cosines_of_the_published_frequencies():
    sinusoid = TimestepEmbedding(128, 512).sinusoid(torch.tensor([1, 999]))
    first = {0: 0.841471, 1: 0.760439, 63: 1e-4, 64: 0.540302}
    assert {index: sinusoid[0, index].item() for index in first} == pytest.approx(first, abs=1e-6)
    angle = 999 * 0.86398845
    assert sinusoid[1, [1, 65]].tolist() == pytest.approx(
        [math.sin(angle), math.cos(angle)], abs=1e-4
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"resolution": 15}, "resolution=15 must be divisible by 2"),
        ({"resolution": (16, 1)}, "resolution="),
        ({"attention_resolutions": [7]}, "attention_resolutions has 7, .* 16, 8"),
        ({"channel_multipliers": [1, 0]}, "channel_multipliers has 0"),
        ({"norm_groups": 3}, "channel_multipliers has 1: .* norm_groups=3"),
        ({"base_channels": 2, "norm_groups": 1}, "base_channels=2"),
        ({"num_res_blocks": 0}, "num_res_blocks=0"),
        ({"dropout": 1.0}, r"dropout=1\.0"),
        ({"in_channels": 0}, "in_channels=0"),
    ],
)
def test_sizes_that_do_not_fit_together_are_refused_by_the_argument_to_change(changed, message):
    with pytest.raises(ValueError, match=message):
        UNet(**{"resolution": 16, "in_channels": 3, "out_channels": 3, **SMALL, **changed})
