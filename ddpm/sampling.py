"""Drawing images from a network: which weights, which images, in which batches."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ddpm.diffusion import GaussianDiffusion
from ddpm.samplers import Sampler


def draw(
    network: nn.Module,
    weights: dict[str, Tensor],
    diffusion: GaussianDiffusion,
    sampler: Sampler,
    shape: tuple[int, int, int],
    indices: Sequence[int],
    batch_size: int,
    seed: int,
    device: torch.device,
) -> Iterator[Tensor]:
    """The images with these indices, batch by batch: (B, C, H, W) float32 in [-1, 1].

    weights: used in place of the network's own, which stay as they are.    shape: (C, H, W).    An image is a function of (weights, sampler, seed, index).
    """

    def model(x_t: Tensor, t: Tensor) -> Tensor:
        return functional_call(network, weights, (x_t, t))

    was_training = network.training
    network.eval()
    try:
        for start in range(0, len(indices), batch_size):
            yield sampler.sample(model, diffusion, shape, indices[start : start + batch_size], seed, device)
    finally:
        network.train(was_training)
