"""Fitting into a device's memory never changes results."""

import pytest
import torch

from ddpm.config import build
from ddpm.config.compose import compose
from ddpm.config.schema import training_config
from ddpm.models.layers import takes_dropout_keys
from ddpm.train.device_batch import halve_until_it_fits


def attempt(limit, tried):
    def call(size):
        tried.append(size)
        if size > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")

    return call


@pytest.mark.parametrize(
    ("share", "limit", "expected"), [(6, 100, [6]), (64, 20, [64, 32, 16]), (7, 1, [7, 4, 2, 1])]
)
def test_the_batch_is_halved_until_it_fits(share, limit, expected):
    tried = []
    assert halve_until_it_fits(share, attempt(limit, tried), lambda fits: fits) == expected[-1]
    assert tried == expected


def test_all_processes_take_what_fits_on_each():
    tried = []
    elsewhere = iter([False, False, True])  # another device has less memory
    assert halve_until_it_fits(32, attempt(100, tried), lambda fits: fits and next(elsewhere)) == 8
    assert tried == [32, 16, 8]


def test_not_even_one_image_is_one_line():
    with pytest.raises(ValueError, match="one image does not fit"):
        halve_until_it_fits(4, attempt(0, []), lambda fits: fits)


MODELS = {
    "unet": [
        "training.conditional=false",
        "model.base_channels=8",
        "model.norm_groups=4",
        "model.channel_multipliers=[1,2,2]",
        "model.attention_resolutions=[8]",
        "model.dropout=0.2",
    ],
    "readme": ["model=unet_readme", "model.resolution=32"],
}


def kept_and_gradients(*overrides):
    """Returns (bytes that the forward pass keeps for the backward pass, gradients)."""
    config = training_config(compose(["data=digits", *overrides]))
    network = build.network(config, torch.device("cpu"), 10).train()
    kept = {}
    own = {parameter.data_ptr() for parameter in network.parameters()}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = torch.randn(
        2, 1, *build.image_size(config.data), generator=torch.Generator().manual_seed(0)
    )
    given = {"dropout_keys": torch.tensor([5, -6])} if takes_dropout_keys(network) else {}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = network(x, torch.tensor([3, 900]), **given)
    size = sum(size for pointer, size in kept.items() if pointer not in own)
    (out * x).sum().backward()
    return size, [parameter.grad for parameter in network.parameters()]


@pytest.mark.parametrize("family", MODELS)
def test_what_is_computed_again_takes_less_memory_and_gives_the_same_gradients(family):
    size, expected = kept_and_gradients(*MODELS[family])
    less, found = kept_and_gradients(*MODELS[family], "runtime.recompute=[0,1]")
    assert less < 0.8 * size
    for gradient, other in zip(found, expected, strict=True):
        assert torch.equal(gradient, other)


def test_a_level_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"runtime\.recompute has 3; the levels are 0 to 2"):
        build.network(training_config(compose(["runtime.recompute=[3]"])), torch.device("meta"), 10)
