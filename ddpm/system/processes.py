"""The processes that a command runs in.

One, or those that torchrun, accelerate launch or Slurm started.
"""

import atexit
import ctypes
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import GradientAccumulationPlugin, gather_object

from ddpm.system import devices
from ddpm.system.internals import reset_accelerate

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
    _check_all_here(state.num_processes)
    return state


def device_of(processes: PartialState, name: Name) -> torch.device:
    """Where this process works: on its own device among several, else on the one of that name."""
    return processes.device if processes.num_processes > 1 else devices.device(name)


@contextmanager
def accelerator_for(device: Name, precision: devices.Precision) -> Iterator[Accelerator]:
    """Gives Accelerate for one run, and has its device multiply as `precision` says.

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
        )
        _check_all_here(accelerator.num_processes)
        with devices.products(accelerator.device, precision):
            yield accelerator
    finally:
        reset_accelerate()


def any_process(num_processes: int) -> Callable[[bool], bool] | None:
    """Returns a function that tells whether any process says yes; None for one process alone.

    All must call it equally often. No device waits.
    """
    if num_processes == 1:
        return None
    group = torch.distributed.new_group(backend="gloo")

    def ask(mine: bool) -> bool:
        flag = torch.tensor([int(mine)])
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX, group=group)
        return bool(flag)

    return ask


def share(items: Sequence[T], processes: PartialState) -> Sequence[T]:
    """Returns this process's share of what all know: every n-th."""
    return items[processes.process_index :: processes.num_processes]


def gather(mine: list[T], processes: PartialState) -> list[T]:
    """Returns the lists of all processes as one, on each of them; sent as pickles among our own."""
    return gather_object(mine) if processes.num_processes > 1 else mine


def _keep_freed_memory() -> None:
    """Has glibc keep what a step frees, else each page is handed out and cleared again."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no blocks outside the heap
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink it


@atexit.register
def _leave_group() -> None:
    """Gloo's threads, left running, may abort a process that ends well."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _check_all_here(found: int) -> None:
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != found:
        raise ValueError(
            f"WORLD_SIZE={started} processes were started, and {found} work together: "
            "start them with torchrun, or unset WORLD_SIZE"
        )
