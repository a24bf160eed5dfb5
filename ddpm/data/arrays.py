"""All pictures of a source in one uint8 array, decoded by several processes into a file that memory maps."""

import math
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ddpm.data import keeping
from ddpm.data.decoding import UNREADABLE, Decoding
from ddpm.data.shards import Source
from ddpm.data.survey import Survey, digest_of

Found = list[tuple[str, bytes | None, int | None]]  # name, digest of the content (None: does not decode), label

FILE = "images.npy"


def decode_into(folder: Path, source: Source, decoding: Decoding, workers: int) -> Survey:
    """Write FILE into a folder: (N, C, H, W) uint8 of the pictures that decode, in the source's order.    Raises ValueError if there is no room."""
    shape = (len(source), decoding.channels, decoding.height, decoding.width)
    raw = folder / "raw"
    with keeping.naming(folder.parent), raw.open("wb") as file:
        keeping.reserve(file.fileno(), math.prod(shape))
    starts = np.cumsum([0, *source.counts])[:-1].tolist()
    survey = Survey(len(source))
    for start, found in _each_shard(source, decoding, str(raw), shape, starts, workers):
        for offset, (name, digest, label) in enumerate(found):
            survey.note(start + offset, name, digest, label)
    if survey.good.any():
        with keeping.naming(folder.parent):
            keeping.save_rows(folder / FILE, np.memmap(raw, np.uint8, "r", shape=shape), survey.good)
    raw.unlink()
    return survey


def _each_shard(source: Source, decoding: Decoding, raw: str, shape: tuple[int, ...], starts: list[int], workers: int) -> Iterator[tuple[int, Found]]:
    """(first index, what was found) of each shard, as they get done."""
    with tqdm(total=len(source), desc="decoding", unit="img", disable=None) as bar:
        if workers <= 1 or len(starts) == 1:
            for shard, start in enumerate(starts):
                yield start, _decode_shard(source, decoding, raw, shape, shard, start)
                bar.update(source.counts[shard])
            return
        executor: Executor = ProcessPoolExecutor(min(workers, len(starts)), mp_context=multiprocessing.get_context("spawn"))
        with executor:
            jobs: dict[Future[Found], int] = {
                executor.submit(_decode_shard, source, decoding, raw, shape, shard, start): shard for shard, start in enumerate(starts)
            }
            for job in as_completed(jobs):
                yield starts[jobs[job]], job.result()
                bar.update(source.counts[jobs[job]])


def _decode_shard(source: Source, decoding: Decoding, raw: str, shape: tuple[int, ...], shard: int, start: int) -> Found:
    images = np.memmap(raw, np.uint8, "r+", shape=shape)
    found: Found = []
    for offset, item in enumerate(source.read(shard)):
        try:
            images[start + offset] = decoding(item.content)
        except UNREADABLE:
            found.append((item.name, None, item.label))
            continue
        found.append((item.name, digest_of(item), item.label))
    images.flush()
    return found
