"""Measures a network's bits/dim, and at which timesteps they arise.

Computes the variational bound term by term, its rate-distortion curve, and the loss by timestep.
"""

import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm.diffusion.process import GaussianDiffusion, Model
from ddpm.diffusion.timesteps import quartiles
from ddpm.system import files, randomness
from ddpm.system.devices import memory_format
from ddpm.system.signals import check

# (indices of the images in their data set, (B,) int64; x0, (B, C, H, W) float in [-1, 1])
Batch = tuple[Tensor, Tensor]


class Bound(NamedTuple):
    """The bound on the negative log likelihood, a mean over images (Ho et al. 2020, Eq. 5).

    Attributes:
        prior: L_T, bits/dim.
        terms: (T,) float64, bits/dim: at t = 0 the decoder's code length L_0, above it the KLs.
        rmse: (T,) float64, root mean squared error of x0_hat at t, on the scale of 0 to 255.
        epsilon_mse: (T,) float64, mean squared error of the noise that x0_hat implies.
        num_images: Number of images that the mean is over.
    """

    prior: float
    terms: Tensor
    rmse: Tensor
    epsilon_mse: Tensor
    num_images: int

    @property
    def rate(self) -> float:
        """Bits/dim of the latents, L_1 + ... + L_T."""
        return self.prior + self.terms[1:].sum().item()

    @property
    def distortion(self) -> float:
        """Bits/dim of the image given the latents, L_0."""
        return self.terms[0].item()

    @property
    def total(self) -> float:
        """The bound in bits/dim."""
        return self.rate + self.distortion


@dataclass(frozen=True)
class BoundSums:
    """The sums over images behind a Bound; `a + b` merges those of batches or processes.

    Attributes:
        totals: (2 + 3T,) float64 on the CPU: the number of images, then sums over images of the
            prior term, of the term at each timestep, and of the squared errors at each timestep,
            of x0 and of epsilon.
    """

    totals: Tensor

    def __add__(self, other: "BoundSums") -> "BoundSums":
        return BoundSums(self.totals + other.totals)

    def mean(self) -> Bound:
        """Returns the mean over the images.

        Raises:
            ValueError: If there are no images.
        """
        count, means = _means(self.totals)
        terms, of_x0, of_epsilon = means[1:].chunk(3)
        return Bound(means[0].item(), terms, 127.5 * of_x0.sqrt(), of_epsilon, count)


# not inference_mode: training also uses the tables that the diffusion builds here
@torch.no_grad()
def bound_sums(
    model: Model,
    diffusion: GaussianDiffusion,
    batches: Iterable[Batch],
    seed: int,
) -> BoundSums:
    """Sums the variational bound over images, as the authors evaluate it.

    Every timestep of every image gets one noise draw. x0_hat is clamped to [-1, 1], also before the
    noise is derived from it (calc_bpd_loop of guided-diffusion); a predicted mean of x_{t-1} is not
    clamped.

    `mean` of the sums is the bound. Sums of several processes, or of classes that need different
    models, can be added first.

    Args:
        model: The network, in evaluation mode.
        diffusion: The process that it was trained for.
        batches: See Batch.
        seed: The noise is a function of seed, t and the image's index, however images are batched.
    """
    num_timesteps = diffusion.num_timesteps
    totals = torch.zeros(2 + 3 * num_timesteps, dtype=torch.float64)
    for numbers, x0 in batches:
        found = []
        for index in range(num_timesteps):
            check()
            t = torch.full((len(x0),), index, device=x0.device)
            noise = _noise(seed, index, numbers, x0)
            x_t = diffusion.q_sample(x0, t, noise)
            output = diffusion.run(model, x_t, t)
            x0_hat, eps_hat, _ = diffusion.clipped(diffusion.estimate(output, x_t, t), x_t, t)
            found.append(
                (
                    diffusion.bound_term(output, x0, x_t, t, clip=True),
                    (x0_hat - x0).square().flatten(1).mean(dim=1),
                    (eps_hat - noise).square().flatten(1).mean(dim=1),
                )
            )
        sums = [torch.stack(part).cpu().double().sum(dim=1) for part in zip(*found, strict=True)]
        prior = diffusion.prior_term(x0.cpu()).sum(dim=0, keepdim=True)
        totals += torch.cat([torch.tensor([len(x0)]), prior, *sums])
    return BoundSums(totals)


class Bucket(NamedTuple):
    """The mean loss over the timesteps first to last, inclusive."""

    first: int
    last: int
    loss: float


