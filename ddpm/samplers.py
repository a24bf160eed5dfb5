"""Samplers: plain functions that walk an explicit list of timesteps from noise to images.

Each takes, in this order: denoise, (x_t, t) -> Denoised; x, the noise to start from, (B, C, H, W), in the dtype to compute in; alphas_cumprod,
(T,) float64; timesteps, decreasing, each in [0, T-1]; noise, t -> standard normal like x, asked once for each step that needs it. Each returns
x_0, of the shape of x, near [-1, 1]. They never learn what the network predicts.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ddpm import randomness
from ddpm.diffusion import Denoised, GaussianDiffusion, Model, Variance

Denoise = Callable[[Tensor, Tensor], Denoised]
Noise = Callable[[int], Tensor]


def ancestral(denoise: Denoise, x: Tensor, alphas_cumprod: Tensor, timesteps: Sequence[int], noise: Noise, variance: Variance) -> Tensor:
    """Algorithm 2 of Ho et al. 2020, on the chain that visits `timesteps` (respaced as in Nichol & Dhariwal 2021, section 4).

    The mean is Eq. 7 at x0_hat. The variance is the chain's beta ("fixed_large"), its posterior variance ("fixed_small"), or what the network says:
    its log ("learned"), or where between those two ("learned_range"). No noise in the last step.
    """
    for t, abar, abar_next in _walk(alphas_cumprod, timesteps):
        x0_hat, _, variance_output = denoise(x, _full(x, t))
        beta = 1 - abar / abar_next
        posterior_variance = beta * (1 - abar_next) / (1 - abar)
        x = abar_next**0.5 * beta / (1 - abar) * x0_hat + (1 - beta) ** 0.5 * (1 - abar_next) / (1 - abar) * x
        if abar_next < 1:
            x = x + _deviation(variance, variance_output, beta, posterior_variance) * noise(t)
    return x


def ddim(denoise: Denoise, x: Tensor, alphas_cumprod: Tensor, timesteps: Sequence[int], noise: Noise, eta: float = 0.0) -> Tensor:
    """Eqs. 12 and 16 of Song et al. 2021 (arXiv 2010.02502): no noise at eta 0, the ancestral chain of fixed_small variance at eta 1."""
    for t, abar, abar_next in _walk(alphas_cumprod, timesteps):
        x0_hat, eps_hat, _ = denoise(x, _full(x, t))
        sigma = eta * ((1 - abar_next) / (1 - abar) * (1 - abar / abar_next)) ** 0.5
        x = abar_next**0.5 * x0_hat + (1 - abar_next - sigma**2) ** 0.5 * eps_hat
        if sigma > 0:
            x = x + sigma * noise(t)
    return x


def spaced_timesteps(num_timesteps: int, num_steps: int, spacing: Literal["respaced", "linear", "quadratic"]) -> list[int]:
    """Which timesteps a chain of num_steps visits, from the noisiest down.

    "respaced": evenly, both ends kept (Nichol & Dhariwal 2021, section 4). "linear": every (T // num_steps)-th from 0, "quadratic": closer
    together near the image (both Song et al. 2021, App. D.2).    Raises ValueError if num_steps lies outside [1, T].
    """
    if not 1 <= num_steps <= num_timesteps:
        raise ValueError(f"num_steps={num_steps} must lie between 1 and the schedule's num_timesteps={num_timesteps}")
    if spacing == "respaced":
        stride = (num_timesteps - 1) / max(num_steps - 1, 1)
        chosen = [round(index * stride) for index in range(num_steps)] if num_steps > 1 else [num_timesteps - 1]
    elif spacing == "linear":
        chosen = list(range(0, num_timesteps, num_timesteps // num_steps))[:num_steps]
    else:
        end = (0.8 * num_timesteps) ** 0.5
        chosen = [int((index * end / max(num_steps - 1, 1)) ** 2) for index in range(num_steps)]
        if len(set(chosen)) < num_steps:
            raise ValueError(f"num_steps={num_steps} is too many for quadratic spacing of {num_timesteps} timesteps: some would be visited twice")
    return chosen[::-1]


@dataclass(frozen=True)
class Sampler:
    """A choice of sampler (group `sampler`): which function walks, over how many timesteps, spaced how, and whether x0_hat is held in [-1, 1].

    num_steps: None for all T.    function: ancestral, ddim, or any with their leading arguments.    guidance_scale: of classifier-free guidance, 1 for
    none (ddpm/sampling.py).
    """

    function: Callable[..., Tensor]
    num_steps: int | None = None
    spacing: Literal["respaced", "linear", "quadratic"] = "respaced"
    clip: bool = True
    guidance_scale: float = 1.0

    def timesteps(self, diffusion: GaussianDiffusion) -> list[int]:
        """The timesteps visited, from the noisiest down.

        Raises ValueError if there are fewer than num_steps, or if the schedule's last x_t is pure noise and they do not start there.
        """
        chosen = spaced_timesteps(diffusion.num_timesteps, self.num_steps or diffusion.num_timesteps, self.spacing)
        if diffusion.alphas_cumprod[-1] == 0 and chosen[0] != diffusion.num_timesteps - 1:
            raise ValueError(f"spacing={self.spacing} starts at timestep {chosen[0]}, but a schedule of zero terminal SNR must start at the last; use respaced")
        return chosen

    @torch.inference_mode()
    def sample(
        self, model: Model, diffusion: GaussianDiffusion, shape: tuple[int, int, int], indices: Sequence[int], seed: int, device: torch.device
    ) -> Tensor:
        """The images with these indices: each a function of (seed, index) and the weights, whatever it is batched with (to rounding).

        shape: (C, H, W).    Returns (len(indices), C, H, W) float32 on the device, in [-1, 1].
        """
        positions = torch.tensor(list(indices), device=device)

        def noise(t: int) -> Tensor:
            return randomness.normal(randomness.stream_keys(randomness.SAMPLE_STEP, seed, t, positions), shape)

        x = randomness.normal(randomness.stream_keys(randomness.SAMPLE_LATENT, seed, 0, positions), shape)
        x = x.contiguous(memory_format=torch.channels_last)
        denoise = diffusion.denoiser(model, clip=self.clip)
        return self.function(denoise, x, diffusion.alphas_cumprod, self.timesteps(diffusion), noise).clamp(-1, 1)


def _walk(alphas_cumprod: Tensor, timesteps: Sequence[int]) -> Iterator[tuple[int, float, float]]:
    """(t, abar at t, abar at the timestep after it) along the chain; after the last one abar is 1."""
    abars: Iterable[float] = [float(alphas_cumprod[t]) for t in timesteps]
    following = [*list(abars)[1:], 1.0]
    yield from zip(timesteps, abars, following, strict=True)


def _deviation(variance: Variance, output: Tensor | None, beta: float, posterior_variance: float) -> Tensor | float:
    """Standard deviation of one reverse step."""
    if output is None:
        return (beta if variance == "fixed_large" else posterior_variance) ** 0.5
    if variance == "learned":
        return torch.exp(0.5 * output)
    share = (output + 1) / 2
    return torch.exp(0.5 * (share * math.log(beta) + (1 - share) * math.log(posterior_variance)))


def _full(x: Tensor, t: int) -> Tensor:
    return torch.full((len(x),), t, device=x.device, dtype=torch.int64)
