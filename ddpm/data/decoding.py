"""From a source to one uint8 array at the run's resolution: decoded once, by several processes, and kept in a memory-mapped file."""

import hashlib
import io
import json
import logging
import math
import multiprocessing
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageColor, ImageOps
from tqdm import tqdm

from ddpm.data.shards import Source
from ddpm.files import allow_by_umask, alone, sync_file, sync_folder, write_whole

Found = list[tuple[str, bytes | None, int | None]]  # name, digest of the content (None: does not decode), label

log = logging.getLogger(__name__)

FILTER = Image.Resampling.BICUBIC
LAYOUT = 3  # of the cache; a change makes old ones be decoded again

CHECKED = 2**30  # bytes: a second or two
PART = 1024  # rows held in memory when a file is written


@dataclass(frozen=True)
class Decoding:
    """What is done to a picture. height, width: pixels.    channels: 3 colour, 1 grey.    crop: "center" cuts to the wanted shape before resizing,
    "none" gives the shape up.    background: colour that shows through transparent pixels, as Pillow spells it.    Raises ValueError if that is no colour."""

    height: int
    width: int
    channels: Literal[1, 3]
    crop: Literal["center", "none"]
    background: str

    def __post_init__(self) -> None:
        try:
            ImageColor.getrgb(self.background)
        except ValueError:
            raise ValueError(f"background={self.background} is no colour: give a name such as white, or #rrggbb") from None

    def __call__(self, content: bytes | Image.Image) -> np.ndarray:
        """The picture as (C, H, W) uint8, turned as its EXIF says, resized with an antialiasing bicubic filter; of a moving one the first.

        Raises OSError, ValueError or SyntaxError (Pillow's) if it does not decode.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = content if isinstance(content, Image.Image) else Image.open(io.BytesIO(content))
            image.load()
        image = self._flat(ImageOps.exif_transpose(image))
        size = (self.width, self.height)
        image = ImageOps.fit(image, size, FILTER) if self.crop == "center" else image.resize(size, FILTER)
        pixels = np.asarray(image, dtype=np.uint8)
        return pixels[None] if self.channels == 1 else pixels.transpose(2, 0, 1)

    def _flat(self, image: Image.Image) -> Image.Image:
        """The image in the wanted mode, 16-bit grey scaled down to 8, transparency laid on the background.

        Raises ValueError for numbers whose black and white nobody knows.
        """
        if image.mode == "F":
            raise ValueError("floating point numbers have no known white")
        if image.mode.startswith("I"):
            deep = np.asarray(image, dtype=np.float64)
            if deep.min() < 0 or deep.max() > 65535:
                raise ValueError("numbers of more than 16 bits have no known white")
            image = Image.fromarray((deep / 257).round().astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, ImageColor.getrgb(self.background)), image)
        return image.convert("L" if self.channels == 1 else "RGB")


@dataclass(frozen=True)
class ImageSet:
    """Decoded pictures, all of a source or a part of them. stored: (M, C, H, W) uint8, all of the source, memory-mapped.    rows: (N,) int64, those of
    `stored` that belong here.    digests: (N,) uint64, the first 8 bytes of each content's SHA-256.    labels: (N,) int64, or None.    classes: their names.
    fingerprint: of content, labels and order of the whole, the same wherever the pictures lie.    unreadable: names of those left out."""

    stored: np.ndarray
    rows: np.ndarray
    digests: np.ndarray
    labels: np.ndarray | None
    classes: list[str]
    fingerprint: str
    unreadable: list[str]

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def images(self) -> np.ndarray:
        """The pictures, (N, C, H, W) uint8: `stored` itself for the whole, a copy in memory for a part."""
        return self.stored if len(self) == len(self.stored) else self.stored[self.rows]

    def split(self, holdout: float) -> tuple["ImageSet", "ImageSet"]:
        """(to train on, held out): a picture is held out if its digest, read as a number in [0, 1), lies below the share `holdout`.

        So a picture's side follows from its content: not from its name, its place or the pictures beside it; and equal pictures are on the same side.
        Raises ValueError if `holdout` is more than 0 and leaves no picture on one of the sides.
        """
        held = self.digests < np.uint64(int(holdout * 2**64))
        if holdout > 0 and not 0 < held.sum() < len(self):
            raise ValueError(f"data.holdout={holdout} holds out {held.sum()} of the {len(self)} pictures, and both sides need some; give another share")
        return self._part(~held), self._part(held)

    def _part(self, chosen: np.ndarray) -> "ImageSet":
        labels = None if self.labels is None else self.labels[chosen]
        return replace(self, rows=self.rows[chosen], digests=self.digests[chosen], labels=labels)


def decoded(source: Source, decoding: Decoding, cache: Path, workers: int, max_unreadable: float) -> ImageSet:
    """The pictures of a source, from the cache if they have been decoded this way before, else decoded now by `workers` processes.

    A second process that wants them waits for the first; a cache that is not what was written is made anew. Raises ValueError, naming the first such
    files, if more than the share max_unreadable (and more than one) do not decode; and, naming data.cache, if they cannot be kept there.
    """
    key = hashlib.sha256(json.dumps([LAYOUT, source.stamp, source.counts, asdict(decoding)]).encode()).hexdigest()[:16]
    folder = cache / key
    if _damage(folder) is not None:
        with _keeping(cache):
            cache.mkdir(parents=True, exist_ok=True)
        with alone(cache / f".{key}.lock"):
            for left in cache.glob(f".{key}-*"):  # by a process that was killed: nobody else is in here
                shutil.rmtree(left, ignore_errors=True)
            damage = _damage(folder)
            if damage is not None:
                if folder.exists():
                    log.warning("decoding again, since the cache is damaged: %s %s", folder, damage)
                    shutil.rmtree(folder)
                _decode_into(folder, source, decoding, workers, max_unreadable)
    about = json.loads((folder / "about.json").read_text())
    labels = np.load(folder / "labels.npy") if about["classes"] else None
    images, digests = np.load(folder / "images.npy", mmap_mode="c"), np.load(folder / "digests.npy")
    if about["unreadable"]:
        names = about["unreadable"]
        log.warning("left out %d of %d pictures that do not decode: %s", len(names), len(names) + len(images), _some(names))
    empty = [] if labels is None else [name for number, name in enumerate(about["classes"]) if number not in labels]
    if empty:
        log.warning("%d of %d classes have no picture: %s", len(empty), len(about["classes"]), _some(empty))
    return ImageSet(images, np.arange(len(images)), digests, labels, about["classes"], about["fingerprint"], about["unreadable"])


def _damage(folder: Path) -> str | None:
    """How the cache's files differ from what was written; None if they do not. Of files larger than CHECKED bytes only the size is looked at."""
    try:
        files = json.loads((folder / "about.json").read_text())["files"]
        for name, (size, digest) in files.items():
            found = (folder / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes, not {size}"
            if size <= CHECKED and _sha256(folder / name) != digest:
                return f"{name} is not what was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"cannot be read ({type(error).__name__})"
    return None


def _decode_into(folder: Path, source: Source, decoding: Decoding, workers: int, max_unreadable: float) -> None:
    shape = (len(source), decoding.channels, decoding.height, decoding.width)
    with _keeping(folder.parent):
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        raw = scratch / "raw"
        with _keeping(folder.parent), raw.open("wb") as file:
            _reserve(file.fileno(), math.prod(shape))
        starts = np.cumsum([0, *source.counts])[:-1].tolist()
        digests: list[bytes] = [b""] * len(source)
        labels = np.full(len(source), -1, dtype=np.int64)
        unreadable: dict[int, str] = {}
        for start, found in _each_shard(source, decoding, str(raw), shape, starts, workers):
            for offset, (name, digest, label) in enumerate(found):
                digests[start + offset] = digest or b""
                labels[start + offset] = -1 if label is None else label
                if digest is None:
                    unreadable[start + offset] = name
        bad = [unreadable[index] for index in sorted(unreadable)]
        if len(bad) == len(source) or len(bad) > max(1, max_unreadable * len(source)):
            raise ValueError(f"{len(bad)} of {len(source)} pictures do not decode (data.max_unreadable={max_unreadable}): {_some(bad)}")
        good = np.array([index not in unreadable for index in range(len(source))])
        with _keeping(folder.parent):
            _save(scratch / "images.npy", np.memmap(raw, np.uint8, "r", shape=shape), good)
            raw.unlink()
            firsts = np.array([int.from_bytes(digest[:8], "big") for digest in digests], dtype=np.uint64)
            _save(scratch / "digests.npy", firsts, good)
            if source.classes:
                _save(scratch / "labels.npy", labels, good)
            fingerprint = hashlib.sha256(json.dumps(source.classes).encode())
            for digest, label in zip(digests, labels.tolist(), strict=True):
                if digest:
                    fingerprint.update(digest + label.to_bytes(8, "little", signed=True))
            files = {file.name: (file.stat().st_size, _sha256(file)) for file in sorted(scratch.iterdir())}
            about = {"classes": source.classes, "fingerprint": fingerprint.hexdigest()[:16], "unreadable": bad, "files": files}
            write_whole(scratch / "about.json", json.dumps(about))
            allow_by_umask(scratch)
            scratch.rename(folder)
            sync_folder(folder.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _keeping(cache: Path) -> Iterator[None]:
    """Have the system's complaints name the key to change."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"data.cache={cache}: decoded pictures cannot be kept there ({error.strerror}); give another data.cache") from error


def _reserve(handle: int, size: int) -> None:
    """Take the room on the disk now: writing to memory that maps a file on a full disk would end the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, size)
    else:
        os.truncate(handle, size)


def _each_shard(source: Source, decoding: Decoding, raw: str, shape: tuple[int, ...], starts: list[int], workers: int) -> Iterator[tuple[int, Found]]:
    """(first index, what was found) of each shard, as they get done."""
    with tqdm(total=len(source), desc="decoding", unit="img", disable=None) as bar:
        if workers <= 1 or len(starts) == 1:
            for shard, start in enumerate(starts):
                yield start, _decode_shard(source, decoding, raw, shape, shard, start)
                bar.update(source.counts[shard])
            return
        executor: Executor = ProcessPoolExecutor(min(workers, len(starts)), mp_context=multiprocessing.get_context("spawn"))
        with executor:
            jobs: dict[Future[Found], int] = {
                executor.submit(_decode_shard, source, decoding, raw, shape, shard, start): shard for shard, start in enumerate(starts)
            }
            for job in as_completed(jobs):
                yield starts[jobs[job]], job.result()
                bar.update(source.counts[jobs[job]])


def _decode_shard(source: Source, decoding: Decoding, raw: str, shape: tuple[int, ...], shard: int, start: int) -> Found:
    images = np.memmap(raw, np.uint8, "r+", shape=shape)
    found: Found = []
    for offset, item in enumerate(source.read(shard)):
        try:
            images[start + offset] = decoding(item.content)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning):
            found.append((item.name, None, item.label))
            continue
        content = item.content if isinstance(item.content, bytes) else item.content.tobytes()
        found.append((item.name, hashlib.sha256(content).digest(), item.label))
    images.flush()
    return found


def _save(path: Path, array: np.ndarray, chosen: np.ndarray) -> None:
    """The chosen rows of an array as a .npy file, a part at a time."""
    with path.open("wb") as out:
        header = {"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False, "shape": (int(chosen.sum()), *array.shape[1:])}
        np.lib.format.write_array_header_2_0(out, header)
        for start in range(0, len(array), PART):
            out.write(array[start : start + PART][chosen[start : start + PART]].tobytes())
    sync_file(path)


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
