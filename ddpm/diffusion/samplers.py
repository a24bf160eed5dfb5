"""Samplers: plain functions that walk an explicit list of timesteps from noise to images.

Each takes the same leading arguments, in this order:

    denoise: (x_t, t) -> Denoised.
    x: The noise to start from, (B, C, H, W), in the dtype to compute in.
    alphas_cumprod: (T,) float64.
    timesteps: Decreasing, each in [0, T-1].
    noise: t -> standard normal noise like x, called once per step that needs it.

Each returns x_0, shaped like x, near [-1, 1]. None of them knows what the network predicts.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Le
from torch import Tensor

from ddpm.diffusion.process import (
    Denoised,
    DenoisedMean,
    GaussianDiffusion,
    Model,
    Variance,
)
from ddpm.diffusion.spacing import Spacing, check_start, spaced_timesteps
from ddpm.system import randomness
from ddpm.system.devices import memory_format

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

    The chain is respaced as in Nichol & Dhariwal 2021, section 4. The mean is Eq. 7 at x0_hat. If
    the network predicts the mean, a step from t to t - 1 uses that prediction directly
    (p_mean_variance in the authors' code). The last step adds no noise.

    Args:
        denoise: (x_t, t) -> Denoised.
        x: The noise to start from, (B, C, H, W).
        alphas_cumprod: (T,) float64.
        timesteps: Decreasing, each in [0, T-1].
        noise: t -> standard normal noise like x.
        variance: The chain's beta ("fixed_large"), its posterior variance ("fixed_small"), or the
            network's output: the log variance ("learned") or the position between the two fixed
            ones ("learned_range"). In YAML, null means the process's own; in Python it is required.

    Returns:
        x_0, shaped like x.

    Raises:
        ValueError: If variance is None.
    """
    if variance is None:
        raise ValueError(
            "variance=None: pass the variance of the process that the network was trained for"
        )
    for t, t_next, abar, abar_next in _walk(alphas_cumprod, timesteps):
        estimate = denoise(x, _full(x, t))
        beta = 1 - abar / abar_next
        posterior_variance = beta * (1 - abar_next) / (1 - abar)
        if isinstance(estimate, DenoisedMean) and t_next == t - 1:
            x = estimate.mean
        else:
            x = (
                abar_next**0.5 * beta / (1 - abar) * estimate.x0_hat
                + (1 - beta) ** 0.5 * (1 - abar_next) / (1 - abar) * x
            )
        if abar_next < 1:
            said = estimate.variance_output
            x = x + _deviation(variance, said, beta, posterior_variance) * noise(t)
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

    Args:
        denoise: (x_t, t) -> Denoised.
        x: The noise to start from, (B, C, H, W).
        alphas_cumprod: (T,) float64.
        timesteps: Decreasing, each in [0, T-1].
        noise: t -> standard normal noise like x.
        eta: 0 adds no noise; 1 gives the ancestral chain with fixed_small variance.

    Returns:
        x_0, shaped like x.
    """
    for t, _, abar, abar_next in _walk(alphas_cumprod, timesteps):
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

    One network call per step, no noise. The first and last steps are first order. From pure noise
    the first step would be infinite in log SNR, so it is a Heun step of two calls (see heun). The
    module documents the arguments.
    """
    # x0_hat and length (in log SNR / 2) of the previous step
    before: tuple[Tensor, float] | None = None
    for t, t_next, abar, abar_next in _walk(alphas_cumprod, timesteps):
        x0_hat = denoise(x, _full(x, t)).x0_hat
        if abar_next == 1:
            return x0_hat
        if abar == 0:
            before = x0_hat, math.inf
            x = _leave_pure_noise(denoise, x, x0_hat, abar_next, t_next)
            continue
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
    """Samples by Heun's second-order steps on the probability-flow ODE in sigma, without noise.

    The last step is an Euler step (Karras et al. 2022, Algorithm 1). In y = x / sqrt(abar) and
    sigma = sqrt(1/abar - 1) the ODE is dy/dsigma = epsilon. Each step makes two network calls, the
    last one a single call. From pure noise, where sigma is infinite, the step is taken in
    1 / sigma: for z = x / sqrt(1 - abar) the same ODE is dz/d(1/sigma) = x0. The module documents
    the arguments.
    """
    for t, t_next, abar, abar_next in _walk(alphas_cumprod, timesteps):
        x0_hat, eps_hat, _ = denoise(x, _full(x, t))
        if abar_next == 1:
            return x0_hat
        if abar == 0:
            x = _leave_pure_noise(denoise, x, x0_hat, abar_next, t_next)
            continue
        step = _sigma(abar_next) - _sigma(abar)
        y = x / abar**0.5 + step * eps_hat
        eps_next = denoise(abar_next**0.5 * y, _full(x, t_next)).eps_hat
        x = abar_next**0.5 * (x / abar**0.5 + step * (eps_hat + eps_next) / 2)
    raise AssertionError("the last step returns")


