"""python -m ddpm.train: one start of a run, from the device to the last line printed."""

import logging
import platform
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import Accelerator, PartialState
from tqdm import tqdm

from ddpm.config import build
from ddpm.config.compose import Composed
from ddpm.config.schema import Config
from ddpm.data.batches import Batches
from ddpm.evaluate.measure import check_extractor, measure, samples_folder
from ddpm.runs import checkpoint, recording, results
from ddpm.runs.folder import RunFolder
from ddpm.runs.identity import hparams
from ddpm.runs.recording import Recorder, Speed
from ddpm.sample.images import grid, save_png, to_uint8
from ddpm.sample.subject import Subject, Trained, of_config
from ddpm.system import files
from ddpm.system.processes import accelerator_for, any_process
from ddpm.system.signals import Interruption, Preempted
from ddpm.train import start
from ddpm.train.device_batch import largest_fitting
from ddpm.train.loop import is_due, updates
from ddpm.train.meter import NotFinite
from ddpm.train.state import TrainingState

log = logging.getLogger("ddpm")


def run(composed: Composed) -> RunFolder:
    """Trains the run of a command line, from its newest checkpoint or its start, to the end.

    A run that is complete is left as it is.

    Returns:
        Its folder.

    Raises:
        ValueError: Where the configuration cannot be, or data or device are not what it needs.
        NotFinite: If a loss or gradient is not finite.
        Preempted: When told to stop, after a checkpoint.
    """
    config, folder, changes = start.which_run(composed)
    build.check(config)
    start.check_history(config, folder, resumes=composed.cfg.resume is not None)
    record = folder.record()
    if record.get("status") == "complete" and not changes:
        _say_complete(folder, record["step"])
        return folder
    start.check_initial_weights(config, folder)
    with accelerator_for(config.runtime.device, config.training.precision) as accelerator:
        if config.runtime.evaluate_every is not None:
            check_extractor(config.evaluation, accelerator.device)
        leads = accelerator.is_main_process
        if leads:
            print(f"run {folder.path}", flush=True)
        data = start.load_data(config, accelerator)
        start.check_data(data, config, folder)
        batches = start.batches_of(data, config, accelerator.device)
        steps_per_epoch = batches.steps_per_epoch
        num_steps = config.training.steps or (config.training.epochs or 0) * steps_per_epoch
        stop = Interruption(any_process(accelerator.num_processes))
        if not leads:
            with stop.listening():
                _train(config, folder, accelerator, batches, num_steps, data.classes, stop)
            return folder
        with folder.lock(), _log_file(folder), stop.listening():
            for place in (folder.checkpoints, folder.path):
                files.clear_scratch(place)
            folder.start(config, composed)
            if changes:
                change = {"step": record.get("step", 0), "changed": changes}
                folder.update(changes=[*record.get("changes", []), change])
            folder.update(
                device=_device_name(accelerator),
                num_steps=num_steps,
                steps_per_epoch=steps_per_epoch,
                data={
                    "fingerprint": data.fingerprint,
                    "images": len(data),
                    "held_out": len(data) - batches.num_images,
                    "classes": data.classes,
                    "unreadable": data.unreadable,
                },
            )
            log.info("%d pictures, %s (runtime.feed)", len(data), start.how_fed(data, batches))
            with _conclusion(folder, config, batches, num_steps):
                _train(config, folder, accelerator, batches, num_steps, data.classes, stop)
        _say_complete(folder, num_steps)
    return folder


def facts(composed: Composed) -> dict[str, str]:
    """What the table at the end of a sweep shows of a run, by column."""
    return results.summary(results.read(start.which_run(composed)[1]))


