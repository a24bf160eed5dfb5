"""Compares two sets of images by their features.

Fréchet and kernel distance, inception score, precision and recall, nearest neighbours.

Features are (N, D) tensors or arrays of any type. The arithmetic is in float64, on the device of
the features (on the CPU if that device has no float64).
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddpm.system.signals import check

Rows = Tensor | np.ndarray  # (N, D)

NUMBERS_AT_ONCE = 2**24  # per chunk of rows or of distances: 128 MB in float64
# squared distances below this share of the squared lengths are rounding errors between equal rows
SAME = 1e-12


class CannotBeHad(ValueError):
    """Raised for a metric that cannot be measured with these images or this extractor."""


class TooFew(CannotBeHad):
    """Raised for a metric that needs more images."""


class Moments(NamedTuple):
    """Mean and covariance of rows of features, float64.

    Attributes:
        mean: (D,).
        covariance: (D, D), unbiased.
        count: Number of rows; 0 if a file does not tell.
    """

    mean: Tensor
    covariance: Tensor
    count: int  # type: ignore[assignment]  # hides tuple.count


class MomentSums:
    """Accumulates mean and covariance over parts of the rows, with one part in memory at a time.

    Each part is centered on its own mean and merged with the earlier ones by the update of Chan,
    Golub & LeVeque 1979, in float64. This avoids the cancellation that comes with subtracting a
    squared mean from a mean of squares.
    """

    def __init__(self) -> None:
        self._count = 0
        self._mean = self._scatter = torch.empty(0)  # the first part determines their sizes

    def add(self, features: Rows) -> None:
        """Adds rows.

        Args:
            features: (N, D).

        Raises:
            ValueError: If they are not finite, or differ in length from earlier rows.
        """
        rows = _rows(features, 1, "a covariance")
        if self._count == 0:
            length = rows.shape[1]
            self._mean = torch.zeros(length, dtype=torch.float64, device=rows.device)
            self._scatter = self._mean.new_zeros(length, length)
        if rows.shape[1] != len(self._mean):
            raise ValueError(
                f"a covariance needs features of one length, got {len(self._mean)} and "
                f"{rows.shape[1]}"
            )
        for chunk in rows.split(_chunk_length(rows)):
            check()
            part = chunk.double()
            mean, total = part.mean(dim=0), self._count + len(part)
            gap = mean - self._mean
            # an extra row for the gap between the means: one product then updates everything
            apart = gap * (self._count * len(part) / total) ** 0.5
            centred = torch.cat([part - mean, apart[None]])
            self._scatter.addmm_(centred.T, centred)
            self._mean += gap * (len(part) / total)
            self._count = total

    def moments(self) -> Moments:
        """Returns mean and covariance of all rows so far, the latter divided by N - 1.

        Raises:
            TooFew: If there are fewer than 2.
        """
        if self._count < 2:
            raise TooFew(f"a covariance needs at least 2 images, got {self._count}")
        return Moments(self._mean.clone(), self._scatter / (self._count - 1), self._count)


def moments(features: Rows) -> Moments:
    """Computes mean and covariance of the features, the latter divided by N - 1.

    Args:
        features: (N, D).

    Raises:
        ValueError: If there are fewer than 2, or they are not finite.
    """
    sums = MomentSums()
    sums.add(features)
    return sums.moments()


def frechet_distance(a: Moments, b: Moments) -> float:
    """Computes the squared Fréchet distance between two normal distributions.

    |mean_a - mean_b|^2 + tr(S_a + S_b - 2 sqrt(S_a S_b)); on Inception features, the FID (Heusel et
    al. 2017).

    tr sqrt(S_a S_b) is the sum of the singular values of sqrt(S_a) sqrt(S_b), with symmetric roots.
    This stays accurate with fewer images than features. The distance still depends on the number of
    images then, so compare only figures of equal counts.

    Returns:
        0 or more.

    Raises:
        ValueError: If the features differ in length.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"the Fréchet distance needs features of one length, got {len(a.mean)} and "
            f"{len(b.mean)}"
        )
    mean_gap = (a.mean - b.mean.to(a.mean.device)).square().sum()
    roots = _symmetric_root(a.covariance) @ _symmetric_root(b.covariance.to(a.covariance.device))
    shared = torch.linalg.svdvals(roots).sum()
    return max(
        0.0,
        float(
            mean_gap + a.covariance.trace() + b.covariance.trace().to(a.mean.device) - 2 * shared
        ),
    )


