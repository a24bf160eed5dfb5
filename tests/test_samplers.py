"""Samplers with an exact denoiser: on Gaussian data each is a known linear map."""

import functools
import itertools
import math

import gaussian
import pytest
import torch
from gaussian import ONE, ONE_COLOUR, no_noise

from ddpm.diffusion import schedules
from ddpm.diffusion.process import Denoised, GaussianDiffusion
from ddpm.diffusion.samplers import Sampler, ancestral, ddim, dpm_solver_pp, heun
from ddpm.diffusion.spacing import spaced_timesteps

ABAR = GaussianDiffusion(schedules.linear(1000, 1e-4, 0.02)).alphas_cumprod
ALL = list(range(999, -1, -1))


def gaussian_denoiser(std):
    return gaussian.denoiser(ABAR, std**2)


def test_ancestral_reproduces_mean_and_spread_of_gaussian_data():
    """Each of the 40,000 elements is a chain of its own."""
    generator = torch.Generator().manual_seed(0)

    def noise(t):
        return torch.randn(1, 1, 200, 200, generator=generator, dtype=torch.float64)

    for variance in ("fixed_small", "fixed_large"):
        out = ancestral(gaussian_denoiser(0.5), noise(0), ABAR, ALL, noise, variance)
        assert out.mean().item() == pytest.approx(0, abs=0.01)  # 4 standard errors
        assert out.std().item() == pytest.approx(0.5, rel=0.02)


def test_ancestral_returns_the_constant_of_constant_data_whatever_the_noise():
    def denoise(x, t):
        abar = ABAR[t].reshape(-1, 1, 1, 1)
        return Denoised(torch.full_like(x, 0.3), (x - abar.sqrt() * 0.3) / (1 - abar).sqrt())

    generator = torch.Generator().manual_seed(1)

    def noise(t):
        return torch.randn(2, 1, 3, 3, generator=generator, dtype=torch.float64)

    for steps in (ALL, spaced_timesteps(ABAR, 7, "respaced")):
        torch.testing.assert_close(
            ancestral(denoise, noise(0), ABAR, steps, noise, "fixed_large"),
            torch.full((2, 1, 3, 3), 0.3, dtype=torch.float64),
        )


@pytest.mark.parametrize("num_steps", [10, 50, 1000])
def test_ddim_is_the_closed_form_linear_map_on_gaussian_data(num_steps):
    """With the exact denoiser, each step multiplies x by a known factor; the map is the product."""
    steps = spaced_timesteps(ABAR, num_steps, "linear")
    gain = 1.0
    for t, following in zip(steps, [*(ABAR[t].item() for t in steps[1:]), 1.0], strict=True):
        abar, s2 = ABAR[t].item(), 0.25
        spread = abar * s2 + 1 - abar
        gain *= (abar * following) ** 0.5 * s2 / spread + (
            (1 - following) * (1 - abar)
        ) ** 0.5 / spread
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    assert ddim(gaussian_denoiser(0.5), x, ABAR, steps, no_noise).item() == pytest.approx(
        gain, rel=1e-12
    )


def test_ddim_reproduces_the_spread_of_gaussian_data():
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)  # the map is linear: one point gives the spread
    assert ddim(gaussian_denoiser(0.5), x, ABAR, ALL, no_noise).item() == pytest.approx(
        0.5, rel=0.01
    )


@pytest.mark.parametrize(
    ("t", "following", "sigma"), [(980, 960, 0.569741), (500, 480, 0.420265), (20, 0, 0.00992036)]
)
def test_ddim_at_eta_1_has_the_golden_sigma_and_is_ancestral_of_fixed_small(t, following, sigma):
    x, zero = (
        torch.full((1, 1, 1, 1), 0.7, dtype=torch.float64),
        lambda t: torch.zeros(1, 1, 1, 1, dtype=torch.float64),
    )

    def one_at_first(noise_of):
        return lambda at: (
            torch.ones(1, 1, 1, 1, dtype=torch.float64) if at == noise_of else zero(at)
        )

    def stop_after_first(x_t, at):  # the last step returns x0_hat: have it return x_t itself
        return (
            gaussian_denoiser(0.5)(x_t, at) if at[0] == t else Denoised(x_t, torch.zeros_like(x_t))
        )

    chain = [t, following]
    plain = ddim(stop_after_first, x, ABAR, chain, zero, eta=1.0)
    pushed = ddim(stop_after_first, x, ABAR, chain, one_at_first(t), eta=1.0)
    assert (pushed - plain).item() == pytest.approx(sigma, rel=1e-5)
    torch.testing.assert_close(
        ancestral(stop_after_first, x, ABAR, chain, one_at_first(t), "fixed_small"),
        pushed,
        rtol=1e-12,
        atol=0,
    )


