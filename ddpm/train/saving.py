"""Writing a run's checkpoints: how long it takes, and what is done on a full or slow disk."""

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

BYTES = 16  # a parameter in a checkpoint: its weight, average and Adam's two moments, float32
DISK_SPEED = 50e6  # bytes per second that a disk is trusted with before it was measured
SLOW = 10.0  # seconds after which it is said that a checkpoint is still being written, then each
LIMIT = 900.0  # seconds after which a run that is to stop waits no more


class DiskHangs(ValueError):
    """A disk that takes nothing, so nothing more is written to it."""


@dataclass
class Saver:
    """Saves a run, once a step at most. All processes must call it alike.

    Attributes:
        folder: The run's.
        config: Its configuration.
        state: What is saved.
        recorder: Of the process that leads and writes; None on the others.
        spent: What the run's time went into.
    """

    folder: RunFolder
    config: Config
    state: TrainingState
    recorder: Recorder | None
    spent: Spent
    saved: int | None = None

    def save(self) -> None:
        """Writes a checkpoint of the present step, if there is none.

        Raises:
            ValueError: If it cannot be written.
            DiskHangs: If the disk does not take it.
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
    """Says before the first step what a checkpoint needs that is not there: room, or time.

    Args:
        folder: Of the run.
        keep: Checkpoints that are kept.
        parameters: Of the network.
    """
    look_at_disk(folder, keep, parameters)
    measured = _measured_seconds(folder)
    if measured is not None:
        warn_of_torchrun(measured)
    clock = signals.clock()
    if clock is not None:
        clock.saved_in(BYTES * parameters / DISK_SPEED if measured is None else measured)


def _measured_seconds(folder: RunFolder) -> float | None:
    """What the run's last checkpoint took to write; None before the first."""
    return (folder.record().get("timed") or {}).get("seconds_to_save")


def warn_of_torchrun(seconds: float) -> None:
    """Warns where torchrun would kill a run that is told to stop before it is saved.

    Args:
        seconds: That a checkpoint takes.
    """
    granted = torchrun.seconds_to_stop()
    if granted is not None and seconds + signals.MARGIN > granted:
        log.warning(
            "a checkpoint takes %.0f s, and torchrun ends its processes %.0f s after a signal: "
            "start it with --shutdown-timeout %d (torch 2.12 and later), or without torchrun, "
            "as experiments/slurm/train.sh does",
            seconds,
            granted,
            60 * int(seconds // 30 + 2),
        )


def look_at_disk(folder: RunFolder, keep: int, parameters: int) -> None:
    """Warns where the checkpoints that are kept will not fit the disk, before the first step."""
    size, free = BYTES * parameters, shutil.disk_usage(folder.path).free
    there = len(checkpoint.all_in(folder.checkpoints))
    wanted = max(keep + 1 - there, 1) * size  # a new one is whole before an old one goes
    if wanted > free:
        log.warning(
            "the disk of %s has %.1f GB free, and %d checkpoints of %.1f GB are to be kept there "
            "(runtime.keep_checkpoints), with room for one more while it is written: give less, "
            "or another outputs=",
            folder.path,
            free / 1e9,
            keep,
            size / 1e9,
        )


def _in_bounds(write: Callable[[], None], folder: RunFolder) -> None:
    """Writes, says so where it takes long, and for a run that is to stop does not wait for ever."""
    failed: list[BaseException] = []

    def call() -> None:
        try:
            write()
        except BaseException as error:
            failed.append(error)

    writing, started = threading.Thread(target=call, daemon=True), time.monotonic()
    since: float | None = None  # when it was first seen that the run is to stop
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
                f"{folder.checkpoints}: the disk has not taken the checkpoint in {waited:.0f} s; "
                "those before it stay"
            )
        log.warning("still writing the checkpoint, %.0f s so far", waited)
    if failed:
        raise failed[0]