@dataclass(frozen=True)
class LossSums:
    """The sums over images behind a list of Buckets; `a + b` merges those of batches or processes.

    Attributes:
        num_timesteps: T.
        totals: (1 + num_buckets,) float64 on the CPU: the number of images, then sums over images
            of each bucket's loss.
    """

    num_timesteps: int
    totals: Tensor

    def __add__(self, other: "LossSums") -> "LossSums":
        assert self.num_timesteps == other.num_timesteps
        return LossSums(self.num_timesteps, self.totals + other.totals)

    def mean(self) -> list[Bucket]:
        """Returns the mean over the images for each bucket.

        Raises:
            ValueError: If there are no images.
        """
        losses = _means(self.totals)[1].tolist()
        return [
            Bucket(*span, loss)
            for span, loss in zip(_spans(self.num_timesteps, len(losses)), losses, strict=True)
        ]


@torch.no_grad()
def loss_sums(
    model: Model,
    diffusion: GaussianDiffusion,
    batches: Iterable[Batch],
    seed: int,
    num_buckets: int = 10,
) -> LossSums:
    """Sums the loss that training minimizes over images, in buckets of neighbouring timesteps.

    Each image gets one timestep and one noise draw per bucket. See bound_sums for `mean`.

    Args:
        model: The network, in evaluation mode.
        diffusion: The process that it was trained for.
        batches: See Batch.
        seed: Timestep and noise are functions of seed, bucket and the image's index.
        num_buckets: From 1 to T.

    Raises:
        ValueError: If `num_buckets` is not from 1 to T.
    """
    num_timesteps = diffusion.num_timesteps
    if not 1 <= num_buckets <= num_timesteps:
        raise ValueError(
            f"num_buckets={num_buckets} must be from 1 to {num_timesteps}, the number of timesteps"
        )
    # the bound uses the streams below num_timesteps
    streams = [num_timesteps + 2 * bucket for bucket in range(num_buckets)]
    spans = _spans(num_timesteps, num_buckets)
    stretches = list(zip(streams, spans, strict=True))
    totals = _loss_totals(model, diffusion, batches, randomness.EVALUATION, seed, stretches)
    return LossSums(num_timesteps, totals)


@dataclass(frozen=True)
class QuartileSums:
    """The sums over images behind losses by quartile of the timesteps; `a + b` merges them.

    Attributes:
        num_timesteps: T.
        totals: (1 + number of quartiles,) float64 on the CPU, laid out as in LossSums.
    """

    num_timesteps: int
    totals: Tensor

    def __add__(self, other: "QuartileSums") -> "QuartileSums":
        assert self.num_timesteps == other.num_timesteps
        return QuartileSums(self.num_timesteps, self.totals + other.totals)

    def by_quartile(self) -> dict[int, float]:
        """Returns the mean over the images, for each quartile that has timesteps.

        Raises:
            ValueError: If there are no images.
        """
        losses = _means(self.totals)[1].tolist()
        return dict(zip(quartiles(self.num_timesteps), losses, strict=True))

    def total(self) -> float:
        """Returns the mean over the images and over all timesteps, equally weighted.

        Raises:
            ValueError: If there are no images.
        """
        spans = quartiles(self.num_timesteps)
        found = self.by_quartile()
        weights = {index: last - first + 1 for index, (first, last) in spans.items()}
        return sum(weights[index] * found[index] for index in found) / self.num_timesteps


@torch.no_grad()
def quartile_sums(
    model: Model, diffusion: GaussianDiffusion, batches: Iterable[Batch], seed: int
) -> QuartileSums:
    """Sums the loss that training minimizes over images, in the quartiles that training reports.

    Each image gets one timestep and one noise draw per quartile.

    Args:
        model: The network, in evaluation mode.
        diffusion: The process that it was trained for.
        batches: See Batch.
        seed: Timestep and noise are functions of seed, quartile and the image's index.
    """
    stretches = [(2 * index, span) for index, span in quartiles(diffusion.num_timesteps).items()]
    totals = _loss_totals(model, diffusion, batches, randomness.HELD_OUT, seed, stretches)
    return QuartileSums(diffusion.num_timesteps, totals)