def test_a_fixed_variance_can_be_typed_for_a_network_that_learned_one():
    x, one = torch.zeros_like(ONE), ONE

    def denoise(x_t, t):  # the network itself would say a variance of 3
        return Denoised(
            torch.zeros_like(x_t) if t[0] == 500 else x_t, torch.zeros_like(x_t), 3 * one
        )

    beta = 1 - ABAR[500] / ABAR[480]
    small = beta * (1 - ABAR[480]) / (1 - ABAR[500])
    for variance, expected in (("fixed_large", beta), ("fixed_small", small)):
        drawn = ancestral(denoise, x, ABAR, [500, 480], lambda t: one, variance)
        assert drawn.item() == pytest.approx(expected.item() ** 0.5, rel=1e-12)


def test_learned_range_reaches_from_the_posterior_variance_to_beta():
    x, one = (
        torch.zeros(1, 1, 1, 1, dtype=torch.float64),
        torch.ones(1, 1, 1, 1, dtype=torch.float64),
    )

    def denoiser_saying(words):
        return lambda x_t, t: Denoised(
            torch.zeros_like(x_t) if t[0] == 500 else x_t, torch.zeros_like(x_t), words
        )

    for words, variance in ((one, "fixed_large"), (-one, "fixed_small")):
        learned = ancestral(
            denoiser_saying(words), x, ABAR, [500, 480], lambda t: one, "learned_range"
        )
        torch.testing.assert_close(
            learned,
            ancestral(denoiser_saying(None), x, ABAR, [500, 480], lambda t: one, variance),
            rtol=1e-12,
            atol=0,
        )


def same_weights():
    """A smooth function of x and t that tells samplers apart without training."""
    return lambda x, t: torch.tanh(x * (0.5 + t.reshape(-1, 1, 1, 1) / 2000)) + 0.1 * x.roll(1, -1)


@pytest.mark.parametrize("clip", [True, False])
def test_ddim_equals_diffusers(clip):
    from diffusers import DDIMScheduler

    process = GaussianDiffusion(schedules.linear(1000, 1e-4, 0.02))
    theirs = DDIMScheduler(
        beta_start=1e-4,
        beta_end=0.02,
        clip_sample=clip,
        set_alpha_to_one=True,
        timestep_spacing="leading",
    )
    theirs.set_timesteps(50)
    steps = spaced_timesteps(ABAR, 50, "linear")
    assert theirs.timesteps.tolist() == steps
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    ours = ddim(
        process.denoiser(same_weights(), clip=clip), x, process.alphas_cumprod, steps, no_noise
    )
    # with clip, diffusers re-derives the noise from the clipped image only on request; we always do
    for t in steps:
        x = theirs.step(
            same_weights()(x, torch.full((2,), t)), t, x, use_clipped_model_output=clip
        ).prev_sample
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ancestral_equals_diffusers(variance):
    """Compares single steps from the same x_t, so that errors do not add up.

    diffusers draws its own noise, so each draw is seeded and repeated for ours.
    """
    from diffusers import DDPMScheduler

    process = GaussianDiffusion(schedules.linear(1000, 1e-4, 0.02))
    theirs = DDPMScheduler(beta_start=1e-4, beta_end=0.02, variance_type=variance, clip_sample=True)
    model, x = same_weights(), torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for t in (999, 500, 100, 10, 1):
        draw = torch.randn(x.shape, generator=torch.Generator().manual_seed(t))
        expected = theirs.step(
            model(x, torch.full((2,), t)), t, x, generator=torch.Generator().manual_seed(t)
        ).prev_sample

        def stop_after_first(x_t, at, t=t):
            return (
                process.denoiser(model)(x_t, at)
                if at[0] == t
                else Denoised(x_t, torch.zeros_like(x_t))
            )

        ours = ancestral(
            stop_after_first,
            x,
            process.alphas_cumprod,
            [t, t - 1],
            lambda at, t=t, draw=draw: draw if at == t else torch.zeros_like(draw),
            variance,
        )
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
        x = expected


def error_of(sampler, abar, variance):
    """A sampler's relative error along the probability-flow ODE.

    From the noisiest timestep to the last, x / sqrt(variance of x_t) is constant on the exact path.
    Then every sampler steps to the image by x0_hat, which is known.
    """
    of_x_t = abar * variance + 1 - abar
    exact = (of_x_t[0] / of_x_t[-1]).sqrt() * abar[0].sqrt() * variance / of_x_t[0]
    timesteps = list(range(len(abar) - 1, -1, -1))
    drawn = sampler(gaussian.denoiser(abar, variance), ONE, abar, timesteps, no_noise)
    return abs((drawn / exact).item() - 1)


