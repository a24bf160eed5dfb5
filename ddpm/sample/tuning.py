"""The way in which many images are drawn, decided before they are."""

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
    """Gives the drawing with its network carried out in the fastest way for so many images.

    All processes must enter it.

    Args:
        drawing: What draws.
        subject: What it is of.
        classes: One an image, at least for the first batch; None for a network without.
        batch: Images at once; batches of fewer are drawn as they are.
        images: That are to be drawn, all processes together.
        processes: Those that share the work.
        tune: auto, true, false, or a way.
        cache: Where what was found is remembered.

    Raises:
        ValueError: If this device does not have the way asked for.
        Preempted: If told to stop meanwhile.
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
    """Refuses a way asked for by name that cannot be had here.

    Raises:
        ValueError: If it cannot.
    """
    if isinstance(tune, str) and tune != "auto":
        ways.check(tune, device, deterministic=False)
        if ways.WAYS[tune].compiled == "blocks":
            raise ValueError(f"tune={tune} is for training; to draw there is tune=compiled")


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
    # of what each process sees and measures that of the leading one counts
    choice = gather([without_trials(tune, work, None)], processes)[0]
    if choice is None:
        budget = gather([budget_of(tune, work)], processes)[0]
        choice = budget if isinstance(budget, Choice) else _tried(task, work, budget)
    return choice


def _tried(first: Task, work: Work, budget: Budget) -> Choice:
    """What trials show; the leading process makes them, for all."""
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
    """Seconds of a call of the network, as it is."""
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
