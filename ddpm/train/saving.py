"""Saving a run's checkpoints, also on a full or slow disk."""

import logging
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from ddpm.config.schema import Config
from ddpm.runs import checkpoint
from ddpm.runs.folder import RunFolder
from ddpm.runs.recording import Recorder
from ddpm.system import signals, torchrun
from ddpm.train.costs import Spent
from ddpm.train.state import TrainingState

log = logging.getLogger("ddpm")

BYTES = 16  # per parameter in a checkpoint: weight, average and Adam's two moments, float32
DISK_SPEED = 50e6  # bytes per second, assumed until a checkpoint was timed
SLOW = 10.0  # seconds between warnings that a checkpoint is still being written
LIMIT = 900.0  # seconds that a run told to stop waits for the disk


class DiskHangs(ValueError):
    """The disk hangs, so nothing more may be written to it."""


@dataclass
class Saver:
    """Saves a run, at most once per step. All processes must call it alike.

    Attributes:
        folder: The run's folder.
        config: The run's configuration.
        state: The training state to save.
        recorder: The main process's recorder; None on the others.
        spent: The run's images and time.
        saved: The step of the last checkpoint written; None before the first.
    """

    folder: RunFolder
    config: Config
    state: TrainingState
    recorder: Recorder | None
    spent: Spent
    saved: int | None = None

    def save(self) -> None:
        """Writes a checkpoint of the current step, unless it was the last to be saved.

        Raises:
            ValueError: If it cannot be written.
            DiskHangs: If the disk hangs while the run is to stop.
        """
        if self.saved == self.state.step:
            return
        saved = self.state.state_dict()
        if self.recorder is not None:
            started = time.perf_counter()
            first = _measured_seconds(self.folder) is None
            self.recorder.flush()

            def write() -> None:
                keep = self.config.runtime.keep_checkpoints
                best = (self.folder.record().get("best") or {}).get("step")
                checkpoint.save(self.folder.checkpoints, saved, keep, best)
                seconds = time.perf_counter() - started
                timed = {**self.spent.timed(), "seconds_to_save": seconds}
                self.folder.saved(self.state.step, timed=timed)

            _in_bounds(write, self.folder)
            seconds = time.perf_counter() - started
            self._note(seconds)
            if first:
                warn_of_torchrun(seconds)
        self.saved = self.state.step

    def _note(self, seconds: float) -> None:
        clock = signals.clock()
        if clock is not None:
            clock.saved_in(seconds)
            clock.pause()


def expect(folder: RunFolder, keep: int, parameters: int) -> None:
    """Warns before the first step if checkpoints lack disk space or time.

    Args:
        folder: The run's folder.
        keep: Number of checkpoints to keep.
        parameters: Number of parameters of the network.
    """
    look_at_disk(folder, keep, parameters)
    measured = _measured_seconds(folder)
    if measured is not None:
        warn_of_torchrun(measured)
    clock = signals.clock()
    if clock is not None:
        clock.saved_in(BYTES * parameters / DISK_SPEED if measured is None else measured)


def _measured_seconds(folder: RunFolder) -> float | None:
    """Seconds that the run's last checkpoint took to write; None before the first."""
    return (folder.record().get("timed") or {}).get("seconds_to_save")


def warn_of_torchrun(seconds: float) -> None:
    """Warns if torchrun would kill a run before it has saved, when told to stop.

    Args:
        seconds: How long a checkpoint takes to write.
    """
    granted = torchrun.seconds_to_stop()
    if granted is not None and seconds + signals.MARGIN > granted:
        log.warning(
            "a checkpoint takes %.0f s, but torchrun kills its processes %.0f s after a signal: "
            "start it with --shutdown-timeout %d (torch 2.12 and later), or without torchrun, "
            "as experiments/slurm/train.sh does",
            seconds,
            granted,
            60 * int(seconds // 30 + 2),
        )


def look_at_disk(folder: RunFolder, keep: int, parameters: int) -> None:
    """Warns if the checkpoints to keep will not fit on the disk."""
    size, free = BYTES * parameters, shutil.disk_usage(folder.path).free
    there = len(checkpoint.all_in(folder.checkpoints))
    wanted = max(keep + 1 - there, 1) * size  # a new one is complete before an old one is deleted
    if wanted > free:
        log.warning(
            "the disk of %s has %.1f GB free, too little for %d checkpoints of %.1f GB "
            "(runtime.keep_checkpoints) and one more while it is written: keep fewer, or choose "
            "another outputs=",
            folder.path,
            free / 1e9,
            keep,
            size / 1e9,
        )


def _in_bounds(write: Callable[[], None], folder: RunFolder) -> None:
    """Runs `write`, warns while it takes long, and gives up if the run is to stop."""
    failed: list[BaseException] = []

    def call() -> None:
        try:
            write()
        except BaseException as error:
            failed.append(error)

    writing, started = threading.Thread(target=call, daemon=True), time.monotonic()
    since: float | None = None  # when the request to stop was first seen
    writing.start()
    while True:
        writing.join(SLOW)
        now = time.monotonic()
        waited = now - started
        if not writing.is_alive():
            break
        if since is None and signals.noted() is not None:
            since = now
        if since is not None and now - since > LIMIT:
            raise DiskHangs(
                f"{folder.checkpoints}: the disk has not finished the checkpoint in "
                f"{waited:.0f} s; earlier checkpoints are kept"
            )
        log.warning("still writing the checkpoint, %.0f s so far", waited)
    if failed:
        raise failed[0]
