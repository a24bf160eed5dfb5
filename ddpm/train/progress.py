"""What a run says of how far it is: its records, its progress bar, and lines in the log."""

import logging
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from torch import nn
from tqdm import tqdm

from ddpm.config import build
from ddpm.config.schema import Config, Runtime
from ddpm.diffusion.timesteps import NUM_QUARTILES
from ddpm.evaluate.measure import OF_SAMPLES
from ddpm.evaluate.of_data import WATCHED, held_out_split
from ddpm.runs.folder import RunFolder
from ddpm.runs.recording import Recorder
from ddpm.sample.previews import PASSES, Previews
from ddpm.train.costs import Costs, Kind, Spent
from ddpm.train.saving import BYTES, DISK_SPEED

log = logging.getLogger("ddpm")

FIRST_LINES = 3  # reports of a start that the log has all of
LINE_EVERY = 60.0  # seconds from then on between two lines of the log, at least


def bar(steps: Iterator[int], done: int, num_steps: int, watched: bool) -> "tqdm[int]":
    """Puts the steps under a progress bar, where somebody watches.

    It has no time left of tqdm's own, which knows of updates alone.
    """
    return tqdm(
        steps,
        initial=done,
        total=num_steps,
        bar_format="{percentage:3.0f}%|{bar}| step {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
        disable=None if watched else True,
        dynamic_ncols=True,
    )


@dataclass
class Progress:
    """How far a run is, and when it will be done; of the process that leads.

    Attributes:
        folder: The run's.
        config: Its configuration.
        num_steps: Of the whole run.
        recorder: Where values go.
        bar: Of the terminal.
        spent: What the run's time went into.
        costs: What it has cost.
        guesses: Of work between updates that was never done yet: as how many updates it takes, or,
            for "checkpoint", the seconds.
    """

    folder: RunFolder
    config: Config
    num_steps: int
    recorder: Recorder
    bar: "tqdm[int]"
    spent: Spent
    costs: Costs
    guesses: Mapping[str, float]
    _shown: str = ""  # of the last report, in the bar
    _lines: int = 0
    _said: float = field(default_factory=time.monotonic)

    def report(self, step: int, values: dict[str, float]) -> None:
        """Records the values of a step and the costs so far, and shows how far the run is.

        metrics.jsonl and TensorBoard have each report, the log the first ones, and one a minute.
        """
        images, seconds = self.spent.since_last()
        speed = images / seconds if seconds else 0.0
        self.recorder.scalars(step, values)
        self.recorder.speed(step, {"train/images_per_second": speed})
        self.recorder.costs(step, self.costs.line(images, seconds))
        left, words = self._left(step)
        self._shown = f"loss {values['train/loss']:.4f}, {speed:.1f} img/s, "
        self.bar.set_postfix_str(self._shown + words)
        if step == self.num_steps or self._lines < FIRST_LINES or self._overdue():
            self._say(left)
            log.info(
                "step %d of %d  loss %.5f  grad norm %.4f  lr %.3g  %.1f img/s  %s",
                step,
                self.num_steps,
                values["train/loss"],
                values["train/grad_norm"],
                values["train/lr"],
                speed,
                words,
            )

    def remind(self, step: int) -> None:
        """Has the bar, and the log where reports come seldom, say how far the run is.

        No device waits for it.
        """
        if not self.bar.disable:
            self.bar.set_postfix_str(self._shown + self._left(step)[1], refresh=False)
        if self._overdue():
            left, words = self._left(step)
            self._say(left)
            log.info("step %d of %d  %s", step, self.num_steps, words)

    def _overdue(self) -> bool:
        return time.monotonic() - self._said >= LINE_EVERY

    def _say(self, left: float) -> None:
        self._lines, self._said = self._lines + 1, time.monotonic()
        ends = datetime.now(UTC) + timedelta(seconds=left)
        self.folder.update(expected_end=ends.isoformat(timespec="seconds"))

    def _left(self, step: int) -> tuple[float, str]:
        """Seconds left after an update, before what is due then; and in words."""
        of_update, known = self.spent.seconds_of_update(step), self.spent.seconds_each
        guessed = {
            kind: guess * (1 if kind == "checkpoint" else of_update)
            for kind, guess in self.guesses.items()
        }
        due = work_due(step, self.num_steps, self.config.runtime)
        left = seconds_left(step, self.num_steps, of_update, due, {**guessed, **known})
        about = "about " if any(count for kind, count in due.items() if kind not in known) else ""
        return left, about + in_words(left, datetime.now())


def work_due(step: int, num_steps: int, runtime: Runtime) -> dict[Kind, int]:
    """Returns how often each kind of work is still due, after an update and before its own."""
    saved, measured = runtime.checkpoint_every, runtime.evaluate_every
    return {
        "checkpoint": times_due(step, num_steps, saved, measured),
        "preview": times_due(step, num_steps, runtime.sample_every),
        "evaluation": times_due(step, num_steps, measured),
    }


def seconds_left(
    step: int,
    num_steps: int,
    of_update: float,
    due: Mapping[Kind, int],
    seconds_each: Mapping[str, float],
) -> float:
    """Returns the seconds that a run still takes: its updates, and the work between them.

    Args:
        step: Updates done.
        num_steps: Of the whole run.
        of_update: Seconds that one takes.
        due: How often each kind of work is.
        seconds_each: What it takes.
    """
    between = sum(count * seconds_each[kind] for kind, count in due.items())
    return (num_steps - step) * of_update + between


def guesses_of(config: Config, previews: Previews, network: nn.Module) -> dict[str, float]:
    """Returns about what work between updates takes that was never done yet.

    That of previews and evaluations is counted in updates, by their passes forward.

    Args:
        config: The run's configuration.
        previews: How they are drawn.
        network: The run's.
    """
    parameters = sum(parameter.numel() for parameter in network.parameters())
    process, evaluation = build.diffusion(config), config.evaluation
    of_update = PASSES * config.training.batch_size
    calls = build.sampler(previews.settings, process).calls(process)
    measured = 0
    if set(OF_SAMPLES) & set(evaluation.metrics):
        own = build.sampler(build.sampler_settings(config.sampler, process), process)
        measured += evaluation.num_samples * own.calls(process)
    if "bits_per_dim" in evaluation.metrics:
        measured += evaluation.num_images * process.num_timesteps
    if held_out_split(config) is not None:
        measured += 2 * WATCHED * NUM_QUARTILES
    return {
        "checkpoint": BYTES * parameters / DISK_SPEED,
        "preview": config.runtime.num_previews * calls / of_update,
        "evaluation": measured / of_update,
    }


def times_due(first: int, last: int, *intervals: int | None) -> int:
    """Returns at how many of the steps from first to last something is due.

    That is at the multiples of any of the intervals, and at the last step; never if all are None.
    """
    given = [every for every in intervals if every is not None]
    if not given or first > last:
        return 0
    counted = sum((last - 1) // every - (first - 1) // every for every in given)
    if len(given) == 2:  # what is due by both counts once
        both = math.lcm(*given)
        counted -= (last - 1) // both - (first - 1) // both
    return counted + 1


def in_words(left: float, now: datetime) -> str:
    """Returns seconds left as "1:02:30 left, ends 14:32", and the day where it is another."""
    seconds = round(left)
    ends = now + timedelta(seconds=seconds)
    minutes, clock = seconds // 60, f"{seconds % 60:02d}"
    clock = f"{minutes}:{clock}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{clock}"
    day = "" if ends.date() == now.date() else f"{ends:%Y-%m-%d} "
    return f"{clock} left, ends {day}{ends:%H:%M}"
