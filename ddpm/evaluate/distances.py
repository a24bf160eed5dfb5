"""Drawn images against the data: distances on features, nearest pictures, colours."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpm.evaluate import metrics
from ddpm.evaluate.features import Extractor, Features
from ddpm.runs.results import Measurement
from ddpm.sample.images import grid
from ddpm.system.files import write_arrays

NUM_PAIRS = 16  # of nearest pictures that are shown


def reference_features(images: np.ndarray, extractor: Extractor, cache: Path) -> Features:
    """Returns the features of a data set's pictures, from the cache if they were computed before.

    Args:
        images: (N, C, H, W) uint8.
        extractor: What computes them.
        cache: A file of this set and extractor.
    """
    if cache.is_file():
        with np.load(cache) as found:
            return Features(
                torch.from_numpy(found["features"]),
                torch.from_numpy(found["probabilities"]) if "probabilities" in found else None,
            )
    found = extractor(images.transpose(0, 2, 3, 1))
    cache.parent.mkdir(parents=True, exist_ok=True)
    write_arrays(
        cache,
        features=found.features.numpy(),
        **({} if found.probabilities is None else {"probabilities": found.probabilities.numpy()}),
    )
    return found


def distance(
    metric: str,
    drawn: Features,
    reference: Features,
    extractor: Extractor,
    protocol: dict[str, Any],
    seed: int,
    inception_splits: int = 10,
    num_reference: int | None = None,
) -> list[Measurement]:
    """Measures a distance between drawn images and the data, with its floor.

    The floor is None where the data has too few pictures for two halves.

    Args:
        metric: fd, kd, inception_score or precision_recall.
        drawn: Features of the drawn images.
        reference: Features of the data.
        extractor: What both come from; it names the distances.
        protocol: That of the measurements.
        seed: Of the random halves and subsets.
        inception_splits: Parts that inception_score is the mean over.
        num_reference: Pictures of the data that precision_recall takes, evenly spaced in the set;
            None for all.

    Raises:
        TooFew: If there are too few images.
        ValueError: If inception_score is wanted and the extractor gives no probabilities.
    """
    half, other = _halves(reference.features, len(drawn.features), seed)
    if metric == "fd":
        value = _frechet(drawn.features, reference.features)
        floor = _floor(_frechet, half, other)
        return [Measurement(extractor.distance_name, value, protocol, floor=floor)]
    if metric == "kd":
        value, deviation = metrics.kernel_distance(drawn.features, reference.features, seed)
        floors = _floor(metrics.kernel_distance, half, other, seed)
        floor = floors and floors[0]
        return [Measurement(extractor.kernel_name, value, protocol, deviation, floor)]
    if metric == "inception_score":
        if drawn.probabilities is None:
            raise ValueError(
                "inception_score needs class probabilities, and "
                f"evaluation.extractor={extractor.name} gives none"
            )
        value, deviation = metrics.inception_score(drawn.probabilities, inception_splits)
        name = (
            "inception_score" if extractor.name == "inception" else f"class_score_{extractor.name}"
        )
        return [Measurement(name, value, {**protocol, "splits": inception_splits}, deviation)]
    real = _evenly(reference.features, num_reference)
    values = metrics.precision_recall(real, drawn.features)
    floors = _floor(metrics.precision_recall, half[:num_reference], other) or (None, None)
    protocol = {**protocol, "num_reference": num_reference}
    return [
        Measurement(name, value, protocol, floor=floor)
        for name, value, floor in zip(("precision", "recall"), values, floors, strict=True)
    ]


def _evenly(features: Tensor, count: int | None) -> Tensor:
    """So many rows, evenly spaced; a TooFew if there are not as many."""
    if count is None:
        return features
    if count > len(features):
        raise metrics.TooFew(
            f"evaluation.num_reference={count} is more than the {len(features)} pictures that are "
            "compared with"
        )
    return features[torch.arange(count) * len(features) // count]


def _frechet(some: Tensor, others: Tensor) -> float:
    return metrics.frechet_distance(metrics.moments(some), metrics.moments(others))


def _floor(measure: Callable[..., Any], half: Tensor, other: Tensor, *rest: Any) -> Any:
    """The measure between two halves of the data, None where they are too small for it."""
    try:
        return measure(half, other, *rest)
    except metrics.TooFew:
        return None


def nearest_pairs(
    drawn: Features, reference: Features, protocol: dict[str, Any]
) -> tuple[Measurement, list[tuple[int, int]]]:
    """Measures how near drawn images are to the training pictures.

    The ratio is the median distance to the nearest training picture, over that of training pictures
    among themselves. Far below 1, the network repeats its training set.

    Args:
        drawn: Features of the drawn images.
        reference: Features of the training pictures.
        protocol: That of the measurement.

    Returns:
        The ratio, and the NUM_PAIRS closest pairs of indices (drawn, training), nearest first.
    """
    distance, index = metrics.nearest(drawn.features, reference.features)
    among, _ = metrics.nearest(reference.features, reference.features, exclude_self=True)
    closest = torch.argsort(distance)[:NUM_PAIRS].tolist()
    ratio = float(distance.median() / among.median().clamp(min=1e-12))
    return Measurement("nearest_ratio", ratio, protocol), [
        (drawn_index, int(index[drawn_index])) for drawn_index in closest
    ]


def pairs_sheet(
    pairs: Sequence[tuple[int, int]], drawn: np.ndarray, training: np.ndarray
) -> np.ndarray:
    """Puts drawn images above their nearest training pictures.

    Args:
        pairs: Of indices (drawn, training).
        drawn: (N, H, W, C) levels of 0 to 255.
        training: (M, C, H, W) uint8.

    Returns:
        (H, W, C) uint8.
    """
    above = drawn[[pair[0] for pair in pairs]].round().astype(np.uint8)
    below = training[[pair[1] for pair in pairs]].transpose(0, 2, 3, 1)
    return grid(np.concatenate([above, below]), columns=len(pairs), least_width=64 * len(pairs))


def colour(
    drawn: np.ndarray, training: np.ndarray, protocol: dict[str, Any]
) -> tuple[list[Measurement], list[str]]:
    """Compares the mean and deviation of each channel with the data's.

    Args:
        drawn: (N, H, W, C) levels of 0 to 255.
        training: (M, C, H, W) uint8.
        protocol: That of the measurements.

    Returns:
        The gaps, drawn images less the data, in levels of 0 to 255; and a warning for each of more
        than 5 levels.
    """
    figures, warnings = [], []
    for channel in range(drawn.shape[3]):
        ours, data = drawn[..., channel].astype(np.float64), training[:, channel].astype(np.float64)
        for name, gap in (
            ("mean", ours.mean() - data.mean()),
            ("deviation", ours.std() - data.std()),
        ):
            figures.append(Measurement(f"channel_{channel}_{name}_gap", float(gap), protocol))
            if abs(gap) > 5:
                warnings.append(
                    f"channel {channel}: the {name} of the samples is {gap:+.1f} levels off the "
                    "data's: a tint, or a loss of contrast"
                )
    return figures, warnings


def _halves(features: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two disjoint random parts of `count` rows each, or of half of all if there are fewer."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(features)))
    size = min(count, len(features) // 2)
    return features[order[:size]], features[order[size : 2 * size]]
