"""The network of the original README's runs, kept to reproduce them.

It differs from Ho et al.'s in almost every part.
"""

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpm.models.layers import attend, call_recomputing, check_levels, picture, positions

TIME_WIDTH = 512
NORM_GROUPS = 32
HEADS = 4


class TimeMlp(nn.Module):
    """Sinusoidal timestep embedding, then two dense layers with a GELU in between.

    Sines and cosines alternate (Vaswani et al. 2017, section 3.5).
    """

    frequencies: Tensor

    def __init__(self, width: int, out_width: int) -> None:
        super().__init__()
        frequencies = torch.exp(
            -math.log(10000) * torch.arange(0, width, 2, dtype=torch.float64) / width
        )
        self.register_buffer("frequencies", frequencies.float(), persistent=False)
        self.linear_1 = nn.Linear(width, out_width)
        self.linear_2 = nn.Linear(out_width, out_width)

    def sinusoid(self, t: Tensor) -> Tensor:
        """Returns the sinusoids of a batch of timesteps.

        Args:
            t: (B,) timesteps.

        Returns:
            (B, width) in [-1, 1]: sin(t / 10000^(2i / width)) at 2i, the cosine at 2i + 1.
        """
        angles = t.to(self.frequencies.dtype)[:, None] * self.frequencies
        return torch.stack([torch.sin(angles), torch.cos(angles)], dim=2).flatten(1)

    def forward(self, t: Tensor) -> Tensor:
        """Returns (B, out_width) embeddings of (B,) timesteps."""
        return self.linear_2(F.gelu(self.linear_1(self.sinusoid(t))))


class PostNormResBlock(nn.Module):
    """Convolution, GroupNorm and swish, twice.

    The timestep is added between the two, the input at the end.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.half_1 = _convolution_norm_swish(in_channels, out_channels)
        self.time_projection = nn.Linear(TIME_WIDTH, out_channels)
        self.half_2 = _convolution_norm_swish(out_channels, out_channels)
        self.shortcut = (
            nn.Identity()
            if in_channels == out_channels
            else nn.Conv2d(in_channels, out_channels, 1)
        )

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Returns (B, out_channels, H, W).

        Args:
            x: (B, in_channels, H, W).
            time: (B, 512) timestep embedding, after its swish.
        """
        h = self.half_1(x) + self.time_projection(time)[:, :, None, None]
        return self.half_2(h) + self.shortcut(x)


class PostNormAttention(nn.Module):
    """Self-attention over all positions with four heads, normalized after the residual sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.Linear(channels, channels)
        self.norm = nn.GroupNorm(NORM_GROUPS, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the normalized sum of x and its attention, (B, C, H, W)."""
        rows = positions(x)
        rows = self.to_out(attend(self.to_q(rows), self.to_k(rows), self.to_v(rows), HEADS))
        return self.norm(x + picture(rows, like=x))


