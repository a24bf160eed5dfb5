"""The U-Net of Ho et al. 2020 (App. B), layer for layer as in the authors' code.

Also what Nichol & Dhariwal and Dhariwal & Nichol made of it.
"""

from collections.abc import Sequence
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpm.models.layers import (
    AttentionBlock,
    BlockStyle,
    Downsample,
    Init,
    Padding,
    ResBlock,
    TimeOrder,
    TimestepEmbedding,
    Upsample,
    call_recomputing,
    check_levels,
    conv3x3,
    number_dropout,
)

Resample = Literal["conv", "resblock"]
MOST_LEVELS = 16  # 65,536 pixels to 2
MOST_BLOCKS = 100  # of a level; the papers have 1 to 4


class Level(nn.Module):
    """One resolution of the way down or up.

    Residual blocks, each followed by attention where the level has it, then a resampling.
    """

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
        self.recomputes = False

    def block(self, index: int, h: Tensor, time: Tensor, dropout_keys: Tensor | None) -> Tensor:
        return (
            call_recomputing(self._block, index, h, time, dropout_keys)
            if self.recomputes
            else self._block(index, h, time, dropout_keys)
        )

    def _block(self, index: int, h: Tensor, time: Tensor, dropout_keys: Tensor | None) -> Tensor:
        h = self.resnets[index](h, time, dropout_keys)
        return self.attentions[index](h) if self.attentions else h


