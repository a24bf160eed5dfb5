"""Forward process, posterior, predictions, variances and losses in float64.

They are tested against the papers' equations and against closed forms.
"""

import math

import pytest
import torch

from ddpm.diffusion import schedules
from ddpm.diffusion.process import GaussianDiffusion, discretized_log_likelihood, min_snr_weights

LINEAR = schedules.linear(1000, 1e-4, 0.02)
COSINE = schedules.cosine(1000, 0.008, 0.999)
DATA_STD = 0.5


def diffusion(
    prediction="epsilon", variance="fixed_small", loss="simple", betas=LINEAR, **settings
):
    return GaussianDiffusion(betas, prediction=prediction, variance=variance, loss=loss, **settings)


def at(t, batch=1):
    return torch.full((batch,), t, dtype=torch.int64)


def pictures(batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(
        batch, 3, 4, 4, generator=generator, dtype=torch.float64
    ) * 2 - 1, torch.randn(batch, 3, 4, 4, generator=generator, dtype=torch.float64)


def gaussian_model(process, std=DATA_STD):
    """Returns the best network for data with independent elements ~ N(0, std^2).

    E[x0 | x_t] is linear in x_t.
    """

    def model(x_t, t):
        abar = process.alphas_cumprod[t].reshape(-1, 1, 1, 1)
        x0 = abar.sqrt() * std**2 / (abar * std**2 + 1 - abar) * x_t
        noise = (x_t - abar.sqrt() * x0) / (1 - abar).sqrt()
        return (
            process.target(x0, x_t, t, noise)
            if process.prediction != "mean"
            else process.posterior_mean(x0, x_t, t)
        )

    return model


@pytest.mark.parametrize(("betas", "t", "abar", "beta_tilde"), [
    (LINEAR, 1, 0.99978009, 5.4531877e-05), (LINEAR, 10, 0.99780657, 0.00025846362), (LINEAR, 250, 0.52142303, 0.0050517198), (LINEAR, 999, 4.0358298e-05, 0.019999984),
    (COSINE, 1, 0.99991258, 2.1789496e-05), (COSINE, 500, 0.49228517, 0.0031460051), (COSINE, 999, 2.4287669e-09, 0.99899758),
])  # fmt: skip
def test_forward_and_posterior_have_the_golden_values(betas, t, abar, beta_tilde):
    process = diffusion(betas=betas)
    assert process.alphas_cumprod[t].item() == pytest.approx(abar, rel=1e-7)
    assert process.posterior_variance()[t].item() == pytest.approx(beta_tilde, rel=1e-7)
    assert process.posterior_variance()[0] == 0


@pytest.mark.parametrize(("betas", "t", "of_x0", "of_x_t"), [
    (LINEAR, 0, 1, 0), (LINEAR, 1, 0.545291, 0.454708), (LINEAR, 100, 0.0188955, 0.981076), (LINEAR, 999, 0.000128351, 0.989949), (COSINE, 999, 0.00155689, 0.0316227),
])  # fmt: skip
def test_posterior_mean_has_the_golden_coefficients(betas, t, of_x0, of_x_t):
    process, one, zero = (
        diffusion(betas=betas),
        torch.ones(1, 1, 1, 1, dtype=torch.float64),
        torch.zeros(1, 1, 1, 1, dtype=torch.float64),
    )
    assert process.posterior_mean(one, zero, at(t)).item() == pytest.approx(
        of_x0, rel=5e-6, abs=1e-15
    )
    assert process.posterior_mean(zero, one, at(t)).item() == pytest.approx(
        of_x_t, rel=5e-6, abs=1e-15
    )


@pytest.mark.parametrize("t", [1, 10, 500, 999])
def test_posterior_mean_from_x0_equals_the_one_from_the_noise(t):
    """Ho et al. 2020, Eq. 7 against Eq. 11."""
    process, (x0, noise) = diffusion(), pictures()
    x_t = process.q_sample(x0, at(t, 2), noise)
    beta, abar = LINEAR[t], process.alphas_cumprod[t]
    torch.testing.assert_close(
        process.posterior_mean(x0, x_t, at(t, 2)),
        (x_t - beta / (1 - abar).sqrt() * noise) / (1 - beta).sqrt(),
        rtol=1e-12,
        atol=1e-13,
    )


@pytest.mark.parametrize("t", [0, 500, 999])
@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v", "mean"])
def test_every_prediction_says_the_same_of_image_and_noise(prediction, t):
    process, (x0, noise) = diffusion(prediction), pictures()
    x_t = process.q_sample(x0, at(t, 2), noise)
    target = process.target(x0, x_t, at(t, 2), noise)
    estimate = process.estimate(target, x_t, at(t, 2))
    x0_hat, eps_hat, variance_output = estimate
    torch.testing.assert_close(x0_hat, x0, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(eps_hat, noise, rtol=1e-9, atol=1e-10)
    assert variance_output is None
    assert getattr(estimate, "mean", None) is (target if prediction == "mean" else None)


def test_clipping_holds_x0_and_keeps_the_noise_consistent():
    process = diffusion()
    x_t = torch.full((1, 1, 1, 1), 3.0, dtype=torch.float64)
    x0_hat, eps_hat, _ = process.denoiser(lambda x, t: torch.zeros_like(x))(x_t, at(500))
    assert x0_hat.item() == 1
    abar = process.alphas_cumprod[500].item()
    assert eps_hat.item() == pytest.approx((3 - abar**0.5) / (1 - abar) ** 0.5, rel=1e-12)


@pytest.mark.parametrize(("variance", "output", "t", "expected"), [
    ("fixed_small", None, 250, 0.0050517198), ("fixed_large", None, 250, 0.00507998), ("learned_range", 1.0, 250, 0.00507998), ("learned_range", -1.0, 250, 0.0050517198),
    ("learned_range", 0.0, 1, math.sqrt(0.00011991992 * 5.4531877e-05)), ("learned", math.log(0.3), 7, 0.3),
    ("fixed_small", None, 0, 5.4531877e-05), ("fixed_large", None, 0, 5.4531877e-05),
])  # fmt: skip
def test_variances_have_the_golden_values(variance, output, t, expected):
    process = diffusion(variance=variance, loss="bound")
    like = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    words = None if output is None else like + output
    assert process.log_variance(words, at(t), like).exp().item() == pytest.approx(
        expected, rel=1e-7
    )


@pytest.mark.parametrize("t", [0, 100, 500, 999])
@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v", "mean"])
def test_squared_error_on_gaussian_data_has_its_closed_form(prediction, t):
    """Over many draws, the best network's error is the posterior variance of its target."""
    process = diffusion(prediction)
    generator = torch.Generator().manual_seed(t)
    x0 = DATA_STD * torch.randn(64, 1, 64, 64, generator=generator, dtype=torch.float64)
    noise = torch.randn(64, 1, 64, 64, generator=generator, dtype=torch.float64)
    abar, s2 = process.alphas_cumprod[t].item(), DATA_STD**2
    x0_error = s2 * (1 - abar) / (abar * s2 + 1 - abar)
    before = process.alphas_cumprod[t - 1].item() if t else 1.0
    of_x0 = {
        "x0": 1,
        "epsilon": abar / (1 - abar),
        "v": 1 / (1 - abar),
        "mean": before * (LINEAR[t].item() / (1 - abar)) ** 2,
    }[prediction]
    measured = process.losses(gaussian_model(process), x0, at(t, 64), noise).mean().item()
    # 262,144 draws have a relative spread of 0.3%
    assert measured == pytest.approx(of_x0 * x0_error, rel=0.01)


@pytest.mark.parametrize(("variance", "t", "weight"), [
    ("fixed_small", 1, 0.599672), ("fixed_large", 1, 0.272692), ("fixed_small", 100, 0.0101784), ("fixed_large", 100, 0.00999623), ("fixed_large", 999, 0.0102045),
])  # fmt: skip
def test_bound_weighs_the_noise_error_as_equation_12(variance, t, weight):
    """A noise error adds its square, times the weight in Eq. 12, to the bound's terms."""
    process, (x0, noise) = (
        diffusion(variance=variance, loss="bound", vlb_weight=1 / 1000),
        pictures(1),
    )
    exact = process.losses(lambda x, s: noise, x0, at(t), noise)
    off = process.losses(lambda x, s: noise + 0.1, x0, at(t), noise)
    assert ((off - exact) * math.log(2)).item() == pytest.approx(weight * 0.1**2, rel=1e-4)


def test_a_perfect_network_leaves_only_the_gap_of_the_fixed_variance():
    """The floor is 0 for fixed_small and 0.486419 bits/dim for fixed_large (0.175125 at t = 1)."""
    x0, noise = pictures(1)
    for variance, total, first in (("fixed_small", 0.0, 0.0), ("fixed_large", 0.486419, 0.175125)):
        process = diffusion(variance=variance)
        terms = [
            process.bound_term(noise, x0, process.q_sample(x0, at(t), noise), at(t)).item()
            for t in range(1, 1000)
        ]
        assert sum(terms) == pytest.approx(total, rel=1e-5, abs=1e-9)
        assert terms[0] == pytest.approx(first, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize(("betas", "level", "offset", "bits"), [
    (LINEAR, 0.0, 0.0, 1.30567), (LINEAR, 1.0, 0.0, 0.509908), (LINEAR, 0.0, 1 / 255, 1.4911), (COSINE, 0.0, 0.0, 0.739559), (COSINE, -1.0, 0.0, 0.3229), (COSINE, 0.0, 1 / 255, 1.14096),
])  # fmt: skip
def test_decoder_has_the_golden_code_lengths(betas, level, offset, bits):
    process = diffusion(betas=betas)
    x0 = torch.full((1, 1, 1, 1), level, dtype=torch.float64)
    log_variance = process.log_variance(None, at(0), x0)
    assert -discretized_log_likelihood(x0, x0 + offset, log_variance).item() / math.log(
        2
    ) == pytest.approx(bits, rel=1e-5)


def test_decoder_probabilities_of_all_levels_add_up_to_one():
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    for mean, deviation in ((0.1, 0.01), (-1.0, 0.3), (0.98, 0.007)):
        log_p = discretized_log_likelihood(
            levels, torch.full_like(levels, mean), torch.full_like(levels, 2 * math.log(deviation))
        )
        assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize(
    ("square", "bits"),
    [(0.0, 5.87478e-10), (0.25, 7.27868e-6), (1 / 3, 9.70471e-6), (1.0, 2.91129e-5)],
)
def test_prior_term_has_the_golden_values(square, bits):
    assert diffusion().prior_term(
        torch.full((1, 1, 2, 2), square**0.5, dtype=torch.float64)
    ).item() == pytest.approx(bits, rel=1e-5)


@pytest.mark.parametrize(("prediction", "t", "weight"), [
    ("epsilon", 0, 0.00050005), ("epsilon", 100, 0.585709), ("epsilon", 250, 1.0), ("v", 0, 0.0005), ("v", 100, 0.524292), ("v", 250, 0.521423), ("x0", 100, 5.0),
])  # fmt: skip
def test_min_snr_weights_have_the_golden_values(prediction, t, weight):
    process, (x0, noise) = diffusion(prediction, loss="min_snr"), pictures()
    assert min_snr_weights(process.alphas_cumprod, 5.0, prediction)[t].item() == pytest.approx(
        weight, rel=2e-6
    )
    plain = diffusion(prediction).losses(lambda x, s: torch.zeros_like(x), x0, at(t, 2), noise)
    torch.testing.assert_close(
        process.losses(lambda x, s: torch.zeros_like(x), x0, at(t, 2), noise) / plain,
        torch.full((2,), weight, dtype=torch.float64),
        rtol=2e-6,
        atol=0,
    )


def test_hybrid_trains_the_mean_by_squared_error_and_the_variance_by_the_bound():
    x0, noise = pictures(1)
    output = torch.cat([noise + 0.3, torch.zeros_like(noise)], dim=1).requires_grad_()
    hybrid = diffusion(variance="learned_range", loss="hybrid", vlb_weight=0.001)
    hybrid.losses(lambda x, t: output, x0, at(300), noise).sum().backward()
    of_hybrid, output.grad = output.grad.chunk(2, dim=1), None
    bound = diffusion(variance="learned_range", loss="bound", vlb_weight=0.001)
    bound.losses(lambda x, t: output, x0, at(300), noise).sum().backward()
    torch.testing.assert_close(of_hybrid[0], torch.full_like(noise, 2 * 0.3 / noise.numel()))
    torch.testing.assert_close(of_hybrid[1], output.grad.chunk(2, dim=1)[1])


def test_a_variance_learned_on_gaussian_data_converges_to_the_true_one():
    """The best reverse step has variance posterior + (coefficient of x0)^2 * Var[x0 | x_t]."""
    t = 200
    process = diffusion(variance="learned", loss="bound")
    generator = torch.Generator().manual_seed(0)
    x0 = DATA_STD * torch.randn(16, 1, 32, 32, generator=generator, dtype=torch.float64)
    noise = torch.randn(16, 1, 32, 32, generator=generator, dtype=torch.float64)
    best = gaussian_model(process)
    log_variance = torch.tensor(-3.0, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([log_variance], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        process.losses(
            lambda x, s: torch.cat([best(x, s), log_variance.expand_as(x)], dim=1),
            x0,
            at(t, 16),
            noise,
        ).mean().backward()
        optimizer.step()
    abar, before, s2 = (
        process.alphas_cumprod[t].item(),
        process.alphas_cumprod[t - 1].item(),
        DATA_STD**2,
    )
    of_x0 = s2 * (1 - abar) / (abar * s2 + 1 - abar)
    true = (
        process.posterior_variance()[t].item()
        + before * (LINEAR[t].item() / (1 - abar)) ** 2 * of_x0
    )
    assert log_variance.exp().item() == pytest.approx(true, rel=0.01)


def test_rescaled_timesteps_show_the_network_a_thousand_whatever_T_is():
    process = diffusion(betas=schedules.linear_rescaled(4000, 1e-4, 0.02), rescale_timesteps=True)
    seen = []
    process.run(lambda x, t: seen.append(t) or x, torch.zeros(2, 1, 1, 1), torch.tensor([0, 3999]))
    torch.testing.assert_close(seen[0], torch.tensor([0.0, 999.75]))


def test_zero_terminal_snr_leaves_no_signal_and_finite_losses():
    process = diffusion("v", betas=schedules.linear(1000, 1e-4, 0.02, zero_terminal_snr=True))
    x0, noise = pictures()
    torch.testing.assert_close(process.q_sample(x0, at(999, 2), noise), noise, rtol=0, atol=0)
    assert process.losses(lambda x, t: torch.zeros_like(x), x0, at(999, 2), noise).isfinite().all()
    torch.testing.assert_close(
        process.estimate(process.target(x0, noise, at(999, 2), noise), noise, at(999, 2)).x0_hat,
        x0,
        rtol=1e-12,
        atol=1e-12,
    )


@pytest.mark.parametrize(("settings", "reason"), [
    ({"betas": schedules.linear(1000, 1e-4, 0.02, zero_terminal_snr=True)}, "prediction=epsilon"), ({"betas": schedules.jsd(1000)}, "zero terminal SNR"),
    ({"variance": "learned"}, "variance=learned"), ({"variance": "learned_range", "loss": "min_snr"}, "variance=learned_range"), ({"loss": "hybrid"}, "loss=hybrid"),
    ({"prediction": "mean", "loss": "min_snr"}, "prediction=mean"), ({"loss": "bound", "vlb_weight": 0.0}, "vlb_weight=0.0"), ({"betas": torch.tensor([0.1, 1.0, 0.1])}, "betas"),
])  # fmt: skip
def test_combinations_that_make_no_sense_are_refused_with_the_reason(settings, reason):
    with pytest.raises(ValueError, match=reason):
        diffusion(**settings)
