"""python -m ddpm.train: one start of a run, from the device to the last line printed."""

import logging
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator, PartialState

from ddpm.config import search
from ddpm.config.compose import Composed
from ddpm.config.schema import Config
from ddpm.data.batches import Batches
from ddpm.evaluate.measure import check_extractor
from ddpm.runs import contents, pictures, reader, recording, results
from ddpm.runs.folder import RunFolder
from ddpm.system import files, signals
from ddpm.system.peers import PeerLost
from ddpm.system.precision import in_words
from ddpm.system.processes import accelerator_for, naming_lost, wait_to_leave
from ddpm.system.signals import Preempted
from ddpm.system.slurm import clock_of
from ddpm.system.text import guard_logs, say
from ddpm.train import start, which
from ddpm.train.meter import NotFinite
from ddpm.train.saving import DiskHangs
from ddpm.train.steps import take_steps

log = logging.getLogger("ddpm")


def run(composed: Composed) -> RunFolder:
    """Trains the run of a command line to the end, from its newest checkpoint if it has one.

    A complete run is left as it is.

    Returns:
        The run's folder.

    Raises:
        ValueError: If the configuration is invalid, or the data or device does not suit it.
        NotFinite: If a loss or gradient is not finite.
        Preempted: If told to stop; what was trained is saved first.
    """
    began = time.time()
    begun = which.which_run(composed)
    config, folder = begun.config, begun.folder
    which.check_agreement(begun)
    which.check_history(begun, resumes=composed.cfg.resume is not None)
    record = folder.record()
    if record.get("status") == "complete" and not begun.changes:
        unseen = pictures.check_here(config, folder, begun.source)
        for note in [*begun.notes, *([f"pictures not compared: {unseen}"] if unseen else [])]:
            say(note)
        _say_complete(folder, record["step"])
        return folder
    contents.check(folder.path)
    with (
        naming_lost(),
        accelerator_for(
            config.runtime.device, config.training.precision, config.runtime.deterministic
        ) as accelerator,
    ):
        if config.runtime.evaluate_every is not None:
            check_extractor(config.evaluation, accelerator.device)
        leads = accelerator.is_main_process
        with signals.listening(), _leaving_together():
            if leads:
                say(f"run {folder.path}")
                signals.set_clock(clock_of(config.runtime.max_hours, began))
            num_steps = _train(begun, composed, accelerator)
        if leads:
            _say_complete(folder, num_steps)
    return folder


def _train(begun: which.Start, composed: Composed, accelerator: Accelerator) -> int:
    """Loads the data and takes all steps; returns their number."""
    config, folder, changes = begun.config, begun.folder, begun.changes
    with _saying_where(folder):
        data, source = start.load_data(config, begun.source, accelerator)
    start.check_data(data, source, config, folder)
    batches = start.batches_of(data, config, accelerator.device)
    steps_per_epoch = batches.steps_per_epoch
    num_steps = config.training.steps or (config.training.epochs or 0) * steps_per_epoch
    notes = [*begun.notes, *data.notes, *start.notes_on(data, config)]
    notes += start.notes_on_dropout(config, folder, len(data.classes))
    notes += start.jump_of_rate(config, folder, num_steps) if changes else []
    precision, deterministic = config.training.precision, config.runtime.deterministic
    arithmetic = in_words(accelerator.device, precision, deterministic)
    if not accelerator.is_main_process:
        take_steps(config, folder, accelerator, batches, num_steps, data)
        return num_steps
    with folder.lock(), _log_file(folder):
        for place in (folder.checkpoints, folder.path):
            files.clear_scratch(place)
        pictures.write_down(folder, source)
        folder.start(
            config,
            composed,
            begun.identity,
            device=_device_name(accelerator),
            arithmetic=arithmetic,
            changed=changes or None,
        )
        folder.update(
            expected_end=None,
            num_steps=num_steps,
            steps_per_epoch=steps_per_epoch,
            data={
                **pictures.about(config, source),
                "fingerprint": data.fingerprint,
                "images": len(data),
                "held_out": len(data) - batches.num_images,
                "classes": data.classes,
                "unreadable": data.unreadable,
                "notes": notes,
                "cache": str(data.folder),
            },
        )
        for note in notes:
            log.warning(note)
        log.info("%d pictures, %s (runtime.feed)", len(data), start.how_fed(data, batches))
        cache = data.folder.parent
        log.info("the cache %s takes %.1f MB", cache, files.size_of(cache) / 1e6)
        with _conclusion(folder, config, batches):
            take_steps(config, folder, accelerator, batches, num_steps, data)
    return num_steps


