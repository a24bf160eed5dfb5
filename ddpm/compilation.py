"""Whether a network is compiled, by a rule that is printed, and compiling it."""

from typing import Literal

import torch
from torch import nn

GAIN = {"cpu": 0.0}  # share of a training step's time that compiling saved, where it was measured (README, Speed)


def decide(choice: bool | Literal["auto"], device: torch.device) -> tuple[bool, str]:
    """(whether to compile, why).    choice: runtime.compile; "auto" compiles where it was measured to save time, which no number of steps makes up for else."""
    if choice != "auto":
        return choice, f"runtime.compile={str(choice).lower()}"
    gain = GAIN.get(device.type)
    if gain is None:
        return False, f"runtime.compile=auto: what it saves on {device.type} has not been measured; try runtime.compile=true"
    return gain > 0, f"runtime.compile=auto: measured to save {gain:.0%} of a step on {device.type}"


def compile_in_place(network: nn.Module) -> None:
    """Have the network compiled when it is first called. Its weights keep their plain names, and dropout its masks.

    For each shape by itself: the code for all shapes that torch otherwise makes at the second one fails in attention on a CPU (torch 2.13), as in a sweep
    over resolutions.
    """
    import torch._inductor.config

    torch._inductor.config.fallback_random = True
    network.compile(dynamic=False)
