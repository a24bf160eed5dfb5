"""Samplers, by an exact denoiser: for Gaussian data each is a linear map that is known in closed form."""

import pytest
import torch

from ddpm.diffusion import schedules
from ddpm.diffusion.process import Denoised, GaussianDiffusion
from ddpm.diffusion.samplers import ancestral, ddim, dpm_solver_pp, heun
from ddpm.diffusion.spacing import spaced_timesteps

ABAR = GaussianDiffusion(schedules.linear(1000, 1e-4, 0.02)).alphas_cumprod
ALL = list(range(999, -1, -1))


def gaussian_denoiser(std):
    def denoise(x, t):
        abar = ABAR[t].reshape(-1, 1, 1, 1)
        x0 = abar.sqrt() * std**2 / (abar * std**2 + 1 - abar) * x
        return Denoised(x0, (x - abar.sqrt() * x0) / (1 - abar).sqrt())

    return denoise


def no_noise(t):
    raise AssertionError("a deterministic sampler asked for noise")


def test_ancestral_reproduces_mean_and_spread_of_gaussian_data():
    """Every element is a chain of its own; 40,000 of them."""
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
    """Each step multiplies x by (abar' ratio) written out for the exact denoiser; the product of the steps is the map."""
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
    """A network with enough structure to tell samplers apart: smooth in x and t, no training needed."""
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
    for t in steps:  # with clip, diffusers re-derives the noise from the clipped image only if it is told to, as we always do
        x = theirs.step(
            same_weights()(x, torch.full((2,), t)), t, x, use_clipped_model_output=clip
        ).prev_sample
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ancestral_equals_diffusers(variance):
    """Step by step from the same x_t, so that errors do not add up; diffusers draws its own noise, so each draw is seeded and repeated."""
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


def exact_end(t, std):
    """Where the probability-flow ODE takes x_t = 1: x / sqrt(variance of x_t) is constant along it."""
    abar = ABAR[t].item()
    return std / (abar * std**2 + 1 - abar) ** 0.5


def test_second_order_samplers_come_nearer_to_the_exact_ode_with_fewer_calls():
    """Relative errors at std 0.5: DDIM in 50 steps 5.5%, Heun in 18 4.7%, DPM-Solver++(2M) in 20 1.9%."""
    x, errors = torch.ones(1, 1, 1, 1, dtype=torch.float64), {}
    for sampler, num_steps, spacing in (
        (ddim, 50, "linear"),
        (dpm_solver_pp, 20, "quadratic"),
        (heun, 18, "edm"),
    ):
        steps = spaced_timesteps(ABAR, num_steps, spacing)
        errors[sampler] = abs(
            sampler(gaussian_denoiser(0.5), x, ABAR, steps, no_noise).item()
            / exact_end(steps[0], 0.5)
            - 1
        )
    assert errors[dpm_solver_pp] < 0.5 * errors[ddim]
    assert errors[heun] < errors[ddim]


@pytest.mark.parametrize(("sampler", "order"), [(ddim, 1), (heun, 2), (dpm_solver_pp, 2)])
def test_samplers_converge_with_their_order(sampler, order):
    """Half the step, and the error falls by 2^order, from t = 900 to 100; all then step to the image by x0_hat, which is known."""
    errors = []
    start, end = (1 / ABAR[900].item() - 1) ** 0.5, (1 / ABAR[100].item() - 1) ** 0.5
    spread = ABAR * 0.25 + 1 - ABAR
    exact = ((spread[100] / spread[900]).sqrt() * ABAR[100].sqrt() * 0.25 / spread[100]).item()
    for num_steps in (40, 80):
        sigmas = [start * (end / start) ** (index / num_steps) for index in range(num_steps + 1)]
        steps = [int(((1 / ABAR - 1).sqrt() - sigma).abs().argmin()) for sigma in sigmas]
        found = sampler(
            gaussian_denoiser(0.5),
            torch.ones(1, 1, 1, 1, dtype=torch.float64),
            ABAR,
            steps,
            no_noise,
        ).item()
        errors.append(abs(found / exact - 1))
    assert errors[1] < errors[0] / 2**order * 1.35


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
