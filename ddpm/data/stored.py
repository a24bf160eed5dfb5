"""Stores pictures decoded in one memory-mapped uint8 array, or encoded in one file.

Encoded pictures are decoded on access.
"""

import io
import math
import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from ddpm.data.cache import Seen, Survey, naming_cache, reserve, save_rows, see
from ddpm.data.decoding import Decoding, reason_of
from ddpm.data.shards import Item, Source
from ddpm.system.signals import check

FILE, CONTENT, OFFSETS = "images.npy", "content.bin", "offsets.npy"


def decode_into(folder: Path, source: Source, decoding: Decoding, workers: int) -> Survey:
    """Writes FILE into a folder: the pictures that decode, in the source's order.

    They are (N, C, H, W) uint8.

    Raises:
        ValueError: If the folder cannot store them, for example because the disk is full.
    """
    shape = (len(source), decoding.channels, decoding.height, decoding.width)
    raw = folder / "raw"
    with naming_cache(folder.parent), raw.open("wb") as file:
        reserve(file.fileno(), math.prod(shape))
    starts = np.cumsum([0, *source.counts])[:-1].tolist()
    survey = Survey(len(source))
    for start, found in _each_shard(source, decoding, str(raw), shape, starts, workers):
        for offset, seen in enumerate(found):
            survey.note(start + offset, seen)
    if survey.good.any():
        with naming_cache(folder.parent):
            save_rows(folder / FILE, np.memmap(raw, np.uint8, "r", shape=shape), survey.good)
    raw.unlink()
    return survey


def _each_shard(
    source: Source,
    decoding: Decoding,
    raw: str,
    shape: tuple[int, ...],
    starts: list[int],
    workers: int,
) -> Iterator[tuple[int, list[Seen]]]:
    """Yields the first index and the results of each shard as it finishes."""
    with tqdm(total=len(source), desc="decoding", unit="img", disable=None) as bar:
        if workers <= 1 or len(starts) == 1:
            for shard, start in enumerate(starts):
                yield start, _decode_shard(source, decoding, raw, shape, shard, start)
                bar.update(source.counts[shard])
            return
        with _worker_pool(min(workers, len(starts))) as pool:
            jobs: dict[Future[list[Seen]], int] = {
                pool.submit(_decode_shard, source, decoding, raw, shape, shard, start): shard
                for shard, start in enumerate(starts)
            }
            waiting = set(jobs)
            while waiting:
                check()
                done, waiting = wait(waiting, timeout=1, return_when=FIRST_COMPLETED)
                for job in done:
                    yield starts[jobs[job]], job.result()
                    bar.update(source.counts[jobs[job]])


@contextmanager
def _worker_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of processes that are killed at once, even in mid-picture, if the block raises."""
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=_deaf
    )
    try:
        yield pool
    except BaseException:
        for worker in set(multiprocessing.active_children()) - before:
            worker.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _deaf() -> None:
    """Ignores Ctrl-C, which a terminal sends to workers too: their parent handles it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _decode_shard(
    source: Source, decoding: Decoding, raw: str, shape: tuple[int, ...], shard: int, start: int
) -> list[Seen]:
    images = np.memmap(raw, np.uint8, "r+", shape=shape)

    def decode(content: bytes | Image.Image, place: int) -> np.ndarray:
        images[place] = decoding(content)
        return images[place]

    found = []
    for offset, item in enumerate(source.read(shard)):
        check()
        found.append(see(item, partial(decode, place=start + offset)))
    images.flush()
    return found


class Packed:
    """Acts like an array (N, C, H, W) uint8 that decodes its rows on access.

    Threads decode in parallel, since Pillow releases the GIL. Memory holds only the rows that were
    asked for.

    Args:
        folder: A folder written by pack_into.
        decoding: How each picture is decoded and resized.
        threads: Number of decoding threads.
    """

    def __init__(self, folder: Path, decoding: Decoding, threads: int) -> None:
        self._folder, self._decoding, self._threads = folder, decoding, threads
        self._content = np.memmap(folder / CONTENT, np.uint8, "r")
        self._offsets = np.load(folder / OFFSETS, mmap_mode="r")
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decoding")
        self.shape = (len(self._offsets) - 1, decoding.channels, decoding.height, decoding.width)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Returns the pictures of these rows, (len(rows), C, H, W) uint8.

        Raises:
            ValueError: If a picture no longer decodes.
        """
        return self.result(self.start(rows))

    def start(self, rows: Sequence[int] | np.ndarray) -> list[Future[np.ndarray]]:
        """Starts decoding these rows in the background; returns one future per row."""
        return [self._pool.submit(self._one, int(row)) for row in rows]

    @staticmethod
    def result(started: list[Future[np.ndarray]], into: np.ndarray | None = None) -> np.ndarray:
        """Waits for the rows that were started and returns them, written to `into` if given."""
        return np.stack([picture.result() for picture in started], out=into)

    def _one(self, row: int) -> np.ndarray:
        content = self._content[self._offsets[row] : self._offsets[row + 1]].tobytes()
        try:
            return self._decoding(content)
        except Exception as error:
            raise ValueError(
                f"picture {row} of {self._folder} decoded when it was packed but no longer does "
                f"({reason_of(error)}): remove that folder to pack the pictures again"
            ) from error


def pack_into(folder: Path, source: Source, decoding: Decoding, threads: int) -> Survey:
    """Writes CONTENT and OFFSETS into a folder.

    CONTENT holds the encoded pictures one after another, OFFSETS where each begins. Each picture is
    decoded once: one that does not decode is left out now instead of stopping a run later. Pictures
    that their source does not encode are packed as PNG.

    Raises:
        ValueError: If the folder cannot store them, for example because the disk is full.
    """
    survey = Survey(len(source))
    ends = np.zeros(len(source), dtype=np.int64)
    index, end = 0, 0
    with (
        naming_cache(folder.parent),
        (folder / CONTENT).open("wb") as out,
        ThreadPoolExecutor(threads, thread_name_prefix="packing") as pool,
        tqdm(total=len(source), desc="packing", unit="img", disable=None) as bar,
    ):
        for shard in range(len(source.counts)):
            items = list(source.read(shard))
            for item, seen in zip(
                items, pool.map(partial(see, decode=decoding.whole), items), strict=True
            ):
                check()
                survey.note(index, seen)
                if seen.reason is None:
                    content = _encoded(item)
                    out.write(content)
                    end += len(content)
                ends[index] = end
                index += 1
            bar.update(source.counts[shard])
    np.save(folder / OFFSETS, np.concatenate([np.zeros(1, dtype=np.int64), ends[survey.good]]))
    return survey


def _encoded(item: Item) -> bytes:
    if isinstance(item.content, bytes):
        return item.content
    out = io.BytesIO()
    item.content.save(out, "PNG")
    return out.getvalue()
