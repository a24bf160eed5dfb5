"""Learning rate schedules.

Each is a pure function of the update's number, so a resumed run needs no other state.
"""

import math
from dataclasses import dataclass

__all__ = ["Constant", "Cosine"]


@dataclass(frozen=True)
class Constant:
    """A linear warm-up from 0, then a constant rate (Ho et al. 2020, App. B: 5000 steps).

    Attributes:
        warmup_steps: Updates of the warm-up.

    Raises:
        ValueError: If warmup_steps is negative.
    """

    warmup_steps: int

    def __post_init__(self) -> None:
        _check_warmup(self.warmup_steps)

    def __call__(self, step: int, num_steps: int, lr: float) -> float:
        """Returns the learning rate of update `step`, counted from 0, of num_steps updates."""
        return lr * _warmup(step, self.warmup_steps)


@dataclass(frozen=True)
class Cosine:
    """A linear warm-up, then cosine annealing (Loshchilov & Hutter 2017, Eq. 5).

    It falls from lr at the first update after the warm-up to final_lr after the last.

    Attributes:
        warmup_steps: Updates of the warm-up.
        final_lr: The rate at the end.

    Raises:
        ValueError: If warmup_steps or final_lr is negative.
    """

    warmup_steps: int
    final_lr: float

    def __post_init__(self) -> None:
        _check_warmup(self.warmup_steps)
        if self.final_lr < 0:
            raise ValueError(f"final_lr={self.final_lr} must not be negative")

    def __call__(self, step: int, num_steps: int, lr: float) -> float:
        """Returns the learning rate of update `step`, counted from 0, of num_steps updates."""
        if step < self.warmup_steps:
            return lr * _warmup(step, self.warmup_steps)
        done = (step - self.warmup_steps) / max(num_steps - self.warmup_steps, 1)
        return self.final_lr + (lr - self.final_lr) * (1 + math.cos(math.pi * done)) / 2


def _warmup(step: int, warmup_steps: int) -> float:
    return min(step / warmup_steps, 1.0) if warmup_steps else 1.0


def _check_warmup(warmup_steps: int) -> None:
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps={warmup_steps} must not be negative")
