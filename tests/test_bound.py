"""The bound and the losses by timestep against closed forms.

The data is one picture, or Gaussian: for both, the best network is known exactly.
"""

import csv
import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm.diffusion import schedules
from ddpm.diffusion.process import GaussianDiffusion
from ddpm.evaluate import bound

LINEAR = schedules.linear(1000, 1e-4, 0.02)
SHORT = schedules.linear(20, 1e-3, 0.3)
STD = 0.1  # of the Gaussian data, so narrow that nothing is ever clipped
GREY = 51 / 255  # an 8-bit level away from the edges


def variational_bound(*arguments, **named):
    return bound.bound_sums(*arguments, **named).mean()


def losses_by_timestep(*arguments, **named):
    return bound.loss_sums(*arguments, **named).mean()


def diffusion(prediction="epsilon", variance="fixed_small", loss="simple", betas=SHORT):
    return GaussianDiffusion(betas, prediction=prediction, variance=variance, loss=loss)


def model_that_knows(process, x0_hat, words=None):
    """Returns a network that predicts x0_hat(x_t, abar), with `words` as its learned variance."""

    def model(x_t, t):
        abar = process.alphas_cumprod[t].reshape(-1, 1, 1, 1).to(x_t.dtype)
        x0 = x0_hat(x_t, abar)
        output = process.target(x0, x_t, t, (x_t - abar.sqrt() * x0) / (1 - abar).sqrt())
        return (
            output if words is None else torch.cat([output, torch.full_like(output, words)], dim=1)
        )

    return model


def gaussian_model(process, words=None):
    return model_that_knows(
        process, lambda x_t, abar: abar.sqrt() * STD**2 / (abar * STD**2 + 1 - abar) * x_t, words
    )


def gaussian_pictures(count, *shape, dtype=torch.float32):
    return torch.arange(count), STD * torch.randn(
        count, *shape, generator=torch.Generator().manual_seed(0)
    ).to(dtype)


def gaussian_error(process):
    """Returns Var[x0 | x_t] for each t."""
    return (
        STD**2
        * (1 - process.alphas_cumprod)
        / (process.alphas_cumprod * STD**2 + 1 - process.alphas_cumprod)
    )


def in_batches(numbers, x0, size):
    return list(zip(numbers.split(size), x0.split(size), strict=True))


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_the_bound_of_gaussian_data_has_its_closed_form(variance):
    process = diffusion(variance=variance)
    found = variational_bound(
        gaussian_model(process), process, in_batches(*gaussian_pictures(16, 1, 128, 128), 8), seed=0
    )
    abar, before = process.alphas_cumprod[1:], process.alphas_cumprod[:-1]
    posterior, error = process.posterior_variance()[1:], gaussian_error(process)
    of_model = posterior if variance == "fixed_small" else SHORT[1:]
    gap = (posterior / of_model).log()
    of_mean = before * (SHORT[1:] / (1 - abar)) ** 2 * error[1:] / of_model
    kls = 0.5 * (-1 - gap + gap.exp() + of_mean) / math.log(2)
    # 262,144 draws have a relative spread of 0.28%
    np.testing.assert_allclose(found.terms[1:], kls, rtol=0.01)
    np.testing.assert_allclose(found.rmse, 127.5 * error.sqrt(), rtol=0.005)
    snr = process.alphas_cumprod / (1 - process.alphas_cumprod)
    np.testing.assert_allclose(found.epsilon_mse, snr * error, rtol=0.01)
    abar_T = abar[-1].item()
    prior = 0.5 * (-math.log(1 - abar_T) - abar_T + abar_T * STD**2) / math.log(2)
    assert found.prior == pytest.approx(prior, rel=0.01)
    assert found.rate == pytest.approx(prior + kls.sum().item(), rel=0.003)
    assert found.num_images == 16


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v", "mean"])
@pytest.mark.parametrize(
    ("variance", "words", "same_as"),
    [
        ("fixed_small", None, "fixed_small"),
        ("learned_range", -1.0, "fixed_small"),
        ("learned_range", 1.0, "fixed_large"),
    ],
)
def test_every_prediction_and_a_learned_variance_have_the_same_bound(
    prediction, variance, words, same_as
):
    pictures = [gaussian_pictures(2, 3, 4, 4, dtype=torch.float64)]
    process, plain = diffusion(prediction, variance, "bound"), diffusion(variance=same_as)
    found = variational_bound(gaussian_model(process, words), process, pictures, seed=0)
    expected = variational_bound(gaussian_model(plain), plain, pictures, seed=0)
    torch.testing.assert_close(found.terms[1:], expected.terms[1:], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found.rmse, expected.rmse, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("variance", "kls"), [("fixed_small", 0.0), ("fixed_large", 0.486419)])
