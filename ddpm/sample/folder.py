"""A folder of drawn images: filled batch by batch, by any number of processes, and carried on."""

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

# what decided images where their folder does not say it yet
BEFORE = {"precision": "tf32", "quantize": "round"}


def word_for(protocol: dict[str, Any]) -> str:
    """Returns a word that tells images of this protocol, what decides them, from all others."""
    return files.short_hash(_said(protocol))


def _said(protocol: dict[str, Any]) -> dict[str, Any]:
    """What a protocol says beside what was done before it could be said."""
    return {key: value for key, value in protocol.items() if (key, value) not in BEFORE.items()}


def claim_folder(folder: Path, protocol: dict[str, Any]) -> None:
    """Makes the folder that of this protocol, what decides its images; of two at once, of one.

    Raises:
        ValueError: If it is that of another, naming the first difference; or if there is a link in
            it.
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
                f"{folder} holds images of {key}={found.get(key)}, not {wanted.get(key)}: give "
                "another to=DIR"
            )


def holds(folder: Path, protocol: dict[str, Any]) -> bool:
    """Returns whether the folder is that of this protocol."""
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
    """Draws those of the first `count` images that are not there yet, as this process's share.

    Batches start at multiples of batch_size whatever is there already, so that an image's bytes do
    not depend on how often this was interrupted, or on the number of processes. Each file is whole
    or not there; memory holds one batch.

    Args:
        drawing: What draws.
        folder: Where to.
        count: Of images, all processes together.
        classes: One an image; None for a network without.
        batch_size: Images drawn at once.
        processes: Those that share the work.
        quantize: See to_levels; with "none" the files are arrays and no pictures.
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
    """Returns how many of the first `count` images are not there yet."""
    files_of = (sample_file(folder, index, quantize) for index in range(count))
    return sum(not file.is_file() for file in files_of)


def sample_file(folder: Path, index: int, quantize: Quantize = "round") -> Path:
    """Returns the file of image number `index`."""
    return folder / f"{index:05d}.{'npy' if quantize == 'none' else 'png'}"


def read_samples(folder: Path, count: int, quantize: Quantize = "round") -> np.ndarray:
    """Reads the first `count` images: (count, H, W, C) uint8, or float32 with quantize "none"."""
    return np.stack([read_image(sample_file(folder, index, quantize)) for index in range(count)])


def pack_samples(folder: Path, count: int, keep: bool) -> Path:
    """Puts the first `count` images into samples.npz; memory holds one of them.

    Its entry arr_0 is (count, H, W, C) uint8, the layout that evaluation suites of the field read.

    Args:
        folder: Of the images.
        count: How many.
        keep: Leave the PNGs.
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
