"""Noise schedules: pure functions that return the betas of the forward process.

Each returns (T,) float64 in (0, 1].

With zero_terminal_snr, each shifts and scales sqrt(alphas_cumprod) so that the last x_t is pure
noise and the first stays as it is (Lin et al. 2023, Algorithm 1).

For a T below 2 or betas outside (0, 1), each raises a ValueError that names the argument.
"""

import math

import torch
from torch import Tensor

__all__ = ["const", "cosine", "jsd", "linear", "linear_rescaled", "quad", "sigmoid", "warmup"]

MOST_TIMESTEPS = 1_000_000  # fits in memory, and float32 still tells all of them apart


def linear(
    num_timesteps: int,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    zero_terminal_snr: bool = False,
) -> Tensor:
    """Returns betas that rise linearly (Ho et al. 2020, section 4)."""
    _check(num_timesteps, beta_start=beta_start, beta_end=beta_end)
    return _finished(_linspace(beta_start, beta_end, num_timesteps), zero_terminal_snr)


def linear_rescaled(
    num_timesteps: int, beta_start: float, beta_end: float, zero_terminal_snr: bool = False
) -> Tensor:
    """Returns the betas of `linear` for another T (Nichol & Dhariwal 2021's code).

    Both ends, given for T = 1000, are scaled by 1000 / T.
    """
    _check(num_timesteps, beta_start=beta_start, beta_end=beta_end)
    scale = 1000 / num_timesteps
    _check(num_timesteps, **{"beta_end * 1000 / num_timesteps": beta_end * scale})
    return _finished(
        _linspace(beta_start * scale, beta_end * scale, num_timesteps), zero_terminal_snr
    )


def quad(
    num_timesteps: int, beta_start: float, beta_end: float, zero_terminal_snr: bool = False
) -> Tensor:
    """Returns betas whose square roots rise linearly (Ho et al. 2020's code)."""
    _check(num_timesteps, beta_start=beta_start, beta_end=beta_end)
    return _finished(
        _linspace(beta_start**0.5, beta_end**0.5, num_timesteps) ** 2, zero_terminal_snr
    )


def warmup(
    num_timesteps: int,
    beta_start: float,
    beta_end: float,
    warmup_share: float,
    zero_terminal_snr: bool = False,
) -> Tensor:
    """Returns betas that rise linearly over the first timesteps, then stay constant.

    The rise takes a share warmup_share of the timesteps (Ho et al. 2020's code: 0.1 and 0.5).
    """
    _check(num_timesteps, beta_start=beta_start, beta_end=beta_end, warmup_share=warmup_share)
    betas = torch.full((num_timesteps,), beta_end, dtype=torch.float64)
    length = int(num_timesteps * warmup_share)
    betas[:length] = _linspace(beta_start, beta_end, length)
    return _finished(betas, zero_terminal_snr)


def const(num_timesteps: int, beta: float, zero_terminal_snr: bool = False) -> Tensor:
    """Returns the same beta at every timestep (Ho et al. 2020's code)."""
    _check(num_timesteps, beta=beta)
    return _finished(torch.full((num_timesteps,), beta, dtype=torch.float64), zero_terminal_snr)


def jsd(num_timesteps: int, zero_terminal_snr: bool = False) -> Tensor:
    """Returns 1/T, 1/(T-1), ..., 1: alphas_cumprod falls linearly to 0 at the last timestep.

    Ho et al. 2020's code, after Sohl-Dickstein et al. 2015.
    """
    _check(num_timesteps)
    return _finished(1 / _linspace(num_timesteps, 1, num_timesteps), zero_terminal_snr)


def cosine(
    num_timesteps: int,
    offset: float = 0.008,
    max_beta: float = 0.999,
    zero_terminal_snr: bool = False,
) -> Tensor:
    """Returns betas whose alphas_cumprod follows a squared cosine.

    Nichol & Dhariwal 2021, Eq. 17.
    """
    _check(num_timesteps, max_beta=max_beta)
    if offset < 0:
        raise ValueError(f"offset={offset} must not be negative")
    u = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    return _finished(
        _betas_of(torch.cos((u + offset) / (1 + offset) * math.pi / 2) ** 2, max_beta),
        zero_terminal_snr,
    )


def sigmoid(
    num_timesteps: int,
    start: float,
    end: float,
    temperature: float,
    max_beta: float,
    zero_terminal_snr: bool = False,
) -> Tensor:
    """Returns betas whose alphas_cumprod follows a logistic curve between start and end.

    Jabri et al. 2022, arXiv 2212.11972, Algorithm 1.
    """
    _check(num_timesteps, max_beta=max_beta)
    if not start < end:
        raise ValueError(f"start={start} must be below end={end}")
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} must be positive")
    u = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    curve = torch.sigmoid((u * (end - start) + start) / temperature)
    return _finished(
        _betas_of((curve[-1] - curve) / (curve[-1] - curve[0]), max_beta), zero_terminal_snr
    )


def _linspace(start: float, end: float, count: int) -> Tensor:
    return torch.linspace(start, end, count, dtype=torch.float64)


def _betas_of(abar: Tensor, max_beta: float) -> Tensor:
    """Returns the betas of an alphas_cumprod curve sampled at u = 0, 1/T, ..., 1."""
    return (1 - abar[1:] / abar[:-1]).clamp(max=max_beta)


def _finished(betas: Tensor, zero_terminal_snr: bool) -> Tensor:
    if not zero_terminal_snr:
        return betas
    root = torch.cumprod(1 - betas, dim=0).sqrt()
    abar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return 1 - abar / torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])


def _check(num_timesteps: int, **shares: float) -> None:
    if not 2 <= num_timesteps <= MOST_TIMESTEPS:
        raise ValueError(f"num_timesteps={num_timesteps} must lie between 2 and {MOST_TIMESTEPS}")
    for name, share in shares.items():
        if not 0 < share < 1:
            raise ValueError(f"{name}={share} must lie between 0 and 1")
