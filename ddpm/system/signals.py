"""Stops a process early on a signal or at a deadline, so that its work can be resumed.

Signals are sent to a process, so the state here is global to it. Long work calls `check` between
its parts, which raises `Preempted` once the process has been told to stop.
"""

import atexit
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any, Literal

# EX_TEMPFAIL, the exit code of a preempted command: the same command resumes it
CARRIES_ON = 75
SAME_CTRL_C = 1.0  # seconds; a terminal and a launcher may both deliver the same Ctrl-C
JOB_ENDS = "the end of the Slurm job"  # the reason of a clock that holds for the whole process
MARGIN = 3.0  # seconds that a process takes to exit once it has saved

_NAMES = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2")
TAKEN = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]


class Preempted(SystemExit):
    """Stops work that can be resumed; the process exits with CARRIES_ON.

    Args:
        why: Why it stops.
    """

    def __init__(self, why: str) -> None:
        super().__init__(CARRIES_ON)
        self.why = why


class Clock:
    """A deadline that leaves a run enough time to save.

    Time is up MARGIN, plus twice the longest time between two calls of `up`, plus twice the longest
    save before the deadline.

    Args:
        ends: The deadline, in seconds as in time.time().
        why: What sets the deadline, in a few words.
    """

    def __init__(self, ends: float, why: str) -> None:
        self._ends, self.why = ends, why
        self._longest_call = self._longest_save = 0.0
        self._looked: float | None = None

    def up(self) -> str | None:
        """Returns why to stop, or None while there is time."""
        now = time.time()
        if self._looked is not None:
            self._longest_call = max(self._longest_call, now - self._looked)
        self._looked = now
        reserve = MARGIN + 2 * (self._longest_call + self._longest_save)
        return self.why if now + reserve >= self._ends else None

    def pause(self) -> None:
        """Excludes the time until the next call of `up` from the longest time between calls."""
        self._looked = None

    def saved_in(self, seconds: float) -> None:
        """Records how long a save took, or is expected to take."""
        self._longest_save = max(self._longest_save, seconds)


class _State:
    """This process's state."""

    told: str | None = None  # why to stop, once told
    was_told: str | None = None  # `told` of the last block that ended
    first: float = 0.0  # when the first SIGINT came
    interrupted: bool = False  # whether a SIGINT has raised KeyboardInterrupt
    obeys: bool = False  # whether this is a worker, whose parent talks to the user
    busy: bool = False  # whether the worker is doing a job
    # a signal acts as usual; is noted for `check`; raises Preempted on the spot; is ignored
    mode: Literal["default", "noted", "at once", "ignored"] = "default"
    clock: Clock | None = None


def told() -> str | None:
    """Returns why this process, or another one of its run, should stop; None to go on."""
    if _State.told is None and _State.clock is not None:
        up = _State.clock.up()
        if up is not None:
            tell(up)
    return _State.told


def noted() -> str | None:
    """Returns the same as `told`, but does not check the clock; safe in other threads."""
    return _State.told


def was_told() -> str | None:
    """Returns why the previous work in this process was told to stop; None if it was not."""
    return _State.was_told


def check_interrupted() -> None:
    """Raises KeyboardInterrupt again if a library has turned it into an error of its own.

    Raises:
        KeyboardInterrupt: If a Ctrl-C has raised one in this command.
    """
    if _State.interrupted:
        raise KeyboardInterrupt


def check() -> None:
    """Stops the current work if this process was told to stop.

    Raises:
        Preempted: If this process was told to stop.
    """
    why = told()
    if why is not None:
        raise Preempted(why)


def tell(why: str) -> None:
    """Tells this process to stop."""
    if _State.told is None:
        _State.told = why
        if not _State.obeys:
            # not print: a signal may come in the middle of another print
            os.write(
                2,
                f"\n{why}: stopping, run the same command to resume "
                "(Ctrl-C twice exits at once)\n".encode(),
            )


def set_clock(clock: Clock | None) -> None:
    """Sets the clock that tells this process to stop; None removes it."""
    _State.clock = clock


def clock() -> Clock | None:
    """Returns the clock, or None if none is set."""
    return _State.clock


def _handle(number: int, frame: FrameType | None) -> None:
    name, now, mode = signal.Signals(number).name, time.monotonic(), _State.mode
    if mode == "ignored":
        return
    if mode == "default":
        if number == signal.SIGINT:
            _State.interrupted = True
            raise KeyboardInterrupt
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
        return
    again = _State.first and now - _State.first > SAME_CTRL_C
    if number == signal.SIGINT and again and not _State.obeys:
        _State.interrupted = True
        raise KeyboardInterrupt
    if number == signal.SIGINT and not _State.first:
        _State.first = now
    fresh = _State.told is None
    tell(name)
    if fresh and mode == "at once":
        raise Preempted(name)


