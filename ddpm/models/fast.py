"""What is faster on a CPU than the plain line that it stands for, and computes the same.

Elsewhere the plain line runs: on an H100 no difference could be measured.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_as_on: str | None = None


@contextmanager
def as_on(device: torch.device) -> Iterator[None]:
    """Has networks run what they would on `device`, wherever they lie.

    So what a GPU computes can be counted on the meta device, and compared on a CPU.
    """
    global _as_on
    before, _as_on = _as_on, device.type
    try:
        yield
    finally:
        _as_on = before


def helps(x: Tensor) -> bool:
    """Whether x lies where these forms are faster. The meta device stands for a CPU."""
    return (_as_on or x.device.type) in ("cpu", "meta")


def linear(layer: nn.Linear, rows: Tensor, size: torch.Size) -> Tensor:
    """Applies a layer to each pixel's channels.

    As a 1x1 convolution it is oneDNN's, which uses AVX-512 on every maker's processors; the product
    of matrices is MKL's.

    Args:
        layer: From C to C' features.
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
    """Doubles each pixel both ways, then applies a 3x3 convolution.

    As a transposed 4x4 convolution of stride 2 it makes 4/9 of the products.

    Args:
        conv: From C to C' channels, with a padding of 1.
        x: (B, C, H, W).

    Returns:
        (B, C', 2H, 2W).
    """
    if not helps(x):
        return conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    return F.conv_transpose2d(x, _transposed(conv.weight), conv.bias, stride=2, padding=1)


def _transposed(weight: Tensor) -> Tensor:
    """Turns (out, in, 3, 3) into (in, out, 4, 4).

    An output sees an input pixel twice along a side, so two taps add up.
    """
    weight = weight.transpose(0, 1)
    for side in (2, 3):
        first, middle, last = weight.unbind(side)
        weight = torch.stack([last, middle + last, first + middle, first], side)
    return weight


def keep(x: Tensor, draws: Tensor, least: int, scale: float) -> Tensor:
    """Keeps, scaled, the elements of x whose draw is at least `least`, and zeroes the others.

    Booleans are slow on a CPU.

    Args:
        x: Of any shape.
        draws: Integers of the shape of x; may be written over.
        least: The smallest draw that keeps an element.
        scale: Of those kept.
    """
    if not helps(x):
        return x * (draws >= least) * scale
    return x * draws.ge_(least).to(x.dtype).mul_(scale)
