"""How many images a device takes at once: runtime.device_batch=auto tries, and halves until it fits."""

from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import nn

from ddpm.data.batches import Batches
from ddpm.diffusion.process import GaussianDiffusion
from ddpm.diffusion.timesteps import LossSecondMoment, Uniform
from ddpm.train.loop import backward


def largest_fitting(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    diffusion: GaussianDiffusion,
    batches: Batches,
    timestep_sampler: Uniform | LossSecondMoment,
    seed: int,
) -> int:
    """The most images that every device can take at once: its share of the global batch, on a GPU halved until forward and backward fit.

    Room is kept for what Adam will hold. Nothing is left changed: gradients are dropped, and randomness has no state. All processes agree.
    Raises ValueError, one line, if not even one image fits.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def attempt(size: int) -> None:
        held = [] if optimizer.state else [torch.empty_like(parameter) for parameter in parameters for _ in range(2)]
        with accelerator.no_sync(model):
            backward(accelerator, model, diffusion, batches, timestep_sampler, seed, 0, 0, size)
        del held

    share = -(-batches.size(0) // accelerator.num_processes)
    if accelerator.device.type != "cuda":  # elsewhere memory does not run out with an error
        return share
    size = halved_until_it_fits(share, attempt, lambda fits: _all(accelerator, fits))
    optimizer.zero_grad()
    return size


def halved_until_it_fits(size: int, attempt: Callable[[int], None], all_agree: Callable[[bool], bool]) -> int:
    """The first of size, size/2, size/4, ... (rounded up) for which attempt(size) runs out of memory nowhere.

    Raises ValueError, one line, if one image is too many.
    """
    while True:
        fits = True
        try:
            attempt(size)
        except torch.OutOfMemoryError:
            fits = False
        if all_agree(fits):
            return size
        if torch.cuda.is_available():  # outside the except block, where the error would still hold the tensors
            torch.cuda.empty_cache()
        if size == 1:
            raise ValueError("one image does not fit the device's memory: choose a smaller model, or runtime.recompute=[0] to store less")
        size = -(-size // 2)


def _all(accelerator: Accelerator, fits: bool) -> bool:
    if accelerator.num_processes == 1:
        return fits
    return bool(accelerator.gather(torch.tensor([int(fits)], device=accelerator.device)).min())
