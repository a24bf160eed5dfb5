"""One start of a training run: everything around the loop, from the device to the last line printed."""

import logging
import os
import platform
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
import yaml
from accelerate import Accelerator, PartialState
from tqdm import tqdm

from ddpm.config import build
from ddpm.config.compose import Composed
from ddpm.config.schema import Config
from ddpm.data.batches import Batches
from ddpm.data.image_set import goes_on_device
from ddpm.data.stored import Packed
from ddpm.evaluate.measure import check_extractor, measure, samples_folder
from ddpm.runs import checkpoint, recording, results
from ddpm.runs.folder import RunFolder
from ddpm.runs.identity import computed, settings
from ddpm.runs.recording import Recorder, Speed
from ddpm.runs.results import read_results, scalars
from ddpm.sample import images
from ddpm.sample.drawing import Drawing
from ddpm.system import files
from ddpm.system.devices import compile_in_place, decide
from ddpm.system.processes import accelerator_for, any_process
from ddpm.system.signals import Interruption, Preempted
from ddpm.train.device_batch import largest_fitting
from ddpm.train.loop import train
from ddpm.train.meter import NotFinite
from ddpm.train.start import _check_data, _first_weights, _resume, _starts_from_weights
from ddpm.train.state import EMA
from ddpm.weights.folders import with_content


def carry_out(config: Config, run: RunFolder, composed: Composed, changes: dict[str, list[Any]] | None = None) -> None:
    """Train from the newest checkpoint of the run, or from the start, to the end. A run that is complete is left as it is.

    changes: what is computed otherwise than before (key -> [before, now]), None where the configuration itself names the run.
    Raises ValueError, one line, where the data or the device is not what the configuration needs.
    """
    record = run.record()
    if changes is None and record.get("changes") and computed(config) != computed(run.config(config.runtime.trusted_modules)):
        raise ValueError(
            f"run {run.path} was carried on with other settings (run.json, changes): go on with resume={run.path}, or start anew with another outputs="
        )
    if record.get("status") == "complete" and not changes:
        print(f"run {run.path} is complete: {record['step']} steps\n{_closing(run, record['step'])}", flush=True)
        return
    config = with_content(config)
    if _starts_from_weights(config, run) and not (config.training.conditional and config.data.num_classes is None):
        _first_weights(config, build.network(config, torch.device("meta"), config.data.num_classes or 1))  # before the data is read
    with accelerator_for(config.runtime.device, config.training.precision) as accelerator:
        leads = accelerator.is_main_process
        source = build.source(config)
        if config.runtime.evaluate_every is not None:
            check_extractor(config.evaluation, accelerator.device)
        if leads:
            print(f"run {run.path}", flush=True)
        with accelerator.main_process_first():
            data = build.images(config, source, config.runtime.workers or _cores())
        _check_data(data, config, run, record)
        trained_on, held_out = data.split(config.data.holdout)
        training = config.training
        on_device = goes_on_device(config.runtime.feed, data, accelerator.device)
        batches = Batches(
            trained_on.stored,
            training.batch_size,
            config.seed,
            accelerator.device,
            training.drop_last,
            config.data.flip,
            labels=trained_on.labels if training.conditional else None,
            label_dropout=training.label_dropout,
            any_class=len(data.classes),
            rows=trained_on.rows,
            on_device=on_device,
        )
        num_steps = training.steps or (training.epochs or 0) * batches.steps_per_epoch
        interruption = Interruption(any_process(accelerator.num_processes))
        if not leads:
            with interruption.listening():
                _train(config, run, accelerator, batches, num_steps, data.classes, interruption)
            return
        with run.held(), _log_file(run), interruption.listening():
            checkpoint.clear_scratch(run.checkpoints)
            files.clear_scratch(run.path)
            run.start(config, composed)
            if changes:
                run.update(changes=[*record.get("changes", []), {"step": record.get("step", 0), "changed": changes}])
            run.update(device=_device_name(accelerator), num_steps=num_steps, steps_per_epoch=batches.steps_per_epoch)
            about = {"fingerprint": data.fingerprint, "images": len(data), "held_out": len(held_out)}
            run.update(data={**about, "classes": data.classes, "unreadable": data.unreadable})
            how = "decoded as they are needed" if isinstance(data.stored, Packed) else "whole on the device" if on_device else "from the decoded file"
            logging.getLogger("ddpm").info("%d pictures, %s (runtime.feed)", len(data), how)
            try:
                _train(config, run, accelerator, batches, num_steps, data.classes, interruption)
            except BaseException as error:
                preempted = isinstance(error, Preempted | KeyboardInterrupt)
                if preempted:
                    saved = run.record().get("step")
                    state = f"is saved at step {saved} of {num_steps}; the same command carries on from there" if saved else "has saved nothing yet"
                    print(f"run {run.path} {state}", flush=True)
                why = error.why if isinstance(error, Preempted) else f"{type(error).__name__}: {error}"
                _conclude(run, config, "preempted" if preempted else "failed", why)
                if isinstance(error, NotFinite):
                    _save_batch(run, batches, error)
                raise
            _conclude(run, config, "complete", None)
        print(f"run {run.path} is complete: {num_steps} steps\n{_closing(run, num_steps)}", flush=True)