def test_a_perfect_network_leaves_only_the_gap_of_the_fixed_variance_and_the_decoder(variance, kls):
    process = diffusion(variance=variance, betas=LINEAR)
    pictures = [(torch.arange(1), torch.full((1, 1, 4, 4), GREY))]
    found = variational_bound(
        model_that_knows(process, lambda x_t, abar: torch.full_like(x_t, GREY)),
        process,
        pictures,
        seed=0,
    )
    assert found.rate - found.prior == pytest.approx(kls, rel=1e-5, abs=1e-7)
    assert found.distortion == pytest.approx(1.30567, rel=1e-5)
    assert found.total == pytest.approx(found.prior + found.terms.sum().item(), rel=1e-12)
    assert found.rmse.max() < 0.01  # not 0, since the network works in float32


@pytest.mark.parametrize(
    ("square", "bits"), [(0.0, 5.87478e-10), (0.25, 7.27868e-6), (1.0, 2.91129e-5)]
)
def test_the_prior_has_its_golden_values(square, bits):
    process = diffusion(betas=LINEAR)
    pictures = [(torch.arange(1), torch.full((1, 1, 1, 1), square**0.5))]
    assert variational_bound(lambda x_t, t: x_t, process, pictures, seed=0).prior == pytest.approx(
        bits, rel=1e-5
    )


def test_an_estimate_outside_the_range_of_pixels_is_held_in_it():
    process = diffusion("x0")
    pictures = [(torch.arange(1), torch.full((1, 1, 2, 2), 0.5))]
    far, edge = (
        variational_bound(
            lambda x_t, t, level=level: torch.full_like(x_t, level), process, pictures, seed=0
        )
        for level in (3.0, 1.0)
    )
    assert torch.equal(far.terms, edge.terms)
    np.testing.assert_allclose(far.rmse, 127.5 * 0.5)
    snr = process.alphas_cumprod / (1 - process.alphas_cumprod)
    np.testing.assert_allclose(far.epsilon_mse, snr * 0.5**2, rtol=1e-4)  # from the clipped x0_hat


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_a_predicted_mean_is_believed_as_it_is(variance):
    """A mean off by 0.01 costs 0.01^2 / (2 sigma^2) nats at each t.

    This follows "xprev" in the p_mean_variance of Ho et al. Rebuilt from a clipped x0_hat, the mean
    would cost less: 16.76 bits/dim in total instead of 21.84 with fixed_large.
    """
    process = diffusion("mean", variance, betas=LINEAR)
    x0 = torch.full((1, 1, 4, 4), GREY, dtype=torch.float64)

    def model(x_t, t):
        return process.posterior_mean(x0, x_t, t) + 0.01

    found = variational_bound(model, process, [(torch.arange(1), x0)], seed=0)
    abar = torch.cumprod(1 - LINEAR, dim=0)
    posterior = (LINEAR[1:] * (1 - abar[:-1]) / (1 - abar[1:])).numpy()
    sigma2 = posterior if variance == "fixed_small" else LINEAR[1:].numpy()
    gap = np.log(posterior / sigma2)
    kls = 0.5 * (-1 - gap + np.exp(gap) + 0.01**2 / sigma2) / np.log(2)
    np.testing.assert_allclose(found.terms[1:], kls, rtol=1e-8)
    deviation = posterior[0] ** 0.5
    z = [(edge / 255 - 0.01) / deviation for edge in (-1, 1)]
    lower, upper = (0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))) for z in z)
    assert found.distortion == pytest.approx(-np.log2(upper - lower), rel=1e-8)
    if variance == "fixed_large":
        assert found.total == pytest.approx(21.84, abs=0.005)


def test_neither_batches_nor_their_order_nor_processes_change_a_figure():
    process = diffusion(variance="learned_range", loss="hybrid")
    numbers, x0 = gaussian_pictures(7, 3, 4, 4)
    model = gaussian_model(process, 0.3)
    whole = bound.bound_sums(model, process, [(numbers, x0)], seed=3)
    losses = bound.loss_sums(model, process, [(numbers, x0)], seed=3, num_buckets=4)
    halves = [(numbers[:3], x0[:3]), (numbers[3:], x0[3:])]
    for parts in (in_batches(numbers, x0, 1), in_batches(numbers.flip(0), x0.flip(0), 3), halves):
        torch.testing.assert_close(
            bound.bound_sums(model, process, parts, seed=3).totals,
            whole.totals,
            rtol=1e-6,
            atol=1e-6,
        )
        torch.testing.assert_close(
            bound.loss_sums(model, process, parts, seed=3, num_buckets=4).totals,
            losses.totals,
            rtol=1e-6,
            atol=1e-6,
        )
    first, second = ([half] for half in halves)
    merged = (
        bound.bound_sums(model, process, first, seed=3)
        + bound.bound_sums(model, process, second, seed=3)
    ).mean()
    assert merged.total == pytest.approx(whole.mean().total, rel=1e-6)
    assert merged.num_images == 7
    merged = (
        bound.loss_sums(model, process, first, seed=3, num_buckets=4)
        + bound.loss_sums(model, process, second, seed=3, num_buckets=4)
    ).mean()
    np.testing.assert_allclose(merged, losses.mean(), rtol=1e-6)


