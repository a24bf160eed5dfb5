"""Checkpoints: one folder a step, whole or not there. Tensors only: nothing in them can run code."""

import hashlib
import json
import logging
import os
import pickle
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ddpm.system import files
from ddpm.system.files import allow_by_umask, sync_file, sync_folder, write_whole

log = logging.getLogger(__name__)

_PREFIX = "step_"


@dataclass(frozen=True)
class Checkpoint:
    """One saved step of a run.    folder: .../checkpoints/step_00005000.    step: optimizer updates done."""

    folder: Path
    step: int

    def weights(self, kind: Literal["ema", "raw"]) -> dict[str, Tensor]:
        """The network's weights by name, on the CPU: their average, or as trained.    Raises ValueError if the file holds anything but tensors."""
        file = self.folder / ("ema.safetensors" if kind == "ema" else "model.safetensors")
        try:
            return load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} holds no tensors, so it is left unread ({error})") from error

    def state(self) -> dict[str, Any]:
        """All else that a resume needs, on the CPU: what `save` was given.    Raises ValueError if the file holds anything but tensors and plain values."""
        file = self.folder / "state.pt"
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(f"{file} holds more than tensors and plain values, so it is left unread ({str(error).splitlines()[0]})") from error

    def damage(self) -> str | None:
        """What is wrong with the files, by the checksums that were written with them; None for a whole checkpoint."""
        try:
            sums = json.loads((self.folder / "meta.json").read_text(encoding="utf-8"))["sha256"]
        except (OSError, ValueError, KeyError) as error:
            return f"meta.json cannot be read ({error})"
        for name, expected in sums.items():
            file = self.folder / name
            if not file.is_file():
                return f"{name} is missing"
            if _sha256(file) != expected:
                return f"{name} is not what was written"
        return None


def save(
    checkpoints: Path, step: int, model: dict[str, Tensor], ema: dict[str, Tensor], state: dict[str, Any], keep: int, best: int | None = None
) -> Checkpoint:
    """Write a checkpoint of `step` updates, point `latest` at it, and drop all but the newest `keep` and that of step `best`.

    state: tensors and plain values (torch.load's weights_only reads it back).    Raises ValueError, one line, if it cannot be written: a full disk, say.
    """
    checkpoints.mkdir(parents=True, exist_ok=True)
    name = f"{_PREFIX}{step:08d}"
    scratch = checkpoints / f".{name}.{os.getpid()}"
    try:
        _write(scratch, step, model, ema, state)
    except (OSError, SafetensorError, RuntimeError) as error:  # RuntimeError is torch.save's
        shutil.rmtree(scratch, ignore_errors=True)
        raise ValueError(f"{checkpoints / name} cannot be written, and those before it stay: {error}") from error
    folder = checkpoints / name
    _remove(folder)
    scratch.rename(folder)
    sync_folder(checkpoints)
    write_whole(checkpoints / "latest", name + "\n")
    for old in all_in(checkpoints)[:-keep]:
        if old.step != best:
            _remove(old.folder)
    return Checkpoint(folder, step)


def _write(scratch: Path, step: int, model: dict[str, Tensor], ema: dict[str, Tensor], state: dict[str, Any]) -> None:
    """The files of a checkpoint, all of them on the disk when this returns."""
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    for kind, tensors in (("model", model), ("ema", ema)):
        save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, scratch / f"{kind}.safetensors")
    torch.save(state, scratch / "state.pt")
    sums = {file.name: _sha256(file) for file in sorted(scratch.iterdir())}
    (scratch / "meta.json").write_text(json.dumps({"step": step, "sha256": sums}))
    for file in scratch.iterdir():
        allow_by_umask(file)  # safetensors makes its files private
        sync_file(file)
    sync_folder(scratch)


def clear_scratch(checkpoints: Path) -> None:
    """Remove what a process that was killed while saving left behind. Only for who alone writes here."""
    for left in checkpoints.glob(f".{_PREFIX}*"):
        shutil.rmtree(left, ignore_errors=True)
    files.clear_scratch(checkpoints)


def all_in(checkpoints: Path) -> list[Checkpoint]:
    """The whole checkpoints of a run, oldest first."""
    folders = [folder for folder in checkpoints.glob(f"{_PREFIX}{'[0-9]' * 8}") if (folder / "meta.json").is_file()]
    return sorted((Checkpoint(folder, int(folder.name.removeprefix(_PREFIX))) for folder in folders), key=lambda found: found.step)


def newest_whole(checkpoints: Path) -> Checkpoint | None:
    """The newest checkpoint whose files are what was written; a damaged one is named in the log and passed over. None if there is none at all.

    Raises ValueError if there are some and all are damaged.
    """
    found = all_in(checkpoints)
    damages = []
    for checkpoint in reversed(found):
        damage = checkpoint.damage()
        if damage is None:
            return checkpoint
        damages.append(f"{checkpoint.folder}: {damage}")
        log.warning("passing over a damaged checkpoint, %s", damages[-1])
    if damages:
        raise ValueError(f"no checkpoint is whole: {'; '.join(damages)}")
    return None


def find(checkpoints: Path, step: int | None = None) -> Checkpoint:
    """The checkpoint of a step, or the newest whole one.    Raises ValueError, listing the steps there are, if it is not there or damaged."""
    found = all_in(checkpoints)
    if not found:
        raise ValueError(f"{checkpoints} holds no checkpoint yet")
    if step is None:
        newest = newest_whole(checkpoints)
        assert newest is not None
        return newest
    for checkpoint in found:
        if checkpoint.step == step:
            damage = checkpoint.damage()
            if damage is not None:
                raise ValueError(f"step={step}: {checkpoint.folder} is damaged: {damage}")
            return checkpoint
    raise ValueError(f"step={step} has no checkpoint; there are {', '.join(str(checkpoint.step) for checkpoint in found)}")


def _remove(folder: Path) -> None:
    """Remove a checkpoint so that a half-removed one is never taken for a whole one."""
    if folder.exists():
        hidden = folder.with_name(f".{folder.name}.removed.{os.getpid()}")
        folder.rename(hidden)
        shutil.rmtree(hidden)


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
