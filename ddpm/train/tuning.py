"""runtime.tune: chooses the way in which a run trains, before it starts."""

import functools
import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState

from ddpm.config import build
from ddpm.config.schema import Config
from ddpm.data.batches import Batches
from ddpm.evaluate.measure import OF_SAMPLES
from ddpm.runs.folder import RunFolder
from ddpm.sample.previews import previews_of, times
from ddpm.system import ways
from ddpm.system.devices import wait_for
from ddpm.system.processes import gather, together
from ddpm.system.signals import at_once
from ddpm.system.trials import trials
from ddpm.train.device_batch import largest_fitting
from ddpm.train.loop import backward, micro_batches
from ddpm.train.start import prepare
from ddpm.train.trial import Task
from ddpm.tune.decide import (
    Budget,
    Choice,
    Work,
    budget_of,
    by_trials,
    changed,
    facts_of_device,
    without_trials,
)
from ddpm.tune.search import Found

log = logging.getLogger("ddpm")


def way_of(
    config: Config,
    folder: RunFolder | None,
    accelerator: Accelerator,
    batches: Batches,
    num_classes: int,
    num_steps: int,
) -> Choice:
    """Returns the way in which a run trains from here on; the same on all processes.

    Args:
        config: The run's configuration.
        folder: The run's folder; None if nothing is to be kept.
        accelerator: The run's accelerator.
        batches: The run's batches.
        num_classes: Number of classes of the data.
        num_steps: Steps of the whole run.

    Raises:
        ValueError: If the way asked for is not available here.
        Preempted: If told to stop meanwhile.
    """
    runtime, device = config.runtime, accelerator.device
    record = {} if folder is None else folder.record()
    share = -(-batches.size(0) // accelerator.num_processes)
    fixed = runtime.device_batch if isinstance(runtime.device_batch, int) else None
    size = min(fixed or share, share)
    network = {**config.model, **build.network_arguments(config, num_classes)}
    facts = {
        **facts_of_device(device),
        "precision": config.training.precision,
        "deterministic": runtime.deterministic,
        "batch": share,
        "device_batch": runtime.device_batch,
        "recompute": runtime.recompute,
        "network": network,
        "optimizer": config.optimizer["_target_"],
    }
    alone = accelerator.num_processes == 1 and size == share
    repeats = bool(ways.blocks(build.network(config, torch.device("meta"), num_classes)))
    work = Work(
        device,
        runtime.deterministic,
        num_steps - record.get("step", 0),
        facts,
        ways.possible(device, alone, repeats),
        size,
        fixed is None,
        lambda: _seconds(config, accelerator, batches, num_classes),
        Path(config.data.cache),
    )
    if isinstance(runtime.tune, str) and runtime.tune != "auto":
        check(config, accelerator, size < share, repeats)
    before = record.get("tuned")
    # what the main process sees and measures counts
    choice = gather([without_trials(runtime.tune, work, before)], PartialState())[0]
    if choice is None:
        budget = gather([budget_of(runtime.tune, work)], PartialState())[0]
        if isinstance(budget, Choice):
            choice = budget
        else:
            task = Task(config, num_classes, share, size, work.names[0])
            choice = _tried(task, work, budget, before)
    if folder is not None and accelerator.is_main_process:
        folder.update(tuned=choice.plain())
        log.info("the network runs as %s (%s)", choice.way, choice.why)
    return choice


def check(config: Config, accelerator: Accelerator, in_pieces: bool, repeats: bool) -> None:
    """Checks that the way asked for by name is available here.

    Args:
        config: The run's configuration.
        accelerator: The run's accelerator.
        in_pieces: Whether a process takes its share of a batch in pieces.
        repeats: Whether the network has blocks that repeat.

    Raises:
        ValueError: If it is not.
    """
    name, runtime = str(config.runtime.tune), config.runtime
    ways.check(name, accelerator.device, runtime.deterministic)
    if ways.WAYS[name].compiled == "blocks" and not repeats:
        raise ValueError(
            f"runtime.tune={name}: {config.model['_target_']} has no block that repeats; "
            "runtime.tune=compiled compiles it whole"
        )
    if ways.WAYS[name].graphs and (in_pieces or accelerator.num_processes > 1):
        raise ValueError(
            f"runtime.tune={name}: CUDA graphs take each batch whole, in a single process, but the "
            f"run has runtime.device_batch={runtime.device_batch} in "
            f"{accelerator.num_processes} process(es)"
        )


def check_fits(choice: Choice, device_batch: int, batches: Batches, num_processes: int) -> None:
    """Checks that a whole batch fits in the device's memory where CUDA graphs need that.

    Raises:
        ValueError: If it does not.
    """
    share = -(-batches.size(0) // num_processes)
    if ways.WAYS[choice.way].graphs and device_batch < share:
        raise ValueError(
            f"runtime.tune={choice.way}: CUDA graphs take each batch whole, but only "
            f"{device_batch} of {share} images fit in memory; runtime.tune=compiled uses no graphs"
        )


def draws_as_it_is(choice: Choice, config: Config, num_steps: int) -> bool:
    """Whether previews and evaluations run the network uncompiled.

    They do if compiling for them would take longer than it saves, and beside CUDA graphs, which
    know only the weights that are trained.

    Args:
        choice: The way in which the run trains.
        config: The run's configuration.
        num_steps: Steps of the whole run.
    """
    way, trial = ways.WAYS[choice.way], choice.trial
    if way.graphs or way.compiled == "no":
        return True
    if trial is None:  # asked for by name
        return False
    if not trial.forward:
        return True
    (_, plain), (first, compiled) = trial.forward
    return first + _calls(config, num_steps) * (compiled - plain) > 0


def _calls(config: Config, num_steps: int) -> float:
    """Calls of the network that a run's previews and evaluations make, in training batches."""
    runtime, process = config.runtime, build.diffusion(config)
    previews = build.sampler(previews_of(config, num_steps).settings, process).calls(process)
    drawn = times(num_steps, runtime.sample_every) * runtime.num_previews * previews
    if runtime.evaluate_every is not None and set(OF_SAMPLES) & set(config.evaluation.metrics):
        calls = build.sampler(config.sampler, process).calls(process)
        drawn += times(num_steps, runtime.evaluate_every) * config.evaluation.num_samples * calls
    return drawn / config.training.batch_size


def _tried(first: Task, work: Work, budget: Budget, before: dict[str, Any] | None) -> Choice:
    """Makes the choice by trials, which the main process runs for all."""
    chosen: list[Choice] = []
    with together():
        if PartialState().is_main_process:
            if before is not None and before["facts"]:
                log.warning("tuning again: %s", changed(before["facts"], work.facts))
            with at_once(), trials("ddpm.train.trial") as run:
                say = functools.partial(print, flush=True)

                def attempt(name: str, size: int | None, seconds: float) -> Found:
                    task = replace(first, way=name, device_batch=size or first.batch)
                    return Found(**run.run("measure", task, seconds))

                chosen.append(by_trials(work, budget, attempt, say))
    return gather(chosen, PartialState())[0]


def _seconds(config: Config, accelerator: Accelerator, batches: Batches, num_classes: int) -> float:
    """Seconds of an update's passes in the device's default way; all processes make them."""
    diffusion = build.diffusion(config)
    network = build.network(config, accelerator.device, num_classes)
    state = prepare(config, accelerator, diffusion, network)
    runtime, count = config.runtime, accelerator.num_processes
    size = runtime.device_batch
    if not isinstance(size, int):
        size = largest_fitting(state, diffusion, batches, config.seed)
    found = []
    for _ in range(3):
        began = time.perf_counter()
        with accelerator.no_sync(state.model):
            for span in micro_batches(batches.size(0), count, accelerator.process_index, size):
                backward(state, diffusion, batches, config.seed, 0, *span)
        wait_for(accelerator.device)
        found.append(time.perf_counter() - began)
        state.optimizer.zero_grad()
    accelerator.free_memory()
    return min(found[1:])
