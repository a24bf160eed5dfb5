"""The processes of a command: one, or those that torchrun, accelerate launch or Slurm started."""

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
    """Returns the processes that share this command's work, each on its own device of that kind.

    Raises:
        ValueError: If this machine has no such device, or if several processes were started but
            did not find each other, so that each would do all the work.
    """
    # without `cpu`, Accelerate does not connect processes that have no GPU
    state = PartialState(cpu=devices.device(device).type == "cpu")
    _meet(state.num_processes, state.process_index)
    return state


def device_of(processes: PartialState, name: Name) -> torch.device:
    """Returns this process's device: its own if there are several, else the one of that name."""
    return processes.device if processes.num_processes > 1 else devices.device(name)


@contextmanager
def accelerator_for(
    device: Name, precision: Precision, deterministic: bool = False
) -> Iterator[Accelerator]:
    """Yields Accelerate for one run, and sets torch's precision for the block (see precision.py).

    Resets Accelerate's global state before and after, and restores torch's flags after.

    Raises:
        ValueError: As in `find_processes`, or if the environment prevents `deterministic`.
    """
    cpu = devices.device(device).type == "cpu"
    if cpu:
        _keep_freed_memory()
    reset_accelerate()
    try:
        accelerator = Accelerator(
            mixed_precision=PRECISIONS[precision],
            cpu=cpu,
            # explicit, since the environment would set these two otherwise
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            dynamo_backend="no",
            # no copy of the gradients. No static_graph: torch 2.13 fails with it if the first
            # backward pass is not synchronized (split batches, the device_batch=auto search)
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        )
        _meet(accelerator.num_processes, accelerator.process_index)
        with products(precision), bits_kept(accelerator.device, deterministic):
            yield accelerator
    finally:
        reset_accelerate()


class Asking:
    """Decides after which step a run stops; all its processes stop after the same one.

    The processes ask each other after every step if steps take seconds, and rarely enough not to
    matter if they take milliseconds. No device waits.
    """

    def __init__(self) -> None:
        self._next, self._last, self._since = 0, 0, time.monotonic()

    def after(self, step: int) -> str | None:
        """Returns why to stop after `step` updates, or None; call it at every step on all."""
        if _Group.peers is None:
            return signals.told()
        if step < self._next and _Group.peers.verdict is None:
            return None
        seconds = (time.monotonic() - self._since) / max(step - self._last, 1)
        why, self._next = _Group.peers.ask(step, seconds)
        self._last, self._since = step, time.monotonic()
        return why


class _Group:
    peers: Peers | None = None  # None with a single process


def agree() -> None:
    """Waits for all processes, and raises on all of them if any was told to stop.

    Raises:
        Preempted: If a process was told to stop.
    """
    if _Group.peers is None:
        signals.check()
        return
    why, _ = _Group.peers.ask()
    if why is not None:
        raise Preempted(why)


@contextmanager
def together() -> Iterator[None]:
    """Makes all processes leave the block together, even if one of them is preempted in it.

    The processes may do different things in the block, if they call `agree` before each collective.

    Raises:
        Preempted: On all processes, if one was told to stop.
    """
    try:
        yield
    except Preempted:
        agree()  # the others are in this call too, or in an earlier one
        raise
    agree()


def wait_to_leave() -> None:
    """Waits for all processes, so that none leaves while another still saves."""
    if _Group.peers is not None:
        _Group.peers.meet()


def share(items: Sequence[T], processes: PartialState) -> Sequence[T]:
    """Returns this process's share of items that all processes know: every n-th item."""
    return items[processes.process_index :: processes.num_processes]


def gather(mine: list[T], processes: PartialState) -> list[T]:
    """Returns the concatenated lists of all processes, on every process.

    The lists travel as pickles, which only the run's own processes send.

    Raises:
        Preempted: If a process was told to stop.
    """
    agree()
    return gather_object(mine) if processes.num_processes > 1 else mine


def _keep_freed_memory() -> None:
    """Makes glibc keep the memory that a step frees; else the kernel clears every page anew."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no blocks outside the heap
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink it


@contextmanager
def garbage_kept() -> Iterator[Callable[[bool], None]]:
    """Turns off Python's automatic garbage collection, which would keep a GPU waiting.

    It is off from the first call of the yielded function until the block ends.

    Yields:
        A function to call at each step; its argument is whether it is time to collect.
    """
    automatic = gc.isenabled()

    def tidy(due: bool) -> None:
        if gc.isenabled():
            gc.collect()
            gc.freeze()  # what exists now stays for the whole run: never scan it again
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
    """Names the lost process if a failure in the block comes from losing it.

    Any other failure is reported to the other processes.

    Raises:
        PeerLost: Instead of a failure that another process caused.
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
    """Destroys the process group: Gloo's threads may abort a process that is exiting cleanly."""
    if _Group.peers is not None:
        signals.deafen()  # the launcher may signal all processes once the first has left
        _Group.peers.leave()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _meet(found: int, rank: int) -> None:
    """Connects the processes of this command; refuses if some are missing."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != found:
        raise ValueError(
            f"WORLD_SIZE={started}, but Accelerate found {found}: "
            "start the processes with torchrun, or unset WORLD_SIZE"
        )
    if found > 1 and _Group.peers is None:
        _Group.peers = Peers(rank, found)
