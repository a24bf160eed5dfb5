import itertools
import math

import pytest
import torch

from ddpm.system import randomness
from ddpm.system.randomness import (
    coin,
    host_key,
    integers,
    normal,
    random_bits,
    stream_keys,
    uniform,
)

PURPOSES = [
    randomness.TRAIN_NOISE,
    randomness.TRAIN_TIMESTEP,
    randomness.TRAIN_FLIP,
    randomness.SAMPLE_LATENT,
    randomness.SAMPLE_STEP,
]
KEYS = stream_keys(randomness.TRAIN_NOISE, 0, 0, torch.arange(20_000))


def chi_square(counts: torch.Tensor) -> float:
    """Deviation of counts from a uniform distribution, in standard deviations."""
    expected = counts.sum() / len(counts)
    freedom = len(counts) - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom))


def test_a_stream_is_splitmix64():
    """The published outputs for seed 1234567."""
    bits = random_bits(torch.tensor([1234567]), 3)[0].tolist()
    assert [value % 2**64 for value in bits] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


def test_a_number_does_not_depend_on_what_it_is_drawn_with():
    whole = normal(stream_keys(randomness.TRAIN_NOISE, 3, 7, torch.arange(10)), (3, 5, 5))
    alone = normal(stream_keys(randomness.TRAIN_NOISE, 3, 7, torch.tensor([6])), (3, 5, 5))
    assert torch.equal(whole[6:7], alone)


def test_streams_are_pieces_of_one_cycle_that_begin_far_apart():
    """The nearest two of 20,000 starts are about 2^64 / 20,000^2 words of the cycle apart."""
    gamma = 0x9E3779B97F4A7C15
    one = random_bits(KEYS[:1], 9)[0]
    later = random_bits(KEYS[:1] + ((3 * gamma + 2**63) % 2**64 - 2**63), 6)[0]
    assert torch.equal(later, one[3:])
    places = sorted(key * pow(gamma, -1, 2**64) % 2**64 for key in KEYS.tolist())
    nearest = min(after - before for before, after in itertools.pairwise(places))
    assert 1e-3 < nearest / (2**64 / len(KEYS) ** 2) < 10


def test_purposes_seeds_steps_and_positions_begin_different_streams():
    streams = [
        stream_keys(*keys, torch.arange(20))
        for keys in itertools.product(PURPOSES, [0, 1, 2**62], [0, 1, 2])
    ]
    bits = random_bits(torch.cat(streams), 2).flatten().tolist()
    assert len(set(bits)) == len(bits)


def test_a_host_key_is_a_63_bit_number_that_the_order_of_its_keys_decides():
    keys = {host_key(*given) for given in itertools.permutations([1, 2, 3])} | {host_key(2**63 - 1)}
    assert len(keys) == 7
    assert all(0 <= key < 2**63 for key in keys)


def test_normal_numbers_have_the_moments_of_the_standard_normal_and_no_correlation():
    x = normal(KEYS, (50,)).double()  # a million numbers
    assert x.shape == (20_000, 50)
    # spread: the variance of x ** power
    for power, moment, spread in (
        (1, 0, 1),
        (2, 1, 2),
        (3, 0, 15),
        (4, 3, 96),
    ):
        assert (x**power).mean().item() == pytest.approx(
            moment, abs=5 * math.sqrt(spread / x.numel())
        )
    # the two numbers of each Box-Muller pair, then neighbors
    for left, right in (
        (x[:, :25], x[:, 25:]),
        (x[:-1], x[1:]),
        (x[:, :-1], x[:, 1:]),
    ):
        assert (left * right).mean().item() == pytest.approx(0, abs=5 / math.sqrt(left.numel()))


def test_an_odd_count_of_normal_numbers_fills_its_shape():
    assert normal(KEYS[:2], (3, 1, 5)).shape == (2, 3, 1, 5)


def test_uniform_numbers_fill_0_to_1_evenly():
    x = uniform(KEYS, 5)
    assert x.shape == (20_000, 5)
    assert x.min() >= 0
    assert x.max() < 1
    assert abs(chi_square(torch.histc(x, 50, 0, 1))) < 5


def test_integers_are_evenly_spread_below_their_bound():
    assert abs(chi_square(torch.bincount(integers(KEYS, 1000), minlength=1000).double())) < 5
    assert integers(KEYS, 1000).max() == 999
    assert integers(KEYS, 1).sum() == 0


def test_coins_are_fair():
    assert coin(KEYS).double().mean().item() == pytest.approx(
        0.5, abs=5 * 0.5 / math.sqrt(len(KEYS))
    )
