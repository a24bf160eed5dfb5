"""Atomic writes, file locks and digests.

A reader finds either the new file or the old one, never a part. Nothing is written through a link
that somebody left in the folder: new files get unpredictable names, and files with known names are
opened without following links.
"""

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from filelock import FileLock, Timeout


@contextmanager
def whole(path: Path, sync: bool = True) -> Iterator[Path]:
    """Yields a scratch path beside `path`, and renames what was made there to `path` at the end.

    The rename happens after all of it is on the disk, with the permissions that the user's umask
    grants. If the block raises, the scratch is removed. A process that is killed leaves its scratch
    (.NAME.PID.RANDOM) for `clear_scratch`.

    Args:
        path: The file or folder to write atomically.
        sync: Wait for the disk. Without it, a power cut may leave an empty file.
    """
    scratch = _beside(path)
    try:
        yield scratch
        if scratch.is_symlink():
            raise ValueError(_linked(scratch))
        for part in [*scratch.rglob("*"), scratch] if scratch.is_dir() else [scratch]:
            _allow_by_umask(part)
            if sync:
                _sync(part)
        if scratch.is_dir():
            remove(path)
        scratch.replace(path)
        if sync:
            _sync(path.parent)
    finally:
        remove(scratch)


def write_text(path: Path, text: str) -> None:
    """Writes `text` to `path` atomically."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Writes `content` to `path` atomically."""
    with whole(path) as scratch, scratch.open("xb") as file:
        file.write(content)


def write_arrays(path: Path, **arrays: Any) -> None:
    """Writes named NumPy arrays to an .npz atomically, without a second copy in memory."""
    import numpy as np  # not at the top: --help should not wait for it

    with whole(path) as scratch, scratch.open("xb") as file:
        np.savez(file, **arrays)


def clear_scratch(folder: Path) -> None:
    """Removes what killed processes left in a folder; call it only as the folder's sole writer."""
    for left in folder.glob(".*.[0-9]*"):
        remove(left)


def remove(path: Path) -> None:
    """Removes a file or a folder; a folder is renamed first, so nobody sees it half removed."""
    if path.is_dir() and not path.is_symlink():
        hidden = _beside(path)
        path.rename(hidden)
        shutil.rmtree(hidden)  # follows no link in it
    else:
        path.unlink(missing_ok=True)


def refuse_links(folder: Path, *below: str) -> None:
    """Refuses links in a folder that is about to be written to; the folder itself may be a link.

    Args:
        folder: The folder, which need not exist.
        below: Names of subfolders to check as well.

    Raises:
        ValueError: If there is a link; the message names it.
    """
    for place in (folder, *(folder / name for name in below)):
        if not place.is_dir():
            continue
        with os.scandir(place) as entries:
            for entry in entries:
                if entry.is_symlink():
                    raise ValueError(_linked(Path(entry.path)))


def open_known(path: Path, how: int) -> int:
    """Opens a file with a known name, and creates it if needed; never follows a link or a pipe.

    Args:
        path: The file.
        how: Flags of os.open, such as os.O_WRONLY | os.O_APPEND.

    Returns:
        The file descriptor.

    Raises:
        ValueError: If `path` is a link, a pipe or a device.
    """
    flags = how | os.O_CREAT
    for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC"):  # not all systems have them
        flags |= getattr(os, name, 0)
    try:
        handle = os.open(path, flags, 0o666)
    except OSError as error:
        if path.is_symlink():
            raise ValueError(_linked(path)) from error
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ValueError(f"{path} is not a regular file: remove it")
    return handle


def append_to(path: Path) -> TextIO:
    """Opens a text file for appending, with `open_known`."""
    return os.fdopen(open_known(path, os.O_WRONLY | os.O_APPEND), "a", encoding="utf-8")


def size_of(folder: Path) -> int:
    """Returns the bytes of all files below a folder; files that vanish meanwhile count as 0."""
    size = 0
    for file in folder.rglob("*"):
        with suppress(OSError):
            size += file.lstat().st_size
    return size


class InUse(ValueError):
    """Another process is using this; try again when it is done."""


@contextmanager
def lock(path: Path, wait: float = -1) -> Iterator[None]:
    """Holds a lock on a lock file; the system releases it when the process ends, for any reason.

    Args:
        path: The lock file. Other processes can read what the holder writes to it.
        wait: Seconds to wait for the current holder; negative waits forever.

    Raises:
        Timeout: If another process holds the lock.
        ValueError: If the file system has no locks, as some network file systems do not, or if the
            file is a link.
    """
    os.close(open_known(path, os.O_RDWR))  # creates it with the permissions that the umask grants
    held = FileLock(path)
    try:
        held.acquire(timeout=wait)
    except Timeout:
        raise
    except OSError as error:
        raise ValueError(
            f"{path} cannot be locked ({error.strerror}): "
            "choose a folder on a file system that supports locks"
        ) from error
    try:
        yield
    finally:
        held.release()


def by_value(value: Any) -> Any:
    """Returns plain values in one form for equal ones: 1 for 1.0, 0 for -0.0, lists for tuples.

    Booleans stay booleans.
    """
    if isinstance(value, Mapping):
        return {key: by_value(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [by_value(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def as_key(value: Any) -> str:
    """Returns the same text for equal plain values, whatever the order of their keys."""
    return json.dumps(by_value(value), sort_keys=True)


def short_hash(value: Any) -> str:
    """Returns eight hexadecimal digits, the same for equal plain values."""
    return hashlib.sha256(as_key(value).encode()).hexdigest()[:8]


def sha256(file: Path) -> str:
    """Returns the SHA-256 of a file's content in hexadecimal."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _beside(path: Path) -> Path:
    """Returns an unpredictable path in the same folder."""
    name = path.name.lstrip(".")[:100]
    return path.with_name(f".{name}.{os.getpid()}.{os.urandom(8).hex()}")


def _linked(path: Path) -> str:
    return f"{path} is a link, and nothing is written through links: remove it, or copy the folder"


def _sync(path: Path) -> None:
    """Flushes a file's bytes, or a folder's entries, to the disk."""
    if path.is_dir():
        if os.name != "posix":
            return
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        return
    if path.is_symlink():
        return
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _allow_by_umask(path: Path) -> None:
    """Sets the permissions that the user's umask grants; some libraries set fewer."""
    if path.is_symlink():
        return
    mask = os.umask(0)
    os.umask(mask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
