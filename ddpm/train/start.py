"""Starting a run: its data, and the state to start or resume from."""

import math

import torch
from accelerate import Accelerator, PartialState
from torch import nn

from ddpm.config import build
from ddpm.config.schema import Config
from ddpm.config.validation import public_names
from ddpm.data.ahead import copies_to
from ddpm.data.batches import Batches, TimedBatches
from ddpm.data.image_set import ImageSet, goes_on_device
from ddpm.data.shards import Source
from ddpm.data.stored import Packed
from ddpm.diffusion.process import GaussianDiffusion
from ddpm.models.layers import drops, takes_dropout_keys
from ddpm.runs import checkpoint, pictures
from ddpm.runs.folder import RunFolder, steps_of_before
from ddpm.runs.format import DROPOUT_BY_PLACE
from ddpm.system import ways
from ddpm.system.devices import cores
from ddpm.system.internals import keep_forward
from ddpm.system.processes import gather, together
from ddpm.system.signals import at_once
from ddpm.train.meter import Meter
from ddpm.train.state import EMA, TrainingState
from ddpm.weights.initial import initial_weights


def load_data(
    config: Config, source: Source | None, accelerator: Accelerator
) -> tuple[ImageSet, Source]:
    """Returns the run's images, which the main process prepares first, and their source.

    Args:
        config: The run's configuration.
        source: The source of the images, if already known.
        accelerator: The run's accelerator.

    Raises:
        ValueError: As `build.images` does, or if the processes find different images.
        Preempted: If told to stop meanwhile.
    """
    loaded: list[tuple[ImageSet, Source]] = []
    for leads in (True, False):  # the others find what the main process has prepared
        with together():
            if accelerator.is_main_process == leads:
                with at_once():
                    found = source or build.source(config)
                    workers = config.runtime.workers or cores()
                    loaded.append((build.images(config, found, workers), found))
    data, found = loaded[0]
    fingerprints = gather([data.fingerprint], PartialState())
    if len(set(fingerprints)) > 1:
        raise ValueError(
            "the processes find different pictures (fingerprints "
            f"{', '.join(sorted(set(fingerprints)))}): all must read the same files"
        )
    return data, found


def check_data(data: ImageSet, source: Source, config: Config, run: RunFolder) -> None:
    """Checks the data's labels, and that a resumed run has the same images as before.

    Raises:
        ValueError: If the labels or the images do not fit the run.
    """
    expected = config.data.num_classes
    if config.training.conditional and len(data.classes) != (expected or max(len(data.classes), 1)):
        raise ValueError(
            f"training.conditional=true needs {expected or 'some'} classes (data.num_classes), but "
            f"the data has {len(data.classes)}"
        )
    if config.training.conditional and data.labels is not None and (data.labels < 0).any():
        raise ValueError(
            "training.conditional=true needs a class for each picture, but "
            f"{(data.labels < 0).sum()} of {len(data)} have none ({'; '.join(data.notes)})"
        )
    pictures.check(run, data.fingerprint, source)


def batches_of(data: ImageSet, config: Config, device: torch.device) -> TimedBatches:
    """Returns the training batches, without the held-out images."""
    training = config.training
    trained_on, _ = data.split(config.data.holdout)
    on_device = goes_on_device(config.runtime.feed, data, device)
    return TimedBatches(
        trained_on.stored,
        training.batch_size,
        config.seed,
        device,
        training.drop_last,
        config.data.flip,
        labels=trained_on.labels if training.conditional else None,
        label_dropout=training.label_dropout,
        any_class=len(data.classes),
        rows=trained_on.rows,
        on_device=on_device,
        copies=copies_to(device),
    )


def notes_on(data: ImageSet, config: Config) -> list[str]:
    """Returns what a user should know about this run's data, one line each."""
    notes = []
    if config.data.flip and config.data.name == "folder":
        notes.append(
            "half of the pictures are mirrored in training; data.flip=false turns this off"
        )
    if config.data.holdout > 0 and data.labels is not None:
        trained_on, held_out = data.split(config.data.holdout)
        seen, kept = (
            {int(label) for label in part.labels if label >= 0}
            for part in (trained_on, held_out)
            if part.labels is not None
        )
        for number in sorted(kept - seen):
            notes.append(
                f"class {data.classes[number]} is held out entirely: training never sees it "
                f"(data.holdout={config.data.holdout})"
            )
    return notes