def _train(config: Config, run: RunFolder, accelerator: Accelerator, batches: Batches, num_steps: int, names: list[str], interruption: Interruption) -> None:
    log = logging.getLogger("ddpm")
    leads, training, runtime = accelerator.is_main_process, config.training, config.runtime
    diffusion = build.diffusion(config)
    raw = build.network(config, accelerator.device, len(names))
    if _starts_from_weights(config, run):
        raw.load_state_dict(_first_weights(config, raw))
    ema = EMA(raw, training.ema_decay, training.ema_warmup)
    timestep_sampler = build.timestep_sampler(diffusion, accelerator.device)
    compiles, why = decide(runtime.compile, accelerator.device)
    if compiles:
        compile_in_place(raw)
    model, optimizer = accelerator.prepare(raw, build.optimizer(config, list(raw.parameters())))
    first_step, meter_sums = 0, None
    newest = checkpoint.newest_whole(run.checkpoints)
    if newest is not None:
        first_step, meter_sums = _resume(newest, raw, ema, optimizer, timestep_sampler, accelerator)
    if leads:
        parameters = sum(parameter.numel() for parameter in raw.parameters())
        log.info(
            "%s parameters, %d images, %d steps an epoch, steps %d to %d on %s",
            f"{parameters:,}",
            batches.num_images,
            batches.steps_per_epoch,
            first_step,
            num_steps,
            accelerator.device,
        )
        log.info("compiled: %s (%s)", "yes" if compiles else "no", why)
        if config.lr_schedule.get("warmup_steps", 0) >= num_steps:
            log.warning("the learning rate is still warming up at the end: lr_schedule.warmup_steps=%d", config.lr_schedule["warmup_steps"])
        if first_step:
            print(f"carrying on from step {first_step}", flush=True)
    lr_schedule, lr = build.lr_schedule(config), float(config.optimizer["lr"])
    preview_sampler = build.sampler(config.sampler, diffusion)
    shape = (config.data.channels, *batches.image_size)
    best: dict[str, Any] = run.record().get("best") or {}  # of the evaluations so far
    recorder = Recorder(run.path, first_step) if leads else None
    bar = tqdm(range(first_step, num_steps), initial=first_step, total=num_steps, unit="step", disable=None if leads else True, dynamic_ncols=True)
    speed = Speed(first_step, training.batch_size, run.record().get("timed") if first_step else None)

    def report(step: int, values: dict[str, float]) -> None:
        if recorder is None:
            return
        recorder.scalars(step, values)
        images_per_second = speed.since_last(step)
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

    def evaluate(step: int) -> None:
        drawing = Drawing(raw, ema.state_dict(), diffusion, preview_sampler, shape, config.evaluation.seed, build.any_class(config, len(names)))
        figures, missing = measure(drawing, config.sampler, config.evaluation, config, names, run, step, "ema", PartialState())
        if missing:
            raise ValueError("; ".join(missing))
        if recorder is not None:
            results.record(run.path / "evaluation.json", figures)
            recorder.scalars(step, {f"eval/{figure.metric}": figure.value for figure in figures})
            shutil.rmtree(samples_folder(run, figures[0].protocol), ignore_errors=True)  # ddpm.evaluate can draw them again
            first, better = figures[0], results.better(figures[0].metric) or min
            if not best or better(first.value, best["value"]) != best["value"]:
                best.update(id=first.id, value=first.value, step=step)
            log.info("step %d  %s", step, "  ".join(f"{figure.metric} {figure.value:.4f}" for figure in figures))
        speed.pause(step)

    def save_checkpoint(step: int, sums: torch.Tensor) -> None:
        state = {
            "ema_updates": ema.num_updates,
            "optimizer": optimizer.state_dict(),
            "timesteps": timestep_sampler.state_dict(),
            "meter": sums.cpu(),
        }
        if accelerator.scaler is not None:
            state["scaler"] = accelerator.scaler.state_dict()
        if recorder is not None:
            recorder.flush()
            checkpoint.save(run.checkpoints, step, raw.state_dict(), ema.state_dict(), state, runtime.keep_checkpoints, best.get("step"))
            run.update(step=step, best=best or None, timed=speed.timed())
        speed.pause(step)

    def save_samples(step: int) -> None:
        if recorder is not None:
            count = runtime.num_previews
            classes = [index % len(names) for index in range(count)] if training.conditional else None
            drawing = Drawing(raw, ema.state_dict(), diffusion, preview_sampler, shape, config.seed, build.any_class(config, len(names)))
            log.info("step %d  drawing %d previews, %d steps each", step, count, len(drawing.timesteps))
            parts = [range(start, min(start + training.batch_size, count)) for start in range(0, count, training.batch_size)]
            drawn = [drawing.images(part, None if classes is None else [classes[index] for index in part]) for part in parts]
            sheet = images.grid(np.concatenate([images.to_uint8(part) for part in drawn]))
            images.save_png(run.samples / f"step_{step:08d}.png", sheet)
            recorder.picture(step, "samples", sheet)
            recorder.flush()
        accelerator.wait_for_everyone()
        speed.pause(step)

    if recorder is not None:
        recorder.settings(settings(run, config, num_steps))
        recorder.text("command", f"```\n{shlex.join(run.record()['command'])}\n```")
        if not first_step:
            recorder.text("config", f"```yaml\n{yaml.safe_dump(config.model_dump(mode='json'), sort_keys=False)}```")
    raw.train()
    device_batch = runtime.device_batch
    if device_batch == "auto":
        device_batch = largest_fitting(accelerator, model, optimizer, diffusion, batches, timestep_sampler, config.seed)
        log.info("%d images at once on each device", device_batch)
    try:
        train(
            accelerator=accelerator,
            model=model,
            diffusion=diffusion,
            optimizer=optimizer,
            lr_at=lambda step: lr_schedule(step, num_steps, lr),
            ema=ema,
            batches=batches,
            timestep_sampler=timestep_sampler,
            seed=config.seed,
            meter_sums=meter_sums,
            steps=bar,
            num_steps=num_steps,
            device_batch=device_batch,
            grad_clip=training.grad_clip,
            log_every=runtime.log_every,
            sample_every=runtime.sample_every,
            evaluate_every=runtime.evaluate_every,
            checkpoint_every=runtime.checkpoint_every,
            log=report,
            save_samples=save_samples,
            evaluate=evaluate,
            save_checkpoint=save_checkpoint,
            stopped_by=interruption.after,
        )
    except torch.OutOfMemoryError as error:
        raise ValueError(f"runtime.device_batch={device_batch} does not fit the device's memory: give {max(device_batch // 2, 1)}, or auto") from error
    if recorder is not None:
        recorder.close()


