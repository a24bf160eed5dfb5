"""Rows of small pictures from runs' previews, the same noise in each column, in bounded bytes."""

import io
import itertools
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from ddpm.runs.reader import Compared
from ddpm.sample.images import text_of

BYTES = 9_000_000  # all pictures of a page, before base64 turns 3 bytes into 4
TILES = 8  # pictures per row, at most
SIDE = 128  # pixels of a picture's longer side, at most
STEPS = 24  # previews per run, at most
LOSSLESS = 32  # pictures of up to this many pixels a side are stored as PNG, others as JPEG


class Picture(NamedTuple):
    """A row of pictures from a run's preview at a step, as a png or jpeg file."""

    step: int
    kind: str
    content: bytes


@dataclass(frozen=True)
class Strip:
    """The previews of one run.

    Attributes:
        noise: What determines the noise, in words; runs with the same words share their columns.
        columns: Pictures per row.
        size: (width, height) of a picture, in pixels.
        drawn_by: What drew the last preview, according to its text; empty if it does not say.
        pictures: The rows, by step.
    """

    noise: str
    columns: int
    size: tuple[int, int]
    drawn_by: str
    pictures: list[Picture]


@dataclass
class Strips:
    """The strip of each run, by the run's index, and sentences on what was left out or shrunk."""

    of_run: dict[int, Strip] = field(default_factory=dict)
    reduced: list[str] = field(default_factory=list)


def strips_of(
    compared: Sequence[Compared], settings: Sequence[Mapping[str, str]], most: int = BYTES
) -> Strips:
    """Cuts rows from the previews of all runs, in at most `most` bytes.

    Each run gets the same share. It keeps as many of its previews as fit, evenly spaced and
    including the last; if not even one fits, the pictures are shrunk.

    Args:
        compared: The runs.
        settings: Each run's whole configuration, as text.
        most: Bytes for all pictures.
    """
    previews = {
        index: found for index, one in enumerate(compared) if (found := _previews(one.run.path))
    }
    strips = Strips()
    left_out = shrunk = 0
    unreadable = []
    for index, files in previews.items():
        strip, kept, side = _fitted(compared[index], files, most // len(previews), settings[index])
        if strip is None:
            unreadable.append(str(compared[index].run.path))
            continue
        strips.of_run[index] = strip
        left_out += len(files) - kept
        shrunk += max(strip.size) < side
    total = sum(len(files) for files in previews.values())
    if left_out:
        strips.reduced.append(
            f"{left_out} of {total} previews are left out to limit the page's size"
        )
    if shrunk:
        strips.reduced.append(f"the pictures of {shrunk} runs are shrunk")
    strips.reduced += [f"the previews of {path} cannot be read" for path in unreadable]
    return strips


def _previews(folder: Path) -> list[tuple[int, Path]]:
    found = []
    for file in (folder / "samples").glob("step_*.png"):
        with suppress(ValueError):
            found.append((int(file.stem.removeprefix("step_")), file))
    return sorted(found)


def _fitted(
    one: Compared, files: Sequence[tuple[int, Path]], share: int, settings: Mapping[str, str]
) -> tuple[Strip | None, int, int]:
    """Fits a run's rows into its share of bytes.

    Returns:
        The strip, or None if no preview can be read; the number of previews kept; and the longer
        side of an original picture, in pixels.
    """
    drawn = int(settings.get("runtime.num_previews", TILES))
    sides = [SIDE, SIDE // 2, SIDE // 4, SIDE // 8]
    for side, count in itertools.product(sides, (STEPS, 12, 6, 3, 2, 1)):
        if side < SIDE and count > 1:
            continue  # drop steps before shrinking pictures
        sheets = [
            (step, cut) for step, file in _spaced(files, count) if (cut := _cut(one, file, drawn))
        ]
        if not sheets:
            return None, 0, 0
        pictures = [_encoded(step, tiles, side) for step, tiles in sheets]
        if sum(len(picture.content) for picture in pictures) <= share or side == sides[-1]:
            tiles = sheets[-1][1]
            whole = max(tiles[0].size)
            strip = Strip(
                _noise(one, tiles[0]),
                len(tiles),
                _size(tiles[0], side),
                text_of(files[-1][1]).get("drawn by", ""),
                pictures,
            )
            return strip, len(pictures), whole
    raise AssertionError("the last side is always taken")


def _spaced(files: Sequence[tuple[int, Path]], count: int) -> list[tuple[int, Path]]:
    """Returns at most `count` files, evenly spaced and including the last."""
    every = math.ceil(len(files) / count)
    return list(files[::-1][::every][::-1])


def _cut(one: Compared, file: Path, drawn: int) -> list[Image.Image]:
    """Cuts the first pictures out of a preview's grid; returns none if the file is damaged.

    ddpm.sample.images.grid puts pictures 2 pixels apart and magnifies pixels if the sheet would be
    narrow. The number of columns follows from the sheet's width.
    """
    resolution = one.settings.get("model.resolution") or one.settings.get("data.resolution")
    height, width = resolution if isinstance(resolution, list) else (resolution, resolution)
    try:
        with Image.open(file) as opened:
            sheet = opened.convert("L" if opened.mode in ("L", "1") else "RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return []
    if not isinstance(width, int) or not isinstance(height, int):
        return [sheet]
    for columns in range(1, sheet.width // width + 1):
        times = max(1, 512 // (columns * width))
        if sheet.width == columns * (width * times + 2) + 2:
            rows = (sheet.height - 2) // (height * times + 2)
            count = min(TILES, columns * rows, drawn)
            return [
                _tile(sheet, divmod(index, columns), (width, height), times)
                for index in range(count)
            ]
    return [sheet]


def _tile(
    sheet: Image.Image, place: tuple[int, int], size: tuple[int, int], times: int
) -> Image.Image:
    top, left = (
        2 + position * (side * times + 2) for position, side in zip(place, size[::-1], strict=True)
    )
    drawn = sheet.crop((left, top, left + size[0] * times, top + size[1] * times))
    return drawn.resize(size, Image.Resampling.NEAREST)


def _noise(one: Compared, tile: Image.Image) -> str:
    """Describes a preview's noise, a function of the seed and the pictures' shape."""
    return f"seed {one.settings.get('seed')}, {tile.width} x {tile.height}"


def _size(tile: Image.Image, side: int) -> tuple[int, int]:
    scale = min(1.0, side / max(tile.size))
    return max(1, round(tile.width * scale)), max(1, round(tile.height * scale))


def _shrunk(tile: Image.Image, size: tuple[int, int]) -> Image.Image:
    return tile if tile.size == size else tile.resize(size, Image.Resampling.BOX)


def _encoded(step: int, tiles: Sequence[Image.Image], side: int) -> Picture:
    width, height = _size(tiles[0], side)
    row = Image.new(tiles[0].mode, (len(tiles) * width, height), "white")
    for index, tile in enumerate(tiles):
        small = (
            tile
            if tile.size == (width, height)
            else tile.resize((width, height), Image.Resampling.BOX)
        )
        row.paste(small, (index * width, 0))
    content = io.BytesIO()
    if max(tiles[0].size) <= LOSSLESS:
        row.save(content, format="PNG", optimize=True)
        return Picture(step, "png", content.getvalue())
    row.save(content, format="JPEG", quality=85)
    return Picture(step, "jpeg", content.getvalue())
