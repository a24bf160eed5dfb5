"""How a run reports its progress: in its records, its progress bar and its log."""

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

FIRST_LINES = 3  # the log has every one of this many first reports of a start
LINE_EVERY = 60.0  # least seconds between the log's later lines


def bar(steps: Iterator[int], done: int, num_steps: int, watched: bool) -> "tqdm[int]":
    """Wraps the steps in a progress bar, which shows if `watched`, on a terminal.

    It leaves out tqdm's time left, which counts nothing but updates.
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
    """Reports how far a run is and when it will end. Only the main process has one.

    Attributes:
        folder: The run's folder.
        config: The run's configuration.
        num_steps: Steps of the whole run.
        recorder: Takes the reported values.
        bar: The terminal's progress bar.
        spent: The run's images and time.
        costs: Makes the lines of costs.jsonl.
        guesses: Kind of work -> estimated cost of work that was never done yet: in updates, or in
            seconds for "checkpoint".
    """

    folder: RunFolder
    config: Config
    num_steps: int
    recorder: Recorder
    bar: "tqdm[int]"
    spent: Spent
    costs: Costs
    guesses: Mapping[str, float]
    _shown: str = ""  # the last report, as the bar has it
    _lines: int = 0
    _said: float = field(default_factory=time.monotonic)

    def report(self, step: int, values: dict[str, float]) -> None:
        """Records the values of a step and the costs so far, and shows how far the run is.

        metrics.jsonl and TensorBoard get every report; the log gets the first ones and then one
        per minute.
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
        """Shows how far the run is between reports: in the bar, and once per minute in the log.

        It does not wait for the device.
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
        """Seconds left after update `step`, before the work due then; and the same in words."""
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
    """Returns how often each kind of work is still due, that of `step` included."""
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
    """Returns the seconds that a run's updates and the work between them still take.

    Args:
        step: Updates done.
        num_steps: Steps of the whole run.
        of_update: Seconds per update.
        due: Kind of work -> how often it is due.
        seconds_each: Kind of work -> seconds that it takes.
    """
    between = sum(count * seconds_each[kind] for kind, count in due.items())
    return (num_steps - step) * of_update + between


def guesses_of(config: Config, previews: Previews, network: nn.Module) -> dict[str, float]:
    """Estimates what each kind of work between updates costs, for as long as none was done.

    A checkpoint is estimated in seconds; previews and evaluations in updates, by their forward
    passes.

    Args:
        config: The run's configuration.
        previews: How previews are drawn.
        network: The run's network.
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
    """Returns at how many of the steps from first to last some work is due.

    It is due at multiples of any of the intervals and at the last step; never if all are None.
    """
    given = [every for every in intervals if every is not None]
    if not given or first > last:
        return 0
    counted = sum((last - 1) // every - (first - 1) // every for every in given)
    if len(given) == 2:  # steps due by both count once
        both = math.lcm(*given)
        counted -= (last - 1) // both - (first - 1) // both
    return counted + 1


def in_words(left: float, now: datetime) -> str:
    """Returns seconds left as "1:02:30 left, ends 14:32", and the date if that is not today."""
    seconds = round(left)
    ends = now + timedelta(seconds=seconds)
    minutes, clock = seconds // 60, f"{seconds % 60:02d}"
    clock = f"{minutes}:{clock}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{clock}"
    day = "" if ends.date() == now.date() else f"{ends:%Y-%m-%d} "
    return f"{clock} left, ends {day}{ends:%H:%M}"
