"""A grid of samples: one row per run, one column per noise."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from ddpm.compare import tables
from ddpm.config import build
from ddpm.config.validation import Node, check_node
from ddpm.runs.folder import RunFolder
from ddpm.runs.reader import Compared
from ddpm.sample.figures import Figure, draw_labels
from ddpm.sample.images import save_png, to_picture, to_uint8
from ddpm.sample.subject import of_run
from ddpm.system import devices
from ddpm.system.text import say


def draw(
    file: Path,
    compared: Sequence[Compared],
    sampler: Node,
    num_samples: int,
    seed: int,
    weights: Literal["ema", "raw"],
    device_name: Literal["auto", "cpu", "cuda", "mps"],
    trusted_modules: list[str],
) -> None:
    """Draws one row of samples per run, one column per noise.

    Networks of the same image size start from the same noise. A run that cannot draw samples is
    left out, with a warning that says why.

    Args:
        file: The PNG to write.
        compared: The runs.
        sampler: Settings of the sampler.
        num_samples: Number of columns.
        seed: Seed of the noise.
        weights: Averaged weights (ema) or those as trained (raw).
        device_name: auto, cpu, cuda or mps.
        trusted_modules: Module prefixes of the user's own code that a run may name.

    Raises:
        ValueError: If no run can draw samples.
    """
    device = devices.device(device_name)
    check_node("sampler", sampler, trusted_modules)

    def row(run: RunFolder) -> np.ndarray:
        """(num_samples, H, W, C) uint8."""
        subject = of_run(run, None, weights, trusted_modules).subject
        built = build.sampler(sampler, subject.diffusion)
        drawing = subject.drawing(built, seed, device, "tf32")
        return to_uint8(drawing.images(range(num_samples), subject.classes_in_turn(num_samples)))

    drawn: list[np.ndarray] = []
    labels: list[str] = []
    for one, differs in zip(compared, tables.differences(compared), strict=True):
        try:
            drawn.append(row(one.run))
            labels.append(tables.label(differs))
        except ValueError as error:
            path = one.run.path
            say(f"warning: {path} has no row in the grid: {error}", to_error=True)
    if not drawn:
        raise ValueError("grid=true: none of these runs can draw samples")
    height, width = (max(images.shape[side] for images in drawn) for side in (1, 2))
    rows = [np.stack([_resized(image, height, width) for image in images]) for images in drawn]
    heads = [f"noise {index}" for index in range(num_samples)]
    save_png(file, draw_labels(Figure(rows, labels, heads, {})))


def _resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes (H, W, C) uint8 to (height, width, 3) by nearest neighbor."""
    return np.asarray(to_picture(image).convert("RGB").resize((width, height), resample=0))
