"""What is not public in the libraries and has no public way: each in one function, with why.

A new release of Hydra, torch or Accelerate that breaks something breaks it here.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def hydra_parser(refuse: Any = None) -> argparse.ArgumentParser:
    """Hydra's own parser of flags; `refuse` is called with what is wrong, in place of its usage.

    Hydra makes the parser itself, so there is no class to derive from.
    """
    from hydra._internal.utils import get_args_parser

    parser: argparse.ArgumentParser = get_args_parser()
    if refuse is not None:
        parser.error = refuse  # type: ignore[method-assign]
    return parser


@contextmanager
def returns_of_sweeps(outcomes: list[Any]) -> Iterator[None]:
    """Adds to `outcomes` what the jobs of a sweep return, in whatever process they ran.

    hydra.main drops what Hydra.multirun returns.
    """
    from hydra._internal.hydra import Hydra

    multirun = Hydra.multirun

    def collect(self: Hydra, *arguments: Any, **named: Any) -> Any:
        batches = multirun(self, *arguments, **named)
        outcomes.extend(done.return_value for batch in batches for done in batch)
        return batches

    Hydra.multirun = collect  # type: ignore[method-assign]
    try:
        yield
    finally:
        Hydra.multirun = multirun  # type: ignore[method-assign]


def reset_accelerate() -> None:
    """Puts back what Accelerate keeps between two runs of one process, the process group aside.

    Its state is shared by all instances, and a second one of another precision is refused.
    """
    import torch
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    GradientState._reset_state()


def keep_dropout_when_compiled() -> None:
    """Has compiled code draw the random numbers that eager code would.

    The setting is Inductor's own, and not among the options of torch.compile.
    """
    import torch._inductor.config

    torch._inductor.config.fallback_random = True


def skip_updates_if(optimizer: Any, failed: Any) -> bool:
    """Has an optimizer change nothing in its next step if `failed` is not 0, without a wait.

    Fused optimizers look at this on the device; it is how torch's gradient scaler tells them.

    Args:
        optimizer: torch's, or Accelerate's wrapper of one.
        failed: () float tensor on the device.

    Returns:
        Whether the optimizer looks at it.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    if not getattr(inner, "_step_supports_amp_scaling", False):
        return False
    inner.grad_scale = None
    inner.found_inf = failed
    return True


def storage_id(storage: Any) -> int:
    """What tells two storages apart where both have no memory, as on the meta device."""
    return storage._cdata
