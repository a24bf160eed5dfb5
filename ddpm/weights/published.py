"""Checkpoint files of openai/improved-diffusion and openai/guided-diffusion.

Such a file holds only weights. Network and process come from the configuration; shapes check them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from torch import Size, Tensor, nn

from ddpm.models.layers import AttentionBlock, ResBlock
from ddpm.models.unet import Level, UNet, level_sizes
from ddpm.system.files import sha256
from ddpm.weights.tensors import read_tensors
from ddpm.weights.unet_settings import UNET

Order = Literal["by_head", "whole"]
SUFFIXES = (".pt", ".pth", ".safetensors")
FIRST = "time_embed.0.weight"
UPSAMPLER = "it is an upsampler, which also takes a small picture and is not supported"
RES_BLOCK = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
ATTENTION = {"norm": "group_norm", "qkv": "to_q to_k to_v", "proj_out": "to_out.0"}


@dataclass(frozen=True)
class Published:
    """A checkpoint file.

    Attributes:
        option: The option that named it, as typed ("init_from=FILE"), for messages.
        file: The file.
        attention: Row order of attention's qkv: Q, K and V head by head ("by_head":
            improved-diffusion, and guided-diffusion's default), or all Q, all K, all V ("whole":
            guided-diffusion's use_new_attention_order). Shapes do not tell which.
    """

    option: str
    file: Path
    attention: Order

    def digest(self) -> str:
        """Returns a short digest of the file's bytes and, unless by_head, of the row order."""
        return sha256(self.file)[:16] + ("-whole" if self.attention == "whole" else "")

    def assumed(self) -> str:
        """Returns a line on what is assumed because the file's shapes do not tell."""
        return (
            f"{self.option}: its shapes do not tell the number and order of attention heads; "
            f"assuming model.* and init_attention={self.attention}"
        )

    def weights_for(self, network: nn.Module, model: Mapping[str, Any]) -> dict[str, Tensor]:
        """Returns the weights for a network: float32 by UNet's parameter names, on the CPU.

        Args:
            network: The network, on any device.
            model: Its class and arguments, as in conf/model/.

        Raises:
            ValueError: If they do not fit; the message names the first tensor that does not.
        """
        if not isinstance(network, UNet):
            raise ValueError(
                f"{self.option}: model._target_={model['_target_']} cannot load a checkpoint of "
                f"improved-diffusion or guided-diffusion; only {UNET} can"
            )
        found = read_tensors(self.option, self.file)
        self._check(found, network, model)
        weights: dict[str, Tensor] = {}
        for name, ours in names(network).items():
            weights |= self._split(found[name], ours, network)
        return weights

    def _split(self, tensor: Tensor, ours: list[str], network: UNet) -> dict[str, Tensor]:
        """Returns a published tensor under our names, a qkv split into its three parts."""
        if tensor.ndim == 3:  # attention layers are 1D convolutions over all pixels
            tensor = tensor[..., 0]
        if len(ours) == 1:
            return {ours[0]: tensor}
        block = cast(AttentionBlock, network.get_submodule(ours[0].rpartition(".to_q.")[0]))
        heads = block.heads if self.attention == "by_head" else 1
        rows = tensor.unflatten(0, (heads, 3, -1)).unbind(1)
        return {name: part.flatten(0, 1) for name, part in zip(ours, rows, strict=True)}

    def _check(self, found: Mapping[str, Tensor], network: UNet, model: Mapping[str, Any]) -> None:
        """Refuses a file that does not fit the network; names the first tensor that differs."""
        if FIRST not in found:
            raise ValueError(
                f"{self.option} is not a checkpoint of improved-diffusion or guided-diffusion: it "
                f"has no {FIRST}{_instead(found)}"
            )
        if not any(name.startswith("output_blocks.") for name in found):
            raise ValueError(f"{self.option} has no output_blocks: it is a classifier or cut off")
        shapes = {name: tensor.shape for name, tensor in found.items()}
        wanted = {name: _shape(name, ours, network) for name, ours in names(network).items()}
        for name in [*wanted, *(name for name in shapes if name not in wanted)]:
            if shapes.get(name) == wanted.get(name):
                continue
            theirs = f"of shape {tuple(shapes[name])}" if name in shapes else "missing"
            ours = f"needs {tuple(wanted[name])}" if name in wanted else "has no such layer"
            raise ValueError(
                f"{self.option}: {name} is {theirs}, but the network of model.* {ours}"
                f"{_decides(shapes, wanted, model['resolution'])}"
            )


