"""Checkpoints: one folder per step, written atomically.

They hold only tensors and plain values, so loading one cannot run code.
"""

import json
import logging
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ddpm.runs.contents import checkpoint_folders, read_meta
from ddpm.system import files
from ddpm.system.bounded import load_tensors
from ddpm.system.plain import Unreadable

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """One saved step of a run.

    Attributes:
        folder: The checkpoint's folder, such as .../checkpoints/step_00005000.
        step: Optimizer updates done.
    """

    folder: Path
    step: int

    def weights(self, kind: Literal["ema", "raw"]) -> dict[str, Tensor]:
        """Returns the network's weights by name, on the CPU.

        Args:
            kind: "ema" for the averaged weights, "raw" for the trained ones.

        Raises:
            ValueError: If the file holds anything but tensors.
        """
        file = self.folder / ("ema.safetensors" if kind == "ema" else "model.safetensors")
        try:
            return load_tensors(file)
        except (SafetensorError, ValueError) as error:
            raise ValueError(
                f"{file} is not a safetensors file and was not loaded ({error})"
            ) from error

    def load(self) -> dict[str, Any]:
        """Returns the state that `save` was given, on the CPU.

        Raises:
            ValueError: If a file holds anything but tensors and plain values.
        """
        return {
            **self.state(),
            "step": self.step,
            "model": self.weights("raw"),
            "ema": self.weights("ema"),
        }

    def state(self) -> dict[str, Any]:
        """Returns the saved state without the step and the weights, on the CPU.

        Raises:
            ValueError: If the file holds anything but tensors and plain values.
        """
        file = self.folder / "state.pt"
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(
                f"{file} holds more than tensors and plain values and was not loaded "
                f"({str(error).splitlines()[0]})"
            ) from error

    def damage(self) -> str | None:
        """Returns what is wrong with the files, by their checksums; None for a whole checkpoint."""
        try:
            sums = read_meta(self.folder)["sha256"]
        except Unreadable as error:
            return f"meta.json cannot be read ({error.why})"
        for name, expected in sums.items():
            file = self.folder / name
            if not file.is_file():
                return f"{name} is missing"
            if files.sha256(file) != expected:
                return f"{name} does not match its checksum"
        return None


def save(
    checkpoints: Path, state: dict[str, Any], keep: int, best: int | None = None
) -> Checkpoint:
    """Writes a checkpoint, points `latest` at it, and removes old ones.

    Args:
        checkpoints: The run's folder of checkpoints.
        state: TrainingState's state: "step", the weights "model" and "ema" by name, and other
            tensors and plain values.
        keep: Number of newest checkpoints to keep.
        best: A step to keep as well; None for none.

    Raises:
        ValueError: If the checkpoint cannot be written, for instance because the disk is full.
    """
    checkpoints.mkdir(parents=True, exist_ok=True)
    rest = dict(state)
    step, weights = rest.pop("step"), {kind: rest.pop(kind) for kind in ("model", "ema")}
    folder = checkpoints / f"step_{step:08d}"
    try:
        with files.whole(folder) as scratch:
            scratch.mkdir()
            for kind, tensors in weights.items():
                plain = {
                    name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()
                }
                save_file(plain, scratch / f"{kind}.safetensors")
            torch.save(rest, scratch / "state.pt")
            sums = {file.name: files.sha256(file) for file in sorted(scratch.iterdir())}
            (scratch / "meta.json").write_text(json.dumps({"step": step, "sha256": sums}))
    except (OSError, SafetensorError, RuntimeError) as error:  # RuntimeError is torch.save's
        raise ValueError(
            f"{folder} cannot be written, earlier checkpoints stay: {error}"
        ) from error
    files.write_text(checkpoints / "latest", folder.name + "\n")
    drop_old(checkpoints, keep, best)
    return Checkpoint(folder, step)


def drop_old(checkpoints: Path, keep: int, best: int | None) -> None:
    """Removes all checkpoints but the newest `keep` and that of step `best`."""
    for old in all_in(checkpoints)[:-keep]:
        if old.step != best:
            files.remove(old.folder)


def all_in(checkpoints: Path) -> list[Checkpoint]:
    """Returns a run's complete checkpoints, oldest first."""
    return [Checkpoint(folder, step) for step, folder in checkpoint_folders(checkpoints)]


def newest_whole(checkpoints: Path) -> Checkpoint | None:
    """Returns the newest undamaged checkpoint, or None if there are no checkpoints.

    Logs a warning for each damaged one that it skips.

    Raises:
        ValueError: If all checkpoints are damaged.
    """
    found = all_in(checkpoints)
    damages = []
    for checkpoint in reversed(found):
        damage = checkpoint.damage()
        if damage is None:
            return checkpoint
        damages.append(f"{checkpoint.folder}: {damage}")
        log.warning("skipping a damaged checkpoint, %s", damages[-1])
    if damages:
        raise ValueError(f"all checkpoints are damaged: {'; '.join(damages)}")
    return None


def find(checkpoints: Path, step: int | None = None) -> Checkpoint:
    """Returns the checkpoint of a step, or the newest undamaged one.

    Raises:
        ValueError: If there is no such checkpoint (the message lists the steps), or it is damaged.
    """
    found = all_in(checkpoints)
    if not found:
        raise ValueError(f"{checkpoints} has no checkpoints yet")
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
    raise ValueError(
        f"step={step} has no checkpoint: "
        f"choose {', '.join(str(checkpoint.step) for checkpoint in found)}"
    )
