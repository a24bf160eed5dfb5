"""Chooses what draws a run's previews, and estimates their share of the training time.

Both are known before training starts.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor

from ddpm.config import build
from ddpm.config.schema import Config
from ddpm.diffusion.process import GaussianDiffusion
from ddpm.diffusion.spacing import BRIGHTNESS, spaced_timesteps
from ddpm.sample.images import text_of

MOST = 0.05  # share of training that previews may take with runtime.preview_sampler=auto
# Forward passes that take as long as training on one image: three by count of multiplications, but
# 1.7 to 2.5 for the quick start's small network on a CPU.
PASSES = 2
LEAST = 50  # steps; a shorter chain is no preview of a longer one
HELD = 0.95  # share of the full chain's spread that a shorter one must keep to stand in for it
OWN = "the run's sampler"


@dataclass(frozen=True)
class Previews:
    """How the previews of a run are drawn.

    Attributes:
        name: An option of group sampler, or "run" for the run's own, or "quick" for a short chain.
        settings: The sampler's settings, with nothing left open.
        steps: Number of timesteps that it visits.
        share: Upper estimate of the share of training that all previews take, in forward passes:
            one per network call, PASSES per trained image. None if the run's length is unknown.
    """

    name: str
    settings: dict[str, Any]
    steps: int
    share: float | None

    @property
    def words(self) -> str:
        """The sampler in words, such as "dpmpp20 (dpm_solver_pp, 20 steps)"."""
        function = self.settings["function"]["_target_"].rpartition(".")[2]
        name = {"run": OWN, "quick": "a quick sampler"}.get(self.name, self.name)
        return f"{name} ({function}, {self.steps} steps)"

    def text(self, config: Config, step: int) -> dict[str, str]:
        """Returns the text chunks of the preview at a step."""
        return {
            "Description": f"step {step}, averaged weights (ema), seed {config.seed}, "
            f"{config.training.precision}",
            "drawn by": self.words,
            "sampler": _as_text(self.settings),
        }


def previews_of(config: Config, num_steps: int | None) -> Previews:
    """Returns how a run's previews are drawn.

    runtime.preview_sampler=auto takes the run's own sampler if that costs at most MOST of training.
    Otherwise it takes Ho et al.'s, respaced to as many steps as fit: early in training its pictures
    are cleaner than an ODE solver's. If so short a chain would lose brightness, it takes dpmpp20,
    provided that the schedule allows it. A network that predicts the mean keeps the run's own
    sampler: other chains need x0_hat, which the mean does not give at high noise.

    Args:
        config: The run's configuration.
        num_steps: Optimizer steps of the whole run. None if unknown, which keeps the run's own
            sampler.
    """
    choice, process = config.runtime.preview_sampler, build.diffusion(config)
    if choice != "auto":
        settings = build.preview_sampler(config, choice, process)
        return _by(choice, settings, config, num_steps, process)[0]
    own, calls = _by_own(config, num_steps, process)
    if own.share is None or own.share <= MOST or process.prediction == "mean":
        return own
    guidance = own.settings["guidance_scale"]
    count = int(MOST * calls / own.share) // (1 if guidance == 1 else 2)
    count = min(max(count, LEAST), process.num_timesteps)
    ancestral = build.preview_sampler(config, "ancestral", process)
    ancestral["function"]["variance"] = "fixed_small"  # works in few steps and for any network
    ancestral["num_steps"] = count
    short, fewer = _by("quick", ancestral, config, num_steps, process)
    quick = [(short, fewer)]
    if (short.share or 0) > MOST or not _stands_for_all(process.alphas_cumprod, count):
        with suppress(ValueError):
            settings = build.preview_sampler(config, "dpmpp20", process)
            quick.insert(0, _by("dpmpp20", settings, config, num_steps, process))
    return next((found for found, fewer in quick if fewer < calls), own)


def _by_own(
    config: Config, num_steps: int | None, process: GaussianDiffusion
) -> tuple[Previews, int]:
    """Returns the previews drawn by the run's own sampler, and its network calls per image."""
    return _by("run", build.preview_sampler(config, "run", process), config, num_steps, process)


