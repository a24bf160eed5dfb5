"""The networks besides Ho et al.'s: improved DDPM, ADM, and the original README's."""

import math

import pytest
import torch
from diffusers import UNet2DModel
from hydra.utils import instantiate
from torch import Tensor, nn
from weight_folders import randomized

from ddpm.config.compose import compose
from ddpm.config.schema import training_config
from ddpm.models.layers import Downsample
from ddpm.models.unet import UNet
from ddpm.models.unet_readme import ReadmeUNet, TimeMlp

PAPER = {
    "base_channels": 16,
    "channel_multipliers": [1, 2],
    "attention_resolutions": [8],
    "num_res_blocks": 1,
    "norm_groups": 4,
}
IMPROVED = {
    **PAPER,
    **{
        "norm_eps": 1e-5,
        "scale_shift_norm": True,
        "time_embedding": "cos_sin",
        "downsample_padding": "symmetric",
        "init": "torch",
    },
}
ADM = {**IMPROVED, "head_channels": 8, "resample": "resblock"}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def unet(settings: dict, **changed: object) -> UNet:
    return UNet(**{"resolution": 16, "in_channels": 3, "out_channels": 3, **settings, **changed})


def theirs(settings: dict, head_width: int | None) -> UNet2DModel:
    """diffusers' network with the same structure."""
    sides = [16 >> level for level in range(len(settings["channel_multipliers"]))]
    plain, attends = (
        ("Resnet{}sampleBlock2D" if "resample" in settings else "{}Block2D"),
        [side in settings["attention_resolutions"] for side in sides],
    )
    improved = "scale_shift_norm" in settings
    return UNet2DModel(
        sample_size=16,
        block_out_channels=[
            settings["base_channels"] * multiplier for multiplier in settings["channel_multipliers"]
        ],
        down_block_types=[
            "AttnDownBlock2D" if attention else plain.format("Down") for attention in attends
        ],
        up_block_types=[
            "AttnUpBlock2D" if attention else plain.format("Up") for attention in reversed(attends)
        ],
        layers_per_block=settings["num_res_blocks"],
        norm_num_groups=settings["norm_groups"],
        attn_norm_num_groups=settings["norm_groups"],
        act_fn="silu",
        attention_head_dim=head_width,
        downsample_padding=1 if improved else 0,
        flip_sin_to_cos=improved,
        freq_shift=0 if improved else 1,
        norm_eps=1e-5 if improved else 1e-6,
        resnet_time_scale_shift="scale_shift" if improved else "default",
        downsample_type="resnet" if "resample" in settings else "conv",
        upsample_type="resnet" if "resample" in settings else "conv",
        num_class_embeds=settings.get("num_classes"),
    )


@pytest.mark.parametrize(
    ("option", "num_classes", "count"),
    [
        ("improved_unet32", None, 52_546_438),
        ("improved_unet64", None, 121_063_942),
        ("improved_unet64_large", 1000, 273_049_350),
        ("improved_unet256", None, 113_676_678),
    ],
)
def test_the_networks_of_improved_ddpm_have_their_number_of_parameters(option, num_classes, count):
    """They learn the variance, so they have six output channels."""
    assert num_parameters(option, out_channels=6, num_classes=num_classes) == count


@pytest.mark.parametrize(("option", "millions"), [("adm64", 296), ("adm128", 422), ("adm256", 554)])
def test_adm_has_the_size_that_its_paper_prints(option, millions):
    """Dhariwal & Nichol 2021, Table 11, with ImageNet's classes."""
    assert round(num_parameters(option, out_channels=6, num_classes=1000) / 1e6) == millions


def test_the_readmes_network_has_its_number_of_parameters():
    assert num_parameters("unet_readme", out_channels=3) == 58_661_123