def kernel_distance(
    a: Rows, b: Rows, seed: int, num_subsets: int = 100, subset_size: int = 1000
) -> tuple[float, float]:
    """Computes the squared MMD of two sets under the kernel (x.y / D + 1)^3, unbiased.

    On Inception features, this is the KID (Binkowski et al. 2018).

    Args:
        a: (N, D).
        b: (M, D).
        seed: Seed of the subsets, each drawn without replacement.
        num_subsets: Number of subsets; only one is taken if it contains both sets entirely.
        subset_size: Images per subset, capped at the size of the smaller set.

    Returns:
        Mean and standard deviation over the subsets. The mean may be slightly negative.

    Raises:
        ValueError: If a set has fewer than 2 images.
    """
    if num_subsets < 1 or subset_size < 2:
        raise ValueError(
            f"the kernel distance needs 1 subset or more, of 2 images or more, got {num_subsets} "
            f"of {subset_size}"
        )
    a, b = _pair(a, b, 2, "the kernel distance")
    size = min(subset_size, len(a), len(b))
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(1 if size == len(a) == len(b) else num_subsets):
        check()
        x, y = (
            rows[
                torch.from_numpy(generator.choice(len(rows), size, replace=False)).to(rows.device)
            ].double()
            for rows in (a, b)
        )
        within = sum(
            (kernel.sum() - kernel.diagonal().sum()) / (size * (size - 1))
            for kernel in (_kernel(x, x), _kernel(y, y))
        )
        found.append(float(within - 2 * _kernel(x, y).mean()))
    return float(np.mean(found)), float(np.std(found))


def inception_score(probabilities: Rows, num_splits: int = 10) -> tuple[float, float]:
    """Computes exp of the mean KL(p(class | image) || p(class)) over images (Salimans et al. 2016).

    Args:
        probabilities: (N, K), rows that sum to 1. They are put in a fixed random order first, so
            that images sorted by class do not end up in one split.
        num_splits: Number of parts; each has a score of its own.

    Returns:
        Mean and standard deviation over the splits.

    Raises:
        ValueError: If a split would be empty, N is below 2, or rows are not probabilities.
    """
    if num_splits < 1:
        raise ValueError(f"the inception score needs 1 split or more, got {num_splits}")
    rows = _rows(
        probabilities, max(2, num_splits), f"the inception score with num_splits={num_splits}"
    ).double()
    if bool((rows < 0).any()) or bool(((rows.sum(dim=1) - 1).abs() > 1e-3).any()):
        raise ValueError("the inception score needs probabilities that sum to 1 for each image")
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(rows))).to(rows.device)
    scores = []
    for split in rows[order].tensor_split(num_splits):
        kl = torch.special.xlogy(split, split) - torch.special.xlogy(split, split.mean(dim=0))
        scores.append(float(kl.sum(dim=1).mean().exp()))
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(real: Rows, generated: Rows, neighbours: int = 3) -> tuple[float, float]:
    """Computes precision and recall of generated images (Kynkäänniemi et al. 2019).

    An image lies within a set if it is no farther from one of the set's images than that image's
    k-th nearest neighbor in the set.

    Args:
        real: (N, D).
        generated: (M, D).
        neighbours: k.

    Returns:
        The share of generated images that lie within the real ones, and of real images within the
        generated ones.

    Raises:
        ValueError: If a set has k images or fewer.
    """
    if neighbours < 1:
        raise ValueError(f"precision and recall need 1 neighbour or more, got {neighbours}")
    real, generated = _pair(
        real, generated, neighbours + 1, f"precision and recall with {neighbours} neighbours"
    )
    return _share_among(generated, real, neighbours), _share_among(real, generated, neighbours)