def _conclude(run: RunFolder, config: Config, status: Literal["complete", "failed", "preempted"], error: str | None) -> None:
    """Write down how the run ended, and for TensorBoard also with what."""
    run.update(status=status, error=error)
    step = run.record().get("step", 0)
    recording.conclude(run.path, status, step, scalars(read_results(run, config.model_dump(mode="json"))))


def _save_batch(run: RunFolder, batches: Batches, error: NotFinite) -> None:
    """Keep the global batch of the update that failed, for a look at it: trouble_step_*.pt with the images' numbers and pixels."""
    size = batches.size(error.update)
    indices = batches.indices(error.update, 0, size).cpu()
    kept = {"images": batches.images(error.update, 0, size).cpu(), "indices": indices, "update": error.update}
    torch.save(kept, run.path / f"trouble_step_{error.update + 1:08d}.pt")
    logging.getLogger("ddpm").error("step %d: images %s of the data set", error.update + 1, indices.tolist())


@contextmanager
def _log_file(run: RunFolder) -> Iterator[None]:
    """Have what the package logs in the run's train.log; on the terminal too where no progress bar shows it."""
    logger = logging.getLogger("ddpm")
    logger.setLevel(logging.INFO)
    handlers: list[logging.Handler] = [logging.FileHandler(run.path / "train.log", encoding="utf-8"), logging.StreamHandler()]
    handlers[0].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handlers[1].setLevel(logging.WARNING if sys.stderr.isatty() else logging.INFO)
    for handler in handlers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _device_name(accelerator: Accelerator) -> str:
    name = torch.cuda.get_device_name(accelerator.device) if accelerator.device.type == "cuda" else platform.processor() or platform.machine()
    return f"{accelerator.num_processes} x {accelerator.device.type} ({name})"


def _closing(run: RunFolder, step: int) -> str:
    return f"samples {run.samples / f'step_{step:08d}.png'}"