def num_parameters(option: str, **arguments: object) -> int:
    settings = training_config(compose([f"model={option}", "data=butterflies"])).model
    with torch.device("meta"):
        network = instantiate(settings, **arguments, _convert_="all")
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("settings", "head_width"),
    [
        pytest.param(PAPER, None, id="paper"),
        pytest.param({**IMPROVED, "num_heads": 4, "channel_multipliers": [1, 1]}, 4, id="improved"),
        pytest.param(
            {**IMPROVED, "head_channels": 8, "num_classes": 10}, 8, id="improved with classes"
        ),
        pytest.param({**ADM, "channel_multipliers": [1, 2, 3]}, 8, id="adm"),
    ],
)
def test_the_network_has_the_names_of_diffusers_and_computes_what_it_does(settings, head_width):
    reference, network = (
        randomized(theirs(settings, head_width), scale=0.05).eval(),
        unet(settings).eval(),
    )
    assert network.state_dict().keys() == reference.state_dict().keys()
    network.load_state_dict(reference.state_dict())
    x_t, t = (
        torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)),
        torch.tensor([0, 731, 999]),
    )
    classes = torch.tensor([0, 9, 9]) if "num_classes" in settings else None
    with torch.inference_mode():
        expected, output = reference(x_t, t, class_labels=classes).sample, network(x_t, t, classes)
    assert (output - expected).abs().max() < 1e-4 * expected.abs().max()


def of_family(family: str) -> tuple[nn.Module, list[Tensor]]:
    """A network of this family, and arguments to call it with."""
    x_t, t, classes = torch.randn(2, 3, 16, 16), torch.tensor([3, 900]), torch.tensor([0, 2])
    if family == "readme":
        return ReadmeUNet(64, 3, 3), [torch.randn(2, 3, 64, 64), t]
    if family == "paper":
        return unet(PAPER, dropout=0.1), [x_t, t]
    settings = {**IMPROVED, "num_heads": 4, "dropout": 0.1} if family == "improved" else ADM
    return unet(settings, num_classes=3), [x_t, t, classes]


@pytest.mark.parametrize("family", ["paper", "improved", "adm", "readme"])
def test_every_parameter_learns(family):
    """Every parameter gets a gradient except the keys' bias, which cancels in the softmax."""
    network, arguments = of_family(family)
    output = randomized(network, scale=0.05)(*arguments)
    assert output.shape == arguments[0].shape
    output.square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any() or name.endswith("to_k.bias"), name


@pytest.mark.parametrize("family", ["paper", "improved", "adm", "readme"])
def test_the_images_layout_lasts_through_the_network(family):
    """A convolution copies its input if the input has another memory layout."""
    network, (x_t, *rest) = of_family(family)
    network.to(memory_format=torch.channels_last)
    lasted: list[bool] = []
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(
                lambda _, inputs: lasted.append(
                    inputs[0].is_contiguous(memory_format=torch.channels_last)
                )
            )
    with torch.inference_mode():
        network(x_t.to(memory_format=torch.channels_last), *rest)
    assert len(lasted) > 10
    assert all(lasted)


@pytest.mark.parametrize("settings", [IMPROVED, ADM], ids=["improved", "adm"])
def test_torch_initialisation_starts_from_exact_zeros(settings):
    """Nichol & Dhariwal's code zeroes the last layer of each residual branch and of the network."""
    network = unet(settings)
    outputs = [
        parameter
        for name, parameter in network.named_parameters()
        if ".conv2." in name or ".to_out." in name or name.startswith("conv_out.")
    ]
    assert len(outputs) > 10
    assert not any(parameter.any() for parameter in outputs)
    assert not network(torch.randn(2, 3, 16, 16), torch.tensor([0, 999])).any()
    assert network.conv_in.bias is not None
    assert network.conv_in.bias.any()


def test_cosines_come_first_where_asked_and_a_rescaled_timestep_may_be_a_fraction():
    """In Nichol & Dhariwal's code, frequency k is 10000^(-k / half): the last is above 1/10000."""
    sinusoid = unet(IMPROVED).time_embedding.sinusoid(torch.tensor([0.25, 999.0]))
    frequencies = [10000 ** (-k / 8) for k in range(8)]
    for row, t in enumerate((0.25, 999.0)):
        expected = [math.cos(t * frequency) for frequency in frequencies] + [
            math.sin(t * frequency) for frequency in frequencies
        ]
        assert sinusoid[row].tolist() == pytest.approx(expected, abs=1e-4)


def test_the_readmes_timestep_is_sines_and_cosines_in_turn():
    sinusoid = TimeMlp(128, 512).sinusoid(torch.tensor([0, 37]))
    expected = [
        turn(37 / 10000 ** (2 * i / 128)) for i in range(64) for turn in (math.sin, math.cos)
    ]
    assert sinusoid[0].tolist() == [0.0, 1.0] * 64
    assert sinusoid[1].tolist() == pytest.approx(expected, abs=1e-5)