def facts(composed: Composed) -> dict[str, str]:
    """Returns a run's row of the table at the end of a sweep: column -> text."""
    folder = which.which_run(composed).folder
    if not folder.record():
        return reader.summary(reader.not_started(folder))
    return reader.summary(reader.read(folder))


def score(composed: Composed) -> search.Score:
    """Returns the score by which a search ranks a complete run.

    If the run evaluates while it trains, this is the metric of its best checkpoint; otherwise it
    is the loss over its last tenth.

    Raises:
        ValueError: If the run recorded no loss.
    """
    folder = which.which_run(composed).folder
    best = folder.record().get("best")
    if composed.cfg.runtime.evaluate_every is not None and best:
        metric = best["id"].partition("@")[0]
        more = results.better(metric) is max
        return search.Score(best["id"], best["value"], "maximize" if more else "minimize")
    found = results.read_results(folder, folder.plain())
    if not found or found[0].metric != "loss":
        raise ValueError(f"{folder.path} recorded no loss for the search to rank it by")
    return search.Score("loss", found[0].final[0], "minimize")


@contextmanager
def _leaving_together() -> Iterator[None]:
    """Keeps every process, when told to stop, until the main process has saved."""
    try:
        yield
    except Preempted:
        wait_to_leave()
        raise


@contextmanager
def _saying_where(folder: RunFolder) -> Iterator[None]:
    """Prints how far a run got when it stops."""
    try:
        yield
    except (Preempted, KeyboardInterrupt):
        if PartialState().is_main_process:
            record = folder.record()
            state = "has saved nothing yet; the same command starts it again"
            if record.get("step"):
                state = (
                    f"is saved at step {record['step']} of {record['num_steps']}; "
                    "the same command resumes from there"
                )
            say(f"run {folder.path} {state}")
        raise


@contextmanager
def _conclusion(folder: RunFolder, config: Config, batches: Batches) -> Iterator[None]:
    """Records how the run ends, in run.json and for TensorBoard."""

    def conclude(status: recording.Status, error: str | None) -> None:
        folder.update(status=status, error=error, expected_end=None)
        ended = results.scalars(results.read_results(folder, config.model_dump(mode="json")))
        recording.conclude(folder.path, status, folder.record().get("step", 0), ended)

    try:
        with _saying_where(folder), naming_lost():
            yield
    except Preempted as stopped:
        conclude("preempted", stopped.why)
        raise
    except KeyboardInterrupt:
        conclude("preempted", "KeyboardInterrupt")
        raise
    except DiskHangs:
        raise
    except PeerLost as lost:
        # reads as cut off once this process is gone, too
        conclude("running", str(lost))
        raise
    except BaseException as error:
        conclude("failed", f"{type(error).__name__}: {error}")
        if isinstance(error, NotFinite):
            _save_batch(folder, batches, error)
        raise
    conclude("complete", None)


def _save_batch(folder: RunFolder, batches: Batches, error: NotFinite) -> None:
    """Saves the global batch of the update that failed: the images' indices and pixels."""
    update, size = error.update, batches.size(error.update)
    indices = batches.indices(update, 0, size).cpu()
    kept = {"images": batches.images(update, 0, size).cpu(), "indices": indices, "update": update}
    with files.whole(folder.path / f"trouble_step_{update + 1:08d}.pt") as scratch:
        torch.save(kept, scratch)
    log.error("step %d failed on the images %s of the data set", update + 1, indices.tolist())


@contextmanager
def _log_file(folder: RunFolder) -> Iterator[None]:
    """Sends the package's log to train.log and the terminal; only warnings beside a bar."""
    logger = logging.getLogger("ddpm")
    logger.setLevel(logging.INFO)
    guard_logs()
    written = files.append_to(folder.path / "train.log")
    file = logging.StreamHandler(written)
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
        written.close()


def _device_name(accelerator: Accelerator) -> str:
    device = accelerator.device
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return f"{accelerator.num_processes} x {device.type} ({name})"


def _say_complete(folder: RunFolder, step: int) -> None:
    sheet = folder.samples / f"step_{step:08d}.png"
    say(f"run {folder.path} is complete: {step} steps")
    say(f"samples {sheet}")
