"""What trials of training and of sampling need: a network without zeros, and timing."""

import time
from collections.abc import Callable

import torch
from torch import nn

ROUNDS, SECONDS = 5, 2.0


def fill(network: nn.Module) -> None:
    """Fills parameters that start at zero, since the gradients before them would vanish."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))


def rounds(work: Callable[[], object]) -> list[float]:
    """Returns seconds per call of `work`, one value per round, after two calls to warm up."""
    work()
    began = time.perf_counter()
    work()
    once = time.perf_counter() - began
    count = max(1, int(SECONDS / ROUNDS / max(once, 1e-6)))
    found = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        for _ in range(count):
            work()
        found.append((time.perf_counter() - began) / count)
    return found
