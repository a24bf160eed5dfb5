"""Runs functions that may hang or crash in child processes, with limits on time and memory."""

import contextlib
import importlib
import json
import os
import pickle
import select
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import psutil

SHARE_OF_MEMORY = 0.8  # share of the free memory that a trial may take
LATE = "not done after"  # first words of the reason if a trial ran out of time
GRACE = 30.0  # seconds that the server may take on top of the trial itself
# variables that make a process one of several; a trial runs alone
_OF_SEVERAL = ("RANK", "WORLD_SIZE", "MASTER_", "GROUP_", "ROLE_", "LOCAL_", "TORCHELASTIC_")


class Failed(Exception):
    """A trial gave no result; the message says why, in one line."""


class Trials:
    """Runs functions of one module in child processes, one after the other.

    The module is imported only once, by a server process from which each trial is forked.
    """

    def __init__(self, server: "subprocess.Popen[bytes]") -> None:
        self._server = server

    def run(self, function: str, argument: Any, seconds: float) -> dict[str, Any]:
        """Runs function(argument) in a child process and returns its dictionary of plain values.

        Args:
            function: The function's name in the module.
            argument: The argument, which must be picklable.
            seconds: The time limit.

        Raises:
            Failed: If the function raises, crashes, or takes too much time or memory.
        """
        memory = int(SHARE_OF_MEMORY * psutil.virtual_memory().available)
        order = pickle.dumps((function, argument, seconds, memory))
        sends, hears = self._server.stdin, self._server.stdout
        assert sends is not None
        assert hears is not None
        try:
            sends.write(struct.pack("<Q", len(order)) + order)
            sends.flush()
            ready, _, _ = select.select([hears], [], [], seconds + GRACE)
            line = hears.readline() if ready else b""
        except BrokenPipeError:
            line = b""
        if not line:
            raise Failed("the server process of the trials is gone")
        found: dict[str, Any] = json.loads(line)
        if "failed" in found:
            raise Failed(found["failed"])
        return found


@contextmanager
def trials(module: str) -> Iterator[Trials]:
    """Yields the trials of a module; kills all their processes at the end."""
    own = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(_OF_SEVERAL) and not name.startswith("ACCELERATE_")
    }
    own["PYTHONPATH"] = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
    # this process owns the folder, since the server gets killed and cannot remove it
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        server = subprocess.Popen(
            [sys.executable, "-m", "ddpm.system.trials", module, place],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=own,
            start_new_session=True,
        )
        try:
            yield Trials(server)
        finally:
            _end(server.pid)
            server.communicate()


def _serve(module: str, folder: Path, orders: BinaryIO) -> None:
    """Forks a child per order, and prints its result as one line of JSON.

    The children share a cache of compiled code. A child that is killed or crashes may leave it half
    written, so the next one starts a new cache.
    """
    parent = os.getppid()
    functions = importlib.import_module(module)
    number = code = 0
    while header := orders.read(8):
        order = pickle.loads(orders.read(struct.unpack("<Q", header)[0]))
        function, argument, seconds, memory = order
        number, place = number + 1, folder / f"trial_{number + 1}"
        place.mkdir()
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / f"code_{code}")
        child = os.fork()
        if child == 0:
            _child(getattr(functions, function), argument, place)
        why = _watched(child, parent, seconds, memory)
        answer = place / "answer.json"
        if why is None and answer.is_file():
            line = answer.read_text(encoding="utf-8")
        else:
            line = json.dumps({"failed": why or _last_line(place / "printed")})
            code = number
        print(line, flush=True)


def _child(function: Any, argument: Any, place: Path) -> None:
    """Writes the result of function(argument), or why it failed, and exits."""
    with (place / "printed").open("wb") as printed:
        os.dup2(printed.fileno(), 1)
        os.dup2(printed.fileno(), 2)
    with contextlib.suppress(OSError):  # if memory runs out, the kernel should kill this one first
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="utf-8")
    try:
        try:
            found = function(argument)
        except BaseException as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            found = {"failed": f"{type(error).__name__}: {' '.join(lines[:2])}"[:300]}
        scratch = place / "answer.part"
        scratch.write_text(json.dumps(found), encoding="utf-8")
        scratch.rename(place / "answer.json")
    finally:
        os._exit(0)


def _watched(child: int, parent: int, seconds: float, memory: int) -> str | None:
    """Waits for a child, and kills it at its limits; returns why it failed, None if it did not."""
    began, pause = time.monotonic(), 0.01
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done and os.WIFSIGNALED(status):
            return f"died ({signal.Signals(os.WTERMSIG(status)).name})"
        if done:
            return None
        why = None
        if time.monotonic() - began > seconds:
            why = f"{LATE} {seconds:.0f} s"
        elif _memory_of(child) > memory:
            why = f"took more than {memory / 1e9:.1f} GB of memory"
        if why is not None or os.getppid() != parent:
            _end(child)
            os.waitpid(child, 0)
            if os.getppid() != parent:
                sys.exit()
            return why
        time.sleep(pause)
        pause = min(2 * pause, 0.3)


def _last_line(file: Path) -> str:
    lines = file.read_text(encoding="utf-8", errors="replace").split("\n") if file.exists() else []
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "gave nothing")


def _memory_of(process: int) -> int:
    """Returns the bytes of memory that a process and its descendants use."""
    found = 0
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(process)
        for one in (parent, *parent.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                found += one.memory_info().rss
    return found


def _end(process: int) -> None:
    """Kills a process and its descendants."""
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(process)
        for one in (*parent.children(recursive=True), parent):
            with contextlib.suppress(psutil.Error):
                one.kill()


if __name__ == "__main__":
    _serve(sys.argv[1], Path(sys.argv[2]), sys.stdin.buffer)
