"""What a source of pictures is: places, cut into shards so that several processes can read them."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
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
        problem: Why its content could not be read, if so.
    """

    name: str
    content: bytes | Image.Image
    label: int | None
    problem: str | None = None


@dataclass(frozen=True)
class Source:
    """Pictures that can be read shard by shard.

    Attributes:
        counts: Pictures of each shard.
        read: Shard number -> its items; picklable.
        classes: Label names, empty if there are no labels.
        stamp: Changes when the pictures may have changed (places, sizes and times of files; version
            of a package or hub revision).
        notes: What a user should know of how the place was read, a line each.
        others: Reason -> files of the place that are not used, by name.
    """

    counts: list[int]
    read: Callable[[int], Iterator[Item]]
    classes: list[str]
    stamp: str
    notes: list[str] = field(default_factory=list)
    others: dict[str, list[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(self.counts)


def shard_counts(count: int) -> list[int]:
    """Returns how many of `count` pictures each shard has."""
    return [min(SHARD_SIZE, count - start) for start in range(0, count, SHARD_SIZE)]


def in_shard(values: Sequence[Any], shard: int) -> Sequence[Any]:
    """Returns those values, one per picture, that are the shard's."""
    return values[shard * SHARD_SIZE : (shard + 1) * SHARD_SIZE]


def some(names: Sequence[str]) -> str:
    """Returns up to five of the names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def stamp_of(root: Path, files: Sequence[Path]) -> str:
    """Returns places, sizes, times and identities of the files in one hash.

    Two folders of files with equal names, sizes and times, as an archive unpacks them, differ.
    """
    digest = hashlib.sha256(str(root.resolve()).encode(errors="surrogateescape"))
    for file in files:
        status = file.stat() if file.exists() else file.lstat()
        name = file.relative_to(root) if file != root else file.name
        about = f"{name}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ino}\0"
        digest.update(about.encode(errors="surrogateescape"))
    return digest.hexdigest()


def item_of(name: str, path: Path, label: int | None) -> Item:
    """Returns a file as an item; one that cannot be read says why."""
    try:
        return Item(name, path.read_bytes(), label)
    except FileNotFoundError:
        problem = "a link to nowhere" if path.is_symlink() else "vanished"
    except PermissionError:
        problem = "permission denied"
    except OSError as error:
        problem = error.strerror or type(error).__name__
    return Item(name, b"", label, problem)
