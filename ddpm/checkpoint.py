"""Checkpoints: one folder a step, whole or not there. Tensors only: nothing in them can run code."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ddpm.files import allow_by_umask, sync_file, sync_folder, write_whole

_PREFIX = "step_"


@dataclass(frozen=True)
class Checkpoint:
    """One saved step of a run.    folder: .../checkpoints/step_00005000.    step: optimizer updates done."""

    folder: Path
    step: int

    def weights(self, kind: Literal["ema", "raw"]) -> dict[str, Tensor]:
        """The network's weights by name, on the CPU: their average, or as trained."""
        return load_file(self.folder / ("ema.safetensors" if kind == "ema" else "model.safetensors"))

    def state(self) -> dict[str, Any]:
        """All else that a resume needs, on the CPU: what `save` was given."""
        return torch.load(self.folder / "state.pt", map_location="cpu", weights_only=True)


def save(
    checkpoints: Path, step: int, model: dict[str, Tensor], ema: dict[str, Tensor], state: dict[str, Any], keep: int, best: int | None = None
) -> Checkpoint:
    """Write a checkpoint of `step` updates, point `latest` at it, and drop all but the newest `keep` and that of step `best`.

    state: tensors and plain values (torch.load's weights_only reads it back).
    """
    checkpoints.mkdir(parents=True, exist_ok=True)
    name = f"{_PREFIX}{step:08d}"
    scratch = checkpoints / f".{name}.{os.getpid()}"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    for kind, tensors in (("model", model), ("ema", ema)):
        save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, scratch / f"{kind}.safetensors")
    torch.save(state, scratch / "state.pt")
    (scratch / "meta.json").write_text(json.dumps({"step": step}))
    for file in scratch.iterdir():
        allow_by_umask(file)  # safetensors makes its files private
        sync_file(file)
    sync_folder(scratch)
    folder = checkpoints / name
    shutil.rmtree(folder, ignore_errors=True)
    scratch.rename(folder)
    sync_folder(checkpoints)
    write_whole(checkpoints / "latest", name + "\n")
    for old in all_in(checkpoints)[:-keep]:
        if old.step != best:
            shutil.rmtree(old.folder)
    return Checkpoint(folder, step)


def all_in(checkpoints: Path) -> list[Checkpoint]:
    """The whole checkpoints of a run, oldest first."""
    folders = [folder for folder in checkpoints.glob(f"{_PREFIX}{'[0-9]' * 8}") if (folder / "meta.json").is_file()]
    return sorted((Checkpoint(folder, int(folder.name.removeprefix(_PREFIX))) for folder in folders), key=lambda found: found.step)


def find(checkpoints: Path, step: int | None = None) -> Checkpoint:
    """The checkpoint of a step, or the newest.    Raises ValueError, listing the steps there are, if it is not there."""
    found = all_in(checkpoints)
    if not found:
        raise ValueError(f"{checkpoints} holds no checkpoint yet")
    if step is None:
        return found[-1]
    for checkpoint in found:
        if checkpoint.step == step:
            return checkpoint
    raise ValueError(f"step={step} has no checkpoint; there are {', '.join(str(checkpoint.step) for checkpoint in found)}")
