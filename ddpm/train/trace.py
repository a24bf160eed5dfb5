"""runtime.profile: a trace of some steps, for Perfetto (https://ui.perfetto.dev)."""

import gzip
import logging
import shutil
from collections.abc import Generator, Iterator
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from ddpm.system import files

log = logging.getLogger("ddpm")

MANY = 20  # steps above which a trace is large and slow to open


def traced(
    steps: Iterator[int], done: int, span: tuple[int, int] | None, folder: Path
) -> Generator[int, None, None]:
    """Passes updates through, and traces some of them with the work after each.

    Args:
        steps: Yields the number of updates done, after each.
        done: Updates done before the first.
        span: The first and last update to trace; None for none. Those that an earlier start made
            are missing from the trace.
        folder: The run's folder; the trace goes to its profile/, in Chrome's format.

    Yields:
        What `steps` yields.
    """
    first, last = span or (0, -1)
    if span is not None and done >= last:
        log.warning(
            "runtime.profile=[%d,%d]: nothing is traced, since step %d is already done", *span, done
        )
    if span is not None and last - first >= MANY:
        log.warning("runtime.profile=[%d,%d]: more than %d steps make a large file", *span, MANY)
    profiler: profile | None = None
    step = done
    try:
        while True:
            if profiler is not None and step >= last:
                _write(profiler, max(first, done + 1), step, folder)
                profiler = None
            if profiler is None and first <= step + 1 <= last:
                profiler = _started()
            with nullcontext() if profiler is None else record_function(f"step {step + 1}"):
                found = next(steps, None)
            if found is None:
                return
            step = found
            yield step
    finally:  # also if the run stops before the last
        if profiler is not None:
            _write(profiler, max(first, done + 1), step, folder)


def _started() -> profile:
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    profiler = profile(activities=activities, record_shapes=True)
    profiler.start()
    return profiler


def _write(profiler: profile, first: int, last: int, folder: Path) -> None:
    """Ends a trace and writes it."""
    profiler.stop()
    path = folder / "profile" / f"steps_{first:08d}_{last:08d}.json.gz"
    path.parent.mkdir(exist_ok=True)
    with files.whole(path) as scratch, TemporaryDirectory() as folder_of_plain:
        plain = Path(folder_of_plain) / "trace.json"
        profiler.export_chrome_trace(str(plain))
        with plain.open("rb") as content, gzip.open(scratch, "wb") as out:
            shutil.copyfileobj(content, out)
    log.info("profile %s (open it in https://ui.perfetto.dev)", path)