class UNet(nn.Module):
    """Predicts from a noised image and its timestep (Ho et al. 2020, App. B).

    Parameter names are those of diffusers' UNet2DModel. Every default is Ho et al.'s. For the other
    papers' values see Nichol & Dhariwal 2021 (improved_unet*.yaml) and Dhariwal & Nichol 2021
    (adm*.yaml).

    Args:
        resolution: Pixels, an int or (height, width), divisible by 2 ** (levels - 1).
        in_channels: Channels of x_t.
        out_channels: Channels of the output.
        base_channels: The width that channel_multipliers multiply.
        channel_multipliers: One per level, of base_channels.
        attention_resolutions: The longer side, in pixels, of the levels that get attention; the
            middle always has it.
        num_res_blocks: Of each level on the way down; one more on the way up.
        dropout: Probability in [0, 1).
        norm_groups: Of every GroupNorm.
        norm_eps: Of every GroupNorm.
        num_heads: Of every attention.
        head_channels: Instead of num_heads: the width of a head, any number of them.
        scale_shift_norm: Have the timestep scale and shift the second normalization of a residual
            block, instead of being added before it.
        time_embedding: Sines or cosines first, see TimestepEmbedding.
        downsample_padding: Right and bottom only ("same"), or on all sides.
        resample: End a level with a strided or upsampling convolution, or with a residual block
            that resamples.
        init: First weights, see layers.init_.
        num_classes: Classes to embed; the embedding is added to the timestep's. None: no classes.

    Raises:
        ValueError: If values do not fit together; the message names the argument.
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
        norm_eps: float = 1e-6,
        num_heads: int = 1,
        head_channels: int | None = None,
        scale_shift_norm: bool = False,
        time_embedding: TimeOrder = "sin_cos",
        downsample_padding: Padding = "same",
        resample: Resample = "conv",
        init: Init = "fan_avg",
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        _check_counts(
            in_channels=in_channels,
            out_channels=out_channels,
            num_res_blocks=num_res_blocks,
            norm_groups=norm_groups,
        )
        _check_counts(num_heads=num_heads, head_channels=head_channels, num_classes=num_classes)
        _check_choice("time_embedding", time_embedding, get_args(TimeOrder))
        _check_choice("downsample_padding", downsample_padding, get_args(Padding))
        _check_choice("resample", resample, get_args(Resample))
        _check_choice("init", init, get_args(Init))
        if not channel_multipliers:
            raise ValueError("channel_multipliers=[] must have at least one level")
        if head_channels is not None and num_heads != 1:
            raise ValueError(
                f"num_heads={num_heads} and head_channels={head_channels}: give one of them"
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout} must lie in [0, 1)")
        if norm_eps <= 0:
            raise ValueError(f"norm_eps={norm_eps} must be positive")
        if num_res_blocks > MOST_BLOCKS:
            raise ValueError(f"num_res_blocks={num_res_blocks} must be at most {MOST_BLOCKS}")
        sizes = level_sizes(resolution, len(channel_multipliers))
        widths = _level_widths(base_channels, channel_multipliers, norm_groups)
        _check_attention(attention_resolutions, [max(size) for size in sizes])
        style = BlockStyle(
            4 * base_channels,
            dropout,
            norm_groups,
            norm_eps,
            scale_shift_norm,
            num_heads,
            head_channels,
            init,
        )
        last = len(widths) - 1

        def attentions(level: int, count: int) -> list[nn.Module]:
            wanted = max(sizes[level]) in attention_resolutions
            return [AttentionBlock(widths[level], style) for _ in range(count)] if wanted else []

        self.time_embedding = TimestepEmbedding(
            base_channels, style.time_width, time_embedding, init
        )
        self.class_embedding = (
            None if num_classes is None else nn.Embedding(num_classes, style.time_width)
        )
        self.conv_in = conv3x3(in_channels, base_channels, init)
        width, skips = base_channels, [base_channels]

        self.down_blocks = nn.ModuleList()
        for level, level_width in enumerate(widths):
            resnets: list[nn.Module] = []
            for _ in range(num_res_blocks):
                resnets.append(ResBlock(width, level_width, style))
                width = level_width
                skips.append(width)
            down = Level(resnets, attentions(level, num_res_blocks))
            if level < last:
                down.downsamplers.append(
                    Downsample(width, downsample_padding, init)
                    if resample == "conv"
                    else ResBlock(width, width, style, "down")
                )
                skips.append(width)
            self.down_blocks.append(down)

        self.mid_block = Level(
            [ResBlock(width, width, style), ResBlock(width, width, style)],
            [AttentionBlock(width, style)],
        )

        self.up_blocks = nn.ModuleList()
        for level, level_width in reversed(list(enumerate(widths))):
            resnets = []
            for _ in range(num_res_blocks + 1):
                resnets.append(ResBlock(width + skips.pop(), level_width, style))
                width = level_width
            up = Level(resnets, attentions(level, num_res_blocks + 1))
            if level > 0:
                up.upsamplers.append(
                    Upsample(width, init)
                    if resample == "conv"
                    else ResBlock(width, width, style, "up")
                )
            self.up_blocks.append(up)

        self.conv_norm_out = style.norm(width)
        self.conv_out = conv3x3(width, out_channels, init, zero=True)
        number_dropout(self)

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        classes: Tensor | None = None,
        dropout_keys: Tensor | None = None,
    ) -> Tensor:
        """Returns what the network says about x_t.

        Args:
            x_t: (B, in_channels, H, W).
            t: (B,) int64 in [0, T-1], or float where they were rescaled.
            classes: (B,) int64 in [0, num_classes-1]; None exactly when num_classes is.
            dropout_keys: (B,) int64: an image's masks in training are a function of its key. None:
                they come from torch's own generator.

        Returns:
            (B, out_channels, H, W).

        Raises:
            ValueError: If classes is missing, not wanted or of the wrong shape, or dropout_keys is
                of the wrong shape.
        """
        if dropout_keys is not None and dropout_keys.shape != t.shape:
            raise ValueError(
                f"dropout_keys must be {tuple(t.shape)}, one an image; "
                f"got {tuple(dropout_keys.shape)}"
            )
        time = F.silu(self._embedding(t, classes))
        h = self.conv_in(x_t)
        skips = [h]
        for down in cast(list[Level], self.down_blocks):
            for index in range(len(down.resnets)):
                h = down.block(index, h, time, dropout_keys)
                skips.append(h)
            for downsample in down.downsamplers:
                h = downsample(h, time, dropout_keys)
                skips.append(h)

        h = self.mid_block.block(0, h, time, dropout_keys)
        h = self.mid_block.resnets[1](h, time, dropout_keys)

        for up in cast(list[Level], self.up_blocks):
            for index in range(len(up.resnets)):
                h = up.block(index, torch.cat([h, skips.pop()], dim=1), time, dropout_keys)
            for upsample in up.upsamplers:
                h = upsample(h, time, dropout_keys)
        return self.conv_out(F.silu(self.conv_norm_out(h)))

    def recompute(self, levels: Sequence[int]) -> None:
        """Saves memory at some levels, at the cost of time (Chen et al. 2016, arXiv:1604.06174).

        These levels keep only what enters each block and compute the rest again in the backward
        pass. The results are the same.

        Args:
            levels: The levels; 0 is the finest.

        Raises:
            ValueError: If there is no such level.
        """
        check_levels(levels, len(self.down_blocks))
        for level in levels:
            for part in (self.down_blocks[level], self.up_blocks[-1 - level]):
                cast(Level, part).recomputes = True

    def _embedding(self, t: Tensor, classes: Tensor | None) -> Tensor:
        embedding = self.time_embedding(t)
        if self.class_embedding is None:
            if classes is not None:
                raise ValueError("classes were given to a network that has num_classes=None")
            return embedding
        if classes is None or classes.shape != t.shape:
            given = None if classes is None else tuple(classes.shape)
            raise ValueError(
                f"classes must be {tuple(t.shape)}, one an image, "
                f"since num_classes={self.class_embedding.num_embeddings}; got {given}"
            )
        return embedding + self.class_embedding(classes)


def level_sizes(resolution: int | tuple[int, int], num_levels: int) -> list[tuple[int, int]]:
    """Returns (height, width) of each level, halving from the first.

    Raises:
        ValueError: If a side does not halve evenly.
    """
    height, width = (resolution, resolution) if isinstance(resolution, int) else tuple(resolution)
    if num_levels > MOST_LEVELS:
        raise ValueError(f"channel_multipliers has {num_levels} levels, and at most {MOST_LEVELS}")
    factor = 2 ** (num_levels - 1)
    if min(height, width) < factor or height % factor or width % factor:
        near = sorted(
            {
                max(factor, side // factor * factor + step * factor)
                for side in (height, width)
                for step in (0, 1)
            }
        )
        raise ValueError(
            f"resolution={resolution} must be divisible by {factor}, "
            f"since {num_levels} levels halve it {num_levels - 1} times; "
            f"near: {', '.join(map(str, near))}"
        )
    return [(height >> level, width >> level) for level in range(num_levels)]


def _level_widths(
    base_channels: int, channel_multipliers: Sequence[int], norm_groups: int
) -> list[int]:
    if base_channels < 4 or base_channels % 2:
        raise ValueError(
            f"base_channels={base_channels} must be even and at least 4 (half sines, half cosines)"
        )
    for multiplier in channel_multipliers:
        if multiplier < 1 or base_channels * multiplier % norm_groups:
            raise ValueError(
                f"channel_multipliers has {multiplier}: its width {base_channels * multiplier} "
                f"must be divisible by norm_groups={norm_groups}"
            )
    return [base_channels * multiplier for multiplier in channel_multipliers]


def _check_attention(attention_resolutions: Sequence[int], sides: list[int]) -> None:
    for side in attention_resolutions:
        if side not in sides:
            levels = ", ".join(map(str, sides))
            raise ValueError(
                f"attention_resolutions has {side}, which no level has; "
                f"the levels have {levels}; give [{sides[-1]}], say"
            )


def _check_counts(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name}={count} must be at least 1")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value} must be one of {', '.join(choices)}")
