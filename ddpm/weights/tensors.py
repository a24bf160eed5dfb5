"""Reads files of tensors, and nothing but tensors."""

import pickle
import re
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ddpm.system.bounded import load_tensors, open_file

UNREADABLE = (
    *(SafetensorError, pickle.UnpicklingError, EOFError, struct.error),
    *(
        OSError,
        RuntimeError,
        LookupError,
        ValueError,
        TypeError,
        AttributeError,
    ),  # from damaged files
)


def read_tensors(option: str, file: Path) -> dict[str, Tensor]:
    """Reads a state dict from safetensors or a file of torch.save.

    Args:
        option: The option that named the file, as typed, for messages.
        file: The file.

    Returns:
        Tensors by name, on the CPU. Floats become float32, other dtypes stay.

    Raises:
        ValueError: If the file holds anything but tensors.
    """
    try:
        loaded = load_tensors(file) if file.suffix == ".safetensors" else _unpickled(file)
    except UNREADABLE as error:
        raise ValueError(
            f"{option}: {file} cannot be read as tensors only; nothing was loaded "
            f"({_reason(error)})"
        ) from error
    if isinstance(loaded, dict) and "param_groups" in loaded:
        raise ValueError(
            f"{option}: {file} is an optimizer's state; use the weights next to it "
            "(model*.pt, or their moving average ema_*.pt)"
        )
    if not isinstance(loaded, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in loaded.items()
    ):
        what = f"is a {type(loaded).__name__}"
        if isinstance(loaded, dict):
            what = f"has {', '.join(map(str, list(loaded)[:6]))} (save only the state dict)"
        raise ValueError(f"{option}: {file} is not a state dict of tensors; it {what}")
    for name, tensor in loaded.items():
        if tensor.layout != torch.strided or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ValueError(
                f"{option}: {file}: {name} has shape {tuple(tensor.shape)} but less data"
            )
    return {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in loaded.items()
    }


def _unpickled(file: Path) -> Any:
    with open_file(file) as content:
        return torch.load(content, map_location="cpu", weights_only=True)


def _reason(error: Exception) -> str:
    """Shortens an error; torch's own message goes on to say how to run the file's code."""
    words = str(error)
    code = re.search(r"(?:GLOBAL|global) ([\w.]+)", words)
    if "Weights only load failed" in words:
        return f"it names {code[1]}" if code else "not a pickle of tensors"
    first = words.splitlines()[0] if words else type(error).__name__
    return f"it is damaged or cut off: {first}"