def test_the_class_moves_the_output_as_the_timestep_does():
    """The class and timestep embeddings are added before the swish, so one can cancel the other."""
    network = unet(IMPROVED, num_classes=2).eval()
    randomized(network, scale=0.05)
    x_t = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        early, late = network.time_embedding(torch.tensor([5, 800]))
        network.class_embedding.weight.copy_(torch.stack([torch.zeros_like(early), early - late]))
        of_early, of_late = (
            network(x_t, torch.tensor([5]), torch.tensor([0])),
            network(x_t, torch.tensor([800]), torch.tensor([0])),
        )
        undone = network(x_t, torch.tensor([800]), torch.tensor([1]))
    assert not torch.allclose(of_early, of_late, atol=1e-3)
    assert torch.allclose(of_early, undone, atol=1e-5)


@pytest.mark.parametrize("padding", ["same", "symmetric"])
def test_downsampling_pads_where_it_says(padding):
    """A kernel that picks its center shows the padding.

    It reads the odd pixels with "same" and the even ones with "symmetric".
    """
    downsample = Downsample(1, padding)
    with torch.no_grad():
        downsample.conv.weight.zero_()[0, 0, 1, 1] = 1
        downsample.conv.bias.zero_()
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    first = 1 if padding == "same" else 0
    assert torch.equal(downsample(x, torch.zeros(1, 4)), x[..., first::2, first::2])


@pytest.mark.parametrize("resample", ["down", "up"])
def test_a_resampling_block_starts_as_the_plain_resampling(resample):
    """Its residual branch ends in zeros, so a fresh block returns just the resampled input."""
    network = unet(ADM)
    block = (
        network.down_blocks[0].downsamplers[0]
        if resample == "down"
        else network.up_blocks[0].upsamplers[0]
    )
    x = torch.randn(2, block.conv1.in_channels, 8, 8)
    expected = (
        x.unflatten(3, (4, 2)).unflatten(2, (4, 2)).mean(dim=(3, 5))
        if resample == "down"
        else x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    )
    assert torch.allclose(block(x, torch.randn(2, 64)), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_heads": 3}, "num_heads=3 must divide 32"),
        ({"num_heads": 0}, "num_heads=0"),
        ({"head_channels": 12}, "head_channels=12 must divide 32"),
        ({"head_channels": 0}, "head_channels=0"),
        ({"head_channels": 8, "num_heads": 2}, "num_heads=2 and head_channels=8"),
        ({"norm_eps": 0.0}, r"norm_eps=0\.0"),
        ({"num_classes": 0}, "num_classes=0"),
        ({"time_embedding": "sines"}, "time_embedding=sines must be one of sin_cos, cos_sin"),
        ({"downsample_padding": "valid"}, "downsample_padding=valid"),
        ({"resample": "pool"}, "resample=pool"),
        ({"init": "zeros"}, "init=zeros"),
        ({"channel_multipliers": []}, "channel_multipliers="),
    ],
)
def test_values_that_do_not_fit_together_are_refused_by_the_argument_to_change(changed, message):
    with pytest.raises(ValueError, match=message):
        unet(PAPER, **changed)


@pytest.mark.parametrize(
    ("num_classes", "classes", "message"),
    [
        (3, None, "classes must be .*num_classes=3"),
        (3, torch.tensor([1]), r"classes must be \(2,\)"),
        (None, torch.tensor([1, 2]), "num_classes=None: .* takes no classes"),
    ],
)
def test_classes_are_asked_for_exactly_where_the_network_has_them(num_classes, classes, message):
    with pytest.raises(ValueError, match=message):
        unet(PAPER, num_classes=num_classes)(
            torch.zeros(2, 3, 16, 16), torch.tensor([0, 1]), classes
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((48, 3, 3), "resolution=48"),
        (((64, 16), 3, 3), "resolution="),
        ((64, 0, 3), "in_channels=0"),
    ],
)
def test_the_readmes_network_refuses_what_its_five_levels_cannot_take(arguments, message):
    with pytest.raises(ValueError, match=message):
        ReadmeUNet(*arguments)
