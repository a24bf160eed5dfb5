"""Prepares the pictures of a source for training and keeps them in the cache.

They are decoded into one array, or stay encoded where that array would take too much space.
"""

import hashlib
import json
import logging
import math
import shutil
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from ddpm.data.cache import find_damage, naming_cache, save_rows, write_about
from ddpm.data.decoding import Decoding
from ddpm.data.listing import listed
from ddpm.data.shards import Source, some
from ddpm.data.stored import FILE, Packed, decode_into, pack_into
from ddpm.system.files import lock, remove, whole

log = logging.getLogger(__name__)

LAYOUT = 6  # version of the cache's layout; raising it rebuilds old caches


Feed = Literal["auto", "device", "file", "decode"]


@dataclass(frozen=True)
class ImageSet:
    """All pictures of a source, or a part of them.

    Attributes:
        stored: (M, C, H, W) uint8, all pictures of the source, memory-mapped or decoded on access.
        rows: (N,) int64, the rows of `stored` that belong to this set.
        digests: (N,) uint64, the first 8 bytes of the SHA-256 of each picture.
        labels: (N,) int64, -1 for none; None if the source has no classes.
        classes: Label names.
        fingerprint: Identifies content, labels and order of all pictures that were listed,
            wherever they are stored.
        reasons: Name of each picture left out -> why it does not decode.
        notes: What the user should know about the set, one line each.
        folder: Its folder in the cache.
    """

    stored: np.ndarray | Packed
    rows: np.ndarray
    digests: np.ndarray
    labels: np.ndarray | None
    classes: list[str]
    fingerprint: str
    reasons: dict[str, str]
    notes: list[str]
    folder: Path

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def unreadable(self) -> list[str]:
        """Names of the pictures that do not decode."""
        return list(self.reasons)

    @cached_property
    def images(self) -> np.ndarray:
        """The pictures, (N, C, H, W) uint8.

        `stored` itself if that is an array and the set is whole, else a copy in memory.
        """
        return (
            self.stored
            if isinstance(self.stored, np.ndarray) and len(self) == len(self.stored)
            else self.stored[self.rows]
        )

    def split(self, holdout: float) -> tuple["ImageSet", "ImageSet"]:
        """Splits the pictures into those to train on and those held out.

        A picture is held out if its digest, read as a number in [0, 1), is below the share
        `holdout`. Its side thus depends on its content alone, not on its name, its position or the
        other pictures, and identical pictures land on the same side.

        Returns:
            (to train on, held out).

        Raises:
            ValueError: If `holdout` is more than 0 and leaves one side empty.
        """
        held = self.digests < np.uint64(int(holdout * 2**64))
        if holdout > 0 and not 0 < held.sum() < len(self):
            raise ValueError(
                f"data.holdout={holdout} holds out {held.sum()} of the {len(self)} pictures, "
                f"but both sides need at least one; give another share"
            )
        return self._part(~held), self._part(held)

    def _part(self, chosen: np.ndarray) -> "ImageSet":
        labels = None if self.labels is None else self.labels[chosen]
        return replace(self, rows=self.rows[chosen], digests=self.digests[chosen], labels=labels)


def image_set(
    source: Source,
    decoding: Decoding,
    cache: Path,
    workers: int,
    max_unreadable: float,
    decode_later: bool = False,
) -> ImageSet:
    """Returns the pictures of a source from the cache, filling the cache first if necessary.

    If several processes ask for the same pictures, one fills the cache and the others wait. A
    damaged cache is rebuilt.

    Args:
        source: Where the pictures come from.
        decoding: How each picture is decoded and resized.
        cache: The folder of all cached sets.
        workers: Number of decoding processes; of threads with decode_later.
        max_unreadable: Share of the pictures that may fail to decode.
        decode_later: Keep the pictures encoded and decode them on access.

    Raises:
        ValueError: If more than `max_unreadable` (and more than one) of the pictures do not decode,
            naming the first of them; or if the cache cannot store them, naming data.cache.
    """
    source = listed(source, cache, workers)
    folder = folder_of(source, decoding, cache, decode_later)
    if find_damage(folder) is not None:
        with naming_cache(cache):
            cache.mkdir(parents=True, exist_ok=True)
        with lock(cache / f".{folder.name}.lock"):
            # leftovers of a killed process: the lock keeps all others out
            for left in cache.glob(f".{folder.name}.[0-9]*"):
                remove(left)
            damage = find_damage(folder)
            if damage is not None:
                if folder.exists():
                    log.warning("decoding again: the cache is damaged: %s %s", folder, damage)
                _make(folder, source, decoding, workers, max_unreadable, decode_later)
    about = json.loads((folder / "about.json").read_text())
    labels = np.load(folder / "labels.npy") if about["classes"] else None
    stored = (
        Packed(folder, decoding, workers) if decode_later else np.load(folder / FILE, mmap_mode="c")
    )
    unused = _unused(len(stored), about["reasons"], source.others)
    notes = [*source.notes, *unused, *about["notes"]]
    if labels is not None:
        empty = [name for number, name in enumerate(about["classes"]) if number not in labels]
        if empty:
            count = len(about["classes"])
            notes.append(f"{len(empty)} of {count} classes have no pictures: {some(empty)}")
    return ImageSet(
        stored,
        np.arange(len(stored)),
        np.load(folder / "digests.npy"),
        labels,
        about["classes"],
        about["fingerprint"],
        about["reasons"],
        notes,
        folder,
    )


