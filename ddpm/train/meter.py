"""What training reports, kept on the device: means of loss and gradient norm, and the first update that was not finite."""

import math
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor


class NotFinite(FloatingPointError):
    """A loss or gradient was not finite.    update: the first such, counted from 0."""

    def __init__(self, update: int, norm: float, means: dict[str, float]) -> None:
        shown = ", ".join(f"{name} {value:.4g}" for name, value in means.items() if "loss" in name or "norm" in name)
        super().__init__(
            f"step {update + 1}: the gradient norm is {norm} (since the last report: {shown}); try a lower optimizer.lr, or training.precision=fp32"
        )
        self.update = update


class Guard:
    """Notices the first update whose gradient is not finite, on the device; from then on no update changes the weights, until the host has seen it.

    scaled: a gradient scaler is at work (fp16), which skips such updates itself and goes on.
    An optimizer that cannot be told on the device to change nothing (fused=true can) makes the host look at every step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, scaled: bool, device: torch.device) -> None:
        self._optimizer: Any = getattr(optimizer, "optimizer", optimizer)  # Accelerate's wrapper
        self._scaled = scaled
        self._told_on_device = bool(getattr(self._optimizer, "_step_supports_amp_scaling", False))
        self._first = torch.full((), -1, dtype=torch.int64, device=device)
        self._norm = torch.zeros((), device=device)

    def see(self, step: int, norm: Tensor) -> None:
        """norm: of the whole gradient of update number `step`, before that update is made."""
        if self._scaled:
            return
        fresh = (self._first < 0) & ~torch.isfinite(norm)
        self._first = torch.where(fresh, step, self._first)
        self._norm = torch.where(fresh, norm.float(), self._norm)
        if self._told_on_device:
            self._optimizer.grad_scale = None
            self._optimizer.found_inf = (self._first >= 0).float()
        else:
            self.check(step, {})

    def check(self, step: int, means: dict[str, float]) -> None:
        """Raises NotFinite if one was seen, or if the means since the last report are not finite. Waits for the device."""
        first = int(self._first)
        if first >= 0 or not all(map(math.isfinite, means.values())):
            raise NotFinite(first if first >= 0 else step, float(self._norm) if first >= 0 else float("nan"), means)


class Meter:
    """Means of loss (overall and by timestep quartile) and gradient norm since the last report, kept on the device."""

    NUM_QUARTILES = 4

    def __init__(self, num_timesteps: int, device: torch.device) -> None:
        self._num_timesteps = num_timesteps
        self._sums = torch.zeros(2 * self.NUM_QUARTILES + 2, device=device)  # loss by quartile, images by quartile, gradient norm, updates

    def add_losses(self, losses: Tensor, t: Tensor) -> None:
        """losses: (B,) of each image, at its timestep t (B,) int64."""
        quartile = t * self.NUM_QUARTILES // self._num_timesteps
        share = (quartile[:, None] == torch.arange(self.NUM_QUARTILES, device=t.device)).float()  # and no scatter: its sums have no fixed order on a GPU
        self._sums[: self.NUM_QUARTILES] += losses.float() @ share
        self._sums[self.NUM_QUARTILES : -2] += share.sum(dim=0)

    def add_norm(self, norm: Tensor) -> None:
        """norm: of the gradient of one update, before clipping."""
        self._sums[-2] += norm.float()
        self._sums[-1] += 1

    def sums(self, accelerator: Accelerator) -> Tensor:
        """Everything since the last report, a row for each process: what a checkpoint keeps."""
        return accelerator.gather(self._sums[None]) if accelerator.num_processes > 1 else self._sums[None].clone()

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """The means over all processes since the last report. Waits for the device."""
        *parts, norm, updates = self.sums(accelerator).sum(dim=0).tolist()
        loss, count = parts[: self.NUM_QUARTILES], parts[self.NUM_QUARTILES :]
        quartiles = {f"train/loss_q{index}": loss[index] / count[index] for index in range(self.NUM_QUARTILES) if count[index]}
        return {"train/loss": sum(loss) / sum(count), **quartiles, "train/grad_norm": norm / updates}

    def load(self, sums: Tensor | None, accelerator: Accelerator) -> None:
        """Carry on from the sums of a checkpoint: each process from its own, or the leading one from all of them if there are more or fewer now."""
        self.reset()
        if sums is not None and len(sums) == accelerator.num_processes:
            self._sums.copy_(sums[accelerator.process_index])
        elif sums is not None and accelerator.is_main_process:
            self._sums.copy_(sums.sum(dim=0))

    def reset(self) -> None:
        """Start anew."""
        self._sums.zero_()
