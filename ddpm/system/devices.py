"""Devices: which there are, and networks on them."""

import os
from collections.abc import Callable
from typing import Literal, TypeVar

import torch
from torch import nn

from ddpm.system.environment import check_environment

T = TypeVar("T")


def memory_format(device: torch.device) -> torch.memory_format:
    """Returns how images, noise and convolutions' weights lie in memory on a device.

    channels_last is faster on a CPU. On CUDA torch's GroupNorm makes everything contiguous again,
    which costs more than channels_last gains: unet128 takes 269 ms a step of 64 images with it and
    199 ms without (H100, bf16, torch 2.11). Compiled code has no such GroupNorm, and its weights
    are channels_last everywhere (see ways.py). The meta device stands for a CPU.
    """
    return torch.channels_last if device.type in ("cpu", "meta") else torch.contiguous_format


def to_device(network: nn.Module, device: torch.device) -> nn.Module:
    """Puts the network on the device, its convolutions' weights as memory_format says."""
    return lay(network.to(device), memory_format(device))


def lay(network: nn.Module, layout: torch.memory_format) -> nn.Module:
    """Has its convolutions' weights lie in memory so, in place."""
    # torch's stub does not know memory_format of modules
    return network.to(memory_format=layout)  # type: ignore[call-overload]


def device(name: Literal["auto", "cpu", "cuda", "mps"]) -> torch.device:
    """Returns the device of that name, "auto" for the fastest there is.

    All that computes asks for it first, so the environment is checked here.

    Raises:
        ValueError: If this machine has no such device, or see `check_environment`.
    """
    check_environment()
    here = [
        kind
        for kind, found in (
            ("cuda", torch.cuda.is_available()),
            ("mps", torch.backends.mps.is_available()),
            ("cpu", True),
        )
        if found
    ]
    if name != "auto" and name not in here:
        raise ValueError(f"device={name} is not on this machine; there are {', '.join(here)}")
    return torch.device(here[0] if name == "auto" else name)


def wait_for(device: torch.device) -> None:
    """Waits until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def halve_to_fit(call: Callable[[slice], T], count: int) -> list[T]:
    """Returns call(slice(0, count)), or what its halves give where the device's memory runs out.

    Args:
        call: Works on these of `count` things.
        count: How many there are.

    Raises:
        OutOfMemoryError: torch's, if one of them is too many.
    """
    parts, found = [slice(0, count)], []
    while parts:
        part = parts.pop()
        try:
            found.append(call(part))
            continue
        except torch.OutOfMemoryError:
            if part.stop - part.start <= 1:
                raise
        # outside the except block, where the error would still hold the tensors
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        middle = (part.start + part.stop) // 2
        parts += [slice(middle, part.stop), slice(part.start, middle)]
    return found


def cores() -> int:
    """Returns the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
