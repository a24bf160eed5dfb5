"""How training picks the timestep of each image.

Both ways are unbiased: loss weights compensate for timesteps that are picked more often.
"""

from itertools import pairwise

import torch
from torch import Tensor

from ddpm.system import randomness

NUM_QUARTILES = 4  # t is in quartile NUM_QUARTILES * t // T; quartile 0 has the least noise
UNIFORM_SHARE = 0.001  # of timesteps that are drawn regardless of losses (the authors' code)


def quartiles(num_timesteps: int) -> dict[int, tuple[int, int]]:
    """Returns the first and last timestep of each quartile; with T below 4 some are missing."""
    edges = [-(-index * num_timesteps // NUM_QUARTILES) for index in range(NUM_QUARTILES + 1)]
    return {
        index: (first, following - 1)
        for index, (first, following) in enumerate(pairwise(edges))
        if first < following
    }


class Uniform:
    """Draws every timestep equally often (Ho et al. 2020, Algorithm 1)."""

    learns = False  # whether `update` uses the losses

    def __init__(self, num_timesteps: int) -> None:
        self.num_timesteps = num_timesteps

    def draw(self, keys: Tensor) -> tuple[Tensor, Tensor | None]:
        """Draws a timestep from each stream.

        Args:
            keys: (B,) int64 streams.

        Returns:
            t, (B,) int64, and its loss weights; None means that all are 1.
        """
        return randomness.integers(keys, self.num_timesteps), None

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Does nothing: uniform sampling ignores the losses."""

    def state_dict(self) -> dict[str, Tensor]:
        """Returns an empty state."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Does nothing: there is no state."""


class LossSecondMoment:
    """Draws timesteps in proportion to the root mean square of their recent losses.

    Nichol & Dhariwal 2021, section 3.3: p_t ~ sqrt(mean of the last `history` squared losses at t),
    mixed with a share UNIFORM_SHARE of uniform draws. Draws are uniform until every t has seen
    `history` losses. The state is the same on every process. Nothing here waits for the device.
    """

    learns = True

    def __init__(
        self,
        num_timesteps: int,
        device: torch.device,
        history: int = 10,
    ) -> None:
        self.num_timesteps = num_timesteps
        self.history = history
        self._losses = torch.zeros(num_timesteps, history, device=device)
        self._seen = torch.zeros(num_timesteps, dtype=torch.int64, device=device)

    def probabilities(self) -> Tensor:
        """Returns p_t for each t: (T,) float32, summing to 1."""
        root = self._losses.square().mean(dim=1).sqrt()
        share = root / root.sum().clamp(min=torch.finfo(root.dtype).tiny)
        learned = share * (1 - UNIFORM_SHARE) + UNIFORM_SHARE / self.num_timesteps
        return torch.where(
            (self._seen >= self.history).all(),
            learned,
            torch.full_like(learned, 1 / self.num_timesteps),
        )

    def draw(self, keys: Tensor) -> tuple[Tensor, Tensor | None]:
        """Draws a timestep from each stream.

        Args:
            keys: (B,) int64 streams.

        Returns:
            t, (B,) int64, and its loss weights 1 / (T p_t), (B,).
        """
        p = self.probabilities()
        edges = torch.cumsum(p, dim=0)
        picked = randomness.uniform(keys, 1)[:, 0] * edges[-1]
        t = torch.searchsorted(edges, picked, right=True).clamp(max=self.num_timesteps - 1)
        return t, 1 / (self.num_timesteps * p[t])

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Records the unweighted losses of a global batch, in the order of its positions.

        Args:
            t: (B,) int64.
            losses: (B,).
        """
        same = t[:, None] == t[None, :]
        earlier = torch.ones_like(same).tril(-1)
        order, count = (same & earlier).sum(dim=1), same.sum(dim=1)
        # losses that later ones would overwrite go to a spare slot
        slot = torch.where(
            order >= count - self.history, (self._seen[t] + order) % self.history, self.history
        )
        padded = torch.cat([self._losses, self._losses[:, :1]], dim=1)
        padded[t, slot] = losses.to(padded.dtype)
        self._losses.copy_(padded[:, : self.history])
        self._seen.index_add_(0, t, torch.ones_like(t))

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the state that a resume needs."""
        return {"losses": self._losses.cpu(), "seen": self._seen.cpu()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores the state from a checkpoint."""
        self._losses.copy_(state["losses"])
        self._seen.copy_(state["seen"])
