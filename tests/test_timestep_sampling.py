"""Importance sampling of timesteps: unbiased, uses the last losses, and waits for all of them."""

import torch

from ddpm.diffusion.timesteps import LossSecondMoment, Uniform
from ddpm.system.randomness import stream_keys

T, HISTORY = 8, 10


def warmed(losses_of):
    sampler = LossSecondMoment(T, torch.device("cpu"), history=HISTORY)
    for _ in range(HISTORY):
        t = torch.arange(T)
        sampler.update(t, losses_of(t))
    return sampler


def keys(count):
    return stream_keys(1, 0, 0, torch.arange(count))


def test_uniform_until_every_timestep_has_a_full_history():
    sampler = LossSecondMoment(T, torch.device("cpu"), history=HISTORY)
    for _ in range(HISTORY):
        torch.testing.assert_close(sampler.probabilities(), torch.full((T,), 1 / T))
        # all but the last timestep
        sampler.update(torch.arange(T - 1), torch.arange(T - 1) + 1.0)
    torch.testing.assert_close(sampler.probabilities(), torch.full((T,), 1 / T))


def test_probabilities_follow_the_root_mean_square_of_the_losses():
    sampler = warmed(lambda t: t + 1.0)
    expected = torch.arange(1, T + 1) / sum(range(1, T + 1)) * 0.999 + 0.001 / T
    torch.testing.assert_close(sampler.probabilities(), expected)


def test_only_the_last_losses_count_even_if_one_batch_brings_more():
    sampler = warmed(lambda t: torch.ones(T))
    sampler.update(
        torch.full((HISTORY + 3,), 2),
        torch.cat([torch.full((3,), 1e6), torch.full((HISTORY,), 3.0)]),
    )
    share = torch.where(torch.arange(T) == 2, 3.0, 1.0)
    torch.testing.assert_close(sampler.probabilities(), share / share.sum() * 0.999 + 0.001 / T)


def test_weighted_losses_estimate_the_uniform_mean():
    sampler = warmed(lambda t: (t + 1.0) ** 2)
    t, weights = sampler.draw(keys(200_000))
    assert torch.bincount(t, minlength=T)[-1] > 5 * torch.bincount(t, minlength=T)[0]
    estimate = (weights * (t + 1.0)).mean().item()
    # the mean of t + 1 for uniform t, within about four standard errors
    assert abs(estimate - (T + 1) / 2) < 0.03


def test_state_moves_to_another_sampler():
    sampler, other = (
        warmed(lambda t: t + 1.0),
        LossSecondMoment(T, torch.device("cpu"), history=HISTORY),
    )
    other.load_state_dict(sampler.state_dict())
    torch.testing.assert_close(other.draw(keys(100)), sampler.draw(keys(100)))


def test_uniform_draws_every_timestep_equally_often_and_unweighted():
    t, weights = Uniform(T).draw(keys(80_000))
    assert weights is None
    assert (torch.bincount(t, minlength=T) - 10_000).abs().max() < 500
