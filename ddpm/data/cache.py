"""Folders of the cache: whole or not there, and noticed when they are not what was written.

Also what is learned of each picture on the way there.
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

CHECKED = 2**30  # bytes: a second or two
PART = 1024  # rows held in memory when a file is written
NEARLY_BLACK = 24  # of 255, the brightest level of a picture that shows nothing


def find_damage(folder: Path) -> str | None:
    """Returns how the files of a cached folder differ from what was written; None if they do not.

    Of files larger than CHECKED bytes, only the size is checked.
    """
    try:
        files = json.loads((folder / "about.json").read_text())["files"]
        for name, (size, digest) in files.items():
            found = (folder / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes, not {size}"
            if size <= CHECKED and sha256(folder / name) != digest:
                return f"{name} is not what was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"cannot be read ({type(error).__name__})"
    return None


def write_about(folder: Path, about: dict[str, Any]) -> None:
    """Writes the last file of a folder: what it holds, and the size and digest of each file.

    For a file larger than CHECKED bytes, that is the size alone.
    """
    files = {}
    for file in sorted(folder.iterdir()):
        size = file.stat().st_size
        files[file.name] = (size, sha256(file) if size <= CHECKED else None)
    write_text(folder / "about.json", json.dumps({**about, "files": files}))


@contextmanager
def naming_cache(cache: Path) -> Iterator[None]:
    """Makes the system's complaints name the key to change.

    Raises:
        ValueError: In place of an OSError of the body.
    """
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"data.cache={cache}: pictures cannot be kept there ({error.strerror}); "
            f"give another data.cache"
        ) from error


def reserve(handle: int, size: int) -> None:
    """Takes the room on the disk now.

    Writing to memory that maps a file on a full disk would end the process.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, size)
    else:
        os.truncate(handle, size)


def save_rows(path: Path, array: np.ndarray, chosen: np.ndarray) -> None:
    """Saves the chosen rows of an array as a .npy file, a part at a time."""
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
    """What is learned of each picture of a source on the way through it.

    Attributes:
        digests: (N, 32) uint8, SHA-256 of what was listed, whether it decodes or not.
        labels: (N,) int64, -1 for none.
        good: (N,) bool: those that decode.
        brightest: (N,) uint8: their brightest level.
    """

    def __init__(self, count: int) -> None:
        self.digests = np.zeros((count, 32), dtype=np.uint8)
        self.labels = np.full(count, -1, dtype=np.int64)
        self.good = np.zeros(count, dtype=bool)
        self.brightest = np.zeros(count, dtype=np.uint8)
        self._reasons: dict[int, tuple[str, str]] = {}

    def note(self, index: int, seen: "Seen") -> None:
        """Notes one picture."""
        self.labels[index] = -1 if seen.label is None else seen.label
        self.digests[index] = np.frombuffer(seen.digest, dtype=np.uint8)
        self.good[index] = seen.reason is None
        self.brightest[index] = seen.brightest
        if seen.reason is not None:
            self._reasons[index] = (seen.name, seen.reason)

    @property
    def reasons(self) -> dict[str, str]:
        """Name -> why it does not decode, in the source's order."""
        return dict(self._reasons[index] for index in sorted(self._reasons))

    @property
    def is_nearly_black(self) -> bool:
        """Whether hardly a picture has a level that a screen would show."""
        return bool(self.good.any() and np.median(self.brightest[self.good]) < NEARLY_BLACK)

    def first_digests(self) -> np.ndarray:
        """Returns the first 8 bytes of each digest, (N,) uint64."""
        return self.digests[:, :8].copy().view(">u8")[:, 0].astype(np.uint64)

    def fingerprint(self, classes: list[str]) -> str:
        """Returns 16 hex digits of content, labels and order of what was listed.

        It does not depend on what decodes, and so not on Pillow's version.
        """
        return fingerprint_of(classes, self.digests, self.labels)


def fingerprint_of(classes: list[str], digests: np.ndarray, labels: np.ndarray) -> str:
    """Returns 16 hex digits of content, labels and order of pictures.

    Args:
        classes: The labels' names.
        digests: (N, 32) uint8, SHA-256 of each content.
        labels: (N,) int64, -1 for none.
    """
    whole = hashlib.sha256(json.dumps(classes).encode())
    numbers = labels.astype("<i8")[:, None].view(np.uint8)
    whole.update(np.concatenate([digests, numbers], axis=1).tobytes())
    return whole.hexdigest()[:16]


class Seen(NamedTuple):
    """One picture of a source: `reason` says why it does not decode, None if it does."""

    name: str
    digest: bytes
    label: int | None
    reason: str | None
    brightest: int


def see(item: Item, decode: Callable[[bytes | Image.Image], np.ndarray | Image.Image]) -> Seen:
    """Decodes an item and says what it is like; any fault of one file is that file's.

    Args:
        item: The picture.
        decode: Raises an exception for one that cannot be used.
    """
    digest, reason, brightest = digest_of(item), item.problem, 0
    if reason is None:
        try:
            brightest = int(np.asarray(decode(item.content)).max())
        except Exception as error:
            reason = reason_of(error)
    return Seen(item.name, digest, item.label, reason, brightest)


def digest_of(item: Item) -> bytes:
    """Returns the SHA-256 of a picture's content: its bytes, or pixels if nothing is encoded."""
    content = item.content.tobytes() if isinstance(item.content, Image.Image) else item.content
    return hashlib.sha256(content).digest()
