"""Samplers: plain functions that walk an explicit list of timesteps from noise to images.

Each takes, in this order: denoise, (x_t, t) -> Denoised; x, the noise to start from, (B, C, H, W), in the dtype to compute in; alphas_cumprod,
(T,) float64; timesteps, decreasing, each in [0, T-1]; noise, t -> standard normal like x, asked once for each step that needs it. Each returns
x_0, of the shape of x, near [-1, 1]. They never learn what the network predicts.
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
    """Algorithm 2 of Ho et al. 2020, on the chain that visits `timesteps` (respaced as in Nichol & Dhariwal 2021, section 4).

    The mean is Eq. 7 at x0_hat. The variance is the chain's beta ("fixed_large"), its posterior variance ("fixed_small"), or what the network says:
    its log ("learned"), or where between those two ("learned_range"). No noise in the last step.
    In YAML null stands for the process's own; called directly, it must be given.    Raises ValueError if it is None.
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
    """Eqs. 12 and 16 of Song et al. 2021 (arXiv 2010.02502): no noise at eta 0, the ancestral chain of fixed_small variance at eta 1."""
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
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, Algorithm 2): one network call a step, no noise; the first and last step are of first order."""
    before: tuple[Tensor, float] | None = (
        None  # x0_hat of the step before, and the length of that step in log SNR / 2
    )
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
    """Heun's second-order step on the probability-flow ODE in sigma, Euler's at the end (Karras et al. 2022, Algorithm 1), no noise.

    In y = x / sqrt(abar) and sigma = sqrt(1/abar - 1) the ODE is dy/dsigma = epsilon. Two network calls a step, one in the last.
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
    """Which timesteps a chain of num_steps visits, from the noisiest down.

    "respaced": evenly, both ends kept (Nichol & Dhariwal 2021, section 4). "linear": every (T // num_steps)-th from 0, "quadratic": closer together near
    the image (both Song et al. 2021, App. D.2). "edm": the nearest to the sigmas of Karras et al. 2022, Eq. 5, rho 7, from 80 to 0.002 or as far as the
    schedule reaches.    alphas_cumprod: (T,).    Raises ValueError if num_steps lies outside [1, T] or a timestep would be visited twice.
    """
    num_timesteps = len(alphas_cumprod)
    if not 1 <= num_steps <= num_timesteps:
        raise ValueError(
            f"num_steps={num_steps} must lie between 1 and the schedule's num_timesteps={num_timesteps}"
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
            f"num_steps={num_steps} is too many for {spacing} spacing of {num_timesteps} timesteps: some would be visited twice"
        )
    return chosen[::-1]


@dataclass(frozen=True)
class Sampler:
    """A choice of sampler (group `sampler`): which function walks, over how many timesteps, spaced how, and whether x0_hat is held in [-1, 1].

    num_steps: None for all T.    function: ancestral, ddim, or any with their leading arguments.    guidance_scale: of classifier-free guidance, 1 for
    none (ddpm/sampling.py).
    """

    function: Callable[..., Tensor]
    num_steps: int | None = None
    spacing: Spacing = "respaced"
    clip: bool = True
    guidance_scale: float = 1.0

    def timesteps(self, diffusion: GaussianDiffusion) -> list[int]:
        """The timesteps visited, from the noisiest down.

        Raises ValueError if there are fewer than num_steps, or if the schedule's last x_t is pure noise and they do not start there.
        """
        chosen = spaced_timesteps(
            diffusion.alphas_cumprod,
            diffusion.num_timesteps if self.num_steps is None else self.num_steps,
            self.spacing,
        )
        if diffusion.alphas_cumprod[-1] == 0 and chosen[0] != diffusion.num_timesteps - 1:
            raise ValueError(
                f"spacing={self.spacing} starts at timestep {chosen[0]}, but a schedule of zero terminal SNR must start at the last; use respaced"
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
        """From x at timesteps[0] to images.    x: (B, C, H, W).    watch: told of each network call, (t, x_t, x0_hat).    Returns like x, in [-1, 1]."""
        denoise = diffusion.denoiser(model, clip=self.clip)

        def watched(x_t: Tensor, t: Tensor) -> Denoised:
            estimate = denoise(x_t, t)
            if watch is not None:
                watch(int(t[0]), x_t, estimate.x0_hat)
            return estimate

        return self.function(watched, x, diffusion.alphas_cumprod, timesteps, noise).clamp(-1, 1)


def latents(
    shape: tuple[int, int, int], indices: Sequence[int], seed: int, device: torch.device
) -> Tensor:
    """The noise that the images with these indices start from: (len(indices), *shape) float32, each a function of seed and index."""
    positions = torch.tensor(list(indices), device=device)
    x = randomness.normal(
        randomness.stream_keys(randomness.SAMPLE_LATENT, seed, 0, positions), shape
    )
    return x.contiguous(memory_format=torch.channels_last)


def step_noise(
    shape: tuple[int, int, int], indices: Sequence[int], seed: int, device: torch.device
) -> Noise:
    """The noise of each step for the images with these indices, a function of seed, timestep and index."""
    positions = torch.tensor(list(indices), device=device)

    def noise(t: int) -> Tensor:
        drawn = randomness.normal(
            randomness.stream_keys(randomness.SAMPLE_STEP, seed, t, positions), shape
        )
        return drawn.contiguous(memory_format=torch.channels_last)

    return noise


def _walk(alphas_cumprod: Tensor, timesteps: Sequence[int]) -> Iterator[tuple[int, float, float]]:
    """(t, abar at t, abar at the timestep after it) along the chain; after the last one abar is 1."""
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
