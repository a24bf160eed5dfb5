"""Means of loss and gradient norm since the last report, kept on the device."""

import math
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ddpm.diffusion.timesteps import NUM_QUARTILES
from ddpm.system.internals import skip_updates_if


class NotFinite(FloatingPointError):
    """A loss or gradient was not finite.

    Attributes:
        update: The first such update, counted from 0.
    """

    def __init__(self, update: int, norm: float, means: dict[str, float]) -> None:
        shown = ", ".join(
            f"{name} {value:.4g}"
            for name, value in means.items()
            if "loss" in name or "norm" in name
        )
        super().__init__(
            f"step {update + 1}: the gradient norm is {norm} (since the last report: {shown}); try "
            "a lower optimizer.lr, or training.precision=fp32"
        )
        self.update = update


class Meter:
    """Means of loss (overall and by timestep quartile) and gradient norm since the last report.

    It also detects the first update with a gradient that is not finite. With a gradient scaler
    (fp16) that is no failure: the scaler skips such an update.
    """

    def __init__(self, num_timesteps: int, accelerator: Accelerator) -> None:
        self._num_timesteps = num_timesteps
        self._accelerator = accelerator
        device = accelerator.device
        # loss by quartile, images by quartile, gradient norm, updates
        self._sums = torch.zeros(2 * NUM_QUARTILES + 2, device=device)
        self._last_update = 0
        self._first_failure = torch.full((), -1, dtype=torch.int64, device=device)
        self._failed_norm = torch.zeros((), device=device)

    def add_losses(self, losses: Tensor, t: Tensor) -> None:
        """Adds the losses (B,) of images at timesteps t, (B,) int64."""
        quartile = t * NUM_QUARTILES // self._num_timesteps
        # a product, because a scatter sums in no fixed order on a GPU
        share = (quartile[:, None] == torch.arange(NUM_QUARTILES, device=t.device)).float()
        self._sums[:NUM_QUARTILES] += losses.float() @ share
        self._sums[NUM_QUARTILES:-2] += share.sum(dim=0)

    def add_norm(self, update: int, norm: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """Adds an update's gradient norm () before clipping; call it before optimizer.step().

        Once a norm is not finite, no update changes the weights any more.

        Raises:
            NotFinite: At once if the optimizer cannot skip an update on the device (fused=true
                can). Otherwise `means` raises it.
        """
        self._last_update = update
        if self._accelerator.scaler is not None:
            norm = norm.nan_to_num(0, 0, 0)
        else:
            fresh = (self._first_failure < 0) & ~torch.isfinite(norm)
            self._first_failure = torch.where(fresh, update, self._first_failure)
            self._failed_norm = torch.where(fresh, norm.float(), self._failed_norm)
            if not skip_updates_if(optimizer, (self._first_failure >= 0).float()):
                self._check({})
        self._sums[-2] += norm.float()
        self._sums[-1] += 1

    def means(self) -> dict[str, float]:
        """Returns the means over all processes since the last report. Waits for the device.

        Raises:
            NotFinite: If a mean or a gradient was not finite.
        """
        *parts, norm, updates = self._gathered().sum(dim=0).tolist()
        loss, count = parts[:NUM_QUARTILES], parts[NUM_QUARTILES:]
        quartiles = {
            f"train/loss_q{index}": loss[index] / count[index]
            for index in range(NUM_QUARTILES)
            if count[index]
        }
        means = {
            "train/loss": sum(loss) / sum(count),
            **quartiles,
            "train/grad_norm": norm / updates,
        }
        self._check(means)
        return means

    def reset(self) -> None:
        """Sets all sums to zero."""
        self._sums.zero_()

    def state_dict(self) -> Tensor:
        """Returns the sums, one row per process, on the CPU. All processes must call it."""
        return self._gathered().cpu()

    def load_state_dict(self, sums: Tensor) -> None:
        """Restores a checkpoint's sums.

        Each process takes its own row. If their number has changed, the main process takes all.
        """
        self.reset()
        if len(sums) == self._accelerator.num_processes:
            self._sums.copy_(sums[self._accelerator.process_index])
        elif self._accelerator.is_main_process:
            self._sums.copy_(sums.sum(dim=0))

    def _gathered(self) -> Tensor:
        rows: Any = self._sums[None]
        if self._accelerator.num_processes > 1:
            return self._accelerator.gather(rows)
        return rows.clone()

    def _check(self, means: dict[str, float]) -> None:
        first = int(self._first_failure)
        if first >= 0:
            raise NotFinite(first, float(self._failed_norm), means)
        if not all(map(math.isfinite, means.values())):
            raise NotFinite(self._last_update, float("nan"), means)
