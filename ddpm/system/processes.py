"""The processes that a command runs in.

One, or those that torchrun, accelerate launch or Slurm started.
"""

import atexit
import ctypes
import gc
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    gather_object,
)

from ddpm.system import devices, signals
from ddpm.system.internals import reset_accelerate
from ddpm.system.names import Precision
from ddpm.system.peers import PeerLost, Peers
from ddpm.system.precision import deterministic as bits_kept
from ddpm.system.precision import products
from ddpm.system.signals import Preempted

T = TypeVar("T")
Name = Literal["auto", "cpu", "cuda", "mps"]

PRECISIONS = {"fp32": "no", "tf32": "no", "bf16": "bf16", "fp16": "fp16"}  # ours -> Accelerate's


def find_processes(device: Name) -> PartialState:
    """Finds the processes of this command, which share its work, each on its device of that kind.

    Raises:
        ValueError: If this machine has no such device, or if several processes were started and do
            not find each other: each would do all the work.
    """
    # else Accelerate leaves processes without a GPU alone
    state = PartialState(cpu=devices.device(device).type == "cpu")
    _meet(state.num_processes, state.process_index)
    return state


def device_of(processes: PartialState, name: Name) -> torch.device:
    """Where this process works: on its own device among several, else on the one of that name."""
    return processes.device if processes.num_processes > 1 else devices.device(name)


@contextmanager
def accelerator_for(
    device: Name, precision: Precision, deterministic: bool = False
) -> Iterator[Accelerator]:
    """Gives Accelerate for one run, and has its device compute as said (see precision.py).

    What both keep between runs of one process is put back, Accelerate's also before.

    Raises:
        ValueError: Like `find_processes`.
    """
    cpu = devices.device(device).type == "cpu"
    if cpu:
        _keep_freed_memory()
    reset_accelerate()
    try:
        accelerator = Accelerator(
            mixed_precision=PRECISIONS[precision],
            cpu=cpu,
            # else the environment says these two
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            dynamo_backend="no",
            # gradients are sent from where they lie; no static_graph, with which torch 2.13 fails
            # where the first pass is not sent (batches in pieces, the search of device_batch=auto)
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        )
        _meet(accelerator.num_processes, accelerator.process_index)
        with products(precision), bits_kept(accelerator.device, deterministic):
            yield accelerator
    finally:
        reset_accelerate()


class Asking:
    """Whether a run is to stop after a step; several processes stop after the same.

    They ask each other so seldom that steps of milliseconds do not notice, and steps of seconds
    each time. No device waits.
    """

    def __init__(self) -> None:
        self._next, self._last, self._since = 0, 0, time.monotonic()

    def after(self, step: int) -> str | None:
        """Returns why to stop after `step` updates, None to go on; all must ask at every step."""
        if _Group.peers is None:
            return signals.told()
        if step < self._next and _Group.peers.verdict is None:
            return None
        seconds = (time.monotonic() - self._since) / max(step - self._last, 1)
        why, self._next = _Group.peers.ask(step, seconds)
        self._last, self._since = step, time.monotonic()
        return why


class _Group:
    peers: Peers | None = None  # where there are several processes


def agree() -> None:
    """Waits for all processes here, and gives up what is under way on all if on one.

    Raises:
        Preempted: If one was told to stop.
    """
    if _Group.peers is None:
        signals.check()
        return
    why, _ = _Group.peers.ask()
    if why is not None:
        raise Preempted(why)


@contextmanager
def together() -> Iterator[None]:
    """Has all processes end what follows at once, also where one gives it up.

    Each may do something else in it, if collectives in it come after `agree`.

    Raises:
        Preempted: On all, if one was told to stop.
    """
    try:
        yield
    except Preempted:
        agree()  # the others come here too, or to an `agree` before
        raise
    agree()


def wait_to_leave() -> None:
    """Waits for all processes, told to stop or not: none leaves while another still saves."""
    if _Group.peers is not None:
        _Group.peers.meet()


def share(items: Sequence[T], processes: PartialState) -> Sequence[T]:
    """Returns this process's share of what all know: every n-th."""
    return items[processes.process_index :: processes.num_processes]


def gather(mine: list[T], processes: PartialState) -> list[T]:
    """Returns the lists of all processes as one, on each of them; sent as pickles among our own.

    Raises:
        Preempted: Like `agree`.
    """
    agree()
    return gather_object(mine) if processes.num_processes > 1 else mine


def _keep_freed_memory() -> None:
    """Has glibc keep what a step frees, else each page is handed out and cleared again."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no blocks outside the heap
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink it


@contextmanager
def garbage_kept() -> Iterator[Callable[[bool], None]]:
    """Keeps Python from looking for garbage by itself, for which a GPU would have to wait.

    From the first call of what is yielded on. Afterwards, Python collects as it did before.

    Yields:
        What is called at each step, with whether it is time to collect what came since the first.
    """
    automatic = gc.isenabled()

    def tidy(due: bool) -> None:
        if gc.isenabled():
            gc.collect()
            gc.freeze()  # what is there now stays, and need not be looked at again
            gc.disable()
        elif due and automatic:
            gc.collect()

    try:
        yield tidy
    finally:
        if automatic:
            gc.unfreeze()
            gc.enable()


@contextmanager
def naming_lost() -> Iterator[None]:
    """Has a failure that another process's end has caused name that process.

    Of any other failure the others are told.

    Raises:
        PeerLost: In place of the first.
    """
    try:
        yield
    except PeerLost as error:
        if _Group.peers is not None:
            _Group.peers.tell_lost(str(error))
        raise
    except Exception as error:
        peers = _Group.peers
        if peers is not None and isinstance(error, RuntimeError):
            happened = peers.what_happened()
            if happened is not None:
                peers.tell_lost(happened)
                raise PeerLost(happened) from error
        if peers is not None:
            peers.leave(str(error))
        raise


@atexit.register
def _leave_group() -> None:
    """Gloo's threads, left running, may abort a process that ends well."""
    if _Group.peers is not None:
        signals.deafen()  # who started it may end all once the first has left
        _Group.peers.leave()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _meet(found: int, rank: int) -> None:
    """Has the processes that work together know each other; refuses if some are not there."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != found:
        raise ValueError(
            f"WORLD_SIZE={started} processes were started, and {found} work together: "
            "start them with torchrun, or unset WORLD_SIZE"
        )
    if found > 1 and _Group.peers is None:
        _Group.peers = Peers(rank, found)
