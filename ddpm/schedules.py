"""Noise schedules: the betas of the forward process, as pure float64 functions."""

import math

import torch
from torch import Tensor


def linear(num_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Tensor:
    """Betas rising linearly (Ho et al. 2020, section 4).

    Returns (T,) float64, each in (0, 1).    Raises ValueError if T < 2 or an end lies outside (0, 1).
    """
    _check_num_timesteps(num_timesteps)
    for name, beta in (("beta_start", beta_start), ("beta_end", beta_end)):
        if not 0 < beta < 1:
            raise ValueError(f"{name}={beta} must lie between 0 and 1")
    return torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64)


def cosine(num_timesteps: int = 1000, offset: float = 0.008, max_beta: float = 0.999) -> Tensor:
    """Betas whose alphas_cumprod follows a squared cosine (Nichol & Dhariwal 2021, Eq. 17).

    Returns (T,) float64, each in (0, max_beta].    Raises ValueError if T < 2, offset < 0 or max_beta lies outside (0, 1).
    """
    _check_num_timesteps(num_timesteps)
    if offset < 0:
        raise ValueError(f"offset={offset} must not be negative")
    if not 0 < max_beta < 1:
        raise ValueError(f"max_beta={max_beta} must lie between 0 and 1")
    u = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    f = torch.cos((u + offset) / (1 + offset) * math.pi / 2) ** 2
    return (1 - f[1:] / f[:-1]).clamp(max=max_beta)


def _check_num_timesteps(num_timesteps: int) -> None:
    if num_timesteps < 2:
        raise ValueError(f"num_timesteps={num_timesteps} must be at least 2")
