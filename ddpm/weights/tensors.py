"""Files of tensors, read as nothing else."""

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
    ),  # a damaged one
)


def read_tensors(option: str, file: Path) -> dict[str, Tensor]:
    """Reads a table of tensors: safetensors, or what torch saved.

    Args:
        option: What named the file, as typed, for messages.
        file: The file.

    Returns:
        float32 tensors (others than floats as they are) by name, on the CPU.

    Raises:
        ValueError: If the file holds anything but tensors.
    """
    try:
        loaded = load_tensors(file) if file.suffix == ".safetensors" else _unpickled(file)
    except UNREADABLE as error:
        raise ValueError(
            f"{option}: {file} cannot be read as tensors alone, so it is left unread "
            f"({_reason(error)})"
        ) from error
    if isinstance(loaded, dict) and "param_groups" in loaded:
        raise ValueError(
            f"{option}: {file} is the state of an optimizer; the weights are in the file beside it "
            "(model*.pt, or ema_*.pt, their moving average)"
        )
    if not isinstance(loaded, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in loaded.items()
    ):
        what = f"is a {type(loaded).__name__}"
        if isinstance(loaded, dict):
            what = f"has {', '.join(map(str, list(loaded)[:6]))} (save the weights' table alone)"
        raise ValueError(f"{option}: {file} is not a table of tensors by name; it {what}")
    for name, tensor in loaded.items():
        if tensor.layout != torch.strided or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ValueError(
                f"{option}: {file}: {name} of shape {tuple(tensor.shape)} claims more than it holds"
            )
    return {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in loaded.items()
    }


def _unpickled(file: Path) -> Any:
    with open_file(file) as content:
        return torch.load(content, map_location="cpu", weights_only=True)


def _reason(error: Exception) -> str:
    """What was wrong, in a few words; torch's own go on to tell how to run the code in a file."""
    words = str(error)
    code = re.search(r"(?:GLOBAL|global) ([\w.]+)", words)
    if "Weights only load failed" in words:
        return f"it names {code[1]}" if code else "no pickle of tensors"
    first = words.splitlines()[0] if words else type(error).__name__
    return f"it is damaged or cut off: {first}"
