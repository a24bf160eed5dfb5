"""The U-Net of Ho et al. 2020 (App. B), layer for layer as in the authors' code."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpm.models.layers import AttentionBlock, Downsample, ResBlock, TimestepEmbedding, Upsample, conv3x3


class Level(nn.Module):
    """One resolution of the way down or up: residual blocks, each followed by attention where the level has it, then a resampling."""

    resnets: nn.ModuleList
    attentions: nn.ModuleList
    downsamplers: nn.ModuleList
    upsamplers: nn.ModuleList

    def __init__(self, resnets: list[nn.Module], attentions: list[nn.Module]) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)
        self.downsamplers = nn.ModuleList()
        self.upsamplers = nn.ModuleList()

    def block(self, index: int, h: Tensor, time: Tensor) -> Tensor:
        h = self.resnets[index](h, time)
        return self.attentions[index](h) if self.attentions else h


class UNet(nn.Module):
    """Predicts from a noised image and its timestep (Ho et al. 2020, App. B; parameter names of diffusers' UNet2DModel).

    resolution: pixels, an int or (height, width), divisible by 2 ** (levels - 1).    channel_multipliers: one a level, of base_channels.
    attention_resolutions: the longer side, in pixels, of the levels that get attention; the middle always has it.
    dropout: probability in [0, 1).    Raises ValueError, naming the argument, for sizes that do not fit together.
    """

    def __init__(
        self,
        resolution: int | tuple[int, int],
        in_channels: int,
        out_channels: int,
        base_channels: int,
        channel_multipliers: Sequence[int],
        attention_resolutions: Sequence[int],
        num_res_blocks: int = 2,
        dropout: float = 0.0,
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        sizes = level_sizes(resolution, len(channel_multipliers))
        _check(sizes, in_channels, out_channels, base_channels, channel_multipliers, attention_resolutions, num_res_blocks, dropout, norm_groups)
        widths = [base_channels * multiplier for multiplier in channel_multipliers]
        time_width = 4 * base_channels
        last = len(widths) - 1

        def resnet(width_in: int, width_out: int) -> ResBlock:
            return ResBlock(width_in, width_out, time_width, dropout, norm_groups)

        def attentions(level: int, count: int) -> list[nn.Module]:
            wanted = max(sizes[level]) in attention_resolutions
            return [AttentionBlock(widths[level], norm_groups) for _ in range(count)] if wanted else []

        self.time_embedding = TimestepEmbedding(base_channels, time_width)
        self.conv_in = conv3x3(in_channels, base_channels)
        width, skips = base_channels, [base_channels]

        self.down_blocks = nn.ModuleList()
        for level, level_width in enumerate(widths):
            resnets: list[nn.Module] = []
            for _ in range(num_res_blocks):
                resnets.append(resnet(width, level_width))
                width = level_width
                skips.append(width)
            down = Level(resnets, attentions(level, num_res_blocks))
            if level < last:
                down.downsamplers.append(Downsample(width))
                skips.append(width)
            self.down_blocks.append(down)

        self.mid_block = Level([resnet(width, width), resnet(width, width)], [AttentionBlock(width, norm_groups)])

        self.up_blocks = nn.ModuleList()
        for level, level_width in reversed(list(enumerate(widths))):
            resnets = []
            for _ in range(num_res_blocks + 1):
                resnets.append(resnet(width + skips.pop(), level_width))
                width = level_width
            up = Level(resnets, attentions(level, num_res_blocks + 1))
            if level > 0:
                up.upsamplers.append(Upsample(width))
            self.up_blocks.append(up)

        self.conv_norm_out = nn.GroupNorm(norm_groups, width, eps=1e-6)
        self.conv_out = conv3x3(width, out_channels, scale=1e-10)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """x_t: (B, in_channels, H, W).    t: (B,) int64, in [0, T-1].    Returns (B, out_channels, H, W)."""
        time = F.silu(self.time_embedding(t))
        h = self.conv_in(x_t)
        skips = [h]
        for down in cast(list[Level], self.down_blocks):
            for index in range(len(down.resnets)):
                h = down.block(index, h, time)
                skips.append(h)
            for downsample in down.downsamplers:
                h = downsample(h)
                skips.append(h)

        h = self.mid_block.block(0, h, time)
        h = self.mid_block.resnets[1](h, time)

        for up in cast(list[Level], self.up_blocks):
            for index in range(len(up.resnets)):
                h = up.block(index, torch.cat([h, skips.pop()], dim=1), time)
            for upsample in up.upsamplers:
                h = upsample(h)
        return self.conv_out(F.silu(self.conv_norm_out(h)))


def level_sizes(resolution: int | tuple[int, int], num_levels: int) -> list[tuple[int, int]]:
    """(height, width) of each level, halving from the first.    Raises ValueError if a side does not halve evenly."""
    height, width = (resolution, resolution) if isinstance(resolution, int) else tuple(resolution)
    factor = 2 ** (num_levels - 1)
    if min(height, width) < factor or height % factor or width % factor:
        near = sorted({max(factor, side // factor * factor + step * factor) for side in (height, width) for step in (0, 1)})
        raise ValueError(
            f"resolution={resolution} must be divisible by {factor}, since {num_levels} levels halve it {num_levels - 1} times; "
            f"near: {', '.join(map(str, near))}"
        )
    return [(height >> level, width >> level) for level in range(num_levels)]


def _check(
    sizes: list[tuple[int, int]],
    in_channels: int,
    out_channels: int,
    base_channels: int,
    channel_multipliers: Sequence[int],
    attention_resolutions: Sequence[int],
    num_res_blocks: int,
    dropout: float,
    norm_groups: int,
) -> None:
    counts = {"in_channels": in_channels, "out_channels": out_channels, "num_res_blocks": num_res_blocks, "norm_groups": norm_groups}
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name}={count} must be at least 1")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout} must lie in [0, 1)")
    if base_channels < 4 or base_channels % 2:
        raise ValueError(f"base_channels={base_channels} must be even and at least 4 (half sines, half cosines)")
    for multiplier in channel_multipliers:
        if multiplier < 1 or base_channels * multiplier % norm_groups:
            raise ValueError(f"channel_multipliers has {multiplier}: its width {base_channels * multiplier} must be divisible by norm_groups={norm_groups}")
    sides = [max(size) for size in sizes]
    for side in attention_resolutions:
        if side not in sides:
            raise ValueError(f"attention_resolutions has {side}, which no level has; the levels have {', '.join(map(str, sides))}")
