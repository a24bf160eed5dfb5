"""Cache folders: written whole or not at all, and checked for damage before use.

Also records what is learned about each picture while it is cached.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ddpm.data.decoding import reason_of
from ddpm.data.shards import Item
from ddpm.system.files import sha256, write_text

CHECKED = 2**30  # bytes; hashing as many takes a second or two
PART = 1024  # rows held in memory while a file is written
NEARLY_BLACK = 24  # of 255; a picture with no level above this looks black


def find_damage(folder: Path) -> str | None:
    """Returns how a cached folder differs from what was written; None if it does not.

    For files larger than CHECKED bytes, only the size is checked.
    """
    try:
        files = json.loads((folder / "about.json").read_text())["files"]
        for name, (size, digest) in files.items():
            found = (folder / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes, not {size}"
            if size <= CHECKED and sha256(folder / name) != digest:
                return f"{name} has changed since it was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"cannot be read ({type(error).__name__})"
    return None


def write_about(folder: Path, about: dict[str, Any]) -> None:
    """Writes about.json, the last file of a folder: `about`, and the size and digest of each file.

    Files larger than CHECKED bytes are recorded by size alone.
    """
    files = {}
    for file in sorted(folder.iterdir()):
        size = file.stat().st_size
        files[file.name] = (size, sha256(file) if size <= CHECKED else None)
    write_text(folder / "about.json", json.dumps({**about, "files": files}))


@contextmanager
def naming_cache(cache: Path) -> Iterator[None]:
    """Turns an OSError in the body into a ValueError that names data.cache.

    Raises:
        ValueError: If the body raises an OSError.
    """
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"data.cache={cache} cannot store pictures ({error.strerror}); "
            f"give another folder, data.cache=DIR"
        ) from error


def reserve(handle: int, size: int) -> None:
    """Allocates disk space for an open file now.

    Otherwise writing to a memory map of the file would kill the process if the disk is full.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, size)
    else:
        os.truncate(handle, size)


def save_rows(path: Path, array: np.ndarray, chosen: np.ndarray) -> None:
    """Saves the chosen rows of an array as a .npy file, PART rows at a time."""
    with path.open("wb") as out:
        header = {
            "descr": np.lib.format.dtype_to_descr(array.dtype),
            "fortran_order": False,
            "shape": (int(chosen.sum()), *array.shape[1:]),
        }
        np.lib.format.write_array_header_2_0(out, header)
        for start in range(0, len(array), PART):
            out.write(array[start : start + PART][chosen[start : start + PART]].tobytes())


class Survey:
    """What one pass over a source finds out about each picture.

    Attributes:
        digests: (N, 32) uint8, SHA-256 of each picture, whether or not it decodes.
        labels: (N,) int64, -1 for none.
        good: (N,) bool, whether each picture decodes.
        brightest: (N,) uint8, the brightest level of each picture.
    """

    def __init__(self, count: int) -> None:
        self.digests = np.zeros((count, 32), dtype=np.uint8)
        self.labels = np.full(count, -1, dtype=np.int64)
        self.good = np.zeros(count, dtype=bool)
        self.brightest = np.zeros(count, dtype=np.uint8)
        self._reasons: dict[int, tuple[str, str]] = {}

    def note(self, index: int, seen: "Seen") -> None:
        """Records one picture."""
        self.labels[index] = -1 if seen.label is None else seen.label
        self.digests[index] = np.frombuffer(seen.digest, dtype=np.uint8)
        self.good[index] = seen.reason is None
        self.brightest[index] = seen.brightest
        if seen.reason is not None:
            self._reasons[index] = (seen.name, seen.reason)

    @property
    def reasons(self) -> dict[str, str]:
        """Name of each picture that does not decode -> why, in the source's order."""
        return dict(self._reasons[index] for index in sorted(self._reasons))

    @property
    def is_nearly_black(self) -> bool:
        """Whether at least half of the pictures look black on a screen."""
        return bool(self.good.any() and np.median(self.brightest[self.good]) < NEARLY_BLACK)

    def first_digests(self) -> np.ndarray:
        """Returns the first 8 bytes of each digest, (N,) uint64."""
        return self.digests[:, :8].copy().view(">u8")[:, 0].astype(np.uint64)

    def fingerprint(self, classes: list[str]) -> str:
        """Returns 16 hex digits that identify the pictures' content, labels and order.

        They do not depend on which pictures decode, and so not on Pillow's version.
        """
        return fingerprint_of(classes, self.digests, self.labels)


def fingerprint_of(classes: list[str], digests: np.ndarray, labels: np.ndarray) -> str:
    """Returns 16 hex digits that identify the content, labels and order of pictures.

    Args:
        classes: Label names.
        digests: (N, 32) uint8, SHA-256 of each picture's content.
        labels: (N,) int64, -1 for none.
    """
    whole = hashlib.sha256(json.dumps(classes).encode())
    numbers = labels.astype("<i8")[:, None].view(np.uint8)
    whole.update(np.concatenate([digests, numbers], axis=1).tobytes())
    return whole.hexdigest()[:16]


class Seen(NamedTuple):
    """What was found out about one picture; `reason` is why it does not decode, or None."""

    name: str
    digest: bytes
    label: int | None
    reason: str | None
    brightest: int


def see(item: Item, decode: Callable[[bytes | Image.Image], np.ndarray | Image.Image]) -> Seen:
    """Decodes an item and reports on it; an error in one file stays with that file.

    Args:
        item: The picture.
        decode: Decodes a picture, or raises an exception if it is unusable.
    """
    digest, reason, brightest = digest_of(item), item.problem, 0
    if reason is None:
        try:
            brightest = int(np.asarray(decode(item.content)).max())
        except Exception as error:
            reason = reason_of(error)
    return Seen(item.name, digest, item.label, reason, brightest)


def digest_of(item: Item) -> bytes:
    """Returns the SHA-256 of a picture's encoded bytes, or of its pixels if it is not encoded."""
    content = item.content.tobytes() if isinstance(item.content, Image.Image) else item.content
    return hashlib.sha256(content).digest()
