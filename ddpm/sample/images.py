"""Pictures to look at: from [-1, 1] to 8 bits, one file per image, or many in a grid."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ddpm.config.schema import Quantize
from ddpm.system.files import whole

if TYPE_CHECKING:
    from torch import Tensor


def to_uint8(images: Tensor) -> np.ndarray:
    """Converts (B, C, H, W) float in [-1, 1] to (B, H, W, C) uint8.

    Values are rounded to the nearest level and clipped.
    """
    return to_levels(images, "round")


def to_levels(images: Tensor, quantize: Quantize) -> np.ndarray:
    """Converts (B, C, H, W) float in [-1, 1] to (B, H, W, C) levels, clipped to [0, 255].

    Args:
        images: The images.
        quantize: "round" (to the nearest level) and "truncate" (to the one below) give uint8,
            "none" float32.
    """
    levels = images.float().add(1).mul(127.5)
    if quantize == "round":
        levels = levels.round()
    levels = levels.clamp(0, 255)
    if quantize != "none":
        levels = levels.byte()
    return levels.permute(0, 2, 3, 1).cpu().numpy()


def to_picture(image: np.ndarray) -> Image.Image:
    """Converts (H, W, C) uint8, C 1 or 3, to a Pillow image."""
    return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)


def read_png(path: Path) -> np.ndarray:
    """Reads a picture as (H, W, C) uint8."""
    with Image.open(path) as image:
        pixels = np.asarray(image)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def grid(images: np.ndarray, columns: int | None = None, least_width: int = 512) -> np.ndarray:
    """Arranges images in one picture, row by row, 2 pixels apart on white.

    Args:
        images: (B, H, W, C) uint8.
        columns: Number of columns; None for a picture as square as possible.
        least_width: Width in pixels up to which images are magnified, by a whole factor.
    """
    columns = columns or math.ceil(math.sqrt(len(images)))
    magnified = max(1, least_width // (columns * images.shape[2]))
    images = images.repeat(magnified, axis=1).repeat(magnified, axis=2)
    count, height, width, channels = images.shape
    rows = math.ceil(count / columns)
    gap = 2
    sheet = np.full(
        (rows * (height + gap) + gap, columns * (width + gap) + gap, channels), 255, dtype=np.uint8
    )
    for index, image in enumerate(images):
        top, left = (
            gap + position * (side + gap)
            for position, side in zip(divmod(index, columns), (height, width), strict=True)
        )
        sheet[top : top + height, left : left + width] = image
    return sheet


def save_png(path: Path, image: np.ndarray, text: Mapping[str, str] | None = None) -> None:
    """Writes (H, W, C) uint8 as a PNG, whole or not at all.

    It does not wait for the disk, since there may be 50,000 files.

    Args:
        path: The file to write.
        image: The picture.
        text: Text chunks of the file, by keyword.
    """
    said = PngInfo()
    for keyword, words in (text or {}).items():
        said.add_text(keyword, words)
    with whole(path, sync=False) as scratch:
        to_picture(image).save(scratch, format="PNG", pnginfo=said)


def text_of(path: Path) -> dict[str, str]:
    """Returns the text chunks of a PNG, by keyword; none if the file cannot be read."""
    try:
        with Image.open(path) as image:
            image.load()  # text may follow the pixels
            return dict(getattr(image, "text", {}))
    except (OSError, SyntaxError, ValueError):
        return {}


def save_image(path: Path, image: np.ndarray) -> None:
    """Writes (H, W, C) uint8 as save_png does, or float32 as an array to a path ending in .npy."""
    if image.dtype == np.uint8:
        return save_png(path, image)
    with whole(path, sync=False) as scratch, scratch.open("wb") as file:
        np.save(file, image)


def read_image(path: Path) -> np.ndarray:
    """Reads what save_image wrote, (H, W, C) uint8 or float32."""
    return np.load(path) if path.suffix == ".npy" else read_png(path)
