"""Passing on to the processes that work for this one that it was told to stop.

A terminal's Ctrl-C comes to all of them, also to one that just starts and cannot answer yet; a
signal to this process comes to none of them. So they start deaf to signals until they listen, and
this process tells each.
"""

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress

import psutil

from ddpm.system import signals

AGAIN = 1.0  # seconds until those are told that have come since
_END = b"\0"  # no signal has the number 0

Workers = Callable[[], Iterable[psutil.Process]]


@contextmanager
def passing_on(workers: Workers) -> Iterator[None]:
    """Tells the workers meanwhile what a signal tells this process; call it while `listening`.

    Processes that are started meanwhile have the signals blocked. A second Ctrl-C, later than
    signals.SAME_CTRL_C, kills all of them and ends this process at once, with 130.

    Args:
        workers: Finds those to tell.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    # any thread may be interrupted by a signal; the one that waits here always learns of it
    before = signal.set_wakeup_fd(writes, warn_on_full_buffer=False)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signals.TAKEN)
    teller = threading.Thread(target=_tell, args=(reads, workers), name="relay", daemon=True)
    teller.start()
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.set_wakeup_fd(before)
        os.write(writes, _END)
        teller.join()
        os.close(reads)
        os.close(writes)


def _tell(reads: int, workers: Workers) -> None:
    """What the thread does: waits for signals, and tells of the first until it is ended."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.TAKEN)
    told, first = signals.noted() is not None, 0.0
    while True:
        ready, _, _ = select.select([reads], [], [], AGAIN if told else None)
        came = os.read(reads, 64) if ready else b""
        if _END in came:
            return
        if signal.SIGINT in came:
            if first and time.monotonic() - first > signals.SAME_CTRL_C:
                _leave()
            first = first or time.monotonic()
        told = told or any(number in came for number in signals.TAKEN)
        if told:
            for worker in workers():
                with suppress(psutil.Error):
                    worker.send_signal(signal.SIGTERM)


def _leave() -> None:
    """Ends this process and all that work for it, in the middle of everything."""
    workers = descendants()
    for worker in workers:
        with suppress(psutil.Error):
            worker.kill()
    psutil.wait_procs(workers, timeout=AGAIN)
    os.write(2, b"interrupted\n")
    os._exit(130)


def descendants(word: str = "") -> list[psutil.Process]:
    """Returns the processes below this one that have `word` in their command lines.

    Those are left out that Python starts to clear up after the others.
    """
    found = []
    for one in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            line = " ".join(one.cmdline())
            if word in line and "resource_tracker" not in line:
                found.append(one)
    return found


def own_children() -> list[psutil.Process]:
    """Returns the processes that this one started."""
    return psutil.Process().children()


def wait_for(processes: Sequence[psutil.Process]) -> None:
    """Waits until these have ended."""
    psutil.wait_procs(processes)
