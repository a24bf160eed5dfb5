"""Compares drawn images with the data: distances on features, nearest pictures, colors."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpm.evaluate import metrics
from ddpm.evaluate.features import SURE, Extractor, Features
from ddpm.evaluate.reference import Reference
from ddpm.runs.results import Measurement
from ddpm.sample.images import grid

NUM_PAIRS = 16  # nearest pairs on a sheet


def distance(
    metric: str,
    drawn: Features,
    reference: Reference | None,
    extractor: Extractor,
    protocol: dict[str, Any],
    seed: int,
) -> list[Measurement]:
    """Measures a distance between drawn images and a reference, with its floor.

    The floor is the same distance between two halves of the reference; None if it is too small.

    Args:
        metric: fd, kd, inception_score or precision_recall.
        drawn: Features of the drawn images.
        reference: What they are compared with; None for inception_score, which needs none.
        extractor: The extractor that computed both; it names the distances.
        protocol: Protocol of the measurements. `splits` is the number of parts that inception_score
            averages over; `num_reference` is the number of reference pictures that precision_recall
            uses, evenly spaced, None for all.
        seed: Seed of the random halves and subsets.

    Raises:
        TooFew: If there are too few images.
        CannotBeHad: If the metric is inception_score and the extractor gives no probabilities.
        ValueError: If the metric is none of the four.
    """
    if metric == "inception_score":
        if drawn.probabilities is None:
            raise metrics.CannotBeHad(
                "inception_score needs class probabilities, but "
                f"evaluation.extractor={extractor.name} gives none"
            )
        value, deviation = metrics.inception_score(drawn.probabilities, protocol["splits"])
        name = (
            "inception_score" if extractor.name == "inception" else f"class_score_{extractor.name}"
        )
        return [Measurement(name, value, protocol, deviation)]
    assert reference is not None
    half, other = _halves(reference.features, len(drawn.features), seed)
    if metric == "fd":
        if reference.moments is None:
            raise metrics.TooFew("a covariance needs at least 2 images, got 1")
        value = metrics.frechet_distance(metrics.moments(drawn.features), reference.moments)
        floor = _floor(_frechet, half, other)
        return [Measurement(extractor.distance_name, value, protocol, floor=floor)]
    assert reference.features is not None
    if metric == "kd":
        value, deviation = metrics.kernel_distance(drawn.features, reference.features, seed)
        floors = _floor(metrics.kernel_distance, half, other, seed)
        floor = floors and floors[0]
        return [Measurement(extractor.kernel_name, value, protocol, deviation, floor)]
    if metric != "precision_recall":
        raise ValueError(f"distance() cannot measure {metric}")
    num_reference = protocol["num_reference"]
    real = _evenly(reference.features, num_reference)
    values = metrics.precision_recall(real, drawn.features)
    floors = _floor(metrics.precision_recall, half[:num_reference], other) or (None, None)
    return [
        Measurement(name, value, protocol, floor=floor)
        for name, value, floor in zip(("precision", "recall"), values, floors, strict=True)
    ]


def classes(
    drawn: Features, asked: Sequence[str] | None, extractor: Extractor, protocol: dict[str, Any]
) -> list[Measurement]:
    """Measures how confidently a classifier recognizes drawn images.

    `named` is the share of images that get a class with a probability of SURE or more; its floor is
    the same share of real pictures that the classifier was not trained on. `class_accuracy` is the
    share of images that get the class that they were drawn for.

    Args:
        drawn: Features of the drawn images.
        asked: Name of the class that each was drawn for; None for a network without classes.
        extractor: The classifier that computed the features.
        protocol: Protocol of the measurements.

    Raises:
        CannotBeHad: If the extractor does not know the data's classes.
    """
    known = extractor.classes
    if drawn.probabilities is None or not known:
        raise metrics.CannotBeHad(
            "classes needs a classifier of the data's classes: give evaluation.extractor=digits "
            f"instead of {extractor.name}"
        )
    if asked is not None and not set(asked) <= set(known):
        raise metrics.CannotBeHad(
            f"classes needs a classifier of the data's classes; {extractor.name} knows "
            f"{', '.join(known)}, but images were drawn of {', '.join(sorted(set(asked)))}"
        )
    sure, likeliest = drawn.probabilities.max(dim=1)
    share = float((sure >= SURE).double().mean())
    found = [Measurement("named", share, protocol, floor=extractor.sure_of_real)]
    if asked is not None:
        right = torch.tensor([known.index(name) for name in asked]) == likeliest
        found.append(Measurement("class_accuracy", float(right.double().mean()), protocol))
    return found


def _evenly(features: Tensor, count: int | None) -> Tensor:
    """`count` evenly spaced rows; raises TooFew if there are fewer."""
    if count is None:
        return features
    if count > len(features):
        raise metrics.TooFew(
            f"evaluation.num_reference={count} is more than the {len(features)} pictures of the "
            "reference"
        )
    return features[torch.arange(count) * len(features) // count]


def _frechet(some: Tensor, others: Tensor) -> float:
    return metrics.frechet_distance(metrics.moments(some), metrics.moments(others))


def _floor(measure: Callable[..., Any], half: Tensor, other: Tensor, *rest: Any) -> Any:
    """The measure between two halves of the data; None if they are too small for it."""
    try:
        return measure(half, other, *rest)
    except metrics.TooFew:
        return None


def nearest_pairs(
    drawn: Features, reference: Tensor, protocol: dict[str, Any]
) -> tuple[Measurement, list[tuple[int, int]]]:
    """Measures how near drawn images are to the training pictures.

    The ratio is the median distance from a drawn image to the nearest training picture, divided by
    that from a training picture to the nearest other one. Far below 1, the network repeats its
    training set.

    Args:
        drawn: Features of the drawn images.
        reference: Features of the training pictures, (N, D).
        protocol: Protocol of the measurement.

    Returns:
        The ratio, and the NUM_PAIRS closest pairs of indices (drawn, training), nearest first.
    """
    distance, index = metrics.nearest(drawn.features, reference)
    among, _ = metrics.nearest(reference, reference, exclude_self=True)
    closest = torch.argsort(distance)[:NUM_PAIRS].tolist()
    ratio = float(distance.median() / among.median().clamp(min=1e-12))
    return Measurement("nearest_ratio", ratio, protocol), [
        (drawn_index, int(index[drawn_index])) for drawn_index in closest
    ]


def pairs_sheet(drawn: np.ndarray, training: np.ndarray) -> np.ndarray:
    """Puts drawn images above their nearest training pictures.

    Args:
        drawn: (N, H, W, C) uint8.
        training: The training picture nearest to each, shaped like drawn.

    Returns:
        (H, W, C) uint8.
    """
    return grid(np.concatenate([drawn, training]), columns=len(drawn), least_width=64 * len(drawn))


def colour(
    drawn: Iterable[np.ndarray], training: Iterable[np.ndarray], protocol: dict[str, Any]
) -> tuple[list[Measurement], list[str]]:
    """Compares the mean and standard deviation of each channel with the data's.

    Args:
        drawn: Blocks of images, each (B, H, W, C) levels from 0 to 255.
        training: Blocks of the data, likewise.
        protocol: Protocol of the measurements.

    Returns:
        The gaps, drawn images minus data, in levels on the scale of 0 to 255; and a warning for
        each gap of more than 5 levels.
    """
    figures, warnings = [], []
    gaps = _levels(drawn) - _levels(training)
    for channel, both in enumerate(gaps.T):
        for name, gap in zip(("mean", "deviation"), both, strict=True):
            figures.append(Measurement(f"channel_{channel}_{name}_gap", float(gap), protocol))
            if abs(gap) > 5:
                warnings.append(
                    f"channel {channel}: the {name} of the samples is {gap:+.1f} levels off the "
                    "data's: a tint, or a loss of contrast"
                )
    return figures, warnings


def _levels(blocks: Iterable[np.ndarray]) -> np.ndarray:
    """Mean and standard deviation of each channel, (2, C) float64, from sums exact for uint8."""
    sums = np.asarray(sum(_sums(block) for block in blocks))
    each = [[value.item() for value in channel] for channel in sums.T]
    return np.array(
        [
            [total / count for count, total, _ in each],
            [math.sqrt(count * squares - total**2) / count for count, total, squares in each],
        ]
    )


def _sums(block: np.ndarray) -> np.ndarray:
    """Count, sum and sum of squares of each channel, (3, C), exact for uint8."""
    whole = block.dtype == np.uint8
    square = np.square(block, dtype=np.uint16 if whole else np.float64)
    exact = np.int64 if whole else np.float64
    count = np.full(block.shape[3], block[..., 0].size)
    rest = [part.sum(axis=(0, 1, 2), dtype=exact) for part in (block, square)]
    return np.stack([count, *rest])


def _halves(features: Tensor | None, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two disjoint random parts of `count` rows each, or of half the rows if that is less."""
    if features is None:
        return torch.empty(0, 1), torch.empty(0, 1)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(features)))
    size = min(count, len(features) // 2)
    return features[order[:size]], features[order[size : 2 * size]]
