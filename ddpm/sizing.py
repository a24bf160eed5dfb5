"""What a network needs, found without memory and without arithmetic."""

from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ddpm import build
from ddpm.config import Config
from ddpm.models.layers import AttentionBlock


class Sizes(NamedTuple):
    """What a network needs. parameters: count.    forward_flops: of one image, a multiplication and an addition counting as 2.    saved_bytes: float32
    activations kept for the backward pass, of one image.    attention: (height, width) -> number of attention blocks that see it."""

    parameters: int
    forward_flops: int
    saved_bytes: int
    attention: dict[tuple[int, int], int]


def sizes(config: Config) -> Sizes:
    """What the network of a run needs, found on the meta device: no memory, no arithmetic."""
    meta = torch.device("meta")
    network = build.network(config, meta, config.data.num_classes or 1).train()
    x, t = torch.zeros(1, config.data.channels, *build.image_size(config.data), device=meta), torch.zeros(1, dtype=torch.int64, device=meta)
    inputs = (x, t, t) if config.training.conditional else (x, t)
    saved: dict[int, int] = {}
    own = {id(parameter) for parameter in network.parameters()}

    def note(tensor: Tensor) -> Tensor:
        if id(tensor) not in own:
            storage = tensor.untyped_storage()
            saved[storage._cdata] = storage.nbytes()
            kept.append(storage)  # keeps the address from being used again
        return tensor

    kept: list[torch.UntypedStorage] = []
    attention: Counter[tuple[int, int]] = Counter()
    hooks = [
        module.register_forward_pre_hook(lambda module, args: attention.update([tuple(args[0].shape[2:])]))
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
