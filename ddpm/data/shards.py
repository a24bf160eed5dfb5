"""What a source of pictures is: places, cut into shards so that several processes can read them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image

from ddpm.system.bounded import read_file

if TYPE_CHECKING:
    from ddpm.data.listing import Listing

MOST_BYTES = 10**9  # of one picture, which is read whole
SHARD_SIZE = 64  # files, glyphs or rows that one process takes at a time


class Item(NamedTuple):
    """One picture as it lies in its source.

    Attributes:
        name: What messages call it.
        content: Its encoded bytes, or already an image where nothing is encoded.
        label: Number of its class, None for none.
        problem: Why its content could not be read, if so.
        beside: Whether the content is a file of its own, which a row of a table names.
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
        counts: Pictures of each shard.
        read: Shard number -> its items; picklable.
        classes: Label names, empty if there are no labels.
        stamp: What else than `files` decides the pictures: version of a package or hub revision,
            columns of a table; once their content is known (`listing.listed`), that.
        notes: What a user should know of how the place was read, a line each.
        others: Reason -> files of the place that are not used, by name.
        root: The folder that all lies in, where it is on this machine.
        files: Names below root: of the pictures, in order, or of the tables that hold them.
        labels: Of the pictures, where each is a file of its own.
        listing: What they are by content, once `listing.listed` found it.
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
    """Returns how many of `count` pictures each shard has."""
    return [min(SHARD_SIZE, count - start) for start in range(0, count, SHARD_SIZE)]


def in_shard(values: Sequence[Any], shard: int) -> Sequence[Any]:
    """Returns those values, one per picture, that are the shard's."""
    return values[shard * SHARD_SIZE : (shard + 1) * SHARD_SIZE]


def some(names: Sequence[str]) -> str:
    """Returns up to five of the names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def item_of(name: str, path: Path, label: int | None) -> Item:
    """Returns a file as an item; one that cannot be read says why."""
    try:
        return Item(name, read_file(path, MOST_BYTES), label)
    except ValueError as error:
        problem = str(error)
    except FileNotFoundError:
        problem = "a link to nowhere" if path.is_symlink() else "vanished"
    except PermissionError:
        problem = "permission denied"
    except OSError as error:
        problem = error.strerror or type(error).__name__
    return Item(name, b"", label, problem)
