"""A run's updates, and what is done between them: reports, previews, measures, checkpoints."""

import logging
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import Accelerator, PartialState
from tqdm import tqdm

from ddpm.config import build
from ddpm.config.schema import Config
from ddpm.data.batches import Batches
from ddpm.data.image_set import ImageSet
from ddpm.evaluate.measure import measure
from ddpm.runs import checkpoint, results
from ddpm.runs.folder import RunFolder
from ddpm.runs.identity import hparams
from ddpm.runs.recording import Recorder, Speed
from ddpm.sample.images import grid, save_png, to_uint8
from ddpm.sample.subject import Subject, Trained, class_words, of_config
from ddpm.system.signals import Interruption, Preempted
from ddpm.train import start
from ddpm.train.device_batch import largest_fitting
from ddpm.train.loop import is_due, updates
from ddpm.train.state import TrainingState

log = logging.getLogger("ddpm")


def take_steps(
    config: Config,
    folder: RunFolder,
    accelerator: Accelerator,
    batches: Batches,
    num_steps: int,
    data: ImageSet,
    stop: Interruption,
) -> None:
    """The updates of a run, and what is done between them, in the order in which it is done."""
    classes = data.classes
    training, runtime, leads = config.training, config.runtime, accelerator.is_main_process
    diffusion, lr_schedule = build.diffusion(config), build.lr_schedule(config)
    state = start.state_of(config, folder, accelerator, diffusion, len(classes))
    subject = of_config(config, classes, lambda device: state.network, state.ema.state_dict)
    best: dict[str, Any] = folder.record().get("best") or {}  # of the evaluations so far
    recorder = _recorder(config, folder, state, batches, num_steps) if leads else None
    speed = Speed(
        state.step, training.batch_size, folder.record().get("timed") if state.step else None
    )
    device_batch = runtime.device_batch
    if device_batch == "auto":
        device_batch = largest_fitting(state, diffusion, batches, config.seed)
        log.info("%d images at once on each device", device_batch)

    def lr_at(step: int) -> float:
        return lr_schedule(step, num_steps, float(config.optimizer["lr"]))

    rest = (lr_at, config.seed, num_steps, device_batch, training.grad_clip)
    steps = _bar(updates(state, diffusion, batches, *rest), state.step, num_steps, leads)
    with _naming_device_batch(device_batch):
        for step in steps:
            signal = stop.after(step)
            logs = is_due(step, runtime.log_every, num_steps)
            evaluates = is_due(step, runtime.evaluate_every, num_steps)
            saves = is_due(step, runtime.checkpoint_every, num_steps)
            saves = saves or evaluates or signal is not None

            if logs or saves:
                means = state.meter.means()  # raises NotFinite: nothing is saved unseen
            if logs:
                state.meter.reset()
                if recorder is not None:
                    _report(recorder, steps, speed, step, {**means, "train/lr": lr_at(step - 1)})
            if is_due(step, runtime.sample_every, num_steps):
                if recorder is not None:
                    _save_previews(recorder, subject, config, folder, step, accelerator.device)
                accelerator.wait_for_everyone()
                speed.pause(step)
            if evaluates:
                trained = Trained(subject, config, folder, step, "ema")
                found = _evaluate(trained, data, accelerator.device)
                if recorder is not None:
                    _record_evaluation(recorder, folder, step, found, best)
                speed.pause(step)
            if saves:
                saved = state.state_dict()
                if recorder is not None:
                    recorder.flush()
                    checkpoint.save(
                        folder.checkpoints, saved, runtime.keep_checkpoints, best.get("step")
                    )
                    folder.saved(step, best=best or None, timed=speed.timed())
                speed.pause(step)
            if signal is not None and step < num_steps:
                raise Preempted(f"{signal} after step {step}")
    if recorder is not None:
        recorder.close()


def _bar(steps: Iterator[int], done: int, num_steps: int, leads: bool) -> "tqdm[int]":
    """The steps under a progress bar, where somebody watches."""
    return tqdm(
        steps,
        initial=done,
        total=num_steps,
        unit="step",
        disable=None if leads else True,
        dynamic_ncols=True,
    )


