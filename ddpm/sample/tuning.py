"""Decides in which way to draw many images, before drawing them."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import PartialState

from ddpm.sample.drawing import Drawing
from ddpm.sample.subject import Subject
from ddpm.sample.trial import Task
from ddpm.system import ways
from ddpm.system.devices import wait_for
from ddpm.system.processes import gather, together
from ddpm.system.signals import at_once
from ddpm.system.trials import trials
from ddpm.tune.decide import (
    Budget,
    Choice,
    Tune,
    Work,
    budget_of,
    by_trials,
    facts_of_device,
    without_trials,
)
from ddpm.tune.search import Found


@contextmanager
def tuned(
    drawing: Drawing,
    subject: Subject,
    classes: Sequence[int] | None,
    batch: int,
    images: int,
    processes: PartialState,
    tune: Tune,
    cache: Path,
) -> Iterator[Drawing]:
    """Yields the drawing with its network set to run in the fastest way for so many images.

    All processes must enter it.

    Args:
        drawing: The network and sampler to draw with.
        subject: The subject of the drawing.
        classes: One class per image, for the first batch at least; None for a network without
            classes.
        batch: Images per batch; smaller batches are drawn in the default way.
        images: Number of images to draw over all processes.
        processes: The processes that share the work.
        tune: auto, true, false, or a way.
        cache: The folder that remembers earlier findings.

    Raises:
        ValueError: If this device does not support the way that was asked for.
        Preempted: If a signal asks the process to stop meanwhile.
    """
    own = ways.default(drawing.device)
    task = Task(
        subject.model,
        drawing.diffusion,
        drawing.sampler,
        drawing.shape,
        drawing.any_class,
        drawing.precision,
        None if classes is None else list(classes[:batch]),
        batch,
        drawing.device,
        own,
    )
    choice = _choice(task, drawing, images, processes, tune, cache)
    with ways.carried_out(choice.way):
        forward = None
        if choice.way != own:
            forward = ways.of_batch(drawing.network, choice.way, task.calls_of(batch))
        yield replace(drawing, forward=forward)


def check(tune: Tune, device: torch.device) -> None:
    """Checks that a way asked for by name is available here.

    Raises:
        ValueError: If it is not.
    """
    if isinstance(tune, str) and tune != "auto":
        ways.check(tune, device, deterministic=False)
        if ways.WAYS[tune].compiled == "blocks":
            raise ValueError(f"tune={tune} is only for training; use tune=compiled to draw")


def _choice(
    task: Task, drawing: Drawing, images: int, processes: PartialState, tune: Tune, cache: Path
) -> Choice:
    device, of_call = task.device, task.calls_of(task.batch)
    check(tune, device)
    facts = {
        **facts_of_device(device),
        "precision": drawing.precision,
        "calls": of_call,
        "network": task.model,
    }
    batches = -(-images // (task.batch * processes.num_processes))
    calls = drawing.sampler.calls(drawing.diffusion) * task.batch // of_call
    work = Work(
        device,
        False,
        batches * calls,
        facts,
        ways.possible(device, alone=True, repeats=False),
        None,
        False,
        lambda: _seconds(drawing, task),
        cache,
    )
    # every process decides, but the main process's choice counts
    choice = gather([without_trials(tune, work, None)], processes)[0]
    if choice is None:
        budget = gather([budget_of(tune, work)], processes)[0]
        choice = budget if isinstance(budget, Choice) else _tried(task, work, budget)
    return choice


def _tried(first: Task, work: Work, budget: Budget) -> Choice:
    """Runs trials on the main process, and returns its choice on all."""
    chosen: list[Choice] = []
    with together():
        if PartialState().is_main_process:
            with at_once(), trials("ddpm.sample.trial") as run:

                def attempt(name: str, size: int | None, seconds: float) -> Found:
                    return Found(**run.run("measure", replace(first, way=name), seconds))

                chosen.append(
                    by_trials(work, budget, attempt, lambda line: print(line, flush=True))
                )
    return gather(chosen, PartialState())[0]


def _seconds(drawing: Drawing, task: Task) -> float:
    """Returns the seconds of one network call in the default way."""
    x = drawing.latents(range(task.batch))
    t = torch.zeros(len(x), dtype=torch.int64, device=drawing.device)
    classes = None if task.classes is None else torch.tensor(task.classes, device=drawing.device)
    found = []
    with torch.inference_mode(), drawing.computing(), at_once():
        for _ in range(3):
            began = time.perf_counter()
            drawing.model(classes)(x, t)
            wait_for(drawing.device)
            found.append(time.perf_counter() - began)
    return min(found[1:])
