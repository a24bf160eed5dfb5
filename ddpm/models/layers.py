"""Building blocks shared by the networks.

Parameters are named as in diffusers, so weights move in both directions without renaming.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ddpm.models import fast
from ddpm.system import randomness

Init = Literal["fan_avg", "torch"]
TimeOrder = Literal["sin_cos", "cos_sin"]
Padding = Literal["same", "symmetric"]
DROPOUTS = (
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    *(nn.AlphaDropout, nn.FeatureAlphaDropout),
)
WORDS_OF_A_LAYER = 2**40  # reserved in an image's stream; one word decides four elements


def init_(layer: nn.Conv2d | nn.Linear, init: Init, zero: bool = False) -> None:
    """Initializes a layer that PyTorch has just constructed.

    Args:
        layer: The layer, changed in place.
        init: "fan_avg": uniform, scaled by the average fan, zero bias (Ho et al.'s code). "torch":
            PyTorch's default (Nichol & Dhariwal's code).
        zero: Start at zero: scale 1e-10 instead of 1 for "fan_avg", exact zeros for "torch".
    """
    if init == "fan_avg":
        nn.init.xavier_uniform_(layer.weight, gain=math.sqrt(1e-10 if zero else 1.0))
    elif zero:
        nn.init.zeros_(layer.weight)
    if layer.bias is not None and (init == "fan_avg" or zero):
        nn.init.zeros_(layer.bias)


def conv3x3(
    in_channels: int, out_channels: int, init: Init = "fan_avg", zero: bool = False
) -> nn.Conv2d:
    """Returns a 3x3 convolution with padding 1, initialized by init_."""
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
    init_(conv, init, zero)
    return conv


def linear(
    in_features: int, out_features: int, init: Init = "fan_avg", zero: bool = False
) -> nn.Linear:
    """Returns a linear layer, initialized by init_."""
    layer = nn.Linear(in_features, out_features)
    init_(layer, init, zero)
    return layer


@dataclass(frozen=True)
class BlockStyle:
    """Settings that all blocks of a network share. UNet documents each."""

    time_width: int
    dropout: float
    norm_groups: int
    norm_eps: float
    scale_shift_norm: bool
    num_heads: int
    head_channels: int | None
    init: Init

    def norm(self, channels: int) -> nn.GroupNorm:
        """Returns a GroupNorm over this many channels."""
        return nn.GroupNorm(self.norm_groups, channels, eps=self.norm_eps)

    def heads(self, channels: int) -> int:
        """Returns the number of attention heads at a width.

        Raises:
            ValueError: If the width does not divide evenly into heads.
        """
        name, divisor = (
            ("num_heads", self.num_heads)
            if self.head_channels is None
            else ("head_channels", self.head_channels)
        )
        if channels % divisor:
            raise ValueError(
                f"{name}={divisor} must divide {channels}, the width of a level with attention"
            )
        return self.num_heads if self.head_channels is None else channels // self.head_channels


class TimestepEmbedding(nn.Module):
    """Sinusoidal timestep embedding, then two dense layers.

    Ho et al. 2020, App. B; Vaswani et al. 2017.

    Args:
        width: Channels of the sinusoid.
        out_width: Channels of the output.
        order: "sin_cos": sines first, the last frequency 1/10000 (Ho et al.'s code). "cos_sin":
            cosines first, the last frequency one step short of 1/10000 (Nichol & Dhariwal's code).
        init: Initialization, see init_.
    """

    frequencies: Tensor

    def __init__(
        self, width: int, out_width: int, order: TimeOrder = "sin_cos", init: Init = "fan_avg"
    ) -> None:
        super().__init__()
        self.order = order
        half = width // 2
        steps = half - 1 if order == "sin_cos" else half
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float64) / steps)
        self.register_buffer("frequencies", frequencies.float(), persistent=False)
        self.linear_1 = linear(width, out_width, init)
        self.linear_2 = linear(out_width, out_width, init)

    def sinusoid(self, t: Tensor) -> Tensor:
        """Returns the sinusoids of a batch of timesteps.

        Args:
            t: (B,) timesteps: integers, or floats if rescaled.

        Returns:
            (B, width) in [-1, 1].
        """
        angles = t.to(self.frequencies.dtype)[:, None] * self.frequencies
        sine, cosine = torch.sin(angles), torch.cos(angles)
        return torch.cat([sine, cosine] if self.order == "sin_cos" else [cosine, sine], dim=1)

    def forward(self, t: Tensor) -> Tensor:
        """Returns (B, out_width) embeddings of (B,) timesteps."""
        return self.linear_2(F.silu(self.linear_1(self.sinusoid(t))))


class Dropout(nn.Dropout):
    """Dropout with a mask that depends only on the image's key and on the layer.

    The rest of the batch, the memory format and the kind of device do not matter. Elements are
    zeroed with probability p; the others are scaled up to keep the mean. Each element takes 16 bits
    of the key's stream, so p is rounded to 2^-16.

    Attributes:
        number: Index of the layer in its network, which selects its words in a stream.
    """

    number = 0

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        """Returns x with elements dropped.

        Args:
            x: (B, C, H, W).
            keys: (B,) int64, one per image. None draws the mask from torch's own generator.
        """
        if not self.training or self.p == 0:
            return x
        if keys is None:
            return super().forward(x)
        dropped = min(round(self.p * 2**16), 2**16 - 1)
        least, scale = dropped - 2**15, 2**16 / (2**16 - dropped)
        # channels innermost, as channels_last lays them out in memory
        pixels = (*x.shape[2:], x.shape[1])
        count = math.prod(pixels)
        words = randomness.random_bits(keys, -(-count // 4), self.number * WORDS_OF_A_LAYER)
        draws = words.view(torch.int16)[:, :count].unflatten(1, pixels).permute(0, 3, 1, 2)
        return fast.keep(x, draws, least, scale)


def number_dropout(network: nn.Module) -> None:
    """Numbers the Dropout layers of a network, in order."""
    layers = [module for module in network.modules() if isinstance(module, Dropout)]
    for number, layer in enumerate(layers):
        layer.number = number


def drops(network: nn.Module) -> bool:
    """Returns whether a network has a layer that drops anything in training."""
    return any(
        (isinstance(layer, DROPOUTS) and layer.p > 0)
        or (isinstance(layer, nn.MultiheadAttention) and layer.dropout > 0)
        for layer in network.modules()
    )


def takes_dropout_keys(network: nn.Module) -> bool:
    """Returns whether a network takes dropout keys, one per image (see UNet.forward)."""
    return "dropout_keys" in inspect.signature(type(network).forward).parameters


class ResBlock(nn.Module):
    """GroupNorm, swish and convolution, twice, with the input added at the end.

    The timestep enters between the two. It is added to the output of the first convolution (Ho et
    al. 2020), or scales and shifts that output once normalized (Nichol & Dhariwal 2021).

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        style: Settings that all blocks of the network share.
        resample: Resampling of both branches just before the first convolution: "down" halves them
            by averaging, "up" doubles them by repeating (Dhariwal & Nichol 2021, after BigGAN).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        style: BlockStyle,
        resample: Literal["none", "down", "up"] = "none",
    ) -> None:
        super().__init__()
        self.resample = resample
        self.scale_shift_norm = style.scale_shift_norm
        self.norm1 = style.norm(in_channels)
        self.conv1 = conv3x3(in_channels, out_channels, style.init)
        self.time_emb_proj = linear(
            style.time_width,
            2 * out_channels if style.scale_shift_norm else out_channels,
            style.init,
        )
        self.norm2 = style.norm(out_channels)
        self.dropout = Dropout(style.dropout)
        self.conv2 = conv3x3(out_channels, out_channels, style.init, zero=True)
        self.conv_shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1)
            init_(self.conv_shortcut, style.init)

    def forward(self, x: Tensor, time: Tensor, dropout_keys: Tensor | None = None) -> Tensor:
        """Returns (B, out_channels, H', W') at the size that `resample` gives.

        Args:
            x: (B, in_channels, H, W).
            time: (B, time_width) timestep embedding, after its swish.
            dropout_keys: (B,) int64, see Dropout.
        """
        h = F.silu(self.norm1(x))
        if self.resample == "down":
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        elif self.resample == "up":
            h, x = double_pixels(h), double_pixels(x)
        h = self.conv1(h)
        shift = self.time_emb_proj(time)[:, :, None, None]
        if self.scale_shift_norm:
            scale, shift = shift.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + shift)
        return self.conv_shortcut(x) + self.conv2(self.dropout(F.silu(h), dropout_keys))