def file_at(name: str, option: str) -> Path | None:
    """Returns the file of that name, or None if it names a folder or a hub repository.

    Raises:
        ValueError: If it ends like a file of weights and there is no such file.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if path.suffix in SUFFIXES and not path.exists():
        raise ValueError(f"{option}={name}: there is no such file")
    return None


def names(network: UNet) -> dict[str, list[str]]:
    """Maps the published name of each tensor of a network, in order, to its names here.

    Attention's qkv has three names here, every other tensor one.
    """
    tensors = set(network.state_dict())
    return {
        f"{theirs}.{kind}": [f"{name}.{kind}" for name in ours.split()]
        for theirs, ours in _layers(network)
        for kind in ("weight", "bias")
        if f"{ours.split()[0]}.{kind}" in tensors
    }


def _layers(network: UNet) -> Iterator[tuple[str, str]]:
    """Yields the published name of each layer and ours, in the order of a forward pass.

    The first convolution counts as an input block. A resampling layer is a block of its own on the
    way down, and ends a block on the way up. Some of our names may be missing in the network.
    """
    yield from (
        ("time_embed.0", "time_embedding.linear_1"),
        ("time_embed.2", "time_embedding.linear_2"),
    )
    yield from (("label_emb", "class_embedding"), ("input_blocks.0.0", "conv_in"))
    number = 1
    for level, down in enumerate(cast(list[Level], network.down_blocks)):
        place = f"down_blocks.{level}"
        for index in range(len(down.resnets)):
            yield from _block(f"input_blocks.{number}", place, down, index)
            number += 1
        for layer in down.downsamplers:
            yield from _layer(f"input_blocks.{number}.0", f"{place}.downsamplers.0", layer, "op")
            number += 1
    middle = cast(Level, network.mid_block)
    yield from _block("middle_block", "mid_block", middle, 0)
    yield from _layer("middle_block.2", "mid_block.resnets.1", middle.resnets[1])
    number = 0
    for level, up in enumerate(cast(list[Level], network.up_blocks)):
        place = f"up_blocks.{level}"
        for index in range(len(up.resnets)):
            yield from _block(f"output_blocks.{number}", place, up, index)
            number += 1
        for layer in up.upsamplers:
            after = 2 if up.attentions else 1
            theirs = f"output_blocks.{number - 1}.{after}"
            yield from _layer(theirs, f"{place}.upsamplers.0", layer, "conv")
    yield from (("out.0", "conv_norm_out"), ("out.2", "conv_out"))


def _block(theirs: str, ours: str, level: Level, index: int) -> Iterator[tuple[str, str]]:
    """Yields the layers of a residual block and of the attention after it, if any."""
    yield from _layer(f"{theirs}.0", f"{ours}.resnets.{index}", level.resnets[index])
    if level.attentions:
        yield from _layer(f"{theirs}.1", f"{ours}.attentions.{index}", level.attentions[index])


def _layer(theirs: str, ours: str, layer: nn.Module, conv: str = "") -> Iterator[tuple[str, str]]:
    """Yields the parts of a layer; `conv` is the published name of a resampling layer's part."""
    parts = {conv: "conv"}
    if isinstance(layer, ResBlock):
        parts = RES_BLOCK
    elif isinstance(layer, AttentionBlock):
        parts = ATTENTION
    for part, name in parts.items():
        yield f"{theirs}.{part}", " ".join(f"{ours}.{one}" for one in name.split())


def _shape(name: str, ours: list[str], network: UNet) -> Size:
    """Returns the shape that a published tensor must have for a network."""
    first = network.get_parameter(ours[0]).shape
    rows = Size([len(ours) * first[0], *first[1:]])
    return Size([*rows, 1]) if name.endswith(("qkv.weight", "proj_out.weight")) else rows


def _settings(shapes: Mapping[str, Size], resolution: int | tuple[int, int]) -> dict[str, Any]:
    """Returns what shapes tell about a network, by the key that decides it."""
    base = shapes[FIRST][1]
    blocks = 1 + max(
        int(name.split(".")[1]) for name in shapes if name.startswith("output_blocks.")
    )
    ends = [
        number
        for number in range(blocks)
        for place in (1, 2)
        if f"output_blocks.{number}.{place}.conv.weight" in shapes
        or f"output_blocks.{number}.{place}.in_layers.0.weight" in shapes
    ]
    starts = [0, *(end + 1 for end in ends)][::-1]  # first block per level up, finest level first
    widths = [shapes[f"output_blocks.{start}.0.in_layers.2.weight"][0] for start in starts]
    sides = [max(size) for size in level_sizes(resolution, len(widths))]
    classes = shapes.get("label_emb.weight")
    return {
        "model.base_channels": base,
        "data.channels": shapes["input_blocks.0.0.weight"][1],
        "training.conditional with data.num_classes, plus one for training.label_dropout": (
            "none" if classes is None else classes[0]
        ),
        "model.num_res_blocks": [*ends, blocks - 1][0],
        "model.channel_multipliers": [width / base for width in widths],
        "model.attention_resolutions": [
            side
            for side, start in zip(sides, starts, strict=True)
            if f"output_blocks.{start}.1.qkv.weight" in shapes
        ],
        "model.scale_shift_norm": shapes["output_blocks.0.0.emb_layers.1.weight"][0]
        == 2 * widths[-1],
        "model.resample": "conv" if any(".op." in name for name in shapes) else "resblock",
        "objective, where a learned variance doubles the output": shapes["out.2.weight"][0],
    }


def _decides(
    theirs: Mapping[str, Size], ours: Mapping[str, Size], resolution: int | tuple[int, int]
) -> str:
    """Returns the part of a message that names the settings to blame, where shapes tell."""
    try:
        found, wanted = _settings(theirs, resolution), _settings(ours, resolution)
    except (LookupError, ValueError, ArithmeticError):
        return ""
    if found["data.channels"] == 6:
        return f"; {UPSAMPLER}"
    differ = [
        f"{key} ({_plain(found[key])} in the file, {_plain(value)} here)"
        for key, value in wanted.items()
        if found[key] != value
    ]
    return f"; check {', '.join(differ)}" if differ else ""


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(f'{one:g}' for one in value)}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _instead(found: Mapping[str, Tensor]) -> str:
    """Returns the part of a message that says what the file holds instead."""
    if any(name.startswith(("conv_in.", "unet.conv_in.")) for name in found):
        return ", but tensors named as in diffusers: give its folder instead"
    if any(name.endswith(FIRST) for name in found):
        prefix = next(name for name in found if name.endswith(FIRST)).removesuffix(FIRST)
        return f", but {prefix}{FIRST}: strip {prefix} from the names"
    first = next(iter(found), None)
    return " and no other tensor" if first is None else f"; its first tensor is {first}"
