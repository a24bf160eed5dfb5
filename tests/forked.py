"""Runs commands in their own processes, forked from one that has already imported torch.

This saves each command the imports, which take most of a tiny run's time. Everything else is as if
it had been typed in a shell.
"""

import atexit
import importlib
import multiprocessing
import os
import socket
import sys
import tempfile
import traceback
from dataclasses import dataclass, field
from multiprocessing import forkserver
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["warm"])


@dataclass
class Command:
    """A command that is running or has ended.

    Attributes:
        process: The command's process.
        files: The files that take standard output and standard error.
    """

    process: multiprocessing.Process
    files: tuple[Path, Path]
    done: bool = field(default=False)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def out(self) -> str:
        """The standard output so far."""
        return self.files[0].read_text()

    @property
    def err(self) -> str:
        return self.files[1].read_text()

    @property
    def begun(self) -> bool:
        """Whether the command has started, so that signals reach it."""
        return self.files[0].with_name("begun").exists()

    @property
    def runs(self) -> bool:
        return self.process.is_alive()

    def send(self, number: int) -> None:
        """Sends a signal if the command is still running."""
        if self.runs:
            os.kill(self.pid, number)

    def wait(self, seconds: float = 120) -> int:
        """Waits for the exit code, which is negative if a signal killed the command."""
        self.process.join(seconds)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
            raise AssertionError(f"still running after {seconds} s:\n{self.out}\n{self.err}")
        return self.process.exitcode


def command(name: str, *overrides: str, before: str | None = None, **environment: str) -> Command:
    """Starts `python -m ddpm.<name> <overrides>`.

    Args:
        name: The command, such as train.
        overrides: The words of the command line.
        before: A function of a test module to call first, as module:function.
        environment: Additional environment variables.
    """
    folder = Path(tempfile.mkdtemp(prefix="ddpm-test-"))
    files = folder / "out", folder / "err"
    for file in files:
        file.touch()
    arguments = (name, overrides, environment, [str(file) for file in files], before)
    process = CONTEXT.Process(target=_child, args=arguments)
    with pytest.MonkeyPatch.context() as patch:
        # the fork server imports `warm` from here
        patch.setenv("PYTHONPATH", str(ROOT / "tests"), prepend=os.pathsep)
        forkserver.ensure_running()
    process.start()
    return Command(process, files)


def group(
    name: str, *overrides: str, processes: int, before: str | None = None, **environment: str
) -> list[Command]:
    """Starts a command in several cooperating processes, as a launcher would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    together = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        **environment,
    }
    return [
        command(name, *overrides, before=before, **together, RANK=str(rank), LOCAL_RANK=str(rank))
        for rank in range(processes)
    ]


def signalled_after_five_images() -> None:
    """Sends the process $SIGNAL in the middle of a batch of images. Used as `before`."""
    from ddpm.sample import folder

    really, count = folder.save_image, iter(range(1000))

    def save_image(path, image):
        really(path, image)
        if next(count) == 4:
            os.kill(os.getpid(), int(os.environ["SIGNAL"]))

    folder.save_image = save_image


def _child(
    name: str,
    overrides: tuple[str, ...],
    environment: dict[str, str],
    files: list[str],
    before: str | None,
) -> None:
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
    sys.stdin, sys.stdout, sys.stderr = (
        os.fdopen(os.open(os.devnull, os.O_RDONLY)),
        os.fdopen(1, "w", closefd=False),
        os.fdopen(2, "w", buffering=1, closefd=False),
    )
    os.chdir(ROOT)
    os.environ.update({"HYDRA_FULL_ERROR": "0", **environment})
    sys.argv = [f"ddpm.{name}", *overrides]
    code: int | str | None = 0
    try:
        Path(files[0]).with_name("begun").touch()
        if before is not None:
            module, function = before.split(":")
            getattr(importlib.import_module(module), function)()
        importlib.import_module(f"ddpm.{name}.__main__").main()
    except SystemExit as stopped:
        code = stopped.code
    except KeyboardInterrupt:  # the command does not handle signals yet
        code = 130
    except BaseException:
        traceback.print_exc()
        code = 1
    if isinstance(code, str):  # as the interpreter does with a string passed to sys.exit
        print(code, file=sys.stderr)
        code = 1
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code or 0)