def _by(
    name: str,
    settings: dict[str, Any],
    config: Config,
    num_steps: int | None,
    process: GaussianDiffusion,
) -> tuple[Previews, int]:
    """Returns the previews drawn by this sampler, and its network calls per image."""
    sampler = build.sampler(settings, process)
    calls, share = sampler.calls(process), None
    if num_steps is not None:
        drawn = times(num_steps, config.runtime.sample_every) * config.runtime.num_previews
        share = drawn * calls / (PASSES * num_steps * config.training.batch_size)
    return Previews(name, settings, len(sampler.timesteps(process)), share), calls


def _stands_for_all(alphas_cumprod: Tensor, count: int) -> bool:
    """Returns whether solid-color pictures keep their spread in brightness in `count` steps."""
    short, whole = (_spread(alphas_cumprod, steps) for steps in (count, None))
    return short >= HELD * whole


def _spread(alphas_cumprod: Tensor, count: int | None) -> float:
    """Returns the standard deviation that the exact ancestral chain gives, relative to the data's.

    Everything is linear and Gaussian, so it is enough to track the variance.
    """
    timesteps = spaced_timesteps(alphas_cumprod, count)
    abars = [*(float(alphas_cumprod[t]) for t in timesteps), 1.0]
    found = 1.0
    for abar, after in pairwise(abars):
        beta = 1 - abar / after
        x0_hat = abar**0.5 * BRIGHTNESS / (abar * BRIGHTNESS + 1 - abar)
        of_x0, of_x_t = after**0.5 * beta, (1 - beta) ** 0.5 * (1 - after)
        factor = (of_x0 * x0_hat + of_x_t) / (1 - abar)
        found = factor**2 * found + beta * (1 - after) / (1 - abar)
    return float((found / BRIGHTNESS) ** 0.5)


def times(num_steps: int, every: int) -> int:
    """Returns how often a run does what is due every `every` steps and at the last one."""
    return -(-num_steps // every)


def cost(config: Config, num_steps: int | None, chosen: Previews) -> str:
    """Says what draws a run's previews and what share of its training that takes.

    Args:
        config: The run's configuration.
        num_steps: Optimizer steps of the whole run; None if unknown.
        chosen: The result of previews_of.
    """
    runtime = config.runtime
    if num_steps is None or chosen.share is None:
        return (
            f"{runtime.num_previews} every {runtime.sample_every} steps; the sampler depends on "
            "the number of steps (runtime.preview_sampler)"
        )
    said = (
        f"{times(num_steps, runtime.sample_every)} x {runtime.num_previews} by {chosen.words}, "
        f"{_percent(chosen.share)} of training"
    )
    if chosen.share > MOST:
        said += f", more than {MOST:.0%}: lower runtime.num_previews or raise runtime.sample_every"
    if chosen.name != "run":
        own = _by_own(config, num_steps, build.diffusion(config))[0]
        said += f"; {own.words} would take {_percent(own.share)} (runtime.preview_sampler=run)"
    return said


def others_before(config: Config, chosen: Previews, pictures: Sequence[Path]) -> str | None:
    """Returns a line if another sampler drew the run's last preview, else None.

    Args:
        config: The run's configuration.
        chosen: What draws previews from now on.
        pictures: The existing previews, oldest first.
    """
    if not pictures:
        return None
    before, last = text_of(pictures[-1]), pictures[-1].name
    # earlier versions wrote no such text, and always drew with the run's own sampler
    own = _as_text(build.preview_sampler(config, "run", build.diffusion(config)))
    if before.get("sampler", own) == _as_text(chosen.settings):
        return None
    by = before.get("drawn by", OWN)
    return f"previews are drawn by {chosen.words} from here on; up to {last} by {by}"


def drawn_by(pictures: Sequence[Path]) -> str:
    """Names the sampler that drew these previews, or each sampler with its first picture."""
    found: dict[str, str] = {}
    for picture in pictures:
        found.setdefault(text_of(picture).get("drawn by", OWN), picture.stem)
    if len(found) == 1:
        return next(iter(found))
    return "different samplers: " + ", ".join(f"from {stem} {by}" for by, stem in found.items())


def _as_text(settings: dict[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)


def _percent(share: float | None) -> str:
    if share is None:
        return ""
    return f"{share:,.0%}" if share >= 1 else f"{100 * share:.3g}%"
