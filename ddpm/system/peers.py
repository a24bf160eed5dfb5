"""Lets the processes of one run agree when to stop, and notice when one of them dies.

They talk through torch's store. No device and no collective is involved, so this works while some
processes draw samples and others wait.
"""

import os
import platform
import threading
import time

from ddpm.system import signals
from ddpm.system.internals import default_store

BEAT = 0.5  # seconds between heartbeats
DEAD = 20.0  # seconds without a heartbeat after which a process counts as dead
LEAVING = 5.0  # seconds that process 0 waits for the others to leave
ASK = 0.5  # seconds of training between two rounds of asking each other


class PeerLost(RuntimeError):
    """Another process of the run is gone; the message names it."""


class Peers:
    """One process's view of the other processes of its run.

    Args:
        rank: This process's rank.
        count: Number of processes.
    """

    def __init__(self, rank: int, count: int) -> None:
        self.rank, self.count = rank, count
        self.verdict: str | None = None  # why all stop, once they have agreed to
        self._store, self._beats = default_store("main"), default_store("beats")
        self._round = 0
        self._failed: str | None = None  # which process failed or is gone, once known
        self._ended = threading.Event()
        self._store.set(f"who/{rank}", f"process {os.getpid()} on {platform.node()}")
        self._beats.set(f"beat/{rank}", "0")
        threading.Thread(target=self._live, name="peers", daemon=True).start()

    def _live(self) -> None:
        """Sends heartbeats, and passes on a request to stop and the news of a failure.

        The main thread may wait in a collective until the process that holds the store is gone.
        """
        number, passed = 0, False
        while not self._ended.wait(BEAT):
            try:
                number += 1
                self._beats.set(f"beat/{self.rank}", str(number))
                if not passed and (why := signals.noted()):
                    self._beats.set("told", f"{why} to process {self.rank}")
                    passed = True
                elif not passed and self._beats.check(["told"]):
                    signals.tell(self._beats.get("told").decode())
                    passed = True
                self._failure()
            except RuntimeError:  # the store dies with the process that holds it
                return

    def ask(self, step: int = 0, step_seconds: float = ASK) -> tuple[str | None, int]:
        """Waits for all processes to ask, then gives each the same answer.

        Args:
            step: This process's step, if it asks between steps.
            step_seconds: Seconds per step.

        Returns:
            Why all stop, or None if all go on; and the step at which to ask next.

        Raises:
            PeerLost: If a process is gone.
        """
        if self.verdict is not None:
            return self.verdict, step
        key, self._round = f"round/{self._round}", self._round + 1
        why = signals.told()
        if why is not None:
            self._store.set(f"{key}/told", why)
        if self._store.add(key, 1) == self.count:
            following = step + max(1, int(ASK / max(step_seconds, 1e-6)))
            told = self._store.get(f"{key}/told") if self._store.check([f"{key}/told"]) else b""
            self._store.set(f"{key}/answer", f"{following} {told.decode()}")
            for part in ("", "/told", "/answer"):  # two rounds ago: nobody reads it any more
                self._store.delete_key(f"round/{self._round - 3}{part}")
        self._wait_for(f"{key}/answer")
        following_step, _, reason = self._store.get(f"{key}/answer").decode().partition(" ")
        self.verdict = reason or None
        return self.verdict, int(following_step)

    def meet(self) -> None:
        """Waits for all processes, whether told to stop or not.

        Raises:
            PeerLost: If a process is gone.
        """
        key, self._round = f"round/{self._round}", self._round + 1
        if self._store.add(key, 1) == self.count:
            self._store.set(f"{key}/answer", "")
        self._wait_for(f"{key}/answer")

    def _wait_for(self, key: str) -> None:
        pause, seen, since = 0.0005, self._signs(), time.monotonic()
        while not self._store.check([key]):
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
            if (failed := self._failure()) is not None:
                raise PeerLost(failed)
            if time.monotonic() - since > DEAD:
                now = self._signs()
                gone = [rank for rank, sign in enumerate(now) if sign == seen[rank]]
                if gone:
                    raise PeerLost(self._named(gone[0]))
                seen, since = now, time.monotonic()

    def what_happened(self) -> str | None:
        """Returns what happened to a process that is gone, or None if all are alive.

        Call it after a collective has failed. It takes a few heartbeats. A process that reported
        its failure is named before one that fell silent.
        """
        try:
            before = self._signs()
            time.sleep(4 * BEAT)
            now = self._signs()
            if (failed := self._failure()) is not None:
                return failed
            for rank, sign in enumerate(now):
                if sign == before[rank] and not self._store.check([f"ended/{rank}"]):
                    return self._named(rank)
        except RuntimeError:  # includes torch's DistError
            self._ended.set()  # nobody is left to talk to
            leader = f"process 0 of {self.count}, which leads the others, was killed or lost"
            return self._failed or leader
        return None

    def tell_lost(self, what: str) -> None:
        """Tells the others which process is gone; they may be waiting and see no error themselves.

        Args:
            what: The message of `what_happened`.
        """
        try:
            if self._failure() is None:
                self._beats.set("failed", what)
        except RuntimeError:  # the store dies with the process that holds it
            return

    def leave(self, failure: str | None = None) -> None:
        """Announces that this process ends.

        The process that holds the store waits up to LEAVING seconds for the others to leave.

        Args:
            failure: Why it fails; None if it does not.
        """
        if self._ended.is_set():
            return
        self._ended.set()
        try:
            if failure is not None and self._failure() is None:
                self._beats.set("failed", f"process {self.rank} of {self.count}: {failure}")
            self._store.set(f"ended/{self.rank}", "")
            if self.rank or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                return
            until = time.monotonic() + LEAVING
            others = [f"ended/{rank}" for rank in range(1, self.count)]
            while not self._store.check(others) and time.monotonic() < until:
                time.sleep(0.01)
        except RuntimeError:  # the store dies with the process that holds it
            return

    def _named(self, rank: int) -> str:
        who = self._store.get(f"who/{rank}").decode()
        return f"process {rank} of {self.count} ({who}) was killed or lost"

    def _failure(self) -> str | None:
        if self._failed is None and self._beats.check(["failed"]):
            self._failed = self._beats.get("failed").decode()
        return self._failed

    def _signs(self) -> list[bytes]:
        return [self._beats.get(f"beat/{rank}") for rank in range(self.count)]
