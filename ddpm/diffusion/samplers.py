"""Samplers: plain functions that walk an explicit list of timesteps from noise to images.

Each takes the same leading arguments, in this order:

    denoise: (x_t, t) -> Denoised.
    x: The noise to start from, (B, C, H, W), in the dtype to compute in.
    alphas_cumprod: (T,) float64.
    timesteps: Decreasing, each in [0, T-1].
    noise: t -> standard normal like x, asked once for each step that needs it.

Each returns x_0, of the shape of x, near [-1, 1]. They never learn what the network predicts.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Le
from torch import Tensor

from ddpm.diffusion.process import Denoised, GaussianDiffusion, Model, Variance
from ddpm.system import randomness
from ddpm.system.signals import check

__all__ = ["Sampler", "ancestral", "ddim", "dpm_solver_pp", "heun"]

Denoise = Callable[[Tensor, Tensor], Denoised]
Noise = Callable[[int], Tensor]
Watch = Callable[[int, Tensor, Tensor], None]


def ancestral(
    denoise: Denoise,
    x: Tensor,
    alphas_cumprod: Tensor,
    timesteps: Sequence[int],
    noise: Noise,
    variance: Variance | None = None,
) -> Tensor:
    """Samples by Algorithm 2 of Ho et al. 2020, on the chain that visits `timesteps`.

    The chain is respaced as in Nichol & Dhariwal 2021, section 4. The mean is Eq. 7 at x0_hat.
    There is no noise in the last step. For the other arguments see the module.

    Args:
        variance: The chain's beta ("fixed_large"), its posterior variance ("fixed_small"), or what
            the network says: its log ("learned"), or where between those two ("learned_range"). In
            YAML null stands for the process's own; called directly, it must be given.

    Raises:
        ValueError: If variance is None.
    """
    if variance is None:
        raise ValueError(
            "variance=None: give the variance of the process that the network was trained for"
        )
    for t, abar, abar_next in _walk(alphas_cumprod, timesteps):
        x0_hat, _, variance_output = denoise(x, _full(x, t))
        beta = 1 - abar / abar_next
        posterior_variance = beta * (1 - abar_next) / (1 - abar)
        x = (
            abar_next**0.5 * beta / (1 - abar) * x0_hat
            + (1 - beta) ** 0.5 * (1 - abar_next) / (1 - abar) * x
        )
        if abar_next < 1:
            x = x + _deviation(variance, variance_output, beta, posterior_variance) * noise(t)
    return x


def ddim(
    denoise: Denoise,
    x: Tensor,
    alphas_cumprod: Tensor,
    timesteps: Sequence[int],
    noise: Noise,
    eta: Annotated[float, Ge(0), Le(1)] = 0.0,
) -> Tensor:
    """Samples by Eqs. 12 and 16 of Song et al. 2021 (arXiv 2010.02502).

    For the other arguments see the module.

    Args:
        eta: 0: no noise. 1: the ancestral chain of fixed_small variance.
    """
    for t, abar, abar_next in _walk(alphas_cumprod, timesteps):
        x0_hat, eps_hat, _ = denoise(x, _full(x, t))
        sigma = eta * ((1 - abar_next) / (1 - abar) * (1 - abar / abar_next)) ** 0.5
        x = abar_next**0.5 * x0_hat + (1 - abar_next - sigma**2) ** 0.5 * eps_hat
        if sigma > 0:
            x = x + sigma * noise(t)
    return x


def dpm_solver_pp(
    denoise: Denoise, x: Tensor, alphas_cumprod: Tensor, timesteps: Sequence[int], noise: Noise
) -> Tensor:
    """Samples by DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, Algorithm 2).

    One network call per step, no noise. The first and last step are of first order.
    """
    # x0_hat of the step before, and the length of that step in log SNR / 2
    before: tuple[Tensor, float] | None = None
    for t, abar, abar_next in _walk(alphas_cumprod, timesteps):
        x0_hat = denoise(x, _full(x, t)).x0_hat
        if abar_next == 1:
            return x0_hat
        length = _half_log_snr(abar_next) - _half_log_snr(abar)
        direction = x0_hat
        if before is not None:
            half = length / (2 * before[1])
            direction = (1 + half) * x0_hat - half * before[0]
        before = x0_hat, length
        x = ((1 - abar_next) / (1 - abar)) ** 0.5 * x - abar_next**0.5 * math.expm1(
            -length
        ) * direction
    raise AssertionError("the last step returns")


def heun(
    denoise: Denoise, x: Tensor, alphas_cumprod: Tensor, timesteps: Sequence[int], noise: Noise
) -> Tensor:
    """Samples by Heun's second-order step on the probability-flow ODE in sigma, without noise.

    The last step is Euler's (Karras et al. 2022, Algorithm 1). In y = x / sqrt(abar) and
    sigma = sqrt(1/abar - 1) the ODE is dy/dsigma = epsilon. Two network calls per step, one in the
    last.
    """
    chain = list(_walk(alphas_cumprod, timesteps))
    for (t, abar, abar_next), t_next in zip(chain, [*timesteps[1:], -1], strict=True):
        step = _sigma(abar_next) - _sigma(abar)
        eps_hat = denoise(x, _full(x, t)).eps_hat
        y = x / abar**0.5 + step * eps_hat
        if abar_next < 1:
            y = (
                x / abar**0.5
                + step * (eps_hat + denoise(abar_next**0.5 * y, _full(x, t_next)).eps_hat) / 2
            )
        x = abar_next**0.5 * y
    return x


Spacing = Literal["respaced", "linear", "quadratic", "edm"]


def spaced_timesteps(alphas_cumprod: Tensor, num_steps: int, spacing: Spacing) -> list[int]:
    """Returns the timesteps that a chain of num_steps visits, from the noisiest down.

    Args:
        alphas_cumprod: (T,).
        num_steps: In [1, T].
        spacing: "respaced": evenly, both ends kept (Nichol & Dhariwal 2021, section 4). "linear":
            every (T // num_steps)-th from 0; "quadratic": closer together near the image (both Song
            et al. 2021, App. D.2). "edm": the nearest to the sigmas of Karras et al. 2022, Eq. 5,
            rho 7, from 80 to 0.002 or as far as the schedule reaches.

    Raises:
        ValueError: If num_steps lies outside [1, T] or a timestep would be visited twice.
    """
    num_timesteps = len(alphas_cumprod)
    if not 1 <= num_steps <= num_timesteps:
        raise ValueError(
            f"num_steps={num_steps} must lie between 1 "
            f"and the schedule's num_timesteps={num_timesteps}"
        )
    last = max(num_steps - 1, 1)
    if spacing == "respaced":
        chosen = (
            [round(index * (num_timesteps - 1) / last) for index in range(num_steps)]
            if num_steps > 1
            else [num_timesteps - 1]
        )
    elif spacing == "linear":
        chosen = list(range(0, num_timesteps, num_timesteps // num_steps))[:num_steps]
    elif spacing == "quadratic":
        chosen = [
            int((index * (0.8 * num_timesteps) ** 0.5 / last) ** 2) for index in range(num_steps)
        ]
    else:
        sigmas = (1 / alphas_cumprod - 1).sqrt()
        high, low = min(80.0, float(sigmas[-1])) ** (1 / 7), max(0.002, float(sigmas[0])) ** (1 / 7)
        chosen = [
            int((sigmas - (low + index / last * (high - low)) ** 7).abs().argmin())
            for index in range(num_steps)
        ]
    if len(set(chosen)) < num_steps:
        raise ValueError(
            f"num_steps={num_steps} is too many for {spacing} spacing "
            f"of {num_timesteps} timesteps: some would be visited twice"
        )
    return chosen[::-1]


@dataclass(frozen=True)
class Sampler:
    """A choice of sampler (group `sampler`).

    Attributes:
        function: Which function walks: ancestral, ddim, or any with their leading arguments.
        num_steps: How many timesteps it visits; None for all T.
        spacing: How they are spaced, see spaced_timesteps.
        clip: Whether x0_hat is held in [-1, 1].
        guidance_scale: Of classifier-free guidance, 1 for none (ddpm/sample/drawing.py).
    """

    function: Callable[..., Tensor]
    num_steps: int | None = None
    spacing: Spacing = "respaced"
    clip: bool = True
    guidance_scale: float = 1.0

    def timesteps(self, diffusion: GaussianDiffusion) -> list[int]:
        """Returns the timesteps visited, from the noisiest down.

        Raises:
            ValueError: If there are fewer than num_steps, or if the schedule's last x_t is pure
                noise and they do not start there.
        """
        chosen = spaced_timesteps(
            diffusion.alphas_cumprod,
            diffusion.num_timesteps if self.num_steps is None else self.num_steps,
            self.spacing,
        )
        if diffusion.alphas_cumprod[-1] == 0 and chosen[0] != diffusion.num_timesteps - 1:
            raise ValueError(
                f"spacing={self.spacing} starts at timestep {chosen[0]}, "
                "but a schedule of zero terminal SNR must start at the last; use respaced"
            )
        return chosen

    @torch.inference_mode()
    def walk(
        self,
        model: Model,
        diffusion: GaussianDiffusion,
        x: Tensor,
        timesteps: Sequence[int],
        noise: Noise,
        watch: Watch | None = None,
    ) -> Tensor:
        """Walks from x at timesteps[0] to images.

        Args:
            model: (x_t, t) -> output.
            diffusion: The process that the model was trained for.
            x: (B, C, H, W).
            timesteps: Decreasing, each in [0, T-1].
            noise: t -> standard normal like x.
            watch: Told of each network call, (t, x_t, x0_hat).

        Returns:
            Images like x, in [-1, 1].
        """
        denoise = diffusion.denoiser(model, clip=self.clip)

        def watched(x_t: Tensor, t: Tensor) -> Denoised:
            check()
            estimate = denoise(x_t, t)
            if watch is not None:
                watch(int(t[0]), x_t, estimate.x0_hat)
            return estimate

        return self.function(watched, x, diffusion.alphas_cumprod, timesteps, noise).clamp(-1, 1)


def latents(
    shape: tuple[int, int, int], indices: Sequence[int], seed: int, device: torch.device
) -> Tensor:
    """Returns the noise that the images with these indices start from.

    Returns:
        (len(indices), *shape) float32, each row a function of seed and index.
    """
    positions = torch.tensor(list(indices), device=device)
    x = randomness.normal(
        randomness.stream_keys(randomness.SAMPLE_LATENT, seed, 0, positions), shape
    )
    return x.contiguous(memory_format=torch.channels_last)


def step_noise(
    shape: tuple[int, int, int], indices: Sequence[int], seed: int, device: torch.device
) -> Noise:
    """Returns the noise of each step for the images with these indices.

    It is a function of seed, timestep and index.
    """
    positions = torch.tensor(list(indices), device=device)

    def noise(t: int) -> Tensor:
        drawn = randomness.normal(
            randomness.stream_keys(randomness.SAMPLE_STEP, seed, t, positions), shape
        )
        return drawn.contiguous(memory_format=torch.channels_last)

    return noise


def _walk(alphas_cumprod: Tensor, timesteps: Sequence[int]) -> Iterator[tuple[int, float, float]]:
    """(t, abar at t, abar at the next timestep) along the chain; after the last, abar is 1."""
    abars: Iterable[float] = [float(alphas_cumprod[t]) for t in timesteps]
    following = [*list(abars)[1:], 1.0]
    yield from zip(timesteps, abars, following, strict=True)


def _half_log_snr(abar: float) -> float:
    return 0.5 * math.log(abar / (1 - abar)) if abar > 0 else -math.inf


def _sigma(abar: float) -> float:
    return (1 / abar - 1) ** 0.5


def _deviation(
    variance: Variance, output: Tensor | None, beta: float, posterior_variance: float
) -> Tensor | float:
    """Standard deviation of one reverse step."""
    if output is None:
        return (beta if variance == "fixed_large" else posterior_variance) ** 0.5
    if variance == "learned":
        return torch.exp(0.5 * output)
    share = (output + 1) / 2
    return torch.exp(0.5 * (share * math.log(beta) + (1 - share) * math.log(posterior_variance)))


def _full(x: Tensor, t: int) -> Tensor:
    return torch.full((len(x),), t, device=x.device, dtype=torch.int64)
