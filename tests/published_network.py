"""A network in the layout of improved-diffusion and guided-diffusion, to test reading their files.

It follows the structure of the two codebases: three lists of blocks in the order of a forward pass,
and layers named by their place in a Sequential.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GROUPS = 8


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, channels)


class Res(nn.Module):
    def __init__(self, width, out, time, scale_shift, move=None):
        super().__init__()
        self.scale_shift, self.move = scale_shift, move
        self.in_layers = nn.Sequential(norm(width), nn.SiLU(), nn.Conv2d(width, out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time, out * (1 + scale_shift)))
        last = nn.Conv2d(out, out, 3, padding=1)
        self.out_layers = nn.Sequential(norm(out), nn.SiLU(), nn.Dropout(0.1), last)
        self.skip_connection = nn.Identity() if width == out else nn.Conv2d(width, out, 1)

    def forward(self, x, time):
        h = self.in_layers[:2](x)
        if self.move == "down":
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        elif self.move == "up":
            h, x = (F.interpolate(one, scale_factor=2, mode="nearest") for one in (h, x))
        h, said = self.in_layers[2](h), self.emb_layers(time)[:, :, None, None]
        if self.scale_shift:
            scale, shift = said.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + said)
        return self.skip_connection(x) + h


class Attention(nn.Module):
    def __init__(self, width, heads, whole):
        super().__init__()
        self.heads, self.whole = heads, whole
        self.norm = norm(width)
        self.qkv = nn.Conv1d(width, 3 * width, 1)
        self.proj_out = nn.Conv1d(width, width, 1)

    def forward(self, x, time):
        rows = self.qkv(self.norm(x).flatten(2))  # (B, 3C, N)
        if self.whole:  # rows hold all of Q, then K, then V, each split by head
            q, k, v = (part.unflatten(1, (self.heads, -1)) for part in rows.chunk(3, dim=1))
        else:  # rows hold Q, K and V of one head after another
            q, k, v = rows.unflatten(1, (self.heads, -1)).chunk(3, dim=2)
        scores = torch.einsum("bhct,bhcs->bhts", q, k) / math.sqrt(q.shape[2])
        mixed = torch.einsum("bhts,bhcs->bhct", scores.softmax(dim=-1), v)
        return x + self.proj_out(mixed.flatten(1, 2)).unflatten(2, x.shape[2:])


class Down(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.op = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x, time):
        return self.op(x)


class Up(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x, time):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class First(nn.Conv2d):
    def forward(self, x, time):
        return super().forward(x)


class Network(nn.Module):
    """A U-Net of two or more levels, with attention at the downsampling factors in `factors`."""

    def __init__(
        self,
        channels=3,
        out=3,
        base=16,
        multipliers=(1, 2),
        blocks=1,
        factors=(1,),
        heads=2,
        head_channels=None,
        scale_shift=False,
        updown=False,
        whole=False,
        classes=None,
    ):
        super().__init__()
        time = 4 * base
        self.base = base
        self.time_embed = nn.Sequential(nn.Linear(base, time), nn.SiLU(), nn.Linear(time, time))
        if classes is not None:
            self.label_emb = nn.Embedding(classes, time)

        def res(width, to, move=None):
            return Res(width, to, time, scale_shift, move)

        def attention(width):
            return Attention(
                width, heads if head_channels is None else width // head_channels, whole
            )

        width, kept = base, [base]
        self.input_blocks = nn.ModuleList([nn.ModuleList([First(channels, base, 3, padding=1)])])
        for level, multiplier in enumerate(multipliers):
            for _ in range(blocks):
                layers = [res(width, base * multiplier)]
                width = base * multiplier
                if level in factors:
                    layers.append(attention(width))
                self.input_blocks.append(nn.ModuleList(layers))
                kept.append(width)
            if level < len(multipliers) - 1:
                last = res(width, width, "down") if updown else Down(width)
                self.input_blocks.append(nn.ModuleList([last]))
                kept.append(width)
        self.middle_block = nn.ModuleList([res(width, width), attention(width), res(width, width)])
        self.output_blocks = nn.ModuleList()
        for level, multiplier in reversed(list(enumerate(multipliers))):
            for number in range(blocks + 1):
                layers = [res(width + kept.pop(), base * multiplier)]
                width = base * multiplier
                if level in factors:
                    layers.append(attention(width))
                if level and number == blocks:
                    layers.append(res(width, width, "up") if updown else Up(width))
                self.output_blocks.append(nn.ModuleList(layers))
        self.out = nn.Sequential(norm(width), nn.SiLU(), nn.Conv2d(width, out, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, classes: Tensor | None = None) -> Tensor:
        half = self.base // 2
        rates = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float64) / half)
        angles = t.to(x.dtype)[:, None] * rates.float().to(x.dtype)
        time = self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=1))
        if classes is not None:
            time = time + self.label_emb(classes)
        kept = []
        for block in self.input_blocks:
            for layer in block:
                x = layer(x, time)
            kept.append(x)
        for layer in self.middle_block:
            x = layer(x, time)
        for block in self.output_blocks:
            x = torch.cat([x, kept.pop()], dim=1)
            for layer in block:
                x = layer(x, time)
        return self.out(x)
