"""The timesteps that a chain visits.

Every named sampler starts in noise on every named schedule, or is refused before anything is
trained.
"""

import functools
import itertools
import re

import numpy as np
import pytest
import torch
from gaussian import ONE_COLOUR, no_noise, spread_kept
from hydra.utils import instantiate
from omegaconf import OmegaConf

from ddpm.config import build
from ddpm.config.compose import CONF, compose
from ddpm.config.schema import plain_config, training_config
from ddpm.diffusion import schedules
from ddpm.diffusion.process import GaussianDiffusion
from ddpm.diffusion.samplers import Sampler, ddim
from ddpm.diffusion.spacing import spaced_timesteps
from ddpm.plan import __main__ as plan

README = (CONF / "README.md").read_text(encoding="utf-8")
ABAR = GaussianDiffusion(schedules.linear(1000, 1e-4, 0.02)).alphas_cumprod
PURE = GaussianDiffusion(schedules.jsd(1000), prediction="v").alphas_cumprod
SAMPLERS = sorted(file.stem for file in (CONF / "sampler").glob("*.yaml"))
SCHEDULES = sorted(file.stem for file in (CONF / "schedule").glob("*.yaml"))


def of_the_original(num_timesteps, counts):
    """improved-diffusion's space_timesteps (respace.py), which rounds a running sum."""
    chosen, start = set(), 0
    for index, count in enumerate(counts):
        size = num_timesteps // len(counts) + (index < num_timesteps % len(counts))
        position = 0.0
        for _ in range(count):
            chosen.add(start + round(position))
            position += (size - 1) / (count - 1) if count > 1 else 1
        start += size
    return sorted(chosen, reverse=True)


def test_timesteps_are_the_papers():
    assert spaced_timesteps(ABAR, 50, "respaced")[::-1][:6] == [0, 20, 41, 61, 82, 102]
    assert spaced_timesteps(ABAR, 50, "respaced")[:3] == [999, 979, 958]
    assert spaced_timesteps(torch.linspace(0.999, 1e-4, 4000), 50, "respaced")[::-1][:4] == [
        0,
        82,
        163,
        245,
    ]
    assert spaced_timesteps(ABAR, 50, "linear") == list(range(980, -1, -20))
    assert spaced_timesteps(ABAR, 10, "quadratic")[::-1] == [
        0,
        9,
        39,
        88,
        158,
        246,
        355,
        483,
        632,
        800,
    ]
    assert spaced_timesteps(ABAR, 1000, "respaced") == list(range(999, -1, -1))


def test_more_steps_than_timesteps_are_refused():
    with pytest.raises(ValueError, match="num_steps=1001 must lie between 1 and .*1000"):
        spaced_timesteps(ABAR, 1001, "respaced")


@pytest.mark.parametrize("count", [10, 20, 50, 100])
def test_quadratic_is_the_papers_without_the_steps_that_do_nothing(count):
    """Song et al.'s seq for CIFAR-10; with 50 and 100 steps it names a timestep more than once."""
    theirs = [int(s) for s in np.linspace(0, np.sqrt(1000 * 0.8), count) ** 2]
    assert spaced_timesteps(ABAR, count, "quadratic") == sorted(set(theirs), reverse=True)


def test_respacing_has_the_originals_ties_for_every_number_of_steps():
    for count in range(2, 1001):
        assert spaced_timesteps(ABAR, count, "respaced") == of_the_original(1000, [count])
    assert spaced_timesteps(ABAR, 1, "respaced") == [999]  # theirs is 0, without any noise


@pytest.mark.parametrize(
    "counts", [[10, 15, 20], [1000], [333], [7, 1, 2], [90, 60, 60, 20, 20], [334, 333, 333]]
)
def test_sections_are_the_originals(counts):
    expected = of_the_original(1000, counts)
    assert len(expected) == sum(counts)
    text = ",".join(str(count) for count in counts)
    for spacing in (counts, text):
        assert spaced_timesteps(ABAR, None, spacing) == expected
        assert spaced_timesteps(ABAR, sum(counts), spacing) == expected


