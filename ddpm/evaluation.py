"""What is measured of a trained network, and how each figure is kept: with its protocol, so that only like is compared with like."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpm import images, metrics
from ddpm.config import Metric
from ddpm.features import Extractor, Features
from ddpm.files import write_whole, write_whole_npz


@dataclass(frozen=True)
class Figure:
    """One measured figure.    protocol: all that decides it, the same figure of another protocol being another one.    deviation: over subsets or splits.
    floor: the same distance between two random halves of the data, which no network beats."""

    metric: str
    value: float
    protocol: dict[str, Any] = field(hash=False)
    deviation: float | None = None
    floor: float | None = None

    @property
    def id(self) -> str:
        """The protocol in one word, such as fid@50k:train:inception:ancestral1000:ema:step800000."""
        return f"{name(self.metric, self.protocol)}:step{self.protocol['step']}"


def name(metric: str, protocol: Mapping[str, Any]) -> str:
    """A metric and its protocol, without the step, in one word."""
    said = [str(protocol[key]) for key in ("split", "extractor", "sampler", "weights") if key in protocol]
    count = protocol["count"]
    return ":".join([f"{metric}@{count // 1000}k" if count % 1000 == 0 else f"{metric}@{count}", *said])


def better(metric: str) -> Callable[..., Any] | None:
    """min or max, whichever of two values of a metric is the better; None where neither is in itself (a colour gap, a ratio of nearest distances)."""
    if metric.startswith(("fid", "fd_", "kid", "kd_", "bits_per_dim", "loss_", "rmse")):
        return min
    return max if metric.startswith(("inception_score", "class_score_", "precision", "recall")) else None


def record(path: Path, figures: Sequence[Figure]) -> None:
    """Add figures to a file, whole or not at all; one of the same metric and protocol takes the place of the one before."""
    kept = {key(entry): entry for entry in recorded(path)}
    for figure in figures:
        entry = {"id": figure.id, **asdict(figure)}
        kept[key(entry)] = json.loads(json.dumps(entry))
    write_whole(path, json.dumps(list(kept.values()), indent=1) + "\n")


def recorded(path: Path) -> list[dict[str, Any]]:
    """The entries of such a file, none if it is not there."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def key(entry: dict[str, Any]) -> str:
    """What makes two entries figures of the same thing."""
    return json.dumps([entry["metric"], entry["protocol"]], sort_keys=True)


def reference_features(pictures: np.ndarray, extractor: Extractor, cache: Path) -> Features:
    """Features of a data set's pictures, (N, C, H, W) uint8, from the cache if they were computed before.    cache: a file of this set and extractor."""
    if cache.is_file():
        with np.load(cache) as found:
            return Features(torch.from_numpy(found["features"]), torch.from_numpy(found["probabilities"]) if "probabilities" in found else None)
    found = extractor(pictures.transpose(0, 2, 3, 1))
    cache.parent.mkdir(parents=True, exist_ok=True)
    write_whole_npz(cache, features=found.features.numpy(), **({} if found.probabilities is None else {"probabilities": found.probabilities.numpy()}))
    return found


def distances(wanted: Sequence[str], drawn: Features, reference: Features, extractor: Extractor, protocol: dict[str, Any], seed: int) -> Iterator[Figure]:
    """The distances between drawn images and the data, each with its floor, from features of both.    wanted: of fd, kd, inception_score, precision_recall."""
    half, other = _halves(reference.features, len(drawn.features), seed)
    if "fd" in wanted:
        value = metrics.frechet_distance(metrics.moments(drawn.features), metrics.moments(reference.features))
        floor = metrics.frechet_distance(metrics.moments(half), metrics.moments(other))
        yield Figure(extractor.distance_name, value, protocol, floor=floor)
    if "kd" in wanted:
        value, deviation = metrics.kernel_distance(drawn.features, reference.features, seed)
        yield Figure(extractor.kernel_name, value, protocol, deviation, metrics.kernel_distance(half, other, seed)[0])
    if "inception_score" in wanted:
        if drawn.probabilities is None:
            raise ValueError(f"inception_score needs class probabilities, and evaluation.extractor={extractor.name} gives none")
        value, deviation = metrics.inception_score(drawn.probabilities)
        yield Figure("inception_score" if extractor.name == "inception" else f"class_score_{extractor.name}", value, protocol, deviation)
    if "precision_recall" in wanted:
        precision, recall = metrics.precision_recall(reference.features, drawn.features)
        floors = metrics.precision_recall(half, other)
        yield Figure("precision", precision, protocol, floor=floors[0])
        yield Figure("recall", recall, protocol, floor=floors[1])


