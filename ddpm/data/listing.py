"""Lists the pictures of a source by content, whether or not they decode.

The cache keeps the digests of files until the files change. Listing a large set again therefore
takes no longer than reading the sizes and times of its files.
"""

import json
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ddpm.data.cache import digest_of, fingerprint_of
from ddpm.data.shards import Source, item_of, some
from ddpm.system.files import lock, short_hash, write_text

SETTLED = 2 * 10**9  # nanoseconds; two changes within this time may leave a file the same times


@dataclass(frozen=True)
class Listing:
    """The pictures of a source, in its order.

    Attributes:
        names: Picture names; not part of the fingerprint.
        digests: (N, 32) uint8, SHA-256 of each picture.
        labels: (N,) int64, -1 for none.
        classes: Label names.
    """

    names: list[str]
    digests: np.ndarray
    labels: np.ndarray
    classes: list[str]

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that identify content, labels and order, wherever the pictures are."""
        return fingerprint_of(self.classes, self.digests, self.labels)

    def as_lines(self) -> str:
        """Returns one line of JSON per picture: name, start of its digest, class."""
        digests = [digest.tobytes().hex()[:16] for digest in self.digests]
        named = [self.classes[label] if label >= 0 else None for label in self.labels.tolist()]
        rows = zip(self.names, digests, named, strict=True)
        return "".join(json.dumps(row) + "\n" for row in rows)


def differences(before: str, now: str) -> str:
    """Describes how two sets of pictures differ, each given as `Listing.as_lines` returns it."""
    old, new = ({name: rest for name, *rest in map(json.loads, text.splitlines())}
                for text in (before, now))  # fmt: skip
    kinds = {
        "added": [name for name in new if name not in old],
        "removed": [name for name in old if name not in new],
        "changed": [name for name in new if name in old and new[name] != old[name]],
    }
    words = [f"{kind}: {some(names)}" for kind, names in kinds.items() if names]
    return "; ".join(words) or "in another order"


def listed(source: Source, cache: Path, workers: int) -> Source:
    """Adds its listing to a source on this machine, and its content to the stamp.

    A package or hub repository is identified by version or revision; its source is returned as is.

    Args:
        source: Where the pictures come from.
        cache: The folder that keeps digests; if it is not writable, every call computes them anew.
        workers: Number of reading threads.
    """
    if source.root is None or source.listing is not None:
        return source
    key = short_hash([str(source.root.resolve()), source.stamp])
    file = cache / "digests" / f"{key}.json"
    with ExitStack() as stack:
        with suppress(OSError, ValueError):  # a read-only disk, say
            file.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock(file.with_name(f".{key}.lock")))
        known = _read(file)
        find = _of_tables if source.labels is None else _of_files
        found, remembered = find(source, source.root, known, workers)
        if remembered is not known:
            with suppress(OSError):
                write_text(file, json.dumps(remembered))
    named = f"{source.stamp} {found.fingerprint} {short_hash(found.names)}"
    return replace(source, stamp=named, listing=found)


def read_through(source: Source, workers: int) -> Listing:
    """Lists any source by reading all of it."""
    return _listing(source, list(_items(source, workers)))


def _listing(source: Source, seen: Sequence[tuple[str, bytes, int | None, bool]]) -> Listing:
    names = [name for name, *_ in seen]
    digests = np.frombuffer(b"".join(digest for _, digest, *_ in seen), np.uint8).reshape(-1, 32)
    labels = np.array([-1 if label is None else label for *_, label, _ in seen], dtype=np.int64)
    return Listing(names, digests, labels, source.classes)


def _items(source: Source, workers: int) -> Iterator[tuple[str, bytes, int | None, bool]]:
    """Yields each picture's name, digest, label, and whether it is a file beside a table."""

    def read(shard: int) -> list[tuple[str, bytes, int | None, bool]]:
        return [
            (item.name, digest_of(item), item.label, item.beside) for item in source.read(shard)
        ]

    with ThreadPoolExecutor(workers) as pool, _bar(len(source)) as bar:
        for found in pool.map(read, range(len(source.counts))):
            bar.update(len(found))
            yield from found


def _of_files(
    source: Source, root: Path, known: dict[str, Any], workers: int
) -> tuple[Listing, dict[str, Any]]:
    """Lists picture files and reads only those that changed."""
    now, names = time.time_ns(), source.files
    states = [_state(f"{root}/{name}") for name in names]
    digests = [
        known[name][1] if name in known and known[name][0] == state else None
        for name, state in zip(names, states, strict=True)
    ]
    changed = [index for index, digest in enumerate(digests) if digest is None]
    if changed:
        read = partial(_digest, root)
        with ThreadPoolExecutor(workers) as pool, _bar(len(changed)) as bar:
            found = pool.map(read, [names[index] for index in changed])
            for index, digest in zip(changed, found, strict=True):
                digests[index] = digest
                bar.update()
    if changed or len(known) != len(names):
        known = {
            name: (state, digest)
            for name, state, digest in zip(names, states, digests, strict=True)
            if _is_settled(state, now)
        }
    labels = np.array(
        [-1 if label is None else label for label in source.labels or []], dtype=np.int64
    )
    return Listing(names, _as_array("".join(map(str, digests))), labels, source.classes), known


def _of_tables(
    source: Source, root: Path, known: dict[str, Any], workers: int
) -> tuple[Listing, dict[str, Any]]:
    """Lists table rows and reads all of them again if one of the tables changed.

    Rows that refer to files are read every time, since the files may change on their own.
    """
    now, states = time.time_ns(), [_state(f"{root}/{name}") for name in source.files]
    about = {"tables": source.files, "states": states, "classes": source.classes}
    if all(known.get(key) == value for key, value in about.items()):
        digests, labels = _as_array(known["digests"]), np.array(known["labels"], dtype=np.int64)
        return Listing(known["names"], digests, labels, source.classes), known
    seen = list(_items(source, workers))
    found = _listing(source, seen)
    if any(beside for *_, beside in seen) or not all(_is_settled(state, now) for state in states):
        return found, known
    rows = {"names": found.names, "labels": found.labels.tolist()}
    return found, {**about, **rows, "digests": found.digests.tobytes().hex()}


def _read(file: Path) -> dict[str, Any]:
    """What earlier calls remembered; empty if nothing."""
    with suppress(OSError, ValueError):
        return json.loads(file.read_text(encoding="utf-8"))
    return {}


def _as_array(digests: str) -> np.ndarray:
    return np.frombuffer(bytes.fromhex(digests), np.uint8).reshape(-1, 32)


def _is_settled(state: list[int] | None, now: int) -> bool:
    """Whether any change after `now` would give the file other times."""
    return state is not None and max(state[1:]) < now - SETTLED


def _state(path: str) -> list[int] | None:
    """A file's size in bytes and its times in nanoseconds; None if they cannot be read."""
    try:
        status = os.stat(path)  # noqa: PTH116 - a hundred thousand Paths take a second
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _digest(root: Path, name: str) -> str:
    return digest_of(item_of(name, root / name, None)).hex()


def _bar(count: int) -> "tqdm[Any]":
    return tqdm(total=count, desc="reading", unit="img", disable=None)
