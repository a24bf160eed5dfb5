"""A folder of drawn images: filled batch by batch, by any number of processes, and carried on after an interruption."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ddpm.sample import images
from ddpm.sample.drawing import Drawing
from ddpm.system.files import write_whole, write_whole_npz


def claim_folder(folder: Path, protocol: dict[str, Any]) -> None:
    """Make the folder that of this protocol, what decides its images.    Raises ValueError, naming the first difference, if it is that of another."""
    folder.mkdir(parents=True, exist_ok=True)
    about = folder / "protocol.json"
    wanted = json.loads(json.dumps(protocol))
    if about.is_file():
        found = json.loads(about.read_text(encoding="utf-8"))
        for key in {**found, **wanted}:
            if found.get(key) != wanted.get(key):
                raise ValueError(f"{folder} holds images of {key}={found.get(key)}, not {wanted.get(key)}: give another to=DIR")
    else:
        write_whole(about, json.dumps(wanted, indent=2) + "\n")


def draw_missing(drawing: Drawing, folder: Path, count: int, classes: Sequence[int] | None, batch_size: int, process: int, num_processes: int) -> None:
    """Draw those of the first `count` images that are not in the folder yet, as this process's share.

    Batches start at multiples of batch_size whatever is there already, so that an image's bytes do not depend on how often this was interrupted, or on
    the number of processes. Each file is whole or not there; memory holds one batch.    classes: one an image, None for a network without.
    """
    starts = range(0, count, batch_size)
    mine = [start for turn, start in enumerate(starts) if turn % num_processes == process]
    with tqdm(total=count, desc="sampling", unit="img", disable=None if process == 0 else True) as bar:
        for start in mine:
            indices = range(start, min(start + batch_size, count))
            missing = [index for index in indices if not sample_file(folder, index).is_file()]
            if missing:
                drawn = images.to_uint8(drawing.images(indices, None if classes is None else classes[start : start + batch_size]))
                for index in missing:
                    images.save_png(sample_file(folder, index), drawn[index - start])
            bar.update(len(indices) * num_processes)


def sample_file(folder: Path, index: int) -> Path:
    """The file of image number `index`."""
    return folder / f"{index:05d}.png"


def read_samples(folder: Path, count: int) -> np.ndarray:
    """The first `count` images: (count, H, W, C) uint8."""
    return np.stack([images.read_png(sample_file(folder, index)) for index in range(count)])


def pack_samples(folder: Path, count: int, keep: bool) -> Path:
    """The first `count` images as samples.npz, entry arr_0: (count, H, W, C) uint8, the layout that evaluation suites of the field read.

    keep: leave the PNGs.    Memory holds one image.
    """
    packed, scratch = folder / "samples.npz", folder / ".samples.npy"
    first = images.read_png(sample_file(folder, 0))
    array = np.lib.format.open_memmap(scratch, "w+", np.uint8, (count, *first.shape))
    try:
        for index in range(count):
            array[index] = images.read_png(sample_file(folder, index))
        array.flush()
        write_whole_npz(packed, arr_0=array)
    finally:
        scratch.unlink(missing_ok=True)
    if not keep:
        for index in range(count):
            sample_file(folder, index).unlink()
    return packed
