"""Finds devices, and moves networks to them."""

import os
from collections.abc import Callable
from typing import Literal, TypeVar

import torch
from torch import nn

from ddpm.system.environment import check_environment

T = TypeVar("T")


def memory_format(device: torch.device) -> torch.memory_format:
    """Returns the memory format of images, noise and convolution weights on a device.

    channels_last is faster on a CPU. On CUDA, torch's GroupNorm makes everything contiguous again,
    which costs more than channels_last gains: a step of unet128 with 64 images takes 269 ms with it
    and 199 ms without (H100, bf16, torch 2.11). Compiled code does not use that GroupNorm, so its
    weights are channels_last everywhere (see ways.py). The meta device counts as a CPU.
    """
    return torch.channels_last if device.type in ("cpu", "meta") else torch.contiguous_format


def to_device(network: nn.Module, device: torch.device) -> nn.Module:
    """Moves the network to the device, and its weights to that device's memory format."""
    return lay(network.to(device), memory_format(device))


def lay(network: nn.Module, layout: torch.memory_format) -> nn.Module:
    """Converts the convolution weights to a memory format, in place."""
    # torch's stubs lack memory_format for modules
    return network.to(memory_format=layout)  # type: ignore[call-overload]


def device(name: Literal["auto", "cpu", "cuda", "mps"]) -> torch.device:
    """Returns the device of that name; "auto" picks the fastest on this machine.

    Everything that computes calls this first, so it also checks the environment.

    Raises:
        ValueError: If this machine has no such device, or `check_environment` refuses a variable.
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
        raise ValueError(f"device={name} is not on this machine; it has {', '.join(here)}")
    return torch.device(here[0] if name == "auto" else name)


def wait_for(device: torch.device) -> None:
    """Waits until the device has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def halve_to_fit(call: Callable[[slice], T], count: int) -> list[T]:
    """Calls `call(slice(0, count))`, and splits the slice in halves when memory runs out.

    Args:
        call: Function that processes one slice of the `count` items.
        count: Number of items.

    Returns:
        The result of each slice, in order.

    Raises:
        OutOfMemoryError: torch's, if a single item does not fit.
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
        # outside the except block: inside it, the error still holds the tensors
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        middle = (part.start + part.stop) // 2
        parts += [slice(middle, part.stop), slice(part.start, middle)]
    return found


def cores() -> int:
    """Returns the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
