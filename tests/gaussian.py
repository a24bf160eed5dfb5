"""Gaussian data, whose best denoiser, probability-flow ODE and samples are known in closed form."""

import torch

from ddpm.diffusion.process import Denoised

# One-colour pictures of 32x32 whose brightness has the deviation 0.5: along the direction of their
# colour the data's variance is 1024 * 0.25, along any other none.
ONE_COLOUR = 32 * 32 * 0.5**2
ONE = torch.ones(1, 1, 1, 1, dtype=torch.float64)


def denoiser(abar, variance):
    """E[x0 | x_t] for x0 ~ N(0, variance): linear in x_t."""

    def denoise(x, t):
        a = abar[t].reshape(-1, 1, 1, 1)
        x0 = a.sqrt() * variance / (a * variance + 1 - a) * x
        return Denoised(x0, (x - a.sqrt() * x0) / (1 - a).sqrt())

    return denoise


def no_noise(t):
    raise AssertionError("a deterministic sampler asked for noise")


def spread_kept(sampler, abar, timesteps):
    """The standard deviation of what a sampler draws, as a share of the data's (one colour).

    It is linear: the images are its answers to the noise that it starts from (chain 0) and to that
    of each step (a chain each), which are independent.
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