def test_seed_and_number_of_an_image_decide_its_noise():
    process = diffusion()
    _, x0 = gaussian_pictures(1, 1, 2, 2)
    totals = {
        variational_bound(
            gaussian_model(process), process, [(torch.tensor([number]), x0)], seed
        ).total
        for number, seed in ((0, 0), (1, 0), (0, 1))
    }
    assert len(totals) == 3


def test_a_diffusion_that_has_been_evaluated_still_trains():
    process = diffusion(loss="bound")
    variational_bound(gaussian_model(process), process, [gaussian_pictures(1, 1, 2, 2)], seed=0)
    weight = torch.ones(1, requires_grad=True)
    numbers, x0 = gaussian_pictures(1, 1, 2, 2)
    process.losses(
        lambda x_t, t: weight * x_t, x0, numbers + 9, torch.randn_like(x0)
    ).sum().backward()
    assert weight.grad.isfinite().all()


def test_no_images_have_no_mean():
    process = diffusion()
    with pytest.raises(ValueError, match="no images"):
        variational_bound(gaussian_model(process), process, [], seed=0)
    with pytest.raises(ValueError, match="no images"):
        losses_by_timestep(gaussian_model(process), process, [], seed=0)


def some_bound(num_timesteps):
    """Returns a bound with a KL of 2^-t bits and an error of t at each t."""
    t = torch.arange(num_timesteps, dtype=torch.float64)
    terms = torch.where(t == 0, 2.0, 0.5**t)
    return bound.Bound(prior=0.001, terms=terms, rmse=t, epsilon_mse=t / 9, num_images=1)


def test_the_curve_adds_up_what_was_sent_before_each_timestep():
    found = some_bound(4)
    assert bound.rate_distortion(found) == [
        (1, 0.001, 3.0),
        (2, pytest.approx(0.126), 2.0),
        (3, pytest.approx(0.376), 1.0),
        (4, pytest.approx(0.876), 0.0),
    ]
    assert (found.rate, found.distortion, found.total) == (
        pytest.approx(0.876),
        2.0,
        pytest.approx(2.876),
    )


def test_the_curve_is_saved_as_numbers_and_as_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    found = some_bound(20)
    bound.save_rate_distortion(tmp_path / "curve.png", tmp_path / "curve.csv", found)
    with (tmp_path / "curve.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["t"]) for row in rows] == list(range(20))
    assert [float(row["term_bits_per_dim"]) for row in rows] == found.terms.tolist()
    assert [float(row["rmse"]) for row in rows] == found.rmse.tolist()
    assert [float(row["epsilon_mse"]) for row in rows] == found.epsilon_mse.tolist()
    assert (int(rows[0]["reverse_time"]), float(rows[0]["rate_bits_per_dim"])) == (
        20,
        pytest.approx(found.rate),
    )
    with Image.open(tmp_path / "curve.png") as picture:
        assert picture.width > 2 * picture.height
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curve.csv", "curve.png"]


def test_without_matplotlib_the_numbers_are_saved_and_the_error_names_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(ValueError, match=r"matplotlib: pip install -e '\.\[plots\]'"):
        bound.save_rate_distortion(tmp_path / "curve.png", tmp_path / "curve.csv", some_bound(20))
    assert [path.name for path in tmp_path.iterdir()] == ["curve.csv"]


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
def test_losses_by_timestep_of_gaussian_data_have_their_closed_form(prediction):
    process = diffusion(prediction)
    found = losses_by_timestep(
        gaussian_model(process),
        process,
        in_batches(*gaussian_pictures(65536, 1, 2, 2), 16384),
        seed=0,
        num_buckets=5,
    )
    abar = process.alphas_cumprod
    of_x0 = {"x0": torch.ones_like(abar), "epsilon": abar / (1 - abar), "v": 1 / (1 - abar)}[
        prediction
    ]
    expected = (of_x0 * gaussian_error(process)).reshape(5, 4).mean(dim=1)
    assert [(bucket.first, bucket.last) for bucket in found] == [
        (0, 3),
        (4, 7),
        (8, 11),
        (12, 15),
        (16, 19),
    ]
    np.testing.assert_allclose([bucket.loss for bucket in found], expected, rtol=0.015)


def test_buckets_hold_every_timestep_once_and_no_more_than_there_are():
    process = diffusion()
    spans = [
        (bucket.first, bucket.last)
        for bucket in losses_by_timestep(
            lambda x_t, t: x_t, process, [gaussian_pictures(1, 1, 2, 2)], 0, num_buckets=7
        )
    ]
    assert [t for first, last in spans for t in range(first, last + 1)] == list(range(20))
    for num_buckets in (0, 21):
        with pytest.raises(ValueError, match=f"num_buckets={num_buckets}"):
            losses_by_timestep(lambda x_t, t: x_t, process, [], 0, num_buckets)
