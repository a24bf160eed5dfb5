"""Previews and evaluations after a step, each made once.

They are no part of the training state. A resumed run makes those that a stop or kill cut off.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState

from ddpm.config import build
from ddpm.data.image_set import ImageSet
from ddpm.evaluate.measure import job_of, measure
from ddpm.evaluate.of_data import held_out_losses, held_out_split
from ddpm.runs import checkpoint, results
from ddpm.runs.recording import Recorder, shows_picture
from ddpm.sample.images import grid, save_png, to_uint8
from ddpm.sample.previews import Previews
from ddpm.sample.subject import Trained, class_words
from ddpm.system.processes import gather, together
from ddpm.train.loop import is_due

log = logging.getLogger("ddpm")


@dataclass(frozen=True)
class Shown:
    """Makes the previews and the evaluation of one step. All processes must call it alike.

    Attributes:
        trained: The network after the step, with its averaged weights in place.
        data: The run's images.
        num_steps: Steps of the whole run.
        device: This process's device.
        previews: How previews are drawn.
        recorder: The main process's recorder; None on the others.
    """

    trained: Trained
    data: ImageSet
    num_steps: int
    device: torch.device
    previews: Previews
    recorder: Recorder | None

    def make_up_for(self) -> None:
        """Makes what is due at this step and missing."""
        step, runtime = self.trained.step, self.trained.config.runtime
        previewed = self._preview_file().is_file()
        evaluated = self.recorder is not None and self.recorder.has("eval/")
        # what the main process sees counts
        previewed, evaluated = gather([(previewed, evaluated)], PartialState())[0]
        if not previewed and is_due(step, runtime.sample_every, self.num_steps):
            self.preview()
        if not evaluated and is_due(step, runtime.evaluate_every, self.num_steps):
            self.evaluate()

    def preview(self) -> None:
        """Draws the grid of the step, always from the same noise, with the averaged weights.

        Raises:
            Preempted: If told to stop.
        """
        with together():
            if self.recorder is not None:
                sheet = self._sheet()
                every = self.trained.config.runtime.sample_every
                if every and shows_picture(self.trained.step, every, self.num_steps):
                    self.recorder.picture(self.trained.step, "samples", sheet)
                self.recorder.flush()
                said = self.previews.text(self.trained.config, self.trained.step)
                save_png(self._preview_file(), sheet, said)  # last: it marks the preview complete

    def evaluate(self) -> None:
        """Measures evaluation.metrics and the loss on held-out images.

        All processes share the work.

        Raises:
            Preempted: If told to stop.
            ValueError: If nothing could be measured.
        """
        config, file = self.trained.config, self.trained.run.path / "evaluation.json"
        split, watched = held_out_split(config), list[results.Measurement]()
        with together():
            job = job_of(
                self.trained,
                config.sampler,
                config.evaluation,
                PartialState(),
                self.device,
                lambda figures: results.record(file, figures),
                data=self.data,
            )
            found, missing = measure(job, keep_samples=False)
            if split is not None:
                watched = held_out_losses(job, split)
        if missing and not found and self.recorder is not None:
            raise ValueError("; ".join(missing))
        for reason in missing:
            log.warning("not measured: %s", reason)
        if self.recorder is not None:
            self._write_down(self.recorder, [*found, *watched])

    def _preview_file(self) -> Path:
        return self.trained.run.samples / f"step_{self.trained.step:08d}.png"

    def _sheet(self) -> np.ndarray:
        """The grid, (H, W, C) uint8."""
        subject, config, step = self.trained.subject, self.trained.config, self.trained.step
        count, size = config.runtime.num_previews, config.training.batch_size
        sampler = build.sampler(self.previews.settings, subject.diffusion)
        precision = config.training.precision
        drawing = subject.drawing(sampler, config.seed, self.device, precision)
        classes = subject.classes_in_turn(count)
        log.info("step %d  drawing %d previews by %s", step, count, self.previews.words)
        if classes and subject.classes:
            log.info("step %d  in turn: %s", step, class_words(classes, subject.classes))
        drawn = []
        for first in range(0, count, size):
            indices = range(first, min(first + size, count))
            drawn.append(drawing.images(indices, classes and classes[first : first + size]))
        return grid(np.concatenate([to_uint8(images) for images in drawn]))

    def _write_down(self, recorder: Recorder, found: list[results.Measurement]) -> None:
        """Records the measurements; the first of them decides which checkpoint is the best."""
        run, step, config = self.trained.run, self.trained.step, self.trained.config
        first, best = found[0], run.record().get("best") or {}
        better = results.better(first.metric) or min
        if not best or better(first.value, best["value"]) != best["value"]:
            run.update(best={"id": first.id, "value": first.value, "step": step})
            checkpoint.drop_old(run.checkpoints, config.runtime.keep_checkpoints, step)
        # last: these records mark the evaluation complete
        named = results.tags(found)
        recorder.scalars(step, {f"eval/{name}": value for name, value in named.items()})
        recorder.flush()
        shown = [f"{name} {named[name]:.4f}" for name in named if not name.startswith("loss_q")]
        log.info("step %d  %s", step, "  ".join(shown))
