"""Folders of the cache: whole or not there, and noticed when they are not what was written.

Also what is learned of each picture on the way there.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ddpm.data.shards import Item
from ddpm.system.files import sha256, write_text

CHECKED = 2**30  # bytes: a second or two
PART = 1024  # rows held in memory when a file is written


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
    """Digests of content, labels, and which pictures do not decode.

    Attributes:
        digests: (N, 32) uint8, SHA-256.
        labels: (N,) int64, -1 for none.
        good: (N,) bool.
    """

    def __init__(self, count: int) -> None:
        self.digests = np.zeros((count, 32), dtype=np.uint8)
        self.labels = np.full(count, -1, dtype=np.int64)
        self.good = np.ones(count, dtype=bool)
        self._unreadable: dict[int, str] = {}

    def note(self, index: int, name: str, digest: bytes | None, label: int | None) -> None:
        """Notes one picture. `digest` is of its content, None if it does not decode."""
        self.labels[index] = -1 if label is None else label
        if digest is None:
            self.good[index] = False
            self._unreadable[index] = name
        else:
            self.digests[index] = np.frombuffer(digest, dtype=np.uint8)

    @property
    def unreadable(self) -> list[str]:
        """Names of those that do not decode, in order."""
        return [self._unreadable[index] for index in sorted(self._unreadable)]

    def first_digests(self) -> np.ndarray:
        """Returns the first 8 bytes of each digest, (N,) uint64."""
        return self.digests[:, :8].copy().view(">u8")[:, 0].astype(np.uint64)

    def fingerprint(self, classes: list[str]) -> str:
        """Returns 16 hex digits of the content, labels and order of what decodes."""
        whole = hashlib.sha256(json.dumps(classes).encode())
        whole.update(
            np.concatenate(
                [self.digests, self.labels.astype("<i8")[:, None].view(np.uint8)], axis=1
            )[self.good].tobytes()
        )
        return whole.hexdigest()[:16]


def digest_of(item: Item) -> bytes:
    """Returns the SHA-256 of a picture's content: its bytes, or pixels if nothing is encoded."""
    content = item.content.tobytes() if isinstance(item.content, Image.Image) else item.content
    return hashlib.sha256(content).digest()