def nearest(queries: Rows, references: Rows, exclude_self: bool = False) -> tuple[Tensor, Tensor]:
    """Finds the reference nearest to each query by Euclidean distance.

    Args:
        queries: (N, D).
        references: (M, D).
        exclude_self: Both are the same set, and no row counts as its own neighbor.

    Returns:
        Distances, (N,) float64, and indices, (N,) int64.

    Raises:
        ValueError: If there are too few references to find one.
    """
    queries, references = _pair(
        queries, references, 2 if exclude_self else 1, "a nearest neighbour"
    )
    if exclude_self and len(queries) != len(references):
        raise ValueError(
            f"exclude_self needs the same images on both sides, got {len(queries)} and "
            f"{len(references)}"
        )
    index = _nearest(queries, references, 1, exclude_self)[1].flatten()
    pairs = zip(
        queries.split(_chunk_length(queries)), index.split(_chunk_length(queries)), strict=True
    )
    return torch.cat(
        [
            (chunk.double() - references[found].double()).square().sum(dim=1).sqrt()
            for chunk, found in pairs
        ]
    ), index


def _rows(features: Rows, least: int, wanted_by: str) -> Tensor:
    """The features as a checked tensor, on a device that supports float64."""
    rows = torch.as_tensor(features).detach()
    if rows.device.type == "mps":
        rows = rows.cpu()
    if rows.ndim != 2 or rows.shape[1] == 0:
        raise ValueError(f"{wanted_by} needs features of shape (N, D), got {tuple(rows.shape)}")
    if len(rows) < least:
        raise TooFew(
            f"{wanted_by} needs at least {least} image{'s' if least > 1 else ''}, got {len(rows)}"
        )
    if not bool(rows.isfinite().all()):
        raise ValueError(f"{wanted_by} needs finite features, got some that are infinite or NaN")
    return rows


def _pair(a: Rows, b: Rows, least: int, wanted_by: str) -> tuple[Tensor, Tensor]:
    a, b = _rows(a, least, wanted_by), _rows(b, least, wanted_by)
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            f"{wanted_by} needs features of one length, got {a.shape[1]} and {b.shape[1]}"
        )
    return a, b.to(a.device)


def _chunk_length(rows: Tensor) -> int:
    return max(1, min(4096, NUMBERS_AT_ONCE // rows.shape[1]))


def _symmetric_root(covariance: Tensor) -> Tensor:
    check()
    values, vectors = torch.linalg.eigh(covariance.double())
    # directions without variance have eigenvalues of rounding errors, negative or not
    rounding = values[-1] * len(values) * torch.finfo(torch.float64).eps
    return (vectors * values.where(values > rounding, 0).sqrt()) @ vectors.T


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _squared_distances(a: Tensor, b: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yields rows of a and of b, and their squared distances, in chunks; 0 for equal rows."""
    # a shift leaves the distances as they are and keeps the squares small
    length, shift = _chunk_length(a), b[0].double()
    for rows, columns in (
        (slice(i, i + length), slice(j, j + length))
        for i in range(0, len(a), length)
        for j in range(0, len(b), length)
    ):
        check()
        x, y = a[rows].double() - shift, b[columns].double() - shift
        lengths = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1)
        squared = torch.addmm(lengths, x, y.T, alpha=-2)
        yield rows, columns, squared.masked_fill_(squared <= SAME * lengths, 0)


def _nearest(a: Tensor, b: Tensor, count: int, exclude_self: bool) -> tuple[Tensor, Tensor]:
    """Squared distances and indices of the nearest rows of b for each row of a: (N, count)."""
    best = torch.full((len(a), count), torch.inf, dtype=torch.float64, device=a.device)
    index = torch.zeros(len(a), count, dtype=torch.int64, device=a.device)
    for rows, columns, squared in _squared_distances(a, b):
        if exclude_self and rows == columns:
            squared.fill_diagonal_(torch.inf)
        here = torch.arange(len(b), device=a.device)[columns].expand(len(squared), -1)
        best[rows], chosen = torch.cat([best[rows], squared], dim=1).topk(count, largest=False)
        index[rows] = torch.cat([index[rows], here], dim=1).gather(1, chosen)
    return best, index


def _share_among(points: Tensor, centres: Tensor, neighbours: int) -> float:
    radii = _nearest(centres, centres, neighbours, exclude_self=True)[0][:, -1]
    among = torch.zeros(len(points), dtype=torch.bool, device=points.device)
    for rows, columns, squared in _squared_distances(points, centres):
        among[rows] |= (squared <= radii[columns]).any(dim=1)
    return float(among.double().mean())