def test_sections_of_their_example():
    """Of 300 timesteps, the first 100 give 10, the next 100 give 15 and the last 100 give 20.

    Each section keeps its ends.
    """
    found = spaced_timesteps(torch.linspace(0.99, 0.01, 300), None, "10,15,20")
    per_section = [[t for t in found if t // 100 == section] for section in range(3)]
    assert [len(section) for section in per_section] == [10, 15, 20]
    assert [(section[-1], section[0]) for section in per_section] == [
        (0, 99),
        (100, 199),
        (200, 299),
    ]


@pytest.mark.parametrize("typed", ["[10,15,20]", '"10,15,20"', "ddim125"])
def test_a_spacing_is_typed_and_the_number_of_its_steps_is_known(typed):
    config = training_config(compose([f"sampler.spacing={typed}"]))
    diffusion = build.diffusion(config)
    count = 125 if typed == "ddim125" else 45
    assert len(build.sampler(config.sampler, diffusion).timesteps(diffusion)) == count
    assert build.sampler_settings(config.sampler, diffusion)["num_steps"] == count


@pytest.mark.parametrize(("count", "stride"), [(10, 100), (50, 20), (30, 34), (1000, 1), (2, 500)])
def test_ddim_with_a_number_takes_a_whole_stride(count, stride):
    expected = list(range(0, 1000, stride))
    assert len(expected) == count
    assert sorted(spaced_timesteps(ABAR, None, f"ddim{count}")) == expected


@pytest.mark.parametrize(
    ("num_steps", "spacing", "reason"),
    [
        (None, "ddim501", "spacing=ddim501: no integer stride .*use spacing=linear num_steps=501"),
        (None, [600, 10], r"section 1 has 500 timesteps, fewer than 600"),
        (None, [10, 0], r"spacing=\[10, 0\] must be 'respaced'.*'ddimN'"),
        (None, "10,,2", "spacing=10,,2 must be"),
        (None, "ddim", "spacing=ddim must be"),
        (50, "ddim25", "num_steps=50 contradicts spacing=ddim25, .* 25 steps; use num_steps=null"),
        (0, "respaced", "num_steps=0 must lie between 1"),
        (1001, "logsnr", "num_steps=1001 must lie between 1"),
    ],
)
def test_a_spacing_that_cannot_be_says_why(num_steps, spacing, reason):
    with pytest.raises(ValueError, match=reason):
        spaced_timesteps(ABAR, num_steps, spacing)


def test_linear_keeps_the_papers_timesteps_and_starts_within_one_stride_of_the_last():
    for count in range(1, 1001):
        found = spaced_timesteps(ABAR, count, "linear")
        assert len(found) == count
        assert found[-1] == 0
        assert found[0] >= 1000 - 1000 / count - 1
        if 1000 % count == 0:
            assert found[::-1] == list(range(0, 1000, 1000 // count))  # generalized_steps' seq
        gaps = {first - second for first, second in itertools.pairwise(found)}
        assert gaps <= {1000 // count, -(-1000 // count)}


@pytest.mark.parametrize("count", [1, 7, 10, 30, 50, 333, 1000])
def test_linear_from_pure_noise_is_diffusers_trailing(count):
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(timestep_spacing="trailing")
    theirs.set_timesteps(count)
    assert spaced_timesteps(PURE, count, "linear") == theirs.timesteps.tolist()


@pytest.mark.parametrize("spacing", ["logsnr", "edm"])
@pytest.mark.parametrize("count", [1, 2, 18, 20, 500, 1000])
def test_a_grid_of_sigmas_takes_distinct_timesteps_however_coarse_the_schedule(spacing, count):
    for abar in (ABAR, PURE):
        found = spaced_timesteps(abar, count, spacing)
        assert found == sorted(set(found), reverse=True)
        assert len(found) == count
        assert found[-1] >= 0
        assert found[-1] == 0 or count < 3
    assert found[0] == 999  # pure noise


def test_the_grids_are_the_published_ones():
    """Karras et al. 2022, Eq. 5, N = 18, on a fine schedule of the same range."""
    karras = [80, 57.586, 40.7856, 28.3746, 19.3525, 12.9101, 8.40094, 5.31519, 3.25682, 1.92334, 1.08817, 0.585348, 0.296442, 0.139516, 0.0599473, 0.0229345, 0.00752802, 0.002]  # fmt: skip
    sigmas = torch.from_numpy(np.geomspace(0.002, 80, 20000))
    found = sigmas[spaced_timesteps(1 / (1 + sigmas**2), 18, "edm")]
    np.testing.assert_allclose(found, karras, rtol=5e-4)
    # Lu et al.'s grid: even in log sigma, from exp(5.1) at most
    for most, least in ((80, 0.002), (1000, 0.01)):
        sigmas = torch.from_numpy(np.geomspace(least, most, 20000))
        found = sigmas[spaced_timesteps(1 / (1 + sigmas**2), 20, "logsnr")]
        expected = np.linspace(np.log(min(most, np.exp(5.1))), np.log(least), 20)
        np.testing.assert_allclose(found.log(), expected, atol=5e-4)


@functools.cache
def node(sampler):
    return plain_config(compose([f"sampler={sampler}"]))["sampler"]


def process(schedule, zero_terminal_snr=False):
    settings = OmegaConf.load(CONF / "schedule" / f"{schedule}.yaml")
    settings.zero_terminal_snr = zero_terminal_snr
    return GaussianDiffusion(instantiate(settings), prediction="v")


def kept_by(settings, diffusion):
    built = build.sampler(settings, diffusion)
    return spread_kept(built.function, diffusion.alphas_cumprod, built.timesteps(diffusion))


def ode_keeps(diffusion):
    """The share of the brightness that the exact ODE keeps.

    A chain starts with variance 1, but x_T on the exact path has the noised data's variance.
    """
    abar = diffusion.alphas_cumprod[-1].item()
    return (abar * ONE_COLOUR + 1 - abar) ** -0.5


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sampler", ["dpmpp20", "heun18"])
def test_second_order_samplers_keep_the_brightness_or_name_the_option_that_does(sampler, schedule):
    assert 0.975 < kept_by(node(sampler), process(schedule, zero_terminal_snr=True)) < 1.025
    plainly = process(schedule)
    if ode_keeps(plainly) >= 0.95:
        assert 0.95 < kept_by(node(sampler), plainly) < 1.03
        return
    with pytest.raises(ValueError, match=r"sampler\.spacing=.*spread in brightness") as found:
        build.sampler(node(sampler), plainly)
    told = re.search("use (.*) in training|use sampler=(.*?),", str(found.value))
    if told[2]:
        assert kept_by(node(told[2]), plainly) >= 0.95
    else:
        assert told[1] == "schedule.zero_terminal_snr=true objective=v"
    all_the_same = {**node(sampler), "spacing": "respaced"}
    assert build.sampler(all_the_same, plainly).timesteps(plainly)[0] == 999


@pytest.mark.parametrize("schedule", ["linear", "cosine", "sigmoid", "jsd"])
@pytest.mark.parametrize("sampler", ["dpmpp20", "heun18"])
def test_pictures_of_one_colour_have_the_colour_that_their_noise_stands_for(sampler, schedule):
    """Draws 40 pictures of 32x32 as a run does: v prediction, x0_hat clipped to [-1, 1].

    The exact path maps noise of mean z / 32 to the brightness z / 2.
    """
    diffusion = process(schedule)
    built = build.sampler(node(sampler), diffusion)
    x = torch.randn(40, 1, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def model(x_t, t):
        abar = diffusion.alphas_cumprod[t].reshape(-1, 1, 1, 1)
        colour = x_t.mean(dim=(1, 2, 3), keepdim=True).expand_as(x_t)
        x0 = abar.sqrt() * ONE_COLOUR / (abar * ONE_COLOUR + 1 - abar) * colour
        return abar.sqrt() * (x_t - abar.sqrt() * x0) / (1 - abar).sqrt() - (1 - abar).sqrt() * x0

    drawn = built.walk(model, diffusion, x, built.timesteps(diffusion), no_noise)
    brightness = drawn.mean(dim=(1, 2, 3))
    assert drawn.std(dim=(1, 2, 3)).max() < 0.01
    expected = (16 * x.mean(dim=(1, 2, 3))).clamp(-1, 1)
    torch.testing.assert_close(brightness, expected, rtol=0.03, atol=0.005)


def column(name):
    """The cells of a column of conf/README.md's table of samplers, by sampler."""
    lines = README[README.index("| sampler | calls |") :].splitlines()[: 2 + len(SAMPLERS)]
    head, _, *rows = ([cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines)
    assert [row[0] for row in rows] == SAMPLERS
    return {row[0]: row[head.index(name)] for row in rows}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_readme_says_what_each_sampler_keeps_on_each_schedule(schedule):
    expected = {}
    for sampler in SAMPLERS:
        try:
            expected[sampler] = f"{kept_by(node(sampler), process(schedule)):.2f}"
        except ValueError:
            expected[sampler] = "refused"
    assert column(schedule) == expected


def test_readme_says_how_often_each_sampler_calls_the_network():
    calls = {name: build.sampler(node(name), process("linear")).calls for name in SAMPLERS}
    short, long = (GaussianDiffusion(schedules.linear(T)) for T in (1000, 1250))
    expected = {
        name: "T" if count(short) != count(long) else str(count(short))
        for name, count in calls.items()
    }
    assert column("calls") == expected


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sampler", ["ddim", "ddim10", "ddim50"])
def test_ddim_works_with_zero_terminal_snr(sampler, schedule):
    diffusion = process(schedule, zero_terminal_snr=True)
    built = build.sampler(node(sampler), diffusion)
    timesteps = built.timesteps(diffusion)
    assert timesteps[0] == diffusion.num_timesteps - 1
    # the step from pure noise is the widest; being of first order, it keeps at most this share
    first = timesteps[1]
    lost = (1 + diffusion.alphas_cumprod[first].item() * (ONE_COLOUR - 1)) ** -0.5
    assert 0.5 * lost < kept_by(node(sampler), diffusion) <= lost


def test_a_chain_that_skips_pure_noise_is_refused_at_zero_terminal_snr():
    for spacing, num_steps in (("quadratic", 50), ("ddim50", None), ([50, 1], None)):
        with pytest.raises(
            ValueError, match=r"zero terminal SNR .* use spacing=respaced or linear"
        ):
            Sampler(ddim, num_steps=num_steps, spacing=spacing).timesteps(process("jsd"))


def test_a_pair_that_loses_brightness_is_refused_before_training_and_by_plan(refusal, complaint):
    pair = ("schedule=quad", "sampler=heun18")
    for said in (complaint(*pair), refusal(plan.main, *pair)):
        assert re.match(
            r"error: sampler\.spacing=edm: .* would keep only 0\.92 .*sampler=ancestral", said
        )
