"""Faster CPU forms of plain PyTorch operations, equal up to rounding.

Other devices run the plain operation: on an H100 no difference could be measured.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_as_on: str | None = None


@contextmanager
def as_on(device: torch.device) -> Iterator[None]:
    """Makes networks take the code path of `device`, wherever their tensors are.

    This counts a GPU's operations on the meta device, or checks its code path on a CPU.
    """
    global _as_on
    before, _as_on = _as_on, device.type
    try:
        yield
    finally:
        _as_on = before


def helps(x: Tensor) -> bool:
    """Returns whether these forms are faster on the device of x. Meta counts as a CPU."""
    return (_as_on or x.device.type) in ("cpu", "meta")


def linear(layer: nn.Linear, rows: Tensor, size: torch.Size) -> Tensor:
    """Applies a linear layer to each pixel's channels.

    A 1x1 convolution runs in oneDNN, which uses AVX-512 on CPUs of every vendor. A matrix product
    would run in MKL.

    Args:
        layer: Maps C to C' features.
        rows: (B, H*W, C).
        size: (H, W).

    Returns:
        (B, H*W, C').
    """
    if not helps(rows):
        return layer(rows)
    pixels = rows.unflatten(1, size).permute(0, 3, 1, 2)
    out = F.conv2d(pixels, layer.weight[:, :, None, None], layer.bias)
    return out.permute(0, 2, 3, 1).flatten(1, 2)


def upsample(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Doubles height and width by repeating pixels, then applies a 3x3 convolution.

    The equivalent transposed 4x4 convolution of stride 2 needs 4/9 of the multiplications.

    Args:
        conv: Maps C to C' channels, with padding 1.
        x: (B, C, H, W).

    Returns:
        (B, C', 2H, 2W).
    """
    if not helps(x):
        return conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    return F.conv_transpose2d(x, _transposed(conv.weight), conv.bias, stride=2, padding=1)


def _transposed(weight: Tensor) -> Tensor:
    """Turns an (out, in, 3, 3) kernel into the equivalent (in, out, 4, 4) one.

    Along a side, every output sees one input pixel twice, so those two taps add up.
    """
    weight = weight.transpose(0, 1)
    for side in (2, 3):
        first, middle, last = weight.unbind(side)
        weight = torch.stack([last, middle + last, first + middle, first], side)
    return weight


def keep(x: Tensor, draws: Tensor, least: int, scale: float) -> Tensor:
    """Zeroes the elements of x whose draw is below `least`, and scales the others.

    On a CPU it avoids booleans, which are slow there.

    Args:
        x: Any shape.
        draws: Integers of the shape of x; may be overwritten.
        least: The smallest draw that keeps an element.
        scale: Factor for the elements kept.
    """
    if not helps(x):
        return x * (draws >= least) * scale
    return x * draws.ge_(least).to(x.dtype).mul_(scale)
