"""The exponential moving average of a network's weights, the one that samples are drawn with (Ho et al. 2020, App. B)."""

import torch
from torch import Tensor, nn


class EMA:
    """Float32 averages of a module's parameters, by name; its persistent buffers are copied as they are.

    decay: share kept at each update, in [0, 1).    warmup: keep no more than (1 + n) / (10 + n) at update n, so that a short run's average does not
    remember its first weights (as TensorFlow's num_updates does; the paper's runs do without).    Raises ValueError if decay is outside [0, 1).
    """

    def __init__(self, module: nn.Module, decay: float, warmup: bool) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema_decay={decay} must lie in [0, 1)")
        self.decay = decay
        self.warmup = warmup
        self.num_updates = 0
        state = module.state_dict(keep_vars=True)
        self._live = {name: tensor.detach() for name, tensor in state.items()}
        self._averages = {name: tensor.detach().float().clone() if tensor.is_floating_point() else tensor.detach().clone() for name, tensor in state.items()}
        averaged = [name for name, tensor in state.items() if isinstance(tensor, nn.Parameter)]
        self._copied = [name for name in state if name not in set(averaged)]
        self._from = [self._live[name] for name in averaged]
        self._to = [self._averages[name] for name in averaged]

    def decay_at(self, update: int) -> float:
        """The share kept by update number `update`, counted from 0."""
        return min(self.decay, (1 + update) / (10 + update)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the module's present weights. Call once for each optimizer update."""
        sources = [tensor.float() for tensor in self._from]
        torch._foreach_lerp_(self._to, sources, 1 - self.decay_at(self.num_updates))
        for name in self._copied:
            self._averages[name].copy_(self._live[name])
        self.num_updates += 1

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by the module's own names, so that a bare module loads them."""
        return self._averages

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor], num_updates: int) -> None:
        """Take over averages and their count of updates.    Raises KeyError if a name is missing."""
        for name, average in self._averages.items():
            average.copy_(state[name])
        self.num_updates = num_updates
