"""A folder of drawn images that any number of processes fill batch by batch, and can resume."""

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from tqdm import tqdm

from ddpm.config.schema import Quantize
from ddpm.sample.drawing import Drawing
from ddpm.sample.images import read_image, read_png, save_image, to_levels
from ddpm.system import files
from ddpm.system.processes import share

# values that held before a folder's protocol.json recorded these keys
BEFORE = {"precision": "tf32", "quantize": "round"}


def word_for(protocol: dict[str, Any]) -> str:
    """Returns a short hash of the protocol, which is everything that decides the images."""
    return files.short_hash(_said(protocol))


def _said(protocol: dict[str, Any]) -> dict[str, Any]:
    """Returns the protocol without keys that have their value in BEFORE."""
    return {key: value for key, value in protocol.items() if (key, value) not in BEFORE.items()}


def claim_folder(folder: Path, protocol: dict[str, Any]) -> None:
    """Reserves the folder for images of this protocol, which is everything that decides them.

    If two commands race for it, a lock lets only one protocol win.

    Raises:
        ValueError: If the folder has another protocol (the message names the first difference) or
            contains a link.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files.refuse_links(folder)
    about = folder / "protocol.json"
    wanted = json.loads(json.dumps(protocol))
    with files.lock(folder / ".lock"):
        if not about.is_file():
            files.write_text(about, json.dumps(wanted, indent=2) + "\n")
            return
    found = {**BEFORE, **json.loads(about.read_text(encoding="utf-8"))}
    wanted = {**BEFORE, **wanted}
    for key in {**found, **wanted}:
        if found.get(key) != wanted.get(key):
            raise ValueError(
                f"{folder} holds images of {key}={found.get(key)}, not {wanted.get(key)}: choose "
                "another to=DIR"
            )


def holds(folder: Path, protocol: dict[str, Any]) -> bool:
    """Returns whether the folder is reserved for this protocol."""
    about = folder / "protocol.json"
    if not about.is_file():
        return False
    found = json.loads(about.read_text(encoding="utf-8"))
    return _said(found) == _said(json.loads(json.dumps(protocol)))


def draw_missing(
    drawing: Drawing,
    folder: Path,
    count: int,
    classes: Sequence[int] | None,
    batch_size: int,
    processes: PartialState,
    quantize: Quantize = "round",
) -> None:
    """Draws this process's share of those of the first `count` images that are still missing.

    Batches start at multiples of batch_size, whatever exists already, so an image's bytes depend
    neither on interruptions nor on the number of processes. Each file is written whole or not at
    all. Memory holds one batch.

    Args:
        drawing: The network and sampler to draw with.
        folder: The folder to fill.
        count: Number of images over all processes.
        classes: One class per image; None for a network without classes.
        batch_size: Images per batch.
        processes: The processes that share the work.
        quantize: See to_levels; with "none" the files are arrays instead of pictures.
    """
    hidden = None if processes.is_main_process else True
    with tqdm(total=count, desc="sampling", unit="img", disable=hidden) as bar:
        for start in share(range(0, count, batch_size), processes):
            indices = range(start, min(start + batch_size, count))
            files_of = {index: sample_file(folder, index, quantize) for index in indices}
            missing = [index for index, file in files_of.items() if not file.is_file()]
            if missing:
                chosen = None if classes is None else classes[start : start + batch_size]
                drawn = to_levels(drawing.images(indices, chosen), quantize)
                for index in missing:
                    save_image(files_of[index], drawn[index - start])
            bar.update(len(indices) * processes.num_processes)


def num_missing(folder: Path, count: int, quantize: Quantize = "round") -> int:
    """Returns how many of the first `count` images are still missing."""
    files_of = (sample_file(folder, index, quantize) for index in range(count))
    return sum(not file.is_file() for file in files_of)


def sample_file(folder: Path, index: int, quantize: Quantize = "round") -> Path:
    """Returns the file of image number `index`."""
    return folder / f"{index:05d}.{'npy' if quantize == 'none' else 'png'}"


def read_samples(folder: Path, count: int, quantize: Quantize = "round") -> np.ndarray:
    """Reads the first `count` images: (count, H, W, C) uint8, or float32 with quantize "none"."""
    return np.stack([read_image(sample_file(folder, index, quantize)) for index in range(count)])


def pack_samples(folder: Path, count: int, keep: bool) -> Path:
    """Packs the first `count` images into samples.npz, with one image in memory at a time.

    Its entry arr_0 is (count, H, W, C) uint8, the layout that the field's evaluation suites read.

    Args:
        folder: The folder of the images.
        count: Number of images.
        keep: Whether to keep the PNGs.
    """
    packed = folder / "samples.npz"
    shape = (count, *read_png(sample_file(folder, 0)).shape)
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with (
        files.whole(packed) as scratch,
        zipfile.ZipFile(scratch, "w") as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as out,
    ):
        np.lib.format.write_array_header_1_0(out, header)
        for index in range(count):
            out.write(read_png(sample_file(folder, index)).tobytes())
    if not keep:
        for index in range(count):
            sample_file(folder, index).unlink()
    return packed