def _train(
    config: Config,
    folder: RunFolder,
    accelerator: Accelerator,
    batches: Batches,
    num_steps: int,
    classes: list[str],
    stop: Interruption,
) -> None:
    """The updates of a run, and what is done between them, in the order in which it is done."""
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

    steps = tqdm(
        updates(
            state,
            diffusion,
            batches,
            lr_at,
            config.seed,
            num_steps,
            device_batch,
            training.grad_clip,
        ),
        initial=state.step,
        total=num_steps,
        unit="step",
        disable=None if leads else True,
        dynamic_ncols=True,
    )
    with _naming_device_batch(device_batch):
        for step in steps:
            signal = stop.after(step)
            logs = is_due(step, runtime.log_every, num_steps)
            evaluates = is_due(step, runtime.evaluate_every, num_steps)
            saves = (
                evaluates or signal is not None or is_due(step, runtime.checkpoint_every, num_steps)
            )

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
                found = _evaluate(trained, accelerator.device)
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
                    folder.update(step=step, best=best or None, timed=speed.timed())
                speed.pause(step)
            if signal is not None and step < num_steps:
                raise Preempted(f"{signal} after step {step}")
    if recorder is not None:
        recorder.close()


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
    recorder.text("command", f"```\n{shlex.join(folder.record()['command'])}\n```")
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
    drawn = []
    for first in range(0, count, size):
        indices = range(first, min(first + size, count))
        drawn.append(drawing.images(indices, classes and classes[first : first + size]))
    sheet = grid(np.concatenate([to_uint8(images) for images in drawn]))
    save_png(folder.samples / f"step_{step:08d}.png", sheet)
    recorder.picture(step, "samples", sheet)
    recorder.flush()


def _evaluate(trained: Trained, device: torch.device) -> list[results.Measurement]:
    """Measures what evaluation.metrics asks for; all processes share the work."""
    config = trained.config
    found, missing = measure(trained, config.sampler, config.evaluation, PartialState(), device)
    if missing:
        raise ValueError("; ".join(missing))
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
    drawn = samples_folder(folder, found[0].protocol)
    shutil.rmtree(drawn, ignore_errors=True)  # ddpm.evaluate can draw them again
    first = found[0]
    better = results.better(first.metric) or min
    if not best or better(first.value, best["value"]) != best["value"]:
        best.update(id=first.id, value=first.value, step=step)
    words = "  ".join(f"{one.metric} {one.value:.4f}" for one in found)
    log.info("step %d  %s", step, words)


@contextmanager
def _conclusion(
    folder: RunFolder, config: Config, batches: Batches, num_steps: int
) -> Iterator[None]:
    """Writes down how the run ended, also for TensorBoard, however it ends."""

    def conclude(status: recording.Status, error: str | None) -> None:
        folder.update(status=status, error=error)
        ended = results.scalars(results.read_results(folder, config.model_dump(mode="json")))
        recording.conclude(folder.path, status, folder.record().get("step", 0), ended)

    try:
        yield
    except (Preempted, KeyboardInterrupt) as stopped:
        saved = folder.record().get("step")
        state = "has saved nothing yet"
        if saved:
            state = (
                f"is saved at step {saved} of {num_steps}; the same command carries on from there"
            )
        print(f"run {folder.path} {state}", flush=True)
        why = (
            stopped.why
            if isinstance(stopped, Preempted)
            else f"{type(stopped).__name__}: {stopped}"
        )
        conclude("preempted", why)
        raise
    except BaseException as error:
        conclude("failed", f"{type(error).__name__}: {error}")
        if isinstance(error, NotFinite):
            _save_batch(folder, batches, error)
        raise
    conclude("complete", None)


def _save_batch(folder: RunFolder, batches: Batches, error: NotFinite) -> None:
    """Keeps the global batch of the update that failed: the images' numbers and pixels."""
    update, size = error.update, batches.size(error.update)
    indices = batches.indices(update, 0, size).cpu()
    kept = {"images": batches.images(update, 0, size).cpu(), "indices": indices, "update": update}
    with files.whole(folder.path / f"trouble_step_{update + 1:08d}.pt") as scratch:
        torch.save(kept, scratch)
    log.error("step %d: images %s of the data set", update + 1, indices.tolist())


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


@contextmanager
def _log_file(folder: RunFolder) -> Iterator[None]:
    """Has what the package logs in train.log; on the terminal too where no bar shows it."""
    logger = logging.getLogger("ddpm")
    logger.setLevel(logging.INFO)
    file = logging.FileHandler(folder.path / "train.log", encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    terminal = logging.StreamHandler()
    terminal.setLevel(logging.WARNING if sys.stderr.isatty() else logging.INFO)
    for handler in (file, terminal):
        logger.addHandler(handler)
    try:
        yield
    finally:
        for handler in (file, terminal):
            logger.removeHandler(handler)
            handler.close()


def _device_name(accelerator: Accelerator) -> str:
    device = accelerator.device
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return f"{accelerator.num_processes} x {device.type} ({name})"


def _say_complete(folder: RunFolder, step: int) -> None:
    sheet = folder.samples / f"step_{step:08d}.png"
    print(f"run {folder.path} is complete: {step} steps\nsamples {sheet}", flush=True)
