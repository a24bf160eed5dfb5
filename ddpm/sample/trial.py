"""A trial of a way to draw: a process that checks it against the plain way, and times it."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from hydra.utils import instantiate
from torch import Tensor

from ddpm.diffusion.process import GaussianDiffusion
from ddpm.diffusion.samplers import Sampler, step_noise
from ddpm.sample.drawing import Drawing
from ddpm.system import ways
from ddpm.system.devices import to_device, wait_for
from ddpm.system.names import Precision
from ddpm.system.ways import Difference, difference
from ddpm.tune.search import FEW, Found
from ddpm.tune.timing import fill, rounds

CALLS = 4  # network calls to compare, from the noisiest timestep down


@dataclass(frozen=True)
class Task:
    """One trial. Drawing documents the attributes that are missing here.

    Attributes:
        model: The network's class and all its arguments, as in conf/model/; already trusted.
        classes: One class per image; None for a network without classes.
        batch: Images per batch.
        device: The device to draw on.
        way: The way to try, one of ddpm.system.ways.
    """

    model: Mapping[str, Any]
    diffusion: GaussianDiffusion
    sampler: Sampler
    shape: tuple[int, int, int]
    any_class: int | None
    precision: Precision
    classes: list[int] | None
    batch: int
    device: torch.device
    way: str

    def drawing(self) -> Drawing:
        """Returns a Drawing with an untrained network."""
        network = instantiate(dict(self.model), _convert_="all")
        fill(network)
        return Drawing(
            to_device(network.eval(), self.device),
            self.diffusion,
            self.sampler,
            self.shape,
            seed=0,
            any_class=self.any_class,
            precision=self.precision,
        )

    def calls_of(self, count: int) -> int:
        """Returns the batch size of the network calls that draw `count` images."""
        return count if self.sampler.guidance_scale == 1 else 2 * count


def measure(task: Task) -> dict[str, Any]:
    """Runs the trial and returns what it found, as plain data."""
    with ways.carried_out(task.way):
        torch.manual_seed(0)
        plain = task.drawing()
        tried = plain
        if task.way != ways.default(task.device):
            torch.manual_seed(0)
            tried = task.drawing()
            size = task.calls_of(task.batch)
            tried = replace(tried, forward=ways.of_batch(tried.network, task.way, size))
        return _measured(task, plain, tried).plain()


@torch.inference_mode()
def _measured(task: Task, plain: Drawing, tried: Drawing) -> Found:
    timesteps = plain.timesteps[:: max(1, len(plain.timesteps) // CALLS)][:CALLS]
    began = time.perf_counter()
    _outputs(task, tried, timesteps[:1], task.batch)
    wait_for(task.device)
    first = time.perf_counter() - began
    worst = Difference("", 0.0)
    if tried is not plain:
        worst = _compared(task, plain, tried, timesteps)
        if worst.times > FEW:
            return Found(task.way, None, [0.0], first, worst.times, worst.of)
    with tried.computing():
        model, x, t = _ready(task, tried, 0, task.batch, timesteps[-1])

        def call() -> None:
            model(x, t)
            wait_for(task.device)

        seconds = rounds(call)
    if tried is not plain:
        again = _compared(task, plain, tried, timesteps)
        worst = max(worst, again, key=lambda one: one.times)
    return Found(task.way, None, seconds, first, worst.times, worst.of)


def _compared(task: Task, plain: Drawing, tried: Drawing, timesteps: list[int]) -> Difference:
    """Compares the network's outputs at some timesteps, and the images of a chain of these."""
    half = -(-task.batch // 2)
    found, wanted, again = (
        {**_outputs(task, drawing, timesteps, size), **_images(task, drawing, timesteps, size)}
        for drawing, size in ((tried, task.batch), (plain, task.batch), (plain, half))
    )
    return difference(found, wanted, again, ways.rounding(task.device, task.precision))


def _ready(
    task: Task, drawing: Drawing, start: int, stop: int, t: int
) -> tuple[Any, Tensor, Tensor]:
    """Returns the model with its classes, and x_t and t of the images from start to stop."""
    classes = None
    if task.classes is not None:
        classes = torch.tensor(task.classes[start:stop], device=task.device)
    x = drawing.latents(range(start, stop))
    return drawing.model(classes), x, torch.full((len(x),), t, device=task.device)


def _outputs(task: Task, drawing: Drawing, timesteps: list[int], size: int) -> dict[str, Tensor]:
    """Returns the network's outputs at some timesteps, computed `size` images at a time."""
    found: dict[str, list[Tensor]] = {}
    with drawing.computing():
        for start in range(0, task.batch, size):
            for t in timesteps:
                model, x, ts = _ready(task, drawing, start, min(start + size, task.batch), t)
                found.setdefault(f"the output at timestep {t}", []).append(model(x, ts))
    return {name: torch.cat(parts) for name, parts in found.items()}


def _images(task: Task, drawing: Drawing, timesteps: list[int], size: int) -> dict[str, Tensor]:
    """Returns the images of a chain of these timesteps, drawn `size` images at a time."""
    parts = []
    for start in range(0, task.batch, size):
        indices = range(start, min(start + size, task.batch))
        noise = step_noise(task.shape, indices, 0, task.device)
        classes = None if task.classes is None else task.classes[start : start + size]
        parts.append(drawing.walk(drawing.latents(indices), timesteps, noise, classes))
    return {"the images": torch.cat(parts)}
