"""Folders of the cache: whole or not there, and noticed when they are not what was written."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ddpm.files import sync_file, write_whole

CHECKED = 2**30  # bytes: a second or two
PART = 1024  # rows held in memory when a file is written


def damage(folder: Path) -> str | None:
    """How the files of a cached folder differ from what was written; None if they do not. Of files larger than CHECKED bytes only the size is looked at."""
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


def write_about(folder: Path, about: dict[str, Any]) -> None:
    """The last file of a folder: what it holds, and the size and digest of each file (of one larger than CHECKED bytes, the size alone)."""
    files = {}
    for file in sorted(folder.iterdir()):
        size = file.stat().st_size
        files[file.name] = (size, _sha256(file) if size <= CHECKED else None)
    write_whole(folder / "about.json", json.dumps({**about, "files": files}))


@contextmanager
def naming(cache: Path) -> Iterator[None]:
    """Have the system's complaints name the key to change."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"data.cache={cache}: pictures cannot be kept there ({error.strerror}); give another data.cache") from error


def reserve(handle: int, size: int) -> None:
    """Take the room on the disk now: writing to memory that maps a file on a full disk would end the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, size)
    else:
        os.truncate(handle, size)


def save_rows(path: Path, array: np.ndarray, chosen: np.ndarray) -> None:
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