@dataclass(frozen=True)
class Sampler:
    """A sampler with its settings (config group `sampler`).

    Attributes:
        function: The function that walks: ancestral, ddim, or any with the same leading arguments.
        num_steps: Number of timesteps to visit; None for all T, or as many as the spacing names.
        spacing: Spacing of the timesteps, see spaced_timesteps.
        clip: Whether x0_hat is clipped to [-1, 1].
        guidance_scale: Scale of classifier-free guidance, 1 for none (ddpm/sample/drawing.py).
    """

    function: Callable[..., Tensor]
    num_steps: int | None = None
    spacing: Spacing = "respaced"
    clip: bool = True
    guidance_scale: float = 1.0

    def timesteps(self, diffusion: GaussianDiffusion) -> list[int]:
        """Returns the timesteps visited, from the noisiest down.

        Raises:
            ValueError: If the schedule has fewer than num_steps timesteps, or the chain does not
                start in noise (check_start).
        """
        chosen = spaced_timesteps(diffusion.alphas_cumprod, self.num_steps, self.spacing)
        check_start(diffusion.alphas_cumprod, chosen, self.spacing)
        return chosen

    def calls(self, diffusion: GaussianDiffusion) -> int:
        """Returns the number of network evaluations per image; guidance doubles it.

        Walks an image of one pixel and counts, so it holds for any function.
        """
        count = 0

        def model(x: Tensor, t: Tensor) -> Tensor:
            nonlocal count
            count += 1
            return x.repeat(1, 2, 1, 1) if diffusion.learns_variance else x

        pixel = torch.zeros(1, 1, 1, 1)
        self.walk(model, diffusion, pixel, self.timesteps(diffusion), lambda t: pixel)
        return count if self.guidance_scale == 1 else 2 * count

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
            noise: t -> standard normal noise like x.
            watch: Called with (t, x_t, x0_hat) after each network call.

        Returns:
            Images like x, in [-1, 1].
        """
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
    """Returns the initial noise of the images with these indices.

    Returns:
        (len(indices), *shape) float32. Each row depends only on seed and index.
    """
    positions = torch.tensor(list(indices), device=device)
    x = randomness.normal(
        randomness.stream_keys(randomness.SAMPLE_LATENT, seed, 0, positions), shape
    )
    return x.contiguous(memory_format=memory_format(device))


def step_noise(
    shape: tuple[int, int, int], indices: Sequence[int], seed: int, device: torch.device
) -> Noise:
    """Returns the function t -> noise of that step for the images with these indices.

    The noise depends only on seed, timestep and index.
    """
    positions = torch.tensor(list(indices), device=device)

    def noise(t: int) -> Tensor:
        drawn = randomness.normal(
            randomness.stream_keys(randomness.SAMPLE_STEP, seed, t, positions), shape
        )
        return drawn.contiguous(memory_format=memory_format(device))

    return noise


def _walk(
    alphas_cumprod: Tensor, timesteps: Sequence[int]
) -> Iterator[tuple[int, int, float, float]]:
    """Yields (t, next t, abar at t, abar at next t) along the chain, to t = -1 where abar is 1."""
    abars = [float(alphas_cumprod[t]) for t in timesteps]
    yield from zip(timesteps, [*timesteps[1:], -1], abars, [*abars[1:], 1.0], strict=True)


def _leave_pure_noise(
    denoise: Denoise, x: Tensor, x0_hat: Tensor, abar_next: float, t_next: int
) -> Tensor:
    """Takes a Heun step from abar = 0, where z = x, along dz/d(1/sigma) = x0."""
    first = abar_next**0.5 * x0_hat + (1 - abar_next) ** 0.5 * x
    x0_next = denoise(first, _full(x, t_next)).x0_hat
    return abar_next**0.5 * (x0_hat + x0_next) / 2 + (1 - abar_next) ** 0.5 * x


def _half_log_snr(abar: float) -> float:
    return 0.5 * math.log(abar / (1 - abar)) if abar > 0 else -math.inf


def _sigma(abar: float) -> float:
    return (1 / abar - 1) ** 0.5


def _deviation(
    variance: Variance, output: Tensor | None, beta: float, posterior_variance: float
) -> Tensor | float:
    """Returns the standard deviation of one reverse step."""
    if variance in ("fixed_small", "fixed_large"):
        return (beta if variance == "fixed_large" else posterior_variance) ** 0.5
    assert output is not None
    if variance == "learned":
        return torch.exp(0.5 * output)
    share = (output + 1) / 2
    return torch.exp(0.5 * (share * math.log(beta) + (1 - share) * math.log(posterior_variance)))


def _full(x: Tensor, t: int) -> Tensor:
    return torch.full((len(x),), t, device=x.device, dtype=torch.int64)
