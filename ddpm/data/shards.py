"""What a source of pictures is: places, cut into shards so that several processes can read them."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

SHARD_SIZE = 64  # files, glyphs or rows that one process takes at a time


class Item(NamedTuple):
    """One picture as it lies in its source.

    Attributes:
        name: What messages call it.
        content: Its encoded bytes, or already an image where nothing is encoded.
        label: Number of its class, None for none.
    """

    name: str
    content: bytes | Image.Image
    label: int | None


@dataclass(frozen=True)
class Source:
    """Pictures that can be read shard by shard.

    Attributes:
        counts: Pictures of each shard.
        read: Shard number -> its items; picklable.
        classes: Label names, empty if there are no labels.
        stamp: Changes when the pictures may have changed (names, sizes and times of files; version
            of a package or hub revision).
    """

    counts: list[int]
    read: Callable[[int], Iterator[Item]]
    classes: list[str]
    stamp: str

    def __len__(self) -> int:
        return sum(self.counts)


def shard_counts(count: int) -> list[int]:
    """Returns how many of `count` pictures each shard has."""
    return [min(SHARD_SIZE, count - start) for start in range(0, count, SHARD_SIZE)]


def in_shard(values: Sequence[Any], shard: int) -> Sequence[Any]:
    """Returns those values, one per picture, that are the shard's."""
    return values[shard * SHARD_SIZE : (shard + 1) * SHARD_SIZE]


def stamp_of(root: Path, files: Sequence[Path]) -> str:
    """Returns names, sizes and times of the files in one hash."""
    digest = hashlib.sha256()
    for file in files:
        status = file.stat() if file.exists() else file.lstat()
        name = file.relative_to(root) if file != root else file.name
        digest.update(
            f"{name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode(errors="surrogateescape")
        )
    return digest.hexdigest()


def content_of(path: Path) -> bytes:
    """Returns a file's bytes; none if it cannot be read, which is counted when they are decoded."""
    try:
        return path.read_bytes()
    except OSError:
        return b""