class Stage(nn.Module):
    """Two residual blocks, each followed by attention if the stage has it, then resampling."""

    def __init__(
        self, in_channels: int, out_channels: int, resample: nn.Module, attention: bool = False
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            [
                PostNormResBlock(in_channels, out_channels),
                PostNormResBlock(out_channels, out_channels),
            ]
        )
        self.attentions = nn.ModuleList(
            [PostNormAttention(out_channels) if attention else nn.Identity() for _ in self.resnets]
        )
        self.resample = resample
        self.recomputes = False

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Returns (B, out_channels, H', W') at the size that the resampling gives.

        Args:
            x: (B, in_channels, H, W).
            time: (B, 512) timestep embedding, after its swish.
        """
        return (
            call_recomputing(self._forward, x, time) if self.recomputes else self._forward(x, time)
        )

    def _forward(self, x: Tensor, time: Tensor) -> Tensor:
        for resnet, attention in zip(self.resnets, self.attentions, strict=True):
            x = attention(resnet(x, time))
        return self.resample(x)


class ReadmeUNet(nn.Module):
    """The original README's U-Net, with 58,661,123 parameters for color images.

    Its five levels have 128, 128, 256, 256 and 512 channels at every resolution. It differs from Ho
    et al. 2020, App. B:

    - Normalization follows the convolutions.
    - Every level downsamples, including the last.
    - There is one skip per level, taken after its downsampling, and one from the first convolution.
    - The way up has as many residual blocks as the way down.
    - Attention has four heads, on the fourth level and in the middle.
    - Upsampling is bilinear.
    - The timestep's dense layers use GELU.
    - Initialization is PyTorch's default.
    - There is no dropout.

    Args:
        resolution: Pixels, an int or (height, width), divisible by 32.
        in_channels: Channels of x_t.
        out_channels: Channels of the output.

    Raises:
        ValueError: If resolution is not divisible by 32, or a channel count is below 1.
    """

    def __init__(
        self, resolution: int | tuple[int, int], in_channels: int, out_channels: int
    ) -> None:
        super().__init__()
        _check(resolution, in_channels, out_channels)
        self.time_mlp = TimeMlp(128, TIME_WIDTH)
        self.conv_in = nn.Conv2d(in_channels, 128, 3, padding=1)
        self.down = nn.ModuleList(
            [
                Stage(128, 128, _downsample(128)),
                Stage(128, 128, _downsample(128)),
                Stage(128, 256, _downsample(256)),
                Stage(256, 256, _downsample(256), attention=True),
                Stage(256, 512, _downsample(512)),
            ]
        )
        self.middle = Stage(512, 512, nn.Identity(), attention=True)
        self.up = nn.ModuleList(
            [
                Stage(512 + 512, 512, _upsample(512)),
                Stage(512 + 256, 256, _upsample(256), attention=True),
                Stage(256 + 256, 256, _upsample(256)),
                Stage(256 + 128, 128, _upsample(128)),
                Stage(128 + 128, 128, _upsample(128)),
            ]
        )
        self.norm_out = nn.GroupNorm(NORM_GROUPS, 128 + 128)
        self.conv_out = nn.Conv2d(128 + 128, out_channels, 3, padding=1)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Returns the network's output for x_t.

        Args:
            x_t: (B, in_channels, H, W).
            t: (B,) int64 in [0, T-1].

        Returns:
            (B, out_channels, H, W).
        """
        time = F.silu(self.time_mlp(t))
        h = self.conv_in(x_t)
        skips = [h]
        for stage in self.down:
            h = stage(h, time)
            skips.append(h)
        h = self.middle(h, time)
        for stage in self.up:
            h = stage(torch.cat([h, skips.pop()], dim=1), time)
        return self.conv_out(F.silu(self.norm_out(torch.cat([h, skips.pop()], dim=1))))

    def recompute(self, levels: Sequence[int]) -> None:
        """Trades time for memory at some levels; see UNet.recompute.

        These levels keep only their inputs and recompute the rest in the backward pass.

        Args:
            levels: The levels; 0 is the finest.

        Raises:
            ValueError: If the network lacks one of them.
        """
        check_levels(levels, len(self.down))
        for level in levels:
            for part in (self.down[level], self.up[-1 - level]):
                cast(Stage, part).recomputes = True


def _convolution_norm_swish(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1),
        nn.GroupNorm(NORM_GROUPS, out_channels),
        nn.SiLU(),
    )


def _downsample(channels: int) -> nn.Module:
    return nn.Conv2d(channels, channels, 3, stride=2, padding=1)


def _upsample(channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
        nn.Conv2d(channels, channels, 3, padding=1),
    )


def _check(resolution: int | tuple[int, int], in_channels: int, out_channels: int) -> None:
    for side in (resolution,) if isinstance(resolution, int) else resolution:
        if side < 32 or side % 32:
            raise ValueError(
                f"resolution={resolution} must be divisible by 32, "
                "since each of the five levels halves it"
            )
    for name, count in (("in_channels", in_channels), ("out_channels", out_channels)):
        if count < 1:
            raise ValueError(f"{name}={count} must be at least 1")
