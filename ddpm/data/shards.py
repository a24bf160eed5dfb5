"""Defines a source of pictures, split into shards so that several processes can read it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image

from ddpm.system.bounded import read_file

if TYPE_CHECKING:
    from ddpm.data.listing import Listing

MOST_BYTES = 10**9  # size limit of one picture, which is read whole
SHARD_SIZE = 64  # files, glyphs or rows that one process takes at a time


class Item(NamedTuple):
    """One picture as its source stores it.

    Attributes:
        name: Its name in messages.
        content: Its encoded bytes, or an image if the source does not encode it.
        label: Its class number, or None.
        problem: Why its content could not be read, or None.
        beside: Whether the content is a separate file that a table row refers to.
    """

    name: str
    content: bytes | Image.Image
    label: int | None
    problem: str | None = None
    beside: bool = False


@dataclass(frozen=True)
class Source:
    """Pictures that can be read shard by shard.

    Attributes:
        counts: Number of pictures in each shard.
        read: Shard number -> its items; picklable.
        classes: Label names, empty if there are no labels.
        stamp: Identifies the pictures, apart from `files`: a package's version, a hub revision, the
            columns of a table. `listing.listed` adds the content.
        notes: What the user should know about how the source was read, one line each.
        others: Reason -> names of the files that are not used.
        root: The folder that holds all files, if they are on this machine.
        files: Names below root: of the pictures, in order, or of the tables that hold them.
        labels: Class number of each picture, if each is a separate file.
        listing: The pictures by content; `listing.listed` adds it.
    """

    counts: list[int]
    read: Callable[[int], Iterator[Item]]
    classes: list[str]
    stamp: str
    notes: list[str] = field(default_factory=list)
    others: dict[str, list[str]] = field(default_factory=dict)
    root: Path | None = None
    files: list[str] = field(default_factory=list)
    labels: list[int | None] | None = None
    listing: "Listing | None" = None

    def __len__(self) -> int:
        return sum(self.counts)


def shard_counts(count: int) -> list[int]:
    """Returns the number of pictures in each shard of `count` pictures."""
    return [min(SHARD_SIZE, count - start) for start in range(0, count, SHARD_SIZE)]


def in_shard(values: Sequence[Any], shard: int) -> Sequence[Any]:
    """Returns the shard's slice of `values`, which has one value per picture."""
    return values[shard * SHARD_SIZE : (shard + 1) * SHARD_SIZE]


def some(names: Sequence[str]) -> str:
    """Returns up to five of the names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def item_of(name: str, path: Path, label: int | None) -> Item:
    """Reads a file into an item; if that fails, `problem` says why."""
    try:
        return Item(name, read_file(path, MOST_BYTES), label)
    except ValueError as error:
        problem = str(error)
    except FileNotFoundError:
        problem = "a broken link" if path.is_symlink() else "vanished"
    except PermissionError:
        problem = "permission denied"
    except OSError as error:
        problem = error.strerror or type(error).__name__
    return Item(name, b"", label, problem)
