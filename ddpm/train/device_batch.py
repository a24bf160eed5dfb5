"""runtime.device_batch=auto: finds how many images fit a device at once."""

from collections.abc import Callable

import torch
from accelerate import Accelerator

from ddpm.data.batches import Batches
from ddpm.diffusion.process import GaussianDiffusion
from ddpm.system.processes import agree
from ddpm.train.loop import backward
from ddpm.train.state import TrainingState


def largest_fitting(
    state: TrainingState,
    diffusion: GaussianDiffusion,
    batches: Batches,
    seed: int,
    at_most: int | None = None,
) -> int:
    """Returns how many images every device takes at once; all processes return the same.

    It starts from a device's share of the global batch, or from `at_most` if that is less. On a
    GPU it halves this until the forward and backward passes fit, with room for Adam's moments.
    The state stays as it was: gradients are dropped, and random numbers are functions of keys.

    Raises:
        ValueError: If not even one image fits.
    """
    accelerator, optimizer = state.accelerator, state.optimizer
    share = -(-batches.size(0) // accelerator.num_processes)
    share = min(share, at_most or share)
    if accelerator.device.type != "cuda":  # elsewhere running out of memory raises no error
        return share
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def attempt(size: int) -> None:
        moments = 0 if optimizer.state else 2
        room = [torch.empty_like(parameter) for parameter in parameters for _ in range(moments)]
        with accelerator.no_sync(state.model):
            backward(state, diffusion, batches, seed, 0, 0, size)
        del room

    size = halve_until_it_fits(share, attempt, lambda fits: _all(accelerator, fits))
    optimizer.zero_grad()
    return size


def halve_until_it_fits(
    size: int, attempt: Callable[[int], None], all_agree: Callable[[bool], bool]
) -> int:
    """Returns the first of size, size/2, size/4, ... (rounded up) that fits on all processes.

    Raises:
        ValueError: If not even one image fits.
        Preempted: If told to stop meanwhile.
    """
    while True:
        agree()
        fits = True
        try:
            attempt(size)
        except torch.OutOfMemoryError:
            fits = False
        if all_agree(fits):
            return size
        # outside the except block, where the error would still hold the tensors
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if size == 1:
            raise ValueError(
                "runtime.device_batch=auto: one image does not fit in the device's memory; choose "
                "a smaller model, or runtime.recompute=[0] to keep fewer activations"
            )
        size = -(-size // 2)


def _all(accelerator: Accelerator, fits: bool) -> bool:
    if accelerator.num_processes == 1:
        return fits
    return bool(accelerator.gather(torch.tensor([int(fits)], device=accelerator.device)).min())
