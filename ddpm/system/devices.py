"""Devices: which there are, networks on them, and whether a network is compiled."""

from typing import Literal

import torch
from torch import nn

from ddpm.system.internals import keep_dropout_when_compiled

# share of a training step's time that compiling saved, where it was measured (README, Speed)
GAIN = {"cpu": 0.0}


def decide(choice: bool | Literal["auto"], device: torch.device) -> tuple[bool, str]:
    """Decides whether to compile.

    Args:
        choice: runtime.compile. "auto" compiles only where it was measured to save time; elsewhere
            no number of steps makes up for it.
        device: Where the network runs.

    Returns:
        Whether to compile, and why.
    """
    if choice != "auto":
        return choice, f"runtime.compile={str(choice).lower()}"
    gain = GAIN.get(device.type)
    if gain is None:
        return (
            False,
            f"runtime.compile=auto: what it saves on {device.type} has not been measured; "
            "try runtime.compile=true",
        )
    return gain > 0, f"runtime.compile=auto: measured to save {gain:.0%} of a step on {device.type}"


def compile_in_place(network: nn.Module) -> None:
    """Has the network compiled when it is first called.

    Its weights keep their plain names, and dropout its masks. Each shape is compiled by itself: the
    code for all shapes that torch otherwise makes at the second one fails in attention on a CPU
    (torch 2.13), as in a sweep over resolutions.
    """
    keep_dropout_when_compiled()
    network.compile(dynamic=False)


def to_device(network: nn.Module, device: torch.device) -> nn.Module:
    """Puts the network on the device, its convolutions' weights in channels_last."""
    # torch's stub does not know memory_format of modules
    return network.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def device(name: Literal["auto", "cpu", "cuda", "mps"]) -> torch.device:
    """Returns the device of that name, "auto" for the fastest there is.

    Raises:
        ValueError: If this machine has no such device.
    """
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
