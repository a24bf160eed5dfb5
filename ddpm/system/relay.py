"""Passes a request to stop on to this process's workers.

A terminal's Ctrl-C reaches all of them, even one that is just starting and cannot handle it yet. A
signal to this process reaches none of them. So workers start with signals blocked until they
listen, and this process tells each of them.
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

AGAIN = 1.0  # seconds between rounds of telling, for workers that started since the last
_END = b"\0"  # no signal is number 0

Workers = Callable[[], Iterable[psutil.Process]]


@contextmanager
def passing_on(workers: Workers) -> Iterator[None]:
    """Passes signals on to the workers inside the block; enter it while `listening`.

    Processes started in the block have these signals blocked. A second Ctrl-C, more than
    signals.SAME_CTRL_C after the first, kills all descendants and exits at once with code 130.

    Args:
        workers: Returns the processes to tell.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    # a signal may interrupt any thread; through this pipe the relay thread always learns of it
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
    """Runs in the relay thread: waits for a signal, then tells the workers every AGAIN seconds."""
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
    """Kills all descendants and exits at once."""
    workers = descendants()
    for worker in workers:
        with suppress(psutil.Error):
            worker.kill()
    psutil.wait_procs(workers, timeout=AGAIN)
    os.write(2, b"interrupted\n")
    os._exit(130)


def descendants(word: str = "") -> list[psutil.Process]:
    """Returns the descendants of this process that have `word` in their command lines.

    Python's resource trackers are left out.
    """
    found = []
    for one in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            line = " ".join(one.cmdline())
            if word in line and "resource_tracker" not in line:
                found.append(one)
    return found


def own_children() -> list[psutil.Process]:
    """Returns the children of this process."""
    return psutil.Process().children()


def wait_for(processes: Sequence[psutil.Process]) -> None:
    """Waits until all of these processes have ended."""
    psutil.wait_procs(processes)
