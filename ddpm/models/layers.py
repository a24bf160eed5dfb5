"""The blocks that the networks share. Parameter names are diffusers' own, so that weights move both ways as they are."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def init_fan_avg_(layer: nn.Conv2d | nn.Linear, scale: float = 1.0) -> None:
    """Uniform variance scaling by the average fan, zero bias: the initialiser of Ho et al.'s code (its "zero" is scale 1e-10)."""
    nn.init.xavier_uniform_(layer.weight, gain=math.sqrt(scale))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def conv3x3(in_channels: int, out_channels: int, scale: float = 1.0) -> nn.Conv2d:
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
    init_fan_avg_(conv, scale)
    return conv


def linear(in_features: int, out_features: int, scale: float = 1.0) -> nn.Linear:
    layer = nn.Linear(in_features, out_features)
    init_fan_avg_(layer, scale)
    return layer


class TimestepEmbedding(nn.Module):
    """Sinusoid of the timestep (sines first, then cosines), then two dense layers (Ho et al. 2020, App. B; Vaswani et al. 2017)."""

    frequencies: Tensor

    def __init__(self, width: int, out_width: int) -> None:
        super().__init__()
        half = width // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float64) / (half - 1))
        self.register_buffer("frequencies", frequencies.float(), persistent=False)
        self.linear_1 = linear(width, out_width)
        self.linear_2 = linear(out_width, out_width)

    def sinusoid(self, t: Tensor) -> Tensor:
        """t: (B,) integer timesteps.    Returns (B, width) in [-1, 1]."""
        angles = t.to(self.frequencies.dtype)[:, None] * self.frequencies
        return torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)

    def forward(self, t: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(self.sinusoid(t))))


class ResBlock(nn.Module):
    """GroupNorm, swish, convolution, twice; the timestep is added between the halves, the input at the end."""

    def __init__(self, in_channels: int, out_channels: int, time_width: int, dropout: float, norm_groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(norm_groups, in_channels, eps=1e-6)
        self.conv1 = conv3x3(in_channels, out_channels)
        self.time_emb_proj = linear(time_width, out_channels)
        self.norm2 = nn.GroupNorm(norm_groups, out_channels, eps=1e-6)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = conv3x3(out_channels, out_channels, scale=1e-10)
        self.conv_shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1)
            init_fan_avg_(self.conv_shortcut)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x: (B, C, H, W).    time: (B, time_width), after its swish."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_emb_proj(time)[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.conv_shortcut(x) + h


class AttentionBlock(nn.Module):
    """Self-attention over all positions, one head, with residual (Ho et al. 2020, App. B)."""

    def __init__(self, channels: int, norm_groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(norm_groups, channels, eps=1e-6)
        self.to_q = linear(channels, channels)
        self.to_k = linear(channels, channels)
        self.to_v = linear(channels, channels)
        self.to_out = nn.ModuleList([linear(channels, channels, scale=1e-10)])

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        h = self.group_norm(x).permute(0, 2, 3, 1).reshape(batch, 1, height * width, channels)  # a view when channels_last
        h = F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h))
        h = self.to_out[0](h).reshape(batch, height, width, channels).permute(0, 3, 1, 2)
        return x + h


class Downsample(nn.Module):
    """3x3 convolution with stride 2 on an even size, padded right and bottom only, as TensorFlow's SAME does."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)
        init_fan_avg_(self.conv)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Each pixel doubled both ways, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