def folder_of(source: Source, decoding: Decoding, cache: Path, decode_later: bool) -> Path:
    """Returns the cache folder of a source; encoded pictures share one for all resolutions.

    Pictures on this machine must have been listed, because their content determines the name.
    """
    assert source.root is None or source.listing is not None
    made = asdict(decoding)
    if decoding.resize == "bicubic":  # folders from before this option have no such key
        del made["resize"]
    if decode_later:
        made = {"white": decoding.white, "max_pixels": decoding.max_pixels}
    key = [LAYOUT, source.stamp, source.counts, made]
    return cache / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]


def _make(
    folder: Path,
    source: Source,
    decoding: Decoding,
    workers: int,
    max_unreadable: float,
    decode_later: bool,
) -> None:
    with whole(folder) as scratch:
        with naming_cache(folder.parent):
            scratch.mkdir()
        survey = (
            pack_into(scratch, source, decoding, workers)
            if decode_later
            else decode_into(scratch, source, decoding, workers)
        )
        fingerprint = survey.fingerprint(source.classes)
        if source.listing is not None and fingerprint != source.listing.fingerprint:
            raise ValueError(
                f"pictures below {source.root} changed while they were being read; start again"
            )
        bad = survey.reasons
        if len(bad) == len(source) or len(bad) > max(1, max_unreadable * len(source)):
            raise ValueError(
                f"{len(bad)} of {len(source)} pictures do not decode "
                f"(data.max_unreadable={max_unreadable}): {_by_reason(bad)}"
            )
        black = (
            "at least half of the pictures are nearly black: if their samples use fewer bits than "
            "the files provide, give data.white=4095 (for 12 bits, say) to brighten them"
        )
        about = {
            "classes": source.classes,
            "fingerprint": fingerprint,
            "reasons": bad,
            "notes": [black] if survey.is_nearly_black else [],
        }
        with naming_cache(folder.parent):
            save_rows(scratch / "digests.npy", survey.first_digests(), survey.good)
            if source.classes:
                save_rows(scratch / "labels.npy", survey.labels, survey.good)
            write_about(scratch, about)


def _unused(count: int, reasons: dict[str, str], others: dict[str, list[str]]) -> list[str]:
    """One line on which files are not used and why; no line if all are used."""
    unused = len(reasons) + sum(map(len, others.values()))
    if not unused:
        return []
    words = [f"{len(names)} {reason} ({some(names)})" for reason, names in others.items()]
    if reasons:
        words.append(f"{len(reasons)} that do not decode: {_by_reason(reasons)}")
    return [f"using {count} of {count + unused} files; skipped: {'; '.join(words)}"]


def _by_reason(reasons: dict[str, str]) -> str:
    """The names of pictures that do not decode, grouped by reason."""
    together: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        together.setdefault(reason, []).append(name)
    return "; ".join(f"{some(names)} ({reason})" for reason, names in together.items())


def decodes_later(feed: Feed, source: Source, decoding: Decoding, cache: Path) -> bool:
    """Returns whether to keep the pictures encoded.

    With "auto", they stay encoded if the cache has no decoded copy and one would take more than
    half of the free disk space.
    """
    if (
        feed != "auto"
        or (folder_of(source, decoding, cache, decode_later=False) / "about.json").is_file()
    ):
        return feed == "decode"
    disk = next(
        folder for folder in (cache.absolute(), *cache.absolute().parents) if folder.exists()
    )
    size = len(source) * decoding.channels * decoding.height * decoding.width
    return size > shutil.disk_usage(disk).free // 2


def goes_on_device(feed: Feed, data: ImageSet, device: torch.device) -> bool:
    """Returns whether to hold all pictures on the device.

    With "auto", a GPU holds them if they take less than a quarter of its free memory.
    """
    if isinstance(data.stored, Packed) or feed in ("file", "decode"):
        return False
    return feed == "device" or (
        device.type == "cuda"
        and math.prod(data.stored.shape) < torch.cuda.mem_get_info(device)[0] // 4
    )
