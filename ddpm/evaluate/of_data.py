"""Measures a network on pictures of its data: bits/dim and losses, on held-out pictures too."""

import functools
import operator
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ddpm.config.schema import Config, Split
from ddpm.data.batches import to_floats
from ddpm.diffusion.process import Model
from ddpm.diffusion.timesteps import NUM_QUARTILES
from ddpm.evaluate import bound
from ddpm.evaluate.job import Job, file_of
from ddpm.runs.results import Measurement
from ddpm.system.devices import halve_to_fit
from ddpm.system.processes import gather, share
from ddpm.system.text import say

BUCKETS = 10  # buckets of timesteps in `losses`
WATCHED = 512  # `held_out_losses` uses at most this many pictures of each split


def losses(job: Job) -> None:
    """Measures the mean loss per bucket of timesteps, on train and on evaluation.bound_split."""
    sums = functools.partial(bound.loss_sums, num_buckets=BUCKETS)
    for split in dict.fromkeys(["train", job.settings.bound_split]):
        protocol = _protocol_of_losses(job, split)
        if not job.has("losses", protocol):
            found = _summed(job, split, "losses", sums, calls=BUCKETS).mean()
            job.add(
                [
                    Measurement(f"loss_t{one.first:04d}_{one.last:04d}", one.loss, protocol)
                    for one in found
                ]
            )


def bits_per_dim(job: Job) -> None:
    """Measures the variational bound and its parts; saves its rate-distortion curve."""
    split = job.settings.bound_split
    count = min(job.settings.num_images, len(job.splits.of(split)))
    protocol = {**job.about, "split": split, "count": count}
    if job.has("bits_per_dim", protocol):
        return
    calls = job.drawing.diffusion.num_timesteps
    found = _summed(job, split, "bits/dim", bound.bound_sums, calls).mean()
    if job.processes.is_main_process:
        path = file_of(job, "rate_distortion", protocol)
        path.parent.mkdir(exist_ok=True)
        bound.save_rate_distortion(path.with_suffix(".png"), path.with_suffix(".csv"), found)
        say(f"rate-distortion {path.with_suffix('.png')}")
    parts = {
        "bits_per_dim": found.total,
        "bits_per_dim_rate": found.rate,
        "bits_per_dim_distortion": found.distortion,
        "bits_per_dim_prior": found.prior,
        "rmse": float(found.rmse[0]),
    }
    job.add([Measurement(name, value, protocol) for name, value in parts.items()])


def held_out_split(config: Config) -> Split | None:
    """Returns the split that a run is measured on but not trained on.

    That is `heldout` if data.holdout is set, else evaluation.split or evaluation.bound_split if one
    of them is `validation` or `test`, else None.
    """
    if config.data.holdout > 0:
        return "heldout"
    asked = (config.evaluation.split, config.evaluation.bound_split)
    return next((split for split in asked if split in ("validation", "test")), None)


def held_out_losses(job: Job, held_out: Split) -> list[Measurement]:
    """Measures the loss that training minimizes, on held-out pictures and on training pictures.

    Each split contributes at most WATCHED pictures, evenly spaced, each at one timestep of every
    quartile. Picture, timestep and noise are the same at every step of a run, so that only the
    weights move the curves. `loss_total` is the mean over all timesteps, equally weighted, and is
    recorded; `loss_q0` to `loss_q3` are the means of the quartiles, from the least noise on.

    Args:
        job: The evaluation.
        held_out: The split that was not trained on.

    Returns:
        The figures, those of `held_out` first, the same on every process.
    """
    settings = job.settings.model_copy(update={"num_images": WATCHED})
    watching = replace(job, settings=settings, found=[])
    figures = []
    for split in (held_out, "train"):
        protocol = _protocol_of_losses(watching, split)
        found = _summed(watching, split, f"loss {split}", bound.quartile_sums, NUM_QUARTILES)
        total = Measurement("loss_total", found.total(), protocol)
        watching.add([total])
        figures.append(total)
        figures += [
            Measurement(f"loss_q{index}", loss, protocol)
            for index, loss in found.by_quartile().items()
        ]
    return figures


def _protocol_of_losses(job: Job, split: Split) -> dict[str, Any]:
    objective = job.trained.config.objective
    return {
        **job.about,
        "split": split,
        "count": min(job.settings.num_images, len(job.splits.of(split))),
        "loss": objective["loss"],
        "prediction": objective["prediction"],
    }


def _summed(job: Job, split: Split, what: str, sums: Callable[..., Any], calls: int) -> Any:
    """The sums that a function of `bound` computes over a split, added over all processes.

    Args:
        job: The evaluation.
        split: The split of the data.
        what: Label of the progress bar.
        sums: A function like bound.loss_sums.
        calls: Calls of the network per picture.
    """
    diffusion, processes = job.drawing.diffusion, job.processes
    mine: list[Any] = []
    count = min(job.settings.num_images, len(job.splits.of(split)))
    hidden = None if processes.is_main_process else True
    with (
        job.drawing.computing(),
        tqdm(total=count * calls, desc=what, unit="img", disable=hidden) as bar,
    ):
        for model, numbers, x0 in _batches(job, split):

            def part(span: slice, model: Any = model, n: Any = numbers, x0: Any = x0) -> Any:
                network = model(span)

                def watched(x_t: Tensor, t: Tensor) -> Tensor:
                    bar.update(len(x_t) * processes.num_processes)
                    return network(x_t, t)

                return sums(watched, diffusion, [(n[span], x0[span])], job.settings.seed)

            mine += halve_to_fit(part, len(x0))
    added = [functools.reduce(operator.add, mine)] if mine else []  # a process may have no share
    return functools.reduce(operator.add, gather(added, processes))


def _batches(job: Job, split: Split) -> Iterator[tuple[Callable[[slice], Model], Tensor, Tensor]]:
    """Yields this process's share of num_images pictures, evenly spaced in the split.

    Yields:
        A function from a slice of the batch to the unguided model for its classes, the pictures'
        indices, and x0.
    """
    data, drawing, settings = job.splits.of(split), job.drawing, job.settings
    unguided = replace(drawing, sampler=replace(drawing.sampler, guidance_scale=1.0))
    count = min(settings.num_images, len(data))
    chosen = np.arange(count) * len(data) // count
    conditional = job.trained.subject.classes is not None
    for start in share(range(0, count, settings.batch_size), job.processes):
        numbers = chosen[start : start + settings.batch_size]
        x0 = to_floats(torch.from_numpy(data.stored[data.rows[numbers]]).to(drawing.device))
        labels: Tensor | None = None
        if conditional and data.labels is not None:
            labels = torch.from_numpy(data.labels[numbers]).to(drawing.device)

        def model(part: slice, labels: Tensor | None = labels) -> Model:
            return unguided.model(None if labels is None else labels[part])

        yield model, torch.from_numpy(numbers).to(drawing.device), x0