def notes_on_dropout(config: Config, run: RunFolder, num_classes: int) -> list[str]:
    """Returns what a user should know about this run's dropout: one line, or none.

    Args:
        config: The run's configuration.
        run: The run's folder, before this start is recorded.
        num_classes: Number of classes of the data.
    """
    target = config.model["_target_"]
    before = steps_of_before(run.record(), DROPOUT_BY_PLACE)
    if not before and target in public_names():
        return []
    network = build.network(config, torch.device("meta"), num_classes)
    if not drops(network):
        return []
    if not takes_dropout_keys(network):
        return [
            f"{target} has dropout masks that depend on how a batch is split (number of devices, "
            "runtime.device_batch); a forward() that takes dropout_keys, as in ddpm.models.UNet, "
            "makes them depend on nothing but the image's place in the batch"
        ]
    if before:
        return [
            f"an earlier version made the steps up to {before} with other dropout masks: a new run "
            "of this configuration would give other numbers"
        ]
    return []


def jump_of_rate(config: Config, run: RunFolder, num_steps: int) -> list[str]:
    """Returns one line if the learning rate jumps because settings have changed, else none.

    The run's folder must still hold the earlier settings.
    """
    record = run.record()
    step = record.get("step", 0)
    if not step or not record.get("num_steps"):
        return []
    before = run.config(config.runtime.trusted_modules)
    old, new = (
        build.lr_schedule(settings)(step, total, float(settings.optimizer["lr"]))
        for settings, total in ((before, record["num_steps"]), (config, num_steps))
    )
    if math.isclose(old, new):
        return []
    last = build.lr_schedule(before)(step - 1, record["num_steps"], float(before.optimizer["lr"]))
    return [f"the learning rate jumps from {last:.3g} to {new:.3g} after step {step}"]


def how_fed(data: ImageSet, batches: Batches) -> str:
    """Returns in words how the images reach the device."""
    if isinstance(data.stored, Packed):
        return "decoded as they are needed"
    return "whole on the device" if batches.on_device else "from the decoded file"


def prepare(
    config: Config, accelerator: Accelerator, diffusion: GaussianDiffusion, network: nn.Module
) -> TrainingState:
    """Puts a network in training mode and returns its training state at step 0."""
    optimizer = build.optimizer(config, list(network.parameters()))
    with keep_forward(network):
        model, optimizer = accelerator.prepare(network.train(), optimizer)
    # last: with several processes on a CPU, Accelerate moves the weights to other memory
    ema = EMA(network, config.training.ema_decay, config.training.ema_warmup)
    timesteps = build.timestep_sampler(diffusion, accelerator.device)
    meter = Meter(diffusion.num_timesteps, accelerator)
    return TrainingState(accelerator, network, model, ema, optimizer, timesteps, meter)


def state_of(
    config: Config,
    run: RunFolder,
    accelerator: Accelerator,
    diffusion: GaussianDiffusion,
    num_classes: int,
    way: str,
) -> TrainingState:
    """Returns the state of the run's newest intact checkpoint, or its initial state.

    Args:
        config: The run's configuration.
        run: The run's folder.
        accelerator: The run's accelerator.
        diffusion: The run's diffusion process.
        num_classes: Number of classes of the data.
        way: The way in which the network runs, by its name in ddpm.system.ways.

    Raises:
        ValueError: If all checkpoints are damaged, or init_from does not fit.
    """
    network = build.network(config, accelerator.device, num_classes)
    if _starts_from_weights(config, run):
        network.load_state_dict(initial_weights(config, network))
    ways.put(network, way)
    state = prepare(config, accelerator, diffusion, network)
    newest = checkpoint.newest_whole(run.checkpoints)
    if newest is not None:
        state.load_state_dict(newest.load())
    return state


def _starts_from_weights(config: Config, run: RunFolder) -> bool:
    return config.init_from is not None and not checkpoint.all_in(run.checkpoints)