def nearest_pairs(drawn: Features, reference: Features, protocol: dict[str, Any], pairs: int = 16) -> tuple[Figure, list[tuple[int, int]]]:
    """How near drawn images are to the training pictures: the median distance to the nearest, over that of training pictures among themselves.

    Far below 1, the network repeats its training set. Also the closest pairs (drawn, training), nearest first.
    """
    distance, index = metrics.nearest(drawn.features, reference.features)
    among, _ = metrics.nearest(reference.features, reference.features, exclude_self=True)
    closest = torch.argsort(distance)[:pairs].tolist()
    ratio = float(distance.median() / among.median().clamp(min=1e-12))
    return Figure("nearest_ratio", ratio, protocol), [(drawn_index, int(index[drawn_index])) for drawn_index in closest]


def pairs_sheet(pairs: Sequence[tuple[int, int]], drawn: np.ndarray, training: np.ndarray) -> np.ndarray:
    """Drawn images above their nearest training pictures: (H, W, C) uint8.    drawn: (N, H, W, C) uint8.    training: (M, C, H, W) uint8."""
    above = drawn[[pair[0] for pair in pairs]]
    below = training[[pair[1] for pair in pairs]].transpose(0, 2, 3, 1)
    return images.grid(np.concatenate([above, below]), columns=len(pairs), least_width=64 * len(pairs))


def colour(drawn: np.ndarray, training: np.ndarray, protocol: dict[str, Any]) -> tuple[list[Figure], list[str]]:
    """Mean and deviation of each channel, drawn images less the data, in levels of 0 to 255; and a warning for each that drifts by more than 5 levels.

    drawn: (N, H, W, C) uint8.    training: (M, C, H, W) uint8.
    """
    figures, warnings = [], []
    for channel in range(drawn.shape[3]):
        ours, data = drawn[..., channel].astype(np.float64), training[:, channel].astype(np.float64)
        for name, gap in (("mean", ours.mean() - data.mean()), ("deviation", ours.std() - data.std())):
            figures.append(Figure(f"channel_{channel}_{name}_gap", float(gap), protocol))
            if abs(gap) > 5:
                warnings.append(f"channel {channel}: the {name} of the samples is {gap:+.1f} levels off the data's: a tint, or a loss of contrast")
    return figures, warnings


def table(figures: Sequence[Figure], expected: Sequence[Metric]) -> str:
    """The figures in lines: value, deviation, floor, what the recipe expects of a metric of that name, protocol."""
    lines = []
    for figure in figures:
        value = f"{figure.value:.4f}" + (f" +- {figure.deviation:.4f}" if figure.deviation is not None else "")
        floor = f"floor {figure.floor:.4f}" if figure.floor is not None else ""
        published = "; ".join(f"published {metric.value:g} +- {metric.tolerance:g} ({metric.protocol})" for metric in expected if metric.name == figure.metric)
        lines.append(f"  {figure.metric:<26} {value:<22} {floor:<16} {figure.id}" + (f"\n  {'':<26} {published}" if published else ""))
    return "\n".join(lines)


def _halves(features: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two disjoint random parts of `count` rows each, or of half of all if there are fewer."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(features)))
    size = min(count, len(features) // 2)
    return features[order[:size]], features[order[size : 2 * size]]
