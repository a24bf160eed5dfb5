"""Which timesteps a chain visits, and whether its first one is noisy enough."""

import math
import re
from collections.abc import Iterator, Sequence
from itertools import accumulate, repeat

import numpy as np
import torch
from torch import Tensor

Spacing = str | list[int]

NAMES = ("respaced", "linear", "quadratic", "logsnr", "edm")
FROM_NOISE = ("logsnr", "edm")  # these promise to start in noise, whatever the schedule
MOST_SIGMA = {"logsnr": math.exp(5.1), "edm": 80.0}
RHO = 7  # Karras et al. 2022, Eq. 5
BRIGHTNESS = 32 * 32 * 0.5**2  # variance of solid-color pictures along their color
LEAST_SPREAD = 0.95


def spaced_timesteps(
    alphas_cumprod: Tensor, num_steps: int | None, spacing: Spacing = "respaced"
) -> list[int]:
    """Returns the timesteps that a chain visits, from the noisiest down.

    If the last x_t is pure noise (zero terminal SNR), "linear", "logsnr" and "edm" start there.

    Args:
        alphas_cumprod: (T,).
        num_steps: In [1, T]; None for T, or for as many as the spacing names.
        spacing: "respaced": evenly, with both ends (Nichol & Dhariwal 2021, section 4), ties as in
            their code. "linear": every (T / num_steps)-th from 0, rounded down (Song et al. 2021,
            App. D.2); with zero terminal SNR counted from T - 1 instead ("trailing", Lin et al.
            2023, section 3.3). "quadratic": closer together near the image (Song et al. 2021,
            App. D.2), without the duplicates from rounding, which do nothing in their code.
            "logsnr": evenly in the log SNR, from exp(-10.2) or the schedule's last (skip_type of
            dpm_solver_pytorch.py; diffusers' lambda_min_clipped). "edm": the sigmas of Karras
            et al. 2022, Eq. 5, rho 7, from 80 to 0.002 or as far as the schedule reaches. These two
            take the nearest timesteps, each at most once. [10, 15, 20] or "10,15,20": this many
            timesteps from each of equal sections, counted from the image. "ddim50": this many at an
            integer stride from 0 (both as space_timesteps in improved-diffusion's respace.py).

    Raises:
        ValueError: If the spacing is unknown or no such chain exists; the message names the
            argument.
    """
    num_timesteps, named = len(alphas_cumprod), named_count(spacing)
    if named is None and spacing not in NAMES:
        raise ValueError(
            f"spacing={spacing} must be {', '.join(repr(name) for name in NAMES)}, 'ddimN', or one "
            "count per section, such as [10,15,20]"
        )
    if named is not None and num_steps not in (None, named):
        raise ValueError(
            f"num_steps={num_steps} contradicts spacing={spacing}, which takes {named} steps; "
            "use num_steps=null"
        )
    count = num_steps if num_steps is not None else named or num_timesteps
    if not 1 <= count <= num_timesteps:
        raise ValueError(
            f"num_steps={count} must lie between 1 and the schedule's num_timesteps={num_timesteps}"
        )
    if named is not None:
        chosen = (
            _whole_stride(num_timesteps, count)
            if str(spacing).startswith("ddim")
            else list(_of_sections(num_timesteps, _counts(spacing)))
        )
    elif spacing == "respaced":
        chosen = _evenly(0, num_timesteps, count) if count > 1 else [num_timesteps - 1]
    elif spacing == "linear" and alphas_cumprod[-1] == 0:
        chosen = [
            round(num_timesteps - index * num_timesteps / count) - 1 for index in range(count)
        ]
    elif spacing == "linear":
        chosen = [index * num_timesteps // count for index in range(count)]
    elif spacing == "quadratic":
        chosen = [int(root**2) for root in np.linspace(0, (0.8 * num_timesteps) ** 0.5, count)]
    else:
        chosen = _on_grid(alphas_cumprod, count, str(spacing))
    return sorted(set(chosen), reverse=True)


def named_count(spacing: Spacing) -> int | None:
    """Returns the number of timesteps that a spacing names ("ddimN" or section counts), or None."""
    if isinstance(spacing, str) and re.fullmatch(r"ddim[1-9]\d*", spacing):
        return int(spacing.removeprefix("ddim"))
    if isinstance(spacing, str) and not re.fullmatch(r"\d+(, ?\d+)*", spacing):
        return None
    counts = _counts(spacing)
    return sum(counts) if counts and min(counts) > 0 else None


def check_start(alphas_cumprod: Tensor, timesteps: Sequence[int], spacing: Spacing) -> None:
    """Checks that a chain starts in noise if it has to.

    Raises:
        ValueError: If it does not; the message names an alternative.
    """
    if alphas_cumprod[-1] == 0 and timesteps[0] != len(alphas_cumprod) - 1:
        raise ValueError(
            f"spacing={spacing} starts at timestep {timesteps[0]}, "
            "but zero terminal SNR requires a start at the last one; "
            "use spacing=respaced or linear"
        )
    abar = float(alphas_cumprod[timesteps[0]])
    kept = (1 + abar * (BRIGHTNESS - 1)) ** -0.5
    if spacing in FROM_NOISE and kept < LEAST_SPREAD:
        share = abar * BRIGHTNESS
        by_ancestral = (1 - (share / (1 + share)) ** 2) ** 0.5
        instead = (
            "sampler=ancestral"
            if by_ancestral >= LEAST_SPREAD
            else "schedule.zero_terminal_snr=true objective=v in training"
        )
        raise ValueError(
            f"spacing={spacing}: the schedule's noisiest x_t holds {abar**0.5:.2g} of the image, "
            f"so solid-color pictures would keep only {kept:.2f} of their spread in brightness; "
            f"use {instead}, or spacing=respaced to accept that"
        )


def _evenly(first: int, size: int, count: int) -> list[int]:
    """Returns `count` of `size` timesteps from `first` on; rounds the sum as respace.py does."""
    stride = (size - 1) / (count - 1) if count > 1 else 1.0
    return [first + round(place) for place in accumulate(repeat(stride, count - 1), initial=0.0)]


def _counts(spacing: Spacing) -> list[int]:
    return [int(part) for part in spacing.split(",")] if isinstance(spacing, str) else spacing


def _of_sections(num_timesteps: int, counts: list[int]) -> Iterator[int]:
    size, extra = divmod(num_timesteps, len(counts))
    first = 0
    for index, count in enumerate(counts):
        length = size + (index < extra)
        if count > length:
            raise ValueError(
                f"spacing={counts}: section {index + 1} has {length} timesteps, fewer than {count}"
            )
        yield from _evenly(first, length, count)
        first += length


def _whole_stride(num_timesteps: int, count: int) -> list[int]:
    for stride in range(1, num_timesteps + 1):
        if len(range(0, num_timesteps, stride)) == count:
            return list(range(0, num_timesteps, stride))
    raise ValueError(
        f"spacing=ddim{count}: no integer stride gives {count} of {num_timesteps} timesteps; "
        f"use spacing=linear num_steps={count}"
    )


def _on_grid(alphas_cumprod: Tensor, count: int, spacing: str) -> list[int]:
    """Returns the distinct timesteps nearest to a grid of sigmas, from the noisiest down."""
    num_timesteps = len(alphas_cumprod)
    chosen = [num_timesteps - 1] if alphas_cumprod[-1] == 0 else []
    sigmas = (1 / alphas_cumprod[: num_timesteps - len(chosen)] - 1).sqrt()
    high, low = min(MOST_SIGMA[spacing], float(sigmas[-1])), max(0.002, float(sigmas[0]))
    places, rest = torch.arange(count - len(chosen)), count - len(chosen)
    share = places.double() / max(rest - 1, 1)
    if spacing == "edm":
        grid = (high ** (1 / RHO) + share * (low ** (1 / RHO) - high ** (1 / RHO))) ** RHO
        nearest = (sigmas[None] - grid[:, None]).abs().argmin(dim=1).tolist()
    else:
        logs = math.log(high) + share * (math.log(low) - math.log(high))
        nearest = (sigmas.log()[None] - logs[:, None]).abs().argmin(dim=1).tolist()
    for wanted in nearest:  # no timestep twice, even where the schedule is coarser than the grid
        after = chosen[-1] - 1 if chosen else num_timesteps - 1
        chosen.append(max(min(wanted, after), count - len(chosen) - 1))
    return chosen
