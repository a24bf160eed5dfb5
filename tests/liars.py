"""A network that errs, hangs or dies in the other memory layout, and functions that do the same."""

import os
import signal
import time

import torch
from torch import nn
from torch.nn import functional as F


class OnePercent(torch.autograd.Function):
    """The identity, with a gradient that is 1% too large."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return 1.01 * gradient


class Net(nn.Module):
    def __init__(self, in_channels, out_channels, resolution, lie):
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, 8, 3, padding=1)
        self.middle = nn.Conv2d(8, 8, 3, padding=1)
        self.conv_out = nn.Conv2d(8, out_channels, 3, padding=1)
        self.lie, self.calls = lie, 0

    def forward(self, x_t, t):
        weight, out = self.middle.weight, 1.0
        if not weight.is_contiguous(memory_format=torch.channels_last) and self.lie:
            weight, out = self.lies(weight)
        h = F.conv2d(F.silu(self.conv_in(x_t)), weight, self.middle.bias, padding=1)
        return out * self.conv_out(F.silu(h))

    def lies(self, weight):
        self.calls += 1
        if self.lie == "gradient":
            return OnePercent.apply(weight), 1.0
        if self.lie == "loss":
            return weight, 1.001
        if self.lie == "second":
            return weight, float("nan") if self.calls == 2 else 1.0
        if self.lie == "later":
            return weight, 1.001 if self.calls > 5 else 1.0
        hangs_or_dies(self.lie)
        return weight, 1.0


def hangs_or_dies(how):
    if how == "raises":
        raise RuntimeError("no kernel image is available\nand more")
    if how == "hangs":
        time.sleep(1000)
    if how == "dies":
        os.kill(os.getpid(), signal.SIGSEGV)
    if how == "eats":
        kept = [bytearray(os.urandom(1)) * (1 << 28) for _ in range(8)]
        time.sleep(1000)
        del kept
    return {"done": how}
