"""With what a run draws its previews, and what share of its training that takes.

Both are known before it starts.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddpm.config import build
from ddpm.config.schema import Config
from ddpm.sample.images import text_of

MOST = 0.05  # of a run's training that previews may take, where runtime.preview_sampler=auto
# Each holds on the schedules that it is not refused for (tests/test_previews.py). Where the first
# is refused, the schedule ends before the noise does, which only a chain that draws noise makes up.
QUICK = ("dpmpp20", "ancestral250")
OWN = "the run's sampler"


@dataclass(frozen=True)
class Previews:
    """How the previews of a run are drawn.

    Attributes:
        name: The option of group sampler, "run" for the run's own.
        settings: Of that sampler, with nothing left open.
        steps: Timesteps that it visits.
        share: What all previews of the run take of its training, counted in passes through the
            network: one forward a call, three a trained image. None if its length is not known.
    """

    name: str
    settings: dict[str, Any]
    steps: int
    share: float | None

    @property
    def words(self) -> str:
        """The sampler: "dpmpp20 (dpm_solver_pp, 20 steps)"."""
        function = self.settings["function"]["_target_"].rpartition(".")[2]
        name = OWN if self.name == "run" else self.name
        return f"{name} ({function}, {self.steps} steps)"

    def text(self, config: Config, step: int) -> dict[str, str]:
        """Returns what a picture of a step says of itself."""
        return {
            "Description": f"step {step}, averaged weights (ema), seed {config.seed}",
            "drawn by": self.words,
            "sampler": _as_text(self.settings),
        }


def previews_of(config: Config, num_steps: int | None) -> Previews:
    """Returns how a run's previews are drawn.

    runtime.preview_sampler=auto takes the run's own sampler where that is at most MOST of training,
    else the first of QUICK that fits and is quicker. A network that predicts the mean is left to
    the run's own: from the mean alone x0_hat is not to be had at high noise.

    Args:
        config: The run's configuration.
        num_steps: Of the whole run; None if not known, which leaves the choice to the run's own.
    """
    choice = config.runtime.preview_sampler
    if choice != "auto":
        return _by(choice, config, num_steps)[0]
    own, calls = _by("run", config, num_steps)
    if own.share is None or own.share <= MOST or build.diffusion(config).prediction == "mean":
        return own
    for name in QUICK:
        try:
            quick, fewer = _by(name, config, num_steps)
        except ValueError:
            continue
        if fewer < calls:
            return quick
    return own


def _by(name: str, config: Config, num_steps: int | None) -> tuple[Previews, int]:
    """The previews drawn by this sampler, and its calls."""
    process, settings = build.diffusion(config), build.preview_sampler(config, name)
    sampler = build.sampler(settings, process)
    calls, share = sampler.calls(process), None
    if num_steps is not None:
        drawn = times(num_steps, config.runtime.sample_every) * config.runtime.num_previews
        share = drawn * calls / (3 * num_steps * config.training.batch_size)
    return Previews(name, settings, len(sampler.timesteps(process)), share), calls


def times(num_steps: int, every: int) -> int:
    """Returns how often in a run what is due every so many steps, and at the last, is done."""
    return -(-num_steps // every)


def cost(config: Config, num_steps: int | None) -> str:
    """Returns in words what draws a run's previews, and what share of its training that takes."""
    chosen, runtime = previews_of(config, num_steps), config.runtime
    if num_steps is None or chosen.share is None:
        return (
            f"{runtime.num_previews} every {runtime.sample_every} steps; what draws them follows "
            "from the number of steps (runtime.preview_sampler)"
        )
    said = (
        f"{times(num_steps, runtime.sample_every)} x {runtime.num_previews} by {chosen.words}, "
        f"{_percent(chosen.share)} of training"
    )
    if chosen.share > MOST:
        said += (
            f", more than {MOST:.0%}: give fewer runtime.num_previews, or more steps between them "
            "(runtime.sample_every)"
        )
    if chosen.name != "run":
        own = _by("run", config, num_steps)[0]
        said += f"; by {own.words} {_percent(own.share)} (runtime.preview_sampler=run)"
    return said


def others_before(config: Config, chosen: Previews, pictures: Sequence[Path]) -> str | None:
    """Says in a line that a run's last preview was drawn by another sampler, if it was.

    Args:
        config: The run's configuration.
        chosen: What draws from now on.
        pictures: The previews that are there, the last of them last.
    """
    if not pictures:
        return None
    before, last = text_of(pictures[-1]), pictures[-1].name
    own = _as_text(build.preview_sampler(config, "run"))  # drew all of earlier versions
    if before.get("sampler", own) == _as_text(chosen.settings):
        return None
    by = before.get("drawn by", OWN)
    return f"previews are drawn by {chosen.words} from here on, those to {last} by {by}"


def drawn_by(pictures: Sequence[Path]) -> str:
    """Returns in words what drew these previews: of each sampler the first picture and its name."""
    found: dict[str, str] = {}
    for picture in pictures:
        found.setdefault(text_of(picture).get("drawn by", OWN), picture.stem)
    if len(found) == 1:
        return next(iter(found))
    return "different samplers: " + ", ".join(f"from {stem} {by}" for by, stem in found.items())


def _as_text(settings: dict[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.3g}%"
