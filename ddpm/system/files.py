"""Writing so that a reader finds the whole file or the one before it; locks; digests.

Nothing is written through a link that somebody left in the folder: new files have names that nobody
knows before, and files of known names are opened without following.
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
    """Gives a scratch path beside `path`; the file or folder made there takes its place at the end.

    It does so by a rename, after all of it is on the disk, with the permissions that the user's
    umask grants. If the block raises, nothing is left. A process that is killed leaves its scratch
    (.NAME.PID.RANDOM) for `clear_scratch`.

    Args:
        path: What is written, whole or not at all.
        sync: Wait for the disk; without, a power cut may leave an empty file.
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
    """Puts `text` at `path`, whole or not at all."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Puts `content` at `path`, whole or not at all."""
    with whole(path) as scratch, scratch.open("xb") as file:
        file.write(content)


def write_arrays(path: Path, **arrays: Any) -> None:
    """Puts NumPy arrays at `path`, an .npz, under their names, without a second copy in memory."""
    import numpy as np  # not at the top: --help need not wait for it

    with whole(path) as scratch, scratch.open("xb") as file:
        np.savez(file, **arrays)


def clear_scratch(folder: Path) -> None:
    """Removes what killed processes left in a folder. Only for who alone writes there."""
    for left in folder.glob(".*.[0-9]*"):
        remove(left)


def remove(path: Path) -> None:
    """Removes a file, or a folder so that a half-removed one is never taken for a whole one."""
    if path.is_dir() and not path.is_symlink():
        hidden = _beside(path)
        path.rename(hidden)
        shutil.rmtree(hidden)  # follows no link in it
    else:
        path.unlink(missing_ok=True)


def refuse_links(folder: Path, *below: str) -> None:
    """Refuses links in a folder that is about to be written into; the folder itself may be one.

    Args:
        folder: The folder, if it is there.
        below: Names of folders in it that are written into too.

    Raises:
        ValueError: If there is one, naming it.
    """
    for place in (folder, *(folder / name for name in below)):
        if not place.is_dir():
            continue
        with os.scandir(place) as entries:
            for entry in entries:
                if entry.is_symlink():
                    raise ValueError(_linked(Path(entry.path)))


def open_known(path: Path, how: int) -> int:
    """Opens a file of a known name, made if need be, and never what a link or a pipe leads to.

    Args:
        path: The file.
        how: Flags of os.open, such as os.O_WRONLY | os.O_APPEND.

    Returns:
        Its descriptor.

    Raises:
        ValueError: If a link, a pipe or a device bears the name.
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
        raise ValueError(f"{path} is no file, and is not written to: remove it")
    return handle


def append_to(path: Path) -> TextIO:
    """Opens a text file to add to, by `open_known`."""
    return os.fdopen(open_known(path, os.O_WRONLY | os.O_APPEND), "a", encoding="utf-8")


def size_of(folder: Path) -> int:
    """Returns the bytes of all files below a folder; what vanishes meanwhile counts nothing."""
    size = 0
    for file in folder.rglob("*"):
        with suppress(OSError):
            size += file.lstat().st_size
    return size


class InUse(ValueError):
    """What another process works on; it can be had when that one is done."""


@contextmanager
def lock(path: Path, wait: float = -1) -> Iterator[None]:
    """Holds a lock on a file made for it; the system ends it with the process, however it ends.

    Args:
        path: The file; what the holder writes into it stays readable for others.
        wait: Seconds to wait for whoever holds it; negative for as long as it takes.

    Raises:
        Timeout: If another process holds it.
        ValueError: If the file system gives no locks, as some network file systems do not; or if
            the file is a link.
    """
    os.close(open_known(path, os.O_RDWR))  # with the permissions that the umask grants
    held = FileLock(path)
    try:
        held.acquire(timeout=wait)
    except Timeout:
        raise
    except OSError as error:
        raise ValueError(
            f"{path} cannot be locked ({error.strerror}): "
            "give a folder on a file system that has locks"
        ) from error
    try:
        yield
    finally:
        held.release()


def by_value(value: Any) -> Any:
    """Returns plain values as equal ones are written alike: 1 for 1.0, 0 for -0.0, tuples as lists.

    Booleans stay apart.
    """
    if isinstance(value, Mapping):
        return {key: by_value(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [by_value(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def as_key(value: Any) -> str:
    """Returns one text for plain values that are equal, whatever the order of their keys."""
    return json.dumps(by_value(value), sort_keys=True)


def short_hash(value: Any) -> str:
    """Eight hexadecimal digits of plain values: equal ones have the same."""
    return hashlib.sha256(as_key(value).encode()).hexdigest()[:8]


def sha256(file: Path) -> str:
    """The hexadecimal digest of a file's bytes."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _beside(path: Path) -> Path:
    """A name in the same folder that nobody else knows."""
    name = path.name.lstrip(".")[:100]
    return path.with_name(f".{name}.{os.getpid()}.{os.urandom(8).hex()}")


def _linked(path: Path) -> str:
    return f"{path} is a link, and nothing is written through links: remove it, or copy the folder"


def _sync(path: Path) -> None:
    """Makes sure that a file's bytes, or the names in a folder, are on the disk."""
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
    """Gives the permissions that the user's umask grants, where what made it gave fewer."""
    if path.is_symlink():
        return
    mask = os.umask(0)
    os.umask(mask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