@pytest.mark.parametrize("variance", [0.5**2, ONE_COLOUR])
@pytest.mark.parametrize(("sampler", "order"), [(ddim, 1), (heun, 2), (dpm_solver_pp, 2)])
def test_errors_fall_with_the_order_as_steps_double(sampler, order, variance):
    """Starts at sigma = 157, with timesteps exactly where the steps need them."""

    def error(num_steps):
        sigmas = torch.logspace(-2, math.log10(157), num_steps + 1, dtype=torch.float64)
        return error_of(sampler, 1 / (1 + sigmas**2), variance)

    errors = [error(num_steps) for num_steps in (40, 80, 160)]
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize(("sampler", "order"), [(ddim, 1), (heun, 2), (dpm_solver_pp, 2)])
def test_errors_fall_with_the_order_from_pure_noise_too(sampler, order):
    """The steps are even in the angle atan(sigma), up to pi / 2."""

    def error(num_steps):
        angles = torch.linspace(0.1, math.pi / 2, num_steps + 1, dtype=torch.float64)
        abar = torch.cos(angles) ** 2
        abar[-1] = 0
        return error_of(sampler, abar, 0.5**2)

    assert math.log2(error(80) / error(160)) == pytest.approx(order, abs=0.1)


def test_a_predicted_mean_is_believed_on_the_whole_chain_and_rebuilt_on_a_shorter_one():
    """With Ho et al.'s "xprev", the network gives p_sample's mean; only the image is clipped."""
    process = GaussianDiffusion(schedules.linear(1000, 1e-4, 0.02), "mean", "fixed_large")
    betas, generator = process.betas, torch.Generator().manual_seed(0)
    draws = torch.randn(1000, 1, 3, 4, 4, generator=generator, dtype=torch.float64)

    def model(x, t):
        return torch.tanh(x) * (1 - 1e-4 * t.reshape(-1, 1, 1, 1)) + 0.05

    sampler = Sampler(functools.partial(ancestral, variance="fixed_large"))
    start = torch.randn(1, 3, 4, 4, generator=generator, dtype=torch.float64)
    x = start
    for t in ALL:
        x = model(x, torch.tensor([t]))
        if t > 0:
            x = x + betas[t].sqrt() * draws[t]
    drawn = sampler.walk(model, process, start, sampler.timesteps(process), lambda t: draws[t])
    torch.testing.assert_close(drawn, x.clamp(-1, 1), rtol=1e-12, atol=1e-12)

    short = [600, 300]  # the network predicts no mean of x_300 given x_600
    x, abar = start, process.alphas_cumprod
    for t, before in ((600, abar[300]), (300, torch.ones(()))):
        beta_t, of_t, of_before = betas[t], abar[t], abar[t - 1]
        x0 = model(x, torch.tensor([t])) - (1 - beta_t).sqrt() * (1 - of_before) / (1 - of_t) * x
        x0 = (x0 * (1 - of_t) / (of_before.sqrt() * beta_t)).clamp(-1, 1)  # Eq. 7 solved for x0
        beta = 1 - of_t / before
        x = (
            before.sqrt() * beta / (1 - of_t) * x0
            + (1 - beta).sqrt() * (1 - before) / (1 - of_t) * x
        )
        if before < 1:
            x = x + beta.sqrt() * draws[t]
    drawn = sampler.walk(model, process, start, short, lambda t: draws[t])
    torch.testing.assert_close(drawn, x, rtol=1e-9, atol=1e-9)


def test_heun_makes_two_calls_a_step_but_one_in_the_last():
    calls = []

    def counting(x, t):
        calls.append(int(t[0]))
        return gaussian_denoiser(0.5)(x, t)

    heun(
        counting,
        torch.ones(1, 1, 1, 1, dtype=torch.float64),
        ABAR,
        spaced_timesteps(ABAR, 18, "edm"),
        no_noise,
    )
    assert len(calls) == 35


def test_dpm_solver_equals_diffusers():
    from diffusers import DPMSolverMultistepScheduler

    process = GaussianDiffusion(schedules.linear(1000, 1e-4, 0.02))
    steps = spaced_timesteps(ABAR, 20, "respaced")
    theirs = DPMSolverMultistepScheduler(
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        algorithm_type="dpmsolver++",
        solver_order=2,
        final_sigmas_type="zero",
    )
    theirs.set_timesteps(timesteps=steps)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    ours = dpm_solver_pp(
        process.denoiser(same_weights(), clip=False), x, process.alphas_cumprod, steps, no_noise
    )
    for t in theirs.timesteps:
        x = theirs.step(same_weights()(x, torch.full((2,), int(t))), t, x).prev_sample
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)
