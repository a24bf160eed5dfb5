"""Converts between the config.json of diffusers' UNet2DModel and the arguments of UNet.

Both have the same parameter names. What one side cannot express is refused with the reason, never
dropped.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from ddpm.models.unet import UNet, level_sizes

UNET = "ddpm.models.UNet"
VERSION = "0.35.0"  # the version of diffusers that these keys are from
UNET_DEFAULTS: dict[str, Any] = {  # of diffusers' UNet2DModel, for keys that a file leaves out
    **{
        "sample_size": None,
        "in_channels": 3,
        "out_channels": 3,
        "center_input_sample": False,
        "dropout": 0.0,
        "act_fn": "silu",
    },
    **{
        "time_embedding_type": "positional",
        "time_embedding_dim": None,
        "freq_shift": 0,
        "flip_sin_to_cos": True,
        "num_train_timesteps": None,
    },
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    **{
        "mid_block_type": "UNetMidBlock2D",
        "mid_block_scale_factor": 1,
        "block_out_channels": [224, 448, 672, 896],
        "layers_per_block": 2,
    },
    **{
        "downsample_padding": 1,
        "downsample_type": "conv",
        "upsample_type": "conv",
        "attention_head_dim": 8,
        "add_attention": True,
    },
    **{
        "norm_num_groups": 32,
        "attn_norm_num_groups": None,
        "norm_eps": 1e-5,
        "resnet_time_scale_shift": "default",
    },
    **{"class_embed_type": None, "num_class_embeds": None},
}
UNET_FIXED: dict[str, list[Any]] = {  # the only values that UNet can express
    **{
        "center_input_sample": [False],
        "time_embedding_type": ["positional"],
        "mid_block_type": ["UNetMidBlock2D"],
        "mid_block_scale_factor": [1],
    },
    **{"act_fn": ["silu", "swish"], "add_attention": [True], "class_embed_type": [None]},
}
SINUSOIDS = {"sin_cos": (False, 1), "cos_sin": (True, 0)}  # flip_sin_to_cos, freq_shift
PADDINGS = {"same": 0, "symmetric": 1}


def unet_config(model: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the contents of diffusers' config.json for a network.

    Args:
        model: The network's class and all its arguments, as in conf/model/.

    Raises:
        ValueError: If diffusers cannot express the network, with the reason.
    """
    arguments = _complete(model)
    widths, attends = _levels(arguments)
    if arguments["channel_multipliers"][0] != 1:
        raise ValueError(
            f"model.channel_multipliers starts with {arguments['channel_multipliers'][0]}: in "
            "diffusers' UNet2DModel the first convolution has the first level's width, so it must "
            "be 1"
        )
    heads = _heads(arguments)
    head_widths = {width // count for width, count in heads.items()}
    if arguments["head_channels"] is None and arguments["num_heads"] > 1 and len(head_widths) > 1:
        raise ValueError(
            f"model.num_heads={arguments['num_heads']} on widths {', '.join(map(str, heads))}: "
            "diffusers' UNet2DModel has one head width for all levels, so only networks with "
            "model.head_channels can be exported"
        )
    one_head = arguments["head_channels"] is None and arguments["num_heads"] == 1
    plain, kind = (
        ("{}Block2D", "conv")
        if arguments["resample"] == "conv"
        else ("Resnet{}sampleBlock2D", "resnet")
    )
    flip, shift = SINUSOIDS[arguments["time_embedding"]]
    resolution = arguments["resolution"]
    return {
        "_class_name": "UNet2DModel",
        "_diffusers_version": VERSION,
        **UNET_DEFAULTS,
        "sample_size": resolution if isinstance(resolution, int) else list(resolution),
        "in_channels": arguments["in_channels"],
        "out_channels": arguments["out_channels"],
        "flip_sin_to_cos": flip,
        "freq_shift": shift,
        "block_out_channels": widths,
        "down_block_types": [
            "AttnDownBlock2D" if attention else plain.format("Down") for attention in attends
        ],
        "up_block_types": [
            "AttnUpBlock2D" if attention else plain.format("Up") for attention in reversed(attends)
        ],
        "layers_per_block": arguments["num_res_blocks"],
        "downsample_padding": PADDINGS[arguments["downsample_padding"]],
        "downsample_type": kind,
        "upsample_type": kind,
        "dropout": arguments["dropout"],
        "attention_head_dim": None if one_head else head_widths.pop(),
        "norm_num_groups": arguments["norm_groups"],
        "attn_norm_num_groups": arguments["norm_groups"],
        "norm_eps": arguments["norm_eps"],
        "resnet_time_scale_shift": "scale_shift" if arguments["scale_shift_norm"] else "default",
        "num_class_embeds": arguments["num_classes"],
    }


def unet_model(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the network of diffusers' config.json, as in conf/model/.

    Raises:
        ValueError: If UNet cannot express it, with the reason.
    """
    settings = read_settings(config, ["UNet2DModel"], UNET_DEFAULTS, UNET_FIXED)
    widths, groups, last = (
        list(settings["block_out_channels"]),
        settings["norm_num_groups"],
        len(settings["block_out_channels"]) - 1,
    )
    down = [str(name).removeprefix("UNetRes") for name in settings["down_block_types"]]
    # from the finest level on, like `down`
    up = [str(name).removeprefix("UNetRes") for name in reversed(settings["up_block_types"])]
    downs = {
        "DownBlock2D": "conv",
        "ResnetDownsampleBlock2D": "resnet",
        "AttnDownBlock2D": settings["downsample_type"] or "conv",
    }
    ups = {
        "UpBlock2D": "conv",
        "ResnetUpsampleBlock2D": "resnet",
        "AttnUpBlock2D": settings["upsample_type"] or "conv",
    }
    for name in [
        *(name for name in down if name not in downs),
        *(name for name in up if name not in ups),
    ]:
        raise ValueError(f"block type {name} is not supported; use {', '.join([*downs, *ups])}")
    if not len(down) == len(up) == len(widths):
        raise ValueError(
            "down_block_types, up_block_types and block_out_channels must have the same length"
        )
    if [name == "AttnUpBlock2D" for name in up] != [name == "AttnDownBlock2D" for name in down]:
        raise ValueError(
            "the levels with attention on the way down and on the way up must be the same"
        )
    kinds = {*(downs[name] for name in down[:last]), *(ups[name] for name in up[1:])}
    if len(kinds) > 1 or not kinds <= {"conv", "resnet"}:
        raise ValueError(
            "all levels must be resampled in the same way, by conv or by resnet; got "
            f"{', '.join(sorted(map(str, kinds)))}"
        )
    multipliers = [width // widths[0] for width in widths]
    if [widths[0] * multiplier for multiplier in multipliers] != widths:
        raise ValueError(f"block_out_channels={widths} must be multiples of the first")
    if settings["time_embedding_dim"] not in (None, 4 * widths[0]):
        raise ValueError(
            f"time_embedding_dim={settings['time_embedding_dim']} must be null or 4 * {widths[0]}"
        )
    if settings["sample_size"] is None:
        raise ValueError("sample_size=null must be the size of the images")
    if groups is None:
        raise ValueError("norm_num_groups=null must be a number")
    attention_groups = settings["attn_norm_num_groups"]
    if attention_groups != groups and (
        attention_groups is not None or settings["resnet_time_scale_shift"] != "default"
    ):
        raise ValueError(
            f"attn_norm_num_groups={attention_groups} must be norm_num_groups={groups}: attention "
            "is normalized like the rest"
        )
    resolution, head_width = settings["sample_size"], settings["attention_head_dim"]
    sides = [max(size) for size in level_sizes(resolution, len(widths))]
    flip_and_shift = (settings["flip_sin_to_cos"], settings["freq_shift"])
    return {
        "_target_": UNET,
        "resolution": resolution if isinstance(resolution, int) else tuple(resolution),
        "in_channels": settings["in_channels"],
        "out_channels": settings["out_channels"],
        "base_channels": widths[0],
        "channel_multipliers": multipliers,
        "attention_resolutions": [
            side for side, name in zip(sides, down, strict=True) if name == "AttnDownBlock2D"
        ],
        "num_res_blocks": settings["layers_per_block"],
        "dropout": settings["dropout"],
        "norm_groups": groups,
        "norm_eps": settings["norm_eps"],
        "num_heads": 1,
        "head_channels": head_width,
        "scale_shift_norm": key_of(
            {False: "default", True: "scale_shift"},
            "resnet_time_scale_shift",
            settings["resnet_time_scale_shift"],
        ),
        "time_embedding": key_of(SINUSOIDS, "flip_sin_to_cos and freq_shift", flip_and_shift),
        "downsample_padding": key_of(PADDINGS, "downsample_padding", settings["downsample_padding"])
        if "conv" in kinds
        else "same",
        "resample": "resblock" if kinds == {"resnet"} else "conv",
        "num_classes": settings["num_class_embeds"],
    }


def unseen(model: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings that change a UNet's output but show in no weight's name or shape."""
    arguments = _complete(model)
    padding = arguments["downsample_padding"] if arguments["resample"] == "conv" else None
    shown = {key: arguments[key] for key in ("norm_groups", "norm_eps", "time_embedding")}
    return {**shown, "downsample_padding": padding, "num_heads": _heads(arguments)}


def read_settings(
    config: Mapping[str, Any],
    classes: list[str],
    defaults: dict[str, Any],
    fixed: Mapping[str, list[Any]],
) -> dict[str, Any]:
    """Returns a file's settings, completed by defaults.

    Raises:
        ValueError: If the class is not one of `classes`, a key is unknown, or `fixed` rules out a
            value.
    """
    if config.get("_class_name") not in classes:
        raise ValueError(f"_class_name={config.get('_class_name')} must be {' or '.join(classes)}")
    settings = {key: value for key, value in config.items() if not key.startswith("_")}
    for key, value in settings.items():
        if key not in defaults and value is not None:
            raise ValueError(f"{key}={value}: unknown key")
        if key in fixed and value not in fixed[key]:
            raise ValueError(f"{key}={value} must be {' or '.join(map(str, fixed[key]))}")
    return {**defaults, **settings}


def key_of(table: Mapping[Any, Any], name: str, value: Any) -> Any:
    """Returns the key under which a table has that value.

    Raises:
        ValueError: If there is none; the message calls the value `name`.
    """
    for key, found in table.items():
        if found == value:
            return key
    raise ValueError(f"{name}={value} must be one of {', '.join(map(str, table.values()))}")


def _complete(model: Mapping[str, Any]) -> dict[str, Any]:
    """Returns all arguments of a UNet, defaults included; refuses other classes."""
    if model["_target_"] != UNET:
        raise ValueError(
            f"model._target_={model['_target_']} cannot be expressed as diffusers' UNet2DModel; "
            f"only {UNET} can"
        )
    defaults = {
        name: parameter.default for name, parameter in inspect.signature(UNet).parameters.items()
    }
    return {**defaults, **{key: value for key, value in model.items() if key != "_target_"}}


def _levels(arguments: Mapping[str, Any]) -> tuple[list[int], list[bool]]:
    """Returns each level's width and whether it has attention."""
    widths = [
        arguments["base_channels"] * multiplier for multiplier in arguments["channel_multipliers"]
    ]
    return widths, [
        max(size) in arguments["attention_resolutions"]
        for size in level_sizes(arguments["resolution"], len(widths))
    ]


def _heads(arguments: Mapping[str, Any]) -> dict[int, int]:
    """Maps width to number of heads for the levels with attention and the middle."""
    widths, attends = _levels(arguments)
    attended = [
        *(width for width, attention in zip(widths, attends, strict=True) if attention),
        widths[-1],
    ]
    return {
        width: width // arguments["head_channels"]
        if arguments["head_channels"]
        else arguments["num_heads"]
        for width in attended
    }
