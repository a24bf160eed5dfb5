"""Being told to stop, by a signal or a clock: what is under way ends soon and can be carried on.

Signals come to a process, so this is a process's own state. Whatever takes long calls `check`
between its parts, and is thereby given up when the process was told to stop.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any, Literal

# EX_TEMPFAIL, the exit code of what was told to stop: the same command carries on
CARRIES_ON = 75
SAME_CTRL_C = 1.0  # seconds; a terminal and a launcher may both pass one Ctrl-C on
JOB_ENDS = "the end of the Slurm job"  # the reason of a clock that counts for the whole process
MARGIN = 3.0  # seconds that a process takes to leave, once it has saved

_NAMES = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2")
TAKEN = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]


class Preempted(SystemExit):
    """What was told to stop stops, and can be carried on.

    It ends the process with CARRIES_ON.
    """

    def __init__(self, why: str) -> None:
        super().__init__(CARRIES_ON)
        self.why = why


class Clock:
    """Says so early that time is up that a run can still save.

    That is by twice the longest time between two looks at it, which is the longest single call,
    and twice the longest save.

    Args:
        ends: When all must be over, as time.time() counts.
        why: What sets the end, in a word.
    """

    def __init__(self, ends: float, why: str) -> None:
        self._ends, self.why = ends, why
        self._longest_call = self._longest_save = 0.0
        self._looked: float | None = None

    def up(self) -> str | None:
        """Returns why to stop; None while there is time."""
        now = time.time()
        if self._looked is not None:
            self._longest_call = max(self._longest_call, now - self._looked)
        self._looked = now
        reserve = MARGIN + 2 * (self._longest_call + self._longest_save)
        return self.why if now + reserve >= self._ends else None

    def pause(self) -> None:
        """Leaves out the time until the next look."""
        self._looked = None

    def saved_in(self, seconds: float) -> None:
        """Notes how long a save took, or is expected to."""
        self._longest_save = max(self._longest_save, seconds)


class _State:
    """Of this process."""

    told: str | None = None  # why to stop, once told
    was_told: str | None = None  # the same of what ended
    first: float = 0.0  # when SIGINT came first
    obeys: bool = False  # whether another process speaks with the user for this one
    busy: bool = False  # whether it does a job for that one
    # what a signal does: what it always does; it is noted; it gives up what runs; nothing
    mode: Literal["default", "noted", "at once", "ignored"] = "default"
    clock: Clock | None = None


def told() -> str | None:
    """Returns why this process, or one that it works with, is to stop; None to go on."""
    if _State.told is None and _State.clock is not None:
        up = _State.clock.up()
        if up is not None:
            tell(up)
    return _State.told


def noted() -> str | None:
    """Returns what `told` would, without a look at the clock; for other threads."""
    return _State.told


def was_told() -> str | None:
    """Returns why what ran in this process before was to stop; None if it was not."""
    return _State.was_told


def check() -> None:
    """Gives up what is under way if this process was told to stop.

    Raises:
        Preempted: If so.
    """
    why = told()
    if why is not None:
        raise Preempted(why)


def tell(why: str) -> None:
    """Tells this process to stop."""
    if _State.told is None:
        _State.told = why
        if not _State.obeys:
            # no print: a signal may come in the middle of one
            os.write(
                2, f"\n{why}: stopping, to carry on later (Ctrl-C twice leaves at once)\n".encode()
            )


def set_clock(clock: Clock | None) -> None:
    """Has a clock tell this process to stop; None for no clock."""
    _State.clock = clock


def clock() -> Clock | None:
    """Returns the clock that was set."""
    return _State.clock


def _handle(number: int, frame: FrameType | None) -> None:
    name, now, mode = signal.Signals(number).name, time.monotonic(), _State.mode
    if mode == "ignored":
        return
    if mode == "default":
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
        return
    again = _State.first and now - _State.first > SAME_CTRL_C
    if number == signal.SIGINT and again and not _State.obeys:
        raise KeyboardInterrupt
    if number == signal.SIGINT and not _State.first:
        _State.first = now
    fresh = _State.told is None
    tell(name)
    if fresh and mode == "at once":
        raise Preempted(name)


@contextmanager
def commanded() -> Iterator[None]:
    """Holds the signals of a command: they do what they always do until it is `listening`.

    Once it has listened, they do nothing any more: what it was told to do is done.
    """
    with _taken("default"):
        yield


@contextmanager
def listening() -> Iterator[None]:
    """Has signals noted meanwhile; see `check`.

    Only the main thread of a process can; elsewhere nothing is taken. Afterwards they are given
    back, and one that came is handed on to who held it before: submitit queues the job again, for
    a preemption too.
    Inside another `listening` or a sweep nothing changes.
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
    """Has signals noted meanwhile, and ever after, in a worker, whose parent deals with users.

    They stay noted between two jobs, when a signal would end the worker and lose what it has to
    tell its parent. It does not leave at once; the parent ends it. Where the parent is gone, there
    is nobody to work for: it stops, and leaves.
    """
    if _State.mode == "default":
        _State.obeys = True  # first: one that waits comes at once
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
    """Has signals do nothing any more, in a process that ends: its exit code tells how it did."""
    for number in TAKEN:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def one_of_several() -> Iterator[None]:
    """Has a clock that is set meanwhile stop what runs meanwhile, and not what comes after it."""
    try:
        yield
    finally:
        why = None if _State.clock is None else _State.clock.why
        if why == _State.told != JOB_ENDS:
            _State.told = None
        _State.clock = None


@contextmanager
def at_once() -> Iterator[None]:
    """Has a signal give up what runs meanwhile, in the middle of it.

    It is for what keeps nothing half done and waits for no other process.

    Raises:
        Preempted: If the process is told to stop meanwhile, or was before.
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
    """Takes the signals over, and gives them back; and lets those through that are blocked."""
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
    """Takes the signals over; returns who held them, and which were blocked."""
    _State.told = _State.was_told = None
    _State.first, _State.mode = 0.0, mode
    before = {number: signal.signal(number, _handle) for number in TAKEN}
    return before, _unblock()


def _unblock() -> set[int] | None:
    """Lets the signals through, which a sweep blocks for its jobs until they listen."""
    if not hasattr(signal, "pthread_sigmask"):
        return None
    return {int(one) for one in signal.pthread_sigmask(signal.SIG_UNBLOCK, TAKEN)}


def _hand_on(why: str | None, before: Mapping[Any, Any]) -> None:
    """Calls who held a signal that came; sent again it would wait where it is blocked."""
    from ddpm.system import slurm  # which has a clock

    name = (why or "").partition(" ")[0]  # it may have come to another process of the group
    number = signal.Signals[name] if name in _NAMES else None
    if why is not None and slurm.submitted_by_submitit():
        number = slurm.for_submitit(why, number)
    handler = None if number is None else before[number]
    if callable(handler) and handler is not signal.default_int_handler:
        handler(number, None)
