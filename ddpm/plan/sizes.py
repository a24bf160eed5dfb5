"""What a run needs, without running it, and what several devices are worth.

Its needs are parameters, FLOPs, activations and steps.
"""

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ddpm.config import build
from ddpm.config.schema import Config
from ddpm.models import fast
from ddpm.models.layers import AttentionBlock, takes_dropout_keys
from ddpm.system.internals import storage_id
from ddpm.train.costs import forward_flops

# so many gradients of the widest activation does a backward pass hold besides what is kept for it:
# of what goes in, of what comes out, and a copy in another layout. On an H100, TF32, without it the
# peak of unet128 at batch 48 is 16% over what is said here, with it 6%
GRADIENTS_HELD = 3
# of a training step: the backward pass has twice the products of the forward one
BACKWARD_SHARE = 2 / 3


class Sizes(NamedTuple):
    """What a network needs.

    Attributes:
        parameters: Their count.
        forward_flops: Of one image; a multiplication and an addition count as 2.
        activation_bytes: Float32 activations of one image at most at once, in a training step.
        attention: (height, width) -> number of attention blocks that see it.
    """

    parameters: int
    forward_flops: int
    activation_bytes: int
    attention: dict[tuple[int, int], int]


def sizes(config: Config, device: torch.device) -> Sizes:
    """Finds what a run's network needs on a device, without memory or arithmetic."""
    with fast.as_on(device):
        return _sizes(config, device)


def _sizes(config: Config, device: torch.device) -> Sizes:
    meta = torch.device("meta")
    network = build.network(config, meta, config.data.num_classes or 1).train()
    shape = (config.data.channels, *build.image_size(config.data))

    def call(count: int) -> None:
        x = torch.zeros(count, *shape, device=meta)
        t = torch.zeros(count, dtype=torch.int64, device=meta)
        given = {"classes": t} if config.training.conditional else {}
        network(x, t, **given, **({"dropout_keys": t} if takes_dropout_keys(network) else {}))

    # what is made of the weights alone is not an image's
    own = {storage_id(parameter.untyped_storage()) for parameter in network.parameters()}
    one, two = (_activation_bytes(partial(call, count), own) for count in (1, 2))
    attention: Counter[tuple[int, int]] = Counter()
    hooks = [
        module.register_forward_pre_hook(
            lambda module, args: attention.update([tuple(args[0].shape[2:])])
        )
        for module in network.modules()
        if isinstance(module, AttentionBlock)
    ]
    with torch.no_grad():
        call(1)
    for hook in hooks:
        hook.remove()
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return Sizes(parameters, forward_flops(config, device), two - one, dict(attention))


def _activation_bytes(forward: Callable[[], None], own: set[int]) -> int:
    """What a forward pass keeps for the backward pass, besides the weights, and this adds."""
    kept: dict[int, torch.UntypedStorage] = {}  # kept, no other gets its address

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage_id(storage)] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), _FusedAttention():
        forward()
    sizes = [storage.nbytes() for number, storage in kept.items() if number not in own]
    return sum(sizes) + GRADIENTS_HELD * max(sizes, default=0)


class _FusedAttention(TorchFunctionMode):
    """Has attention keep what it does on a device; on meta it keeps its matrices of N x N too."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return _Attention.apply(*args[:3])
        return func(*args, **(kwargs or {}))


class _Attention(torch.autograd.Function):
    """Keeps what the fused kernels of attention do."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out


def images_at_once(config: Config) -> int:
    """Returns how many images one device takes at once, if they fit its memory."""
    return (
        config.training.batch_size
        if config.runtime.device_batch == "auto"
        else min(config.runtime.device_batch, config.training.batch_size)
    )


def steps_per_epoch(config: Config) -> int | None:
    """Returns the updates of one pass over the published number of images.

    What is about held out is taken off. None if that number is not known.
    """
    batch = config.training.batch_size
    if config.data.num_images is None:
        return None
    count = round(config.data.num_images * (1 - config.data.holdout))
    return count // batch if config.training.drop_last else -(-count // batch)


def number_of_steps(config: Config) -> int | None:
    """Returns the updates of the whole run, by the published number of images.

    None if that number is needed and not known.
    """
    if config.training.steps is not None:
        return config.training.steps
    of_epoch = steps_per_epoch(config)
    return of_epoch * (config.training.epochs or 0) if of_epoch is not None else None


def expected_speed(
    speed: float, devices: int, batch_size: int, gradient_bytes: int, bandwidth: float
) -> float:
    """Estimates the images/s of devices that share a global batch, from the images/s of one.

    A ring all-reduce sends 2 (n - 1) / n of the gradients from each of n devices, and the backward
    pass hides what fits into its own time. This assumes that a device is as fast with its share of
    the batch as with what `speed` was measured with, that all are equally fast, and no latency. It
    is an upper bound where shares are small.

    Args:
        speed: Images/s of one device.
        devices: How many.
        batch_size: The global batch.
        gradient_bytes: Of all gradients.
        bandwidth: Bytes/s that a device sends while all do.
    """
    computing = batch_size / devices / speed
    exchanging = 2 * (devices - 1) / devices * gradient_bytes / bandwidth
    return batch_size / (computing + max(0.0, exchanging - BACKWARD_SHARE * computing))