def _recorder(
    config: Config, folder: RunFolder, state: TrainingState, batches: Batches, num_steps: int
) -> Recorder:
    """Opens the run's records, and says what is about to be done."""
    parameters = sum(parameter.numel() for parameter in state.network.parameters())
    log.info(
        "%s parameters, %d images, %d steps an epoch, steps %d to %d on %s",
        f"{parameters:,}",
        batches.num_images,
        batches.steps_per_epoch,
        state.step,
        num_steps,
        state.accelerator.device,
    )
    warmup_steps = config.lr_schedule.get("warmup_steps", 0)
    if warmup_steps >= num_steps:
        log.warning(
            "the learning rate is still warming up at the end: lr_schedule.warmup_steps=%d",
            warmup_steps,
        )
    if state.step:
        print(f"carrying on from step {state.step}", flush=True)
    recorder = Recorder(folder.path, state.step)
    recorder.settings(hparams(folder, config, num_steps))
    recorder.text("command", f"```\n{shlex.join(folder.record()['starts'][-1]['command'])}\n```")
    if not state.step:
        settings = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
        recorder.text("config", f"```yaml\n{settings}```")
    return recorder


def _report(
    recorder: Recorder, bar: "tqdm[int]", speed: Speed, step: int, values: dict[str, float]
) -> None:
    """One record: to metrics.jsonl and TensorBoard, the progress bar and the log."""
    images_per_second = speed.since_last(step)
    recorder.scalars(step, values)
    recorder.speed(step, {"train/images_per_second": images_per_second})
    bar.set_postfix_str(f"loss {values['train/loss']:.4f}, {images_per_second:.1f} img/s")
    log.info(
        "step %d  loss %.5f  grad norm %.4f  lr %.3g  %.1f img/s",
        step,
        values["train/loss"],
        values["train/grad_norm"],
        values["train/lr"],
        images_per_second,
    )


def _save_previews(
    recorder: Recorder,
    subject: Subject,
    config: Config,
    folder: RunFolder,
    step: int,
    device: torch.device,
) -> None:
    """Draws the grid of a step, always from the same noise, with the averaged weights."""
    count, size = config.runtime.num_previews, config.training.batch_size
    sampler = build.sampler(config.sampler, subject.diffusion)
    drawing = subject.drawing(sampler, config.seed, device)
    classes = subject.classes_in_turn(count)
    log.info("step %d  drawing %d previews, %d steps each", step, count, len(drawing.timesteps))
    if classes and subject.classes:
        log.info("step %d  in turn %s", step, class_words(classes, subject.classes))
    drawn = []
    for first in range(0, count, size):
        indices = range(first, min(first + size, count))
        drawn.append(drawing.images(indices, classes and classes[first : first + size]))
    sheet = grid(np.concatenate([to_uint8(images) for images in drawn]))
    save_png(folder.samples / f"step_{step:08d}.png", sheet)
    recorder.picture(step, "samples", sheet)
    recorder.flush()


def _evaluate(trained: Trained, data: ImageSet, device: torch.device) -> list[results.Measurement]:
    """Measures what evaluation.metrics asks for; all processes share the work."""
    config = trained.config
    settings, processes = config.evaluation, PartialState()
    found, missing = measure(
        trained, config.sampler, settings, processes, device, keep_samples=False, data=data
    )
    if missing and not found:
        raise ValueError("; ".join(missing))
    for reason in missing:
        log.warning("not measured: %s", reason)
    return found


def _record_evaluation(
    recorder: Recorder,
    folder: RunFolder,
    step: int,
    found: list[results.Measurement],
    best: dict[str, Any],
) -> None:
    """Writes the measurements down; `best` becomes the first of them if there was no better."""
    results.record(folder.path / "evaluation.json", found)
    recorder.scalars(step, {f"eval/{one.metric}": one.value for one in found})
    first = found[0]
    better = results.better(first.metric) or min
    if not best or better(first.value, best["value"]) != best["value"]:
        best.update(id=first.id, value=first.value, step=step)
    words = "  ".join(f"{one.metric} {one.value:.4f}" for one in found)
    log.info("step %d  %s", step, words)


@contextmanager
def _naming_device_batch(device_batch: int) -> Iterator[None]:
    """Has the device's complaint of too little memory name the key to change."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"runtime.device_batch={device_batch} does not fit the device's memory: give "
            f"{max(device_batch // 2, 1)}, or auto"
        ) from error
