"""Stateless random numbers: each is a function of its keys and nothing else.

A stream is SplitMix64 (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators")
started from a hash of its keys, in integer tensor operations. So a sample's noise does not depend
on the batch it is drawn in, the process that draws it, what was drawn before, or the kind of
device. A resume needs no saved state, and no step waits for the host.

Streams are independent in practice, not by construction. All are pieces of SplitMix64's single
cycle that start where a hash puts them, so two streams of n words overlap with probability
2n / 2^64. Training for 800,000 updates with 128 images of 32x32 draws its noise from 10^8 streams
(n = 1536); about one pair of them overlaps.

Keys are a purpose (TRAIN_NOISE, ...), the run's seed, and integers such as step and position.
"""

import math

import torch
from torch import Tensor

(
    TRAIN_NOISE,
    TRAIN_TIMESTEP,
    TRAIN_FLIP,
    TRAIN_DROPOUT,
    DATA_ORDER,
    INITIAL_WEIGHTS,
    SAMPLE_LATENT,
    SAMPLE_STEP,
    TRAIN_LABEL,
    EVALUATION,
    HELD_OUT,
) = range(1, 12)

_GOLDEN_GAMMA = 0x9E3779B97F4A7C15
_INVERSE_GAMMA = pow(_GOLDEN_GAMMA, -1, 2**64)
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def _signed(value: int) -> int:
    """Returns the int64 with the same 64 bits; int64 sums and products wrap like unsigned ones."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


def _shift_xor(z: Tensor, bits: int) -> Tensor:
    # >> on int64 copies the sign; the mask makes it logical
    return (z >> bits).bitwise_and_(2 ** (64 - bits) - 1).bitwise_xor_(z)


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's output function, a bijection of the 64-bit integers."""
    z = _shift_xor(z, 30).mul_(_signed(_MIX_1))
    z = _shift_xor(z, 27).mul_(_signed(_MIX_2))
    return _shift_xor(z, 31)


def host_key(*keys: int) -> int:
    """Returns a 63-bit integer for these keys, to seed a generator on the host (torch.manual_seed).

    This is `_mix` on Python integers, so no device is involved.
    """
    state = 0
    for key in keys:
        state = ((state ^ key) + _GOLDEN_GAMMA) % 2**64
        state = (state ^ state >> 30) * _MIX_1 % 2**64
        state = (state ^ state >> 27) * _MIX_2 % 2**64
        state ^= state >> 31
    return state % 2**63


def stream_keys(purpose: int, seed: int, step: int, positions: Tensor) -> Tensor:
    """Returns the start of one stream per position.

    Args:
        purpose: TRAIN_NOISE or another of these constants.
        seed: The run's seed.
        step: The number of the stream: an optimizer step, timestep or epoch.
        positions: (B,) int64.

    Returns:
        (B,) int64, on the device of positions.
    """
    return _mix((positions ^ host_key(purpose, seed, step)) + _signed(_GOLDEN_GAMMA))


def random_bits(keys: Tensor, count: int, start: int = 0) -> Tensor:
    """Returns `count` outputs of each stream.

    Args:
        keys: (B,) int64.
        count: Outputs per stream.
        start: Outputs to skip at the beginning of each stream.

    Returns:
        (B, count) int64, all 64 bits random.
    """
    # add the start to the keys: compiled code on a GPU counts in 32 bits
    counter = torch.arange(1, count + 1, device=keys.device, dtype=torch.int64)
    # keys + counter * gamma, factored: torch's compiler folds counter * gamma and overflows
    places = (keys * _signed(_INVERSE_GAMMA) + start)[:, None] + counter
    return _mix(places.mul_(_signed(_GOLDEN_GAMMA)))


def uniform(keys: Tensor, count: int) -> Tensor:
    """Draws uniform numbers in [0, 1).

    Args:
        keys: (B,) int64.
        count: Numbers per stream.

    Returns:
        (B, count) float32, multiples of 2^-24.
    """
    return ((random_bits(keys, count) >> 40) & (2**24 - 1)).float() * 2.0**-24


def integers(keys: Tensor, high: int) -> Tensor:
    """Draws one uniform integer in [0, high) per stream.

    Args:
        keys: (B,) int64.
        high: The exclusive upper bound.

    Returns:
        (B,) int64, with a bias below high / 2^63.
    """
    return (random_bits(keys, 1)[:, 0] & (2**63 - 1)) % high


def coin(keys: Tensor) -> Tensor:
    """Tosses one fair coin per stream: (B,) bool."""
    return random_bits(keys, 1)[:, 0] < 0


def normal(keys: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Draws standard normal numbers (Box & Muller 1958).

    Args:
        keys: (B,) int64.
        shape: Shape of each stream's numbers.

    Returns:
        (B, *shape) float32, at most 6.8 in absolute value.
    """
    count = math.prod(shape)
    bits = random_bits(keys, (count + 1) // 2)
    radius = torch.sqrt(-2 * torch.log(((bits & 0xFFFFFFFF).float() + 0.5) * 2.0**-32))
    angle = ((bits >> 32) & 0xFFFFFFFF).float() * (2 * math.pi * 2.0**-32)
    return torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1)[
        :, :count
    ].reshape(-1, *shape)