def _loss_totals(
    model: Model,
    diffusion: GaussianDiffusion,
    batches: Iterable[Batch],
    purpose: int,
    seed: int,
    stretches: list[tuple[int, tuple[int, int]]],
) -> Tensor:
    """The number of images, then the sum of their losses in each stretch of timesteps.

    A stretch is (stream, (first, last timestep)). Timesteps are drawn from `stream`, noise from
    `stream + 1`.
    """
    totals = torch.zeros(1 + len(stretches), dtype=torch.float64)
    for numbers, x0 in batches:
        found = []
        for stream, (first, last) in stretches:
            check()
            keys = randomness.stream_keys(purpose, seed, stream, numbers.to(x0.device))
            t = first + randomness.integers(keys, last - first + 1)
            noise = _noise(seed, stream + 1, numbers, x0, purpose)
            found.append(diffusion.losses(model, x0, t, noise))
        totals += torch.cat([torch.tensor([len(x0)]), torch.stack(found).cpu().double().sum(dim=1)])
    return totals


class Point(NamedTuple):
    """One point of progressive lossy coding.

    Attributes:
        reverse_time: Number of reverse steps done, of T.
        rate: Bits/dim received so far.
        rmse: Root mean squared error of x0_hat, on the scale of 0 to 255.
    """

    reverse_time: int
    rate: float
    rmse: float


def rate_distortion(bound: Bound) -> list[Point]:
    """Returns the curve of Ho et al. 2020, Fig. 5, at reverse times T - t + 1 = 1, ..., T.

    Here t counts as in the paper, one more than in the code. x_t has cost L_T + ... + L_t, and
    x0_hat is the network's estimate at x_t. The rate of the last point is that of the bound, which
    excludes L_0.
    """
    latents = torch.cat([torch.tensor([bound.prior], dtype=torch.float64), bound.terms[1:].flip(0)])
    rates, errors = latents.cumsum(dim=0).tolist(), bound.rmse.flip(0).tolist()
    return [
        Point(index + 1, rate, rmse)
        for index, (rate, rmse) in enumerate(zip(rates, errors, strict=True))
    ]


def save_rate_distortion(path_png: Path, path_csv: Path, bound: Bound) -> None:
    """Writes the numbers as CSV, then the three panels of Ho et al. 2020, Fig. 5, as PNG.

    Args:
        path_png: Where the panels go.
        path_csv: Where the numbers go, one row per timestep.
        bound: The bound to plot.

    Raises:
        ValueError: If matplotlib is not installed; the CSV is written anyway.
    """
    curve = rate_distortion(bound)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    heads = ["t", "term_bits_per_dim", "reverse_time", "rate_bits_per_dim", "rmse", "epsilon_mse"]
    writer.writerow(heads)
    rows = zip(bound.terms.tolist(), reversed(curve), bound.epsilon_mse.tolist(), strict=True)
    for t, (term, point, epsilon_mse) in enumerate(rows):
        writer.writerow([t, term, *point, epsilon_mse])
    files.write_text(path_csv, text.getvalue())
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(
            "the rate-distortion plot needs the package matplotlib: pip install -e '.[plots]'"
        ) from error
    times, rates, errors = zip(*curve, strict=True)
    figure = Figure(figsize=(12, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    steps, rate, distortion = (
        "reverse process steps (T - t + 1)",
        "rate (bits/dim)",
        "distortion (RMSE of 255)",
    )
    panels = (
        (times, errors, steps, distortion),
        (times, rates, steps, rate),
        (rates, errors, rate, distortion),
    )
    for axes, (x, y, x_label, y_label) in zip(figure.subplots(1, 3), panels, strict=True):
        axes.plot(x, y)
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    with files.whole(path_png) as scratch:
        figure.savefig(scratch, format="png", dpi=150)


def _noise(
    seed: int, stream: int, numbers: Tensor, x0: Tensor, purpose: int = randomness.EVALUATION
) -> Tensor:
    keys = randomness.stream_keys(purpose, seed, stream, numbers.to(x0.device))
    noise = randomness.normal(keys, tuple(x0.shape[1:])).to(x0.dtype)
    return noise.contiguous(memory_format=memory_format(noise.device))


def _means(totals: Tensor) -> tuple[int, Tensor]:
    """The number of images (the first total), and the other totals divided by it."""
    if totals[0] == 0:
        raise ValueError("there are no images to take a mean over")
    return int(totals[0]), totals[1:] / totals[0]


def _spans(num_timesteps: int, num_buckets: int) -> list[tuple[int, int]]:
    """(first, last) timestep of each bucket."""
    edges = [bucket * num_timesteps // num_buckets for bucket in range(num_buckets + 1)]
    return [(first, following - 1) for first, following in pairwise(edges)]
