"""Files of improved-diffusion and guided-diffusion: what was trained there computes the same here.

None of the published files is here; a network in their layout stands for them.
"""

import argparse
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from published_network import GROUPS, Network
from safetensors.torch import save_file
from weight_folders import randomized

from ddpm.config.compose import compose
from ddpm.models.unet import UNet
from ddpm.runs import checkpoint
from ddpm.runs.folder import RunFolder
from ddpm.runs.identity import identity
from ddpm.sample.run import run as sample
from ddpm.train.run import run as train
from ddpm.train.which import which_run
from ddpm.weights.published import Published, names

pytestmark = pytest.mark.usefixtures("one_thread")  # networks as small as these are slower on two
CHOICES = {  # of guided-diffusion's flags, the first value improved-diffusion's
    "scale_shift": (False, True),
    "updown": (False, True),
    "whole": (False, True),
    "classes": (None, 5),
    "head_channels": (None, 8),
    "out": (3, 6),
    "half": (False, True),
}
RESOLUTION = 8


def ours(scale_shift=False, updown=False, classes=None, head_channels=None, out=3, **changed):
    """The arguments of UNet for such a network."""
    return {
        "resolution": RESOLUTION,
        "in_channels": 3,
        "out_channels": out,
        "base_channels": 16,
        "channel_multipliers": [1, 2],
        "attention_resolutions": [RESOLUTION // 2],
        "num_res_blocks": 1,
        "norm_groups": GROUPS,
        "norm_eps": 1e-5,
        "num_heads": 2 if head_channels is None else 1,
        "head_channels": head_channels,
        "scale_shift_norm": scale_shift,
        "time_embedding": "cos_sin",
        "downsample_padding": "symmetric",
        "resample": "resblock" if updown else "conv",
        "num_classes": classes,
        **changed,
    }


def saved(file: Path, half: bool = False, seed: int = 0, **choices) -> Network:
    """A network in the published layout, and its file."""
    torch.manual_seed(seed)
    network = randomized(Network(**choices)).eval()
    network = network.half().float() if half else network
    torch.save((network.half() if half else network).state_dict(), file)
    return network.float()


def read(file: Path, arguments: dict, whole: bool = False) -> UNet:
    network = UNet(**arguments)
    source = Published(f"from={file}", file, "whole" if whole else "by_head")
    network.load_state_dict(source.weights_for(network, arguments))
    return network.eval()


@pytest.mark.parametrize("choices", itertools.product(*CHOICES.values()))
def test_a_published_network_computes_here_what_it_computed_there(tmp_path, choices):
    chosen = dict(zip(CHOICES, choices, strict=True))
    theirs = saved(tmp_path / "model.pt", **chosen).double()
    whole, _ = chosen.pop("whole"), chosen.pop("half")
    network = read(tmp_path / "model.pt", ours(**chosen), whole).double()
    x_t = torch.randn(2, 3, RESOLUTION, RESOLUTION, dtype=torch.float64)
    classes = [] if chosen["classes"] is None else [torch.tensor([4, 0])]
    with torch.inference_mode():
        expected = theirs(x_t, torch.tensor([3, 999]), *classes)
        found = network(x_t, torch.tensor([3, 999]), *classes)
    assert (found - expected).abs().max() < 1e-10 * expected.abs().max()


@pytest.mark.parametrize(
    "shape",
    [
        {"multipliers": (1, 1, 2, 2), "blocks": 3, "factors": (2, 3)},
        {"multipliers": (1, 2, 3), "blocks": 2, "factors": (0, 1, 2), "updown": True},
        {"multipliers": (2,), "blocks": 2, "factors": ()},
    ],
    ids=str,
)
def test_every_published_tensor_is_used_once_and_every_one_of_ours_filled_once(tmp_path, shape):
    theirs = saved(tmp_path / "model.pt", classes=4, **shape)
    arguments = ours(
        updown=shape.get("updown", False),
        classes=4,
        channel_multipliers=list(shape["multipliers"]),
        num_res_blocks=shape["blocks"],
        attention_resolutions=[RESOLUTION >> factor for factor in shape["factors"]],
    )
    network = read(tmp_path / "model.pt", arguments)
    table = names(network)
    assert sorted(table) == sorted(theirs.state_dict())
    assert sorted(name for mine in table.values() for name in mine) == sorted(network.state_dict())
    x_t, t = torch.randn(1, 3, RESOLUTION, RESOLUTION), torch.tensor([321])
    with torch.inference_mode():
        expected, found = (one(x_t, t, torch.tensor([1])) for one in (theirs, network))
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