@contextmanager
def commanded() -> Iterator[None]:
    """Handles a command's signals: they act as usual until the command is `listening`.

    After that they are ignored, since the command's work is done: also while the process exits,
    which takes torch a while, so that the exit code says how the work ended.
    """
    with _taken("default"):
        try:
            yield
        except Exception:
            check_interrupted()
            raise
        finally:
            if _State.mode == "ignored":
                atexit.register(deafen)


@contextmanager
def listening() -> Iterator[None]:
    """Notes signals inside the block instead of acting on them; see `check`.

    Afterwards (inside `commanded`, when the command ends) the previous handlers are restored, and a
    signal that came is passed to its previous handler. So submitit requeues the job, also after a
    preemption. Does nothing inside another `listening`, in a worker of a sweep, or outside the main
    thread, which alone may set handlers.
    """
    if threading.current_thread() is not threading.main_thread() or _State.mode in (
        "noted",
        "at once",
    ):
        yield
        return
    if signal.getsignal(signal.SIGINT) is _handle:  # in a command
        _State.mode = "noted"
        try:
            yield
        finally:
            _State.mode = "ignored"
        return
    with _taken("noted"):
        yield


@contextmanager
def obeying() -> Iterator[None]:
    """Notes signals in a worker process, from the first job on; its parent talks to the user.

    Signals stay noted between jobs, where they would otherwise kill the worker and lose its result.
    A second Ctrl-C has no effect: the parent kills its workers. If the parent dies, the worker
    stops its job and exits.
    """
    if _State.mode == "default":
        _State.obeys = True  # before _take, which delivers a pending signal at once
        _take("noted")
        threading.Thread(target=_mind, args=(os.getppid(),), name="mind", daemon=True).start()
    _State.busy = True
    try:
        yield
    finally:
        _State.busy = False


def _mind(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    tell("the process of the sweep is gone")
    while _State.busy:
        time.sleep(0.1)
    os._exit(CARRIES_ON)


def deafen() -> None:
    """Ignores signals from now on, in a process that is exiting, to keep its exit code."""
    for number in TAKEN:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def one_of_several() -> Iterator[None]:
    """Limits a clock set inside the block to that block: what comes after does not stop.

    The end of a Slurm job still stops everything.
    """
    try:
        yield
    finally:
        why = None if _State.clock is None else _State.clock.why
        if why == _State.told != JOB_ENDS:
            _State.told = None
        _State.clock = None


@contextmanager
def at_once() -> Iterator[None]:
    """Makes a signal interrupt the block at any point.

    Use it only for work that leaves nothing half done and waits for no other process.

    Raises:
        Preempted: If the process is told to stop in the block, or was before.
    """
    check()
    before = _State.mode
    if before == "noted" and threading.current_thread() is threading.main_thread():
        _State.mode = "at once"
    try:
        check()
        yield
    finally:
        _State.mode = before


@contextmanager
def _taken(mode: Literal["default", "noted"]) -> Iterator[None]:
    """Installs our signal handlers, unblocks the signals, and restores both at the end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before, mask = _take(mode)
    try:
        yield
    finally:
        if mask is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in before.items():
            signal.signal(number, handler)
        _State.mode, _State.clock = "default", None
        _State.told, _State.was_told = None, _State.told
        _hand_on(_State.was_told, before)


def _take(
    mode: Literal["default", "noted"],
) -> tuple[dict[signal.Signals, Any], set[int] | None]:
    """Installs our signal handlers; returns the previous ones, and the previous signal mask."""
    _State.told = _State.was_told = None
    _State.first, _State.interrupted, _State.mode = 0.0, False, mode
    before = {number: signal.signal(number, _handle) for number in TAKEN}
    return before, _unblock()


def _unblock() -> set[int] | None:
    """Unblocks the signals, which a sweep blocks in its jobs until they listen."""
    if not hasattr(signal, "pthread_sigmask"):
        return None
    return {int(one) for one in signal.pthread_sigmask(signal.SIG_UNBLOCK, TAKEN)}


def _hand_on(why: str | None, before: Mapping[Any, Any]) -> None:
    """Calls the previous handler of a signal that came; raised again, it might stay blocked."""
    from ddpm.system import slurm  # not at the top: it imports Clock from here

    name = (why or "").partition(" ")[0]  # the signal may have come to another process of the run
    number = signal.Signals[name] if name in _NAMES else None
    if why is not None and slurm.submitted_by_submitit():
        number = slurm.for_submitit(why, number)
    handler = None if number is None else before[number]
    if callable(handler) and handler is not signal.default_int_handler:
        handler(number, None)