class AttentionBlock(nn.Module):
    """Self-attention over all positions, with a residual connection (Ho et al. 2020, App. B)."""

    def __init__(self, channels: int, style: BlockStyle) -> None:
        super().__init__()
        self.heads = style.heads(channels)
        self.group_norm = style.norm(channels)
        self.to_q = linear(channels, channels, style.init)
        self.to_k = linear(channels, channels, style.init)
        self.to_v = linear(channels, channels, style.init)
        self.to_out = nn.ModuleList([linear(channels, channels, style.init, zero=True)])

    def forward(self, x: Tensor) -> Tensor:
        """Returns x plus its attention, (B, C, H, W)."""
        size, rows = x.shape[2:], positions(self.group_norm(x))
        layers = self.to_q, self.to_k, self.to_v
        q, k, v = (fast.linear(layer, rows, size) for layer in layers)
        rows = attend(q, k, v, self.heads)
        rows = fast.linear(cast(nn.Linear, self.to_out[0]), rows, size)
        return x + picture(rows, like=x)


def positions(x: Tensor) -> Tensor:
    """Turns (B, C, H, W) into (B, H*W, C); a view if x is channels_last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def picture(rows: Tensor, like: Tensor) -> Tensor:
    """Turns (B, H*W, C) into channels_last (B, C, H, W) with the height and width of `like`."""
    return rows.unflatten(1, like.shape[2:]).permute(0, 3, 1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Computes scaled dot-product attention (Vaswani et al. 2017).

    Args:
        q: (B, N, C), with the channels split among the heads.
        k: Like q.
        v: Like q.
        heads: Number of heads.

    Returns:
        (B, N, C).
    """
    # (B, heads, N, C / heads)
    q, k, v = (rows.unflatten(2, (heads, -1)).transpose(1, 2) for rows in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def double_pixels(x: Tensor) -> Tensor:
    """Doubles height and width by repeating each pixel."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


class Downsample(nn.Module):
    """A 3x3 convolution with stride 2, for even sizes.

    Args:
        channels: Channels of the input and the output.
        padding: "same": right and bottom only, as in TensorFlow. "symmetric": on all sides.
        init: Initialization, see init_.
    """

    def __init__(self, channels: int, padding: Padding = "same", init: Init = "fan_avg") -> None:
        super().__init__()
        self.padding = padding
        self.conv = nn.Conv2d(
            channels, channels, 3, stride=2, padding=1 if padding == "symmetric" else 0
        )
        init_(self.conv, init)

    def forward(self, x: Tensor, time: Tensor, dropout_keys: Tensor | None = None) -> Tensor:
        """Halves x; the other arguments only match the signature of ResBlock."""
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.padding == "same" else x)


class Upsample(nn.Module):
    """Doubles height and width by repeating pixels, then applies a 3x3 convolution."""

    def __init__(self, channels: int, init: Init = "fan_avg") -> None:
        super().__init__()
        self.conv = conv3x3(channels, channels, init)

    def forward(self, x: Tensor, time: Tensor, dropout_keys: Tensor | None = None) -> Tensor:
        """Doubles x; the other arguments only match the signature of ResBlock."""
        return fast.upsample(self.conv, x)


def call_recomputing(block: Callable[..., Tensor], *inputs: object) -> Tensor:
    """Returns block(*inputs) and recomputes its activations in the backward pass.

    Both passes drop the same elements.
    """
    return (
        checkpoint(block, *inputs, use_reentrant=False)
        if torch.is_grad_enabled()
        else block(*inputs)
    )


def check_levels(levels: Sequence[int], count: int) -> None:
    """Checks the levels of runtime.recompute against a network of `count` levels.

    Raises:
        ValueError: If the network lacks one of them.
    """
    for level in levels:
        if not 0 <= level < count:
            raise ValueError(f"recompute has {level}; the levels are 0 to {count - 1}")
