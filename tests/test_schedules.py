import pytest
import torch

from ddpm.diffusion.schedules import cosine, linear

PAPER = {"beta_start": 1e-4, "beta_end": 0.02}
IMPROVED = {"offset": 0.008, "max_beta": 0.999}

LINEAR = {  # t: (beta, alphas_cumprod)
    0: (0.0001, 0.9999),
    1: (0.00011991992, 0.99978009),
    10: (0.0002991992, 0.99780657),
    100: (0.002091992, 0.89514159),
    500: (0.01005996, 0.077796658),
    999: (0.02, 4.0358298e-05),
}
COSINE = {
    0: (4.1284225e-05, 0.99995872),
    1: (4.6141753e-05, 0.99991258),
    10: (8.9871362e-05, 0.9992789),
    100: (0.00053189916, 0.97157568),
    500: (0.0031556914, 0.49228517),
    999: (0.999, 2.4287669e-09),
}


@pytest.mark.parametrize(
    ("betas", "golden"),
    [(linear(1000, **PAPER), LINEAR), (cosine(1000, **IMPROVED), COSINE)],
    ids=["linear", "cosine"],
)
def test_betas_and_what_is_left_of_the_image_are_the_published_ones(betas, golden):
    assert betas.dtype == torch.float64
    assert betas.shape == (1000,)
    alphas_cumprod = torch.cumprod(1 - betas, dim=0)
    for t, (beta, abar) in golden.items():
        assert betas[t].item() == pytest.approx(beta, rel=1e-7)
        assert alphas_cumprod[t].item() == pytest.approx(abar, rel=1e-7)


@pytest.mark.parametrize(
    ("betas", "last"),
    [(linear(4000, 2.5e-5, 5e-3), 4.24665e-05), (cosine(4000, **IMPROVED), 1.51798e-10)],
    ids=["linear", "cosine"],
)
def test_four_thousand_timesteps_end_where_the_published_ones_do(betas, last):
    assert torch.prod(1 - betas).item() == pytest.approx(last, rel=1e-5)


@pytest.mark.parametrize("num_timesteps", [1000, 4000])
def test_only_the_last_cosine_beta_reaches_its_cap(num_timesteps):
    assert (cosine(num_timesteps, **IMPROVED) == 0.999).nonzero().flatten().tolist() == [
        num_timesteps - 1
    ]


@pytest.mark.parametrize(
    ("schedule", "changed", "argument"),
    [
        (linear, {"num_timesteps": 1}, "num_timesteps=1"),
        (linear, {"beta_start": 0.0}, r"beta_start=0\.0"),
        (linear, {"beta_end": 1.0}, r"beta_end=1\.0"),
        (cosine, {"num_timesteps": 0}, "num_timesteps=0"),
        (cosine, {"offset": -0.1}, r"offset=-0\.1"),
        (cosine, {"max_beta": 1.0}, r"max_beta=1\.0"),
    ],
)
def test_what_is_no_schedule_is_refused_by_the_argument_to_change(schedule, changed, argument):
    with pytest.raises(ValueError, match=argument):
        schedule(**{"num_timesteps": 10, **(PAPER if schedule is linear else IMPROVED), **changed})
