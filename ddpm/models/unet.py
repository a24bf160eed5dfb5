"""The U-Net of Ho et al. 2020 (App. B), layer for layer as in the authors' code.

Options cover the variants of Nichol & Dhariwal 2021 and Dhariwal & Nichol 2021.
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
MOST_LEVELS = 16  # enough to go from 65,536 pixels to 2
MOST_BLOCKS = 100  # per level; the papers use 1 to 4


class Level(nn.Module):
    """One resolution on the way down or up.

    Residual blocks, each followed by attention if the level has it, then resampling.
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
        """Applies residual block `index`, then the attention after it, if any."""
        return (
            call_recomputing(self._block, index, h, time, dropout_keys)
            if self.recomputes
            else self._block(index, h, time, dropout_keys)
        )

    def _block(self, index: int, h: Tensor, time: Tensor, dropout_keys: Tensor | None) -> Tensor:
        h = self.resnets[index](h, time, dropout_keys)
        return self.attentions[index](h) if self.attentions else h


class UNet(nn.Module):
    """U-Net that predicts from a noised image and its timestep (Ho et al. 2020, App. B).

    Parameters are named as in diffusers' UNet2DModel. Defaults are Ho et al.'s. conf/model/ holds
    the values of Nichol & Dhariwal 2021 (improved_unet*.yaml) and Dhariwal & Nichol 2021
    (adm*.yaml).

    Args:
        resolution: Pixels, an int or (height, width), divisible by 2 ** (levels - 1).
        in_channels: Channels of x_t.
        out_channels: Channels of the output.
        base_channels: The width that channel_multipliers multiply.
        channel_multipliers: One multiple of base_channels per level.
        attention_resolutions: Levels that get attention, by their longer side in pixels. The middle
            always has it.
        num_res_blocks: Residual blocks per level on the way down; the way up has one more.
        dropout: Dropout probability in [0, 1).
        norm_groups: Groups of every GroupNorm.
        norm_eps: Epsilon of every GroupNorm.
        num_heads: Heads of every attention block.
        head_channels: Channels per head, in place of num_heads. The width then decides the number
            of heads.
        scale_shift_norm: Whether the timestep scales and shifts the second normalization of a
            residual block instead of being added before it.
        time_embedding: Whether sines or cosines come first, see TimestepEmbedding.
        downsample_padding: Padding of strided convolutions: right and bottom only ("same") or all
            sides ("symmetric").
        resample: What ends a level: a strided or upsampling convolution ("conv"), or a residual
            block that resamples ("resblock").
        init: Initialization, see layers.init_.
        num_classes: Number of classes; their embedding is added to the timestep's. None: no
            classes.

    Raises:
        ValueError: If an argument is invalid or does not fit the others; the message names it.
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
                f"num_heads={num_heads} and head_channels={head_channels}: set only one of them"
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
        """Returns the network's output for x_t.

        Args:
            x_t: (B, in_channels, H, W).
            t: (B,) int64 in [0, T-1], or float if rescaled.
            classes: (B,) int64 in [0, num_classes-1]; None if, and only if, num_classes is None.
            dropout_keys: (B,) int64. In training, an image's key decides its dropout masks. None
                draws them from torch's own generator.

        Returns:
            (B, out_channels, H, W).

        Raises:
            ValueError: If classes is missing, unexpected or of the wrong shape, or dropout_keys is
                of the wrong shape.
        """
        if dropout_keys is not None and dropout_keys.shape != t.shape:
            raise ValueError(
                f"dropout_keys must be {tuple(t.shape)}, one per image; "
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
        """Trades time for memory at some levels (Chen et al. 2016, arXiv:1604.06174).

        These levels keep only the inputs of their blocks and recompute the rest in the backward
        pass. Results do not change.

        Args:
            levels: The levels; 0 is the finest.

        Raises:
            ValueError: If the network lacks one of them.
        """
        check_levels(levels, len(self.down_blocks))
        for level in levels:
            for part in (self.down_blocks[level], self.up_blocks[-1 - level]):
                cast(Level, part).recomputes = True

    def _embedding(self, t: Tensor, classes: Tensor | None) -> Tensor:
        embedding = self.time_embedding(t)
        if self.class_embedding is None:
            if classes is not None:
                raise ValueError("num_classes=None: the network takes no classes, but got some")
            return embedding
        if classes is None or classes.shape != t.shape:
            given = None if classes is None else tuple(classes.shape)
            raise ValueError(
                f"classes must be {tuple(t.shape)}, one per image, "
                f"since num_classes={self.class_embedding.num_embeddings}; got {given}"
            )
        return embedding + self.class_embedding(classes)


def level_sizes(resolution: int | tuple[int, int], num_levels: int) -> list[tuple[int, int]]:
    """Returns the (height, width) of each level; each level halves the one before.

    Raises:
        ValueError: If there are too many levels or a side does not halve evenly.
    """
    height, width = (resolution, resolution) if isinstance(resolution, int) else tuple(resolution)
    if num_levels > MOST_LEVELS:
        raise ValueError(f"channel_multipliers has {num_levels} levels, more than {MOST_LEVELS}")
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
            f"use {', '.join(map(str, near))}, for example"
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
                f"attention_resolutions has {side}, but the levels' longer sides are {levels}; "
                f"use [{sides[-1]}], for example"
            )


def _check_counts(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name}={count} must be at least 1")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value} must be one of {', '.join(choices)}")
