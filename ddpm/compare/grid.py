"""A grid of samples: a row for each run, a column for each noise."""

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
    """Draws a row of samples for each run, a column for each noise.

    Networks of the same image size start from the same noise. A run that cannot be drawn from is
    left out, and named with the reason.

    Args:
        file: Of the picture.
        compared: The runs.
        sampler: How they are drawn.
        num_samples: Columns.
        seed: Of the noise.
        weights: Whose samples they are.
        device_name: auto, cpu, cuda or mps.
        trusted_modules: Prefixes of own code that a run may name.

    Raises:
        ValueError: If none can be drawn from.
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
        raise ValueError("grid=true: none of these runs can be drawn from")
    height, width = (max(images.shape[side] for images in drawn) for side in (1, 2))
    rows = [np.stack([_resized(image, height, width) for image in images]) for images in drawn]
    heads = [f"noise {index}" for index in range(num_samples)]
    save_png(file, draw_labels(Figure(rows, labels, heads, {})))


def _resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W, C) uint8 as (height, width, 3), each pixel as it is."""
    return np.asarray(to_picture(image).convert("RGB").resize((width, height), resample=0))
