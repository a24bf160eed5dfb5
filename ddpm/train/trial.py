"""A trial of a way to train, in one process: checks it against the plain way and times it."""

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddpm.config.schema import Config
from ddpm.models.layers import drops, takes_dropout_keys
from ddpm.system import ways
from ddpm.system.devices import wait_for
from ddpm.system.precision import autocast
from ddpm.system.processes import accelerator_for
from ddpm.system.ways import Difference, difference
from ddpm.train.timed import TrainingStep, random_images
from ddpm.tune.search import FEW, Found
from ddpm.tune.timing import fill, rounds

CHECKS = 3  # updates compared before timing: graphs are recorded in the second


@dataclass(frozen=True)
class Task:
    """What a trial tries.

    Attributes:
        config: The run's configuration.
        num_classes: Number of classes of the data.
        batch: Images per update that one process takes.
        device_batch: Images at once; with runtime.device_batch=auto they are halved until they
            fit the GPU.
        way: Name of the way, of ddpm.system.ways.
    """

    config: Config
    num_classes: int
    batch: int
    device_batch: int
    way: str


def measure(task: Task) -> dict[str, Any]:
    """Runs a trial and returns its `Found` in plain form."""
    size = task.device_batch
    while True:
        try:
            return _of_size(task, size).plain()
        except torch.OutOfMemoryError:
            graphs = ways.WAYS[task.way].graphs  # which take each batch whole
            if size == 1 or graphs or task.config.runtime.device_batch != "auto":
                raise
        torch.cuda.empty_cache()  # outside the except block, where the error still holds tensors
        torch._dynamo.reset()
        size = -(-size // 2)


def _of_size(task: Task, size: int) -> Found:
    config, runtime = task.config, task.config.runtime
    precision = config.training.precision
    with accelerator_for(runtime.device, precision, runtime.deterministic) as accelerator:
        images = random_images(config, task.batch)
        own = ways.default(accelerator.device)

        def step(way: str) -> TrainingStep:
            made = TrainingStep(
                config, accelerator, images, task.batch, way, size, task.num_classes
            )
            fill(made.network)
            return made

        with ways.carried_out(task.way):
            tried = step(task.way)
            plain = tried if task.way == own else step(own)
            began = time.perf_counter()
            tried.gradients(0, size)
            first = time.perf_counter() - began
            worst = Difference("", 0.0)
            for number in range(CHECKS if plain is not tried else 0):
                worst = _worse(worst, _compared(tried, plain, number, config))
                if worst.times > FEW:
                    return Found(task.way, size, [0.0], first, worst.times, worst.of)
            seconds = rounds(lambda: tried.run(1))
            if plain is not tried:
                plain.network.load_state_dict(tried.network.state_dict())
                worst = _worse(worst, _compared(tried, plain, CHECKS, config))
            way = ways.WAYS[task.way]
            draws = way.compiled != "no" and not way.graphs
            forward = _forward(tried, config) if draws else []
    return Found(task.way, size, seconds, first, worst.times, worst.of, forward)


def _worse(one: Difference, other: Difference) -> Difference:
    return max(one, other, key=lambda difference: difference.times)


def _compared(tried: TrainingStep, plain: TrainingStep, number: int, config: Config) -> Difference:
    """Compares the gradients and losses of an update."""
    size, device = plain.device_batch or 1, plain.device
    with ways.carried_out(ways.default(device)):
        wanted = again = plain.gradients(number, size)
        # masks from torch's own generator depend on how a batch is split
        if not drops(plain.network) or takes_dropout_keys(plain.network):
            again = plain.gradients(number, -(-size // 2))
    found = tried.gradients(number, size)
    if found.keys() != wanted.keys():
        return Difference(", ".join(sorted(found.keys() ^ wanted.keys())), float("inf"))
    return difference(found, wanted, again, ways.rounding(device, config.training.precision))


def _forward(step: TrainingStep, config: Config) -> list[list[float]]:
    """Seconds of the first network call and of later ones, as previews make them: plain, tried.

    Empty if the code compiled for previews computes something else.
    """
    network, device, batches = step.network, step.device, step.batches
    precision = config.training.precision
    x: Tensor = batches.images(0, 0, batches.size(0))
    t = torch.zeros(len(x), dtype=torch.int64, device=device)
    classes = batches.classes(0, 0, len(x))

    def call(images: slice = slice(None)) -> Tensor:
        given = (x[images], t[images], *(() if classes is None else (classes[images],)))
        with torch.inference_mode(), autocast(device, precision):
            out: Tensor = network(*given)
        wait_for(device)
        return out

    def timed() -> tuple[list[float], Tensor]:
        began = time.perf_counter()
        out = call()
        first = time.perf_counter() - began
        return [first, statistics.median(rounds(call))], out

    network.eval()
    with ways.as_it_is():
        plain, wanted = timed()
        half = -(-len(x) // 2)
        again = torch.cat(
            [call(slice(half)), *([call(slice(half, None))] if half < len(x) else [])]
        )
    tried, found = timed()
    least = ways.rounding(device, precision)
    off = difference({"": found}, {"": wanted}, {"": again}, least).times
    return [plain, tried] if off <= FEW else []
