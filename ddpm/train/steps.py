"""A run's updates and the work between them: reports, checkpoints, previews, evaluations."""

import logging
import shlex
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext

import torch
import yaml
from accelerate import Accelerator

from ddpm.config import build
from ddpm.config.schema import Config
from ddpm.data.batches import Batches, TimedBatches
from ddpm.data.image_set import ImageSet
from ddpm.runs.folder import RunFolder
from ddpm.runs.identity import hparams
from ddpm.runs.recording import Recorder
from ddpm.sample.previews import MOST, Previews, cost, others_before, previews_of
from ddpm.sample.subject import Trained, of_config
from ddpm.system import ways
from ddpm.system.processes import Asking, garbage_kept
from ddpm.system.signals import Preempted
from ddpm.system.text import say
from ddpm.train import progress, saving, start
from ddpm.train.costs import Spent, costs_of
from ddpm.train.device_batch import largest_fitting
from ddpm.train.loop import is_due, updates
from ddpm.train.shown import Shown
from ddpm.train.state import TrainingState
from ddpm.train.trace import traced
from ddpm.train.tuning import check_fits, draws_as_it_is, way_of
from ddpm.tune.search import table

log = logging.getLogger("ddpm")


def take_steps(
    config: Config,
    folder: RunFolder,
    accelerator: Accelerator,
    batches: TimedBatches,
    num_steps: int,
    data: ImageSet,
) -> None:
    """Makes a run's updates and does the work between them, in order.

    Raises:
        Preempted: If told to stop, after saving a checkpoint.
    """
    classes = data.classes
    training, runtime, leads = config.training, config.runtime, accelerator.is_main_process
    diffusion, lr_schedule = build.diffusion(config), build.lr_schedule(config)
    choice = way_of(config, folder, accelerator, batches, len(classes), num_steps)
    state = start.state_of(config, folder, accelerator, diffusion, len(classes), choice.way)
    subject = of_config(config, classes, lambda device: state.network, state.ema.state_dict)
    recorder = _recorder(config, folder, state, batches, num_steps) if leads else None
    if recorder is not None and choice.found:
        recorder.text("tuning", "\n".join(table(choice.found)))
    drawn_by = previews_of(config, num_steps)
    if leads:
        _say_previews(folder, config, num_steps, drawn_by)
    spent = Spent(batches, state.step, folder.record(), accelerator.num_processes)
    device_batch = runtime.device_batch
    if device_batch == "auto":
        device_batch = largest_fitting(state, diffusion, batches, config.seed, choice.device_batch)
        log.info("%d images at once on each device", device_batch)
    check_fits(choice, device_batch, batches, accelerator.num_processes)

    def lr_at(step: int) -> float:
        return lr_schedule(step, num_steps, float(config.optimizer["lr"]))

    def shown(step: int) -> Shown:
        trained = Trained(subject, config, folder, step, "ema")
        return Shown(trained, data, num_steps, accelerator.device, drawn_by, recorder)

    rest = (lr_at, config.seed, num_steps, device_batch, training.grad_clip)
    bar = progress.bar(
        updates(state, diffusion, batches, *rest), state.step, num_steps, watched=leads
    )
    teller = None
    if recorder is not None:
        costs = costs_of(config, spent, accelerator.device, accelerator.num_processes)
        guesses = progress.guesses_of(config, drawn_by, state.network)
        teller = progress.Progress(folder, config, num_steps, recorder, bar, spent, costs, guesses)
    trace = traced(iter(bar), state.step, runtime.profile if leads else None, folder.path)
    asking, saver = Asking(), saving.Saver(folder, config, state, recorder, spent)
    recompiled = ways.Recompilations()
    plainly = ways.as_it_is if draws_as_it_is(choice, config, num_steps) else nullcontext
    with (
        _naming_device_batch(device_batch),
        ways.carried_out(choice.way),
        garbage_kept() as tidy,
        closing(trace) as steps,
    ):
        if state.step:
            with state.averaged(), plainly():
                shown(state.step).make_up_for()
        spent.go_on()
        for step in steps:
            told = asking.after(step)
            logs = is_due(step, runtime.log_every, num_steps)
            previews = is_due(step, runtime.sample_every, num_steps)
            evaluates = is_due(step, runtime.evaluate_every, num_steps)
            saves = is_due(step, runtime.checkpoint_every, num_steps) or evaluates or told

            tidy(bool(logs or saves or previews))  # while a GPU still computes
            if logs or saves or previews:
                means = state.meter.means()  # raises NotFinite before anything is saved
                spent.pause(step)
            if logs:
                state.meter.reset()
            if teller is not None and logs:
                teller.report(step, {**means, "train/lr": lr_at(step - 1)})
            elif teller is not None:
                teller.remind(step)
            if saves:
                with spent.doing("checkpoint"):
                    saver.save()
            if told and step < num_steps:
                raise Preempted(told)
            if previews or evaluates:
                try:
                    with state.averaged(), plainly():
                        if previews:
                            with spent.doing("preview"):
                                shown(step).preview()
                        if evaluates:
                            with spent.doing("evaluation"):
                                shown(step).evaluate()
                except Preempted:
                    saver.save()
                    raise
            if made := recompiled.since():
                log.info("compiled after step %d: %s", step, ways.in_words(made))
                if leads:
                    folder.update(recompilations=recompiled.count)
            if logs or saves or previews:
                spent.go_on()
    if recorder is not None:
        recorder.close()


def _recorder(
    config: Config, folder: RunFolder, state: TrainingState, batches: Batches, num_steps: int
) -> Recorder:
    """Opens the run's records and announces what is about to be done."""
    parameters = sum(parameter.numel() for parameter in state.network.parameters())
    log.info(
        "%s parameters, %d images, %d steps per epoch, steps %d to %d on %s",
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
            "lr_schedule.warmup_steps=%d: the learning rate is still warming up at the end",
            warmup_steps,
        )
    if state.step:
        say(f"carrying on from step {state.step}")
    saving.expect(folder, config.runtime.keep_checkpoints, parameters)
    recorder = Recorder(folder.path, state.step)
    recorder.settings(hparams(folder, config, num_steps))
    recorder.text("command", shlex.join(folder.record()["starts"][-1]["command"]))
    if not state.step:
        settings = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
        recorder.text("config", settings, "yaml")
    return recorder


def _say_previews(folder: RunFolder, config: Config, num_steps: int, chosen: Previews) -> None:
    """Logs what draws the previews, what they cost, and whether another sampler did before."""
    costly = chosen.share is not None and chosen.share > MOST
    log.log(
        logging.WARNING if costly else logging.INFO, "previews: %s", cost(config, num_steps, chosen)
    )
    before = others_before(config, chosen, sorted(folder.samples.glob("step_*[0-9].png")))
    if before is not None:
        log.warning("%s", before)


@contextmanager
def _naming_device_batch(device_batch: int) -> Iterator[None]:
    """Makes an out-of-memory error name the key to change."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"runtime.device_batch={device_batch} does not fit in the device's memory: give "
            f"{max(device_batch // 2, 1)}, or auto"
        ) from error
