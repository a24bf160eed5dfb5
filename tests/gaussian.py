"""Gaussian data: the best denoiser, probability-flow ODE and samples have closed forms."""

import torch

from ddpm.diffusion.process import Denoised

# Uniform 32x32 pictures. Their brightness has standard deviation 0.5, so the data has variance
# 1024 * 0.25 along the all-ones direction and 0 along any other.
ONE_COLOUR = 32 * 32 * 0.5**2
ONE = torch.ones(1, 1, 1, 1, dtype=torch.float64)


def denoiser(abar, variance):
    """Returns the denoiser E[x0 | x_t] for x0 ~ N(0, variance), which is linear in x_t."""

    def denoise(x, t):
        a = abar[t].reshape(-1, 1, 1, 1)
        x0 = a.sqrt() * variance / (a * variance + 1 - a) * x
        return Denoised(x0, (x - a.sqrt() * x0) / (1 - a).sqrt())

    return denoise


def no_noise(t):
    raise AssertionError("a deterministic sampler asked for noise")


def spread_kept(sampler, abar, timesteps):
    """Returns the standard deviation of a sampler's images over that of the data (ONE_COLOUR).

    The sampler is linear, so each chain propagates one independent noise: chain 0 the starting
    noise, and one chain per step that step's noise. Their variances add up.
    """
    steps = {t: index + 1 for index, t in enumerate(timesteps)}
    answers = torch.zeros(len(steps) + 1, 1, 1, 1, dtype=torch.float64)

    def noise(t):
        one = torch.zeros_like(answers)
        one[steps[t]] = 1
        return one

    answers[0] = 1
    drawn = sampler(denoiser(abar, ONE_COLOUR), answers, abar, timesteps, noise)
    return drawn.square().sum().sqrt().item() / ONE_COLOUR**0.5
