"""Times how long it takes to see that the pictures of a complete run have not changed.

    python tests/benchmarks/many_pictures.py [100000]

Trains one step on that many small files, repeats the same command, and prints the seconds spent
checking the pictures: the first time, when all are read, and afterwards.
"""

import io
import logging
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from ddpm import run
from ddpm.config import build
from ddpm.config.compose import compose
from ddpm.config.schema import training_config
from ddpm.data import listing
from ddpm.runs.pictures import with_pictures


def make(place: Path, count: int) -> None:
    """Writes 16x16 PNG files in ten classes, made distinct by trailing bytes."""
    content = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(content, "PNG")
    for number in range(count):
        file = place / f"class {number % 10}" / f"{number:07d}.png"
        if number < 10:
            file.parent.mkdir(parents=True)
        file.write_bytes(content.getvalue() + number.to_bytes(4, "big"))


def main(count: int) -> None:
    logging.getLogger("ddpm").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "pictures"
        make(place, count)
        time.sleep(listing.SETTLED / 1e9)  # digests of younger files are not kept
        words = [
            *("model=quickstart", "data=folder", f"data.path={place}", "training.steps=1"),
            *("training.batch_size=4", "runtime.num_previews=1", "sampler=ddim10"),
            f"outputs={folder}/outputs",
        ]
        config = training_config(compose(words))
        build.check(config)
        for what in ("first", "second", "third"):
            started = time.perf_counter()
            with_pictures(config)
            print(
                f"{what} look at {count} files: {time.perf_counter() - started:.2f} s", flush=True
            )
        run(words)
        for what in ("again", "once more"):
            started = time.perf_counter()
            run(words)
            print(f"the complete run typed {what}: {time.perf_counter() - started:.2f} s in all")
        digits = [word for word in words if not word.startswith("data")]
        run(digits)
        started = time.perf_counter()
        run(digits)
        print(f"one of the digits, to compare: {time.perf_counter() - started:.2f} s in all")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100_000)
