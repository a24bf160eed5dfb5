"""Everything that training changes, to be saved in a checkpoint and restored from one."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ddpm.diffusion.timesteps import LossSecondMoment, Uniform
from ddpm.models.layers import drops, takes_dropout_keys
from ddpm.train.meter import Meter


class EMA:
    """The exponential moving average of a network's weights (Ho et al. 2020, App. B).

    It averages a module's parameters in float32 and copies its persistent buffers.

    Args:
        module: The network; its current weights are the first average.
        decay: The share kept at each update, in [0, 1).
        warmup: Cap the decay at (1 + n) / (10 + n) at update n, so that a short run's average
            forgets its initial weights (TensorFlow's num_updates; the paper's runs do without).

    Raises:
        ValueError: If decay is outside [0, 1).
    """

    def __init__(self, module: nn.Module, decay: float, warmup: bool) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema_decay={decay} must lie in [0, 1)")
        self.decay = decay
        self.warmup = warmup
        self.num_updates = 0
        state = module.state_dict(keep_vars=True)
        self._live = {name: tensor.detach() for name, tensor in state.items()}
        self._averages = {name: _float_copy(tensor) for name, tensor in self._live.items()}
        averaged = [name for name, tensor in state.items() if isinstance(tensor, nn.Parameter)]
        self._copied = [name for name in state if name not in set(averaged)]
        self._from = [self._live[name] for name in averaged]
        self._to = [self._averages[name] for name in averaged]

    def decay_at(self, update: int) -> float:
        """Returns the share that update number `update`, counted from 0, keeps."""
        return min(self.decay, (1 + update) / (10 + update)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self) -> None:
        """Moves the averages towards the current weights, once per optimizer update."""
        sources = [tensor.float() for tensor in self._from]
        torch._foreach_lerp_(self._to, sources, 1 - self.decay_at(self.num_updates))
        for name in self._copied:
            self._averages[name].copy_(self._live[name])
        self.num_updates += 1

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the averages under the module's names, so that a bare module loads them."""
        return self._averages

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor], num_updates: int) -> None:
        """Restores averages and their number of updates.

        Raises:
            KeyError: If a name is missing.
        """
        for name, average in self._averages.items():
            average.copy_(state[name])
        self.num_updates = num_updates


@dataclass
class TrainingState:
    """Everything that an update changes.

    Attributes:
        accelerator: The run's accelerator; it owns the gradient scaler, if any (fp16).
        network: The bare network; checkpoints have its names.
        model: The network as Accelerate prepared it: (x_t, t[, classes][, dropout_keys]) -> output.
        ema: The moving average of its weights.
        optimizer: The optimizer as Accelerate prepared it.
        timesteps: Draws timesteps; a sampler that learns has a state.
        meter: Sums that are still to be reported.
        step: Optimizer updates done.
    """

    accelerator: Accelerator
    network: nn.Module
    model: nn.Module
    ema: EMA
    optimizer: torch.optim.Optimizer
    timesteps: Uniform | LossSecondMoment
    meter: Meter
    step: int = 0

    @cached_property
    def uses_dropout_keys(self) -> bool:
        """Whether the network has dropout that draws its masks from keys."""
        return drops(self.network) and takes_dropout_keys(self.network)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Swaps in the averaged weights; the network's own come back uncopied."""
        averages = self.ema.state_dict()
        live = self.network.state_dict(keep_vars=True)
        own = {name: tensor.data for name, tensor in live.items()}
        try:
            for name, tensor in live.items():
                tensor.data = averages[name].to(tensor.dtype)
            yield
        finally:
            for name, tensor in live.items():
                tensor.data = own[name]

    def state_dict(self) -> dict[str, Any]:
        """Returns tensors and plain values. All processes must call it."""
        scaler = self.accelerator.scaler
        return {
            "step": self.step,
            "model": self.network.state_dict(),
            "ema": self.ema.state_dict(),
            "ema_updates": self.ema.num_updates,
            "optimizer": self.optimizer.state_dict(),
            "timesteps": self.timesteps.state_dict(),
            "meter": self.meter.state_dict(),
            **({} if scaler is None else {"scaler": scaler.state_dict()}),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restores everything as it was after the saved step.

        Settings stay the current ones: torch's optimizers save theirs, too, and would restore the
        old ones. A part that the checkpoint lacks, such as a gradient scaler, starts fresh.
        """
        scaler = self.accelerator.scaler
        self.step = saved["step"]
        self.network.load_state_dict(saved["model"])
        self.ema.load_state_dict(saved["ema"], saved["ema_updates"])
        settings = [
            {key: value for key, value in group.items() if key != "params"}
            for group in self.optimizer.param_groups
        ]
        self.optimizer.load_state_dict(saved["optimizer"])
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(own)
        if saved["timesteps"].keys() == self.timesteps.state_dict().keys():
            self.timesteps.load_state_dict(saved["timesteps"])
        self.meter.load_state_dict(saved["meter"])
        if scaler is not None and "scaler" in saved:
            scaler.load_state_dict(saved["scaler"])


def _float_copy(tensor: Tensor) -> Tensor:
    return tensor.float().clone() if tensor.is_floating_point() else tensor.clone()
