"""Being told to stop: finish the step, save, leave with a code that says "start me again"."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# EX_TEMPFAIL, the exit code of a run that was told to stop: the same command carries on
CARRIES_ON = 75
AGREE_EVERY = 10  # steps after which several processes tell each other


class Preempted(SystemExit):
    """A run that was told to stop has saved and stops.

    It ends a sweep too, and the process with CARRIES_ON.
    """

    def __init__(self, why: str) -> None:
        super().__init__(CARRIES_ON)
        self.why = why


class Interruption:
    """Whether SIGTERM, SIGINT, SIGUSR1 or SIGUSR2 has come since, on any process of the run.

    The second SIGINT ends the process at once.

    Args:
        any_process: Tells whether any of several processes says yes (processes.any_process); None
            for one alone. They ask each other every AGREE_EVERY steps, and all then stop at the
            same.
    """

    def __init__(self, any_process: Callable[[bool], bool] | None = None) -> None:
        self._told: str | None = None
        self._any_process = any_process

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._told == "SIGINT":
            raise KeyboardInterrupt
        self._told = signal.Signals(number).name
        print(
            f"{self._told}: stopping after this step, to carry on later "
            "(Ctrl-C twice leaves at once)",
            file=sys.stderr,
            flush=True,
        )

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes the signals over, and gives them back afterwards.

        Only the main thread of a process can; elsewhere nothing is taken. A signal that came is
        then handed on to who held it before: submitit queues the job again.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        taken = [
            getattr(signal, name)
            for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2")
            if hasattr(signal, name)
        ]
        before = {number: signal.signal(number, self._handle) for number in taken}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            held = before[signal.Signals[self._told]] if self._told is not None else None
            if callable(held) and held is not signal.default_int_handler:
                signal.raise_signal(signal.Signals[str(self._told)])

    def after(self, step: int) -> str | None:
        """Returns the signal's name if the run is to stop after `step` updates, None to go on.

        With several processes, all must ask at every step.
        """
        if self._any_process is None:
            return self._told
        if step % AGREE_EVERY or not self._any_process(self._told is not None):
            return None
        return self._told or "a signal to another process"
