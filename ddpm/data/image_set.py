"""A source made ready for training, kept in the cache.

It is one array of decoded pictures, or they stay encoded where that would take too much room.
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

LAYOUT = 6  # of the cache; a change makes old ones be made again


Feed = Literal["auto", "device", "file", "decode"]


@dataclass(frozen=True)
class ImageSet:
    """Pictures, all of a source or a part of them.

    Attributes:
        stored: (M, C, H, W) uint8, all of the source, memory-mapped or decoded as asked for.
        rows: (N,) int64, those of `stored` that belong here.
        digests: (N,) uint64, the first 8 bytes of each content's SHA-256.
        labels: (N,) int64, or None.
        classes: Their names.
        fingerprint: Of content, labels and order of all that was listed, the same wherever it lies.
        reasons: Name -> why it does not decode, of those left out.
        notes: What a user should know of the set, a line each.
        folder: Of the cache, where it lies.
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

        `stored` itself for the whole, a copy in memory for a part.
        """
        return (
            self.stored
            if isinstance(self.stored, np.ndarray) and len(self) == len(self.stored)
            else self.stored[self.rows]
        )

    def split(self, holdout: float) -> tuple["ImageSet", "ImageSet"]:
        """Splits the pictures into those to train on and those held out.

        A picture is held out if its digest, read as a number in [0, 1), lies below the share
        `holdout`. So its side follows from its content, not from its name, its place or the
        pictures beside it, and equal pictures are on the same side.

        Returns:
            (to train on, held out).

        Raises:
            ValueError: If `holdout` is more than 0 and leaves no picture on one of the sides.
        """
        held = self.digests < np.uint64(int(holdout * 2**64))
        if holdout > 0 and not 0 < held.sum() < len(self):
            raise ValueError(
                f"data.holdout={holdout} holds out {held.sum()} of the {len(self)} pictures, "
                f"and both sides need some; give another share"
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
    """Returns the pictures of a source, from the cache, where they are made ready if need be.

    A second process that wants them waits for the first. A cache that is not what was written is
    made anew.

    Args:
        source: Where the pictures lie.
        decoding: What is done to each.
        cache: The folder of all that was made ready.
        workers: Processes that decode; threads with decode_later.
        max_unreadable: Share of the pictures that may fail to decode.
        decode_later: Keep the pictures encoded, and decode those that are asked for.

    Raises:
        ValueError: If more than that share (and more than one) do not decode, naming the first of
            them; or if they cannot be kept in the cache, naming data.cache.
    """
    source = listed(source, cache, workers)
    folder = folder_of(source, decoding, cache, decode_later)
    if find_damage(folder) is not None:
        with naming_cache(cache):
            cache.mkdir(parents=True, exist_ok=True)
        with lock(cache / f".{folder.name}.lock"):
            # of a process that was killed: nobody else is in here
            for left in cache.glob(f".{folder.name}.[0-9]*"):
                remove(left)
            damage = find_damage(folder)
            if damage is not None:
                if folder.exists():
                    log.warning("decoding again, since the cache is damaged: %s %s", folder, damage)
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
            notes.append(f"{len(empty)} of {count} classes have no picture: {some(empty)}")
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
    """Returns where the pictures are kept; encoded ones are the same for any resolution.

    Pictures on this machine must be listed: their content names the folder.
    """
    assert source.root is None or source.listing is not None
    made = asdict(decoding)
    if decoding.resize == "bicubic":  # whose folders are older than the choice
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
                f"pictures below {source.root} have changed while they were read; start again"
            )
        bad = survey.reasons
        if len(bad) == len(source) or len(bad) > max(1, max_unreadable * len(source)):
            raise ValueError(
                f"{len(bad)} of {len(source)} pictures do not decode "
                f"(data.max_unreadable={max_unreadable}): {_by_reason(bad)}"
            )
        black = (
            "nearly all pictures are nearly black: if their numbers have fewer bits than their "
            "files, data.white=4095 (for 12 bits, say) makes them visible"
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
    """In one line, if there is any: what of a place is not used, and why."""
    unused = len(reasons) + sum(map(len, others.values()))
    if not unused:
        return []
    words = [f"{len(names)} {reason} ({some(names)})" for reason, names in others.items()]
    if reasons:
        words.append(f"{len(reasons)} that do not decode: {_by_reason(reasons)}")
    return [f"{count} of {count + unused} files are used; not used are {'; '.join(words)}"]


def _by_reason(reasons: dict[str, str]) -> str:
    """Names with why they do not decode, those of one reason together."""
    together: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        together.setdefault(reason, []).append(name)
    return "; ".join(f"{some(names)} ({reason})" for reason, names in together.items())


def decodes_later(feed: Feed, source: Source, decoding: Decoding, cache: Path) -> bool:
    """Returns whether to keep the pictures encoded.

    That is as asked, or for "auto" where decoded ones are not there and would take more than half
    of the free disk.
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

    That is as asked, or for "auto" on a GPU where they take less than a quarter of its free memory.
    """
    if isinstance(data.stored, Packed) or feed in ("file", "decode"):
        return False
    return feed == "device" or (
        device.type == "cuda"
        and math.prod(data.stored.shape) < torch.cuda.mem_get_info(device)[0] // 4
    )
