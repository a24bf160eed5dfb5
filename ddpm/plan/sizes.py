"""What a run needs, without running it: parameters, FLOPs, activations and steps.

It also estimates how fast several devices would be.
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

# A backward pass holds this many gradients of the widest activation besides what was saved for it:
# those of a layer's input and output, and a copy in another memory layout. On an H100 with TF32,
# the peak of unet128 at batch 48 is 6% over the estimate with them, and 16% over it without.
GRADIENTS_HELD = 3
# of a training step's time: the backward pass has twice the forward pass's products
BACKWARD_SHARE = 2 / 3


class Sizes(NamedTuple):
    """What a network needs.

    Attributes:
        parameters: Number of parameters.
        forward_flops: FLOPs of one image's forward pass; a multiplication and an addition count
            as 2.
        activation_bytes: Peak float32 activations of one image in a training step.
        attention: (height, width) -> number of attention blocks at this resolution.
    """

    parameters: int
    forward_flops: int
    activation_bytes: int
    attention: dict[tuple[int, int], int]


def sizes(config: Config, device: torch.device) -> Sizes:
    """Returns what a run's network needs on a device, found on the meta device."""
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

    # the difference of two images and one: what depends on weights alone cancels out
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
    """Bytes that a forward pass saves for the backward pass, and that the latter adds."""
    # holding a storage keeps others from getting its address
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage_id(storage)] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), _FusedAttention():
        forward()
    sizes = [storage.nbytes() for number, storage in kept.items() if number not in own]
    return sum(sizes) + GRADIENTS_HELD * max(sizes, default=0)


class _FusedAttention(TorchFunctionMode):
    """Makes attention save what it would on a device; on meta it saves N x N matrices, too."""

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
    """Saves what fused attention kernels save."""

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
    """Returns the updates per epoch, by the published number of images less those held out.

    None if that number is unknown.
    """
    batch = config.training.batch_size
    if config.data.num_images is None:
        return None
    count = round(config.data.num_images * (1 - config.data.holdout))
    return count // batch if config.training.drop_last else -(-count // batch)


def number_of_steps(config: Config) -> int | None:
    """Returns the updates of the whole run, by the published number of images.

    None if that number is needed but unknown.
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
    pass hides what fits into its own time. The estimate assumes that a device is as fast with its
    share of the batch as when `speed` was measured, that all devices are equally fast, and that
    there is no latency. If shares are small it is an upper bound.

    Args:
        speed: Images/s of one device.
        devices: Number of devices.
        batch_size: The global batch.
        gradient_bytes: Bytes of all gradients.
        bandwidth: Bytes/s that each device sends while all do.
    """
    computing = batch_size / devices / speed
    exchanging = 2 * (devices - 1) / devices * gradient_bytes / bandwidth
    return batch_size / (computing + max(0.0, exchanging - BACKWARD_SHARE * computing))
