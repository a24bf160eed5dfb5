"""What a run needs, without running it, and what several devices are worth.

Its needs are parameters, FLOPs, activations and steps.
"""

from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ddpm.config import build
from ddpm.config.schema import Config
from ddpm.models.layers import AttentionBlock
from ddpm.system.internals import storage_id

# of a training step: the backward pass has twice the products of the forward one
BACKWARD_SHARE = 2 / 3


class Sizes(NamedTuple):
    """What a network needs.

    Attributes:
        parameters: Their count.
        forward_flops: Of one image; a multiplication and an addition count as 2.
        saved_bytes: Float32 activations kept for the backward pass, of one image.
        attention: (height, width) -> number of attention blocks that see it.
    """

    parameters: int
    forward_flops: int
    saved_bytes: int
    attention: dict[tuple[int, int], int]


def sizes(config: Config) -> Sizes:
    """Finds what a run's network needs on the meta device: no memory, no arithmetic."""
    meta = torch.device("meta")
    network = build.network(config, meta, config.data.num_classes or 1).train()
    x, t = (
        torch.zeros(1, config.data.channels, *build.image_size(config.data), device=meta),
        torch.zeros(1, dtype=torch.int64, device=meta),
    )
    inputs = (x, t, t) if config.training.conditional else (x, t)
    saved: dict[int, int] = {}
    own = {id(parameter) for parameter in network.parameters()}

    def note(tensor: Tensor) -> Tensor:
        if id(tensor) not in own:
            storage = tensor.untyped_storage()
            saved[storage_id(storage)] = storage.nbytes()
            kept.append(storage)  # keeps the address from being used again
        return tensor

    kept: list[torch.UntypedStorage] = []
    attention: Counter[tuple[int, int]] = Counter()
    hooks = [
        module.register_forward_pre_hook(
            lambda module, args: attention.update([tuple(args[0].shape[2:])])
        )
        for module in network.modules()
        if isinstance(module, AttentionBlock)
    ]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        network(*inputs)
    for hook in hooks:
        hook.remove()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(*inputs)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return Sizes(parameters, counter.get_total_flops(), sum(saved.values()), dict(attention))


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
