"""Writing so that a reader finds the whole file or the one before it: temporary name, fsync, rename."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]  # mypy knows it as a module


def write_whole(path: Path, text: str) -> None:
    """Put `text` at `path`, whole or not at all. The file gets the permissions that the user's umask gives."""
    write_whole_bytes(path, text.encode())


def write_whole_bytes(path: Path, content: bytes) -> None:
    """`write_whole` of bytes."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    with scratch.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)
    sync_folder(path.parent)


def write_whole_npz(path: Path, **arrays: Any) -> None:
    """`write_whole` of NumPy arrays under their names, without a second copy in memory."""
    import numpy as np  # not at the top: --help need not wait for it

    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with scratch.open("wb") as file:
            np.savez(file, **arrays)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def clear_scratch(folder: Path) -> None:
    """Remove the files that a process left behind in a folder which was killed while writing. Only for who alone writes there."""
    for left in folder.glob(".*.[0-9]*"):
        if left.is_file():
            left.unlink()


def lock(file: IO[str], wait: bool = False) -> bool:
    """Whether an open file is now this process's alone, until it is closed or the process ends, however it ends. Always, where the system has no such locks."""
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            return False
    return True


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Wait until no other process is in here with the same `path`, a file made for this, and keep others waiting."""
    with path.open("a") as file:
        lock(file, wait=True)
        yield


def sync_file(path: Path) -> None:
    """Make sure that a file's bytes are on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Make sure that the names in a folder are on the disk, where the system can."""
    if os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def allow_by_umask(path: Path) -> None:
    """Give a file or folder the permissions that the user's umask grants, where what made it gave fewer."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
