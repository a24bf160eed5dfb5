"""What drawn images are compared with: a data set's pictures, or a published file of statistics."""

import zipfile
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple, cast

import numpy as np
import torch
from filelock import Timeout
from torch import Tensor

from ddpm.data.image_set import ImageSet
from ddpm.evaluate.features import LENGTHS, Extractor
from ddpm.evaluate.metrics import Moments, MomentSums
from ddpm.system.files import lock, sha256, write_arrays
from ddpm.system.signals import check

# A larger reference keeps the features of this many evenly spaced pictures: 410 MB with Inception.
# Mean and covariance always cover all pictures.
KEPT = 50_000
AT_ONCE = 2**24  # bytes of pictures read at a time
NEED_FEATURES = ("kd", "precision_recall")  # mean and covariance are not enough for these
READ = ("mu", "sigma", "arr_0")  # the arrays that are read from a file
# what NumPy and zipfile raise for a damaged or foreign file
NOT_READ = (OSError, EOFError, ValueError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error)
Pictures = tuple[int, int, int, int]  # (N, H, W, C)


class Header(NamedTuple):
    """The header of an array in a file."""

    shape: tuple[int, ...]
    columns_first: bool
    type: np.dtype


class Reference(NamedTuple):
    """A network's features of the pictures that drawn images are compared with.

    Attributes:
        moments: Mean and covariance over all pictures; None for a single picture.
        features: (min(N, KEPT), D) float32, see `kept`; None for a file without pictures.
    """

    moments: Moments | None
    features: Tensor | None


def kept(count: int) -> np.ndarray:
    """Returns which of `count` pictures keep their features, evenly spaced: (n,) int64."""
    size = min(count, KEPT)
    return np.arange(size) * count // size


def of_pictures(
    blocks: Iterable[np.ndarray], count: int, extractor: Extractor, cache: Path
) -> Reference:
    """Returns the reference of these pictures, from the cache if it was computed before.

    Memory holds one block of pictures, a covariance and the features that are kept. If several
    processes need the same reference, one computes it and the others wait.

    Args:
        blocks: Blocks of pictures, each (B, H, W, C) uint8, read on demand.
        count: Number of pictures.
        extractor: Computes the features.
        cache: The cache file of these pictures and this extractor.
    """
    cache.parent.mkdir(parents=True, exist_ok=True)
    with _alone(cache):
        if not cache.is_file():
            found = _of_pictures(blocks, count, extractor)
            of_all = {} if found.moments is None else found.moments._asdict()
            arrays = {name: np.asarray(value) for name, value in of_all.items()}
            write_arrays(cache, features=np.asarray(found.features), **arrays)
    with np.load(cache) as kept_before:
        features = torch.from_numpy(kept_before["features"])
        if count < 2:
            return Reference(None, features)
        mean, covariance = (torch.from_numpy(kept_before[name]) for name in ("mean", "covariance"))
    return Reference(Moments(mean, covariance, count), features)


def _of_pictures(blocks: Iterable[np.ndarray], count: int, extractor: Extractor) -> Reference:
    chosen, sums, start = kept(count), MomentSums(), 0
    features: Tensor | None = None
    for block in blocks:
        seen = extractor(block).features
        sums.add(seen)
        if features is None:
            features = seen.new_empty(len(chosen), seen.shape[1])
        first, last = np.searchsorted(chosen, [start, start + len(block)])
        features[first:last] = seen[torch.from_numpy(chosen[first:last] - start)]
        start += len(block)
    return Reference(sums.moments() if count > 1 else None, features)


@contextmanager
def _alone(cache: Path) -> Iterator[None]:
    """Lets one process at a time write a file; those that wait still stop when told to."""
    with ExitStack() as held:
        while True:
            check()
            with suppress(Timeout):
                held.enter_context(lock(cache.with_name(f".{cache.name}.lock"), wait=1))
                break
        yield


def blocks_of(images: ImageSet) -> Iterator[np.ndarray]:
    """Yields the pictures of a set in order, in blocks (B, H, W, C) uint8."""
    size = _at_once(*images.stored.shape[1:])
    for start in range(0, len(images), size):
        yield images.stored[images.rows[start : start + size]].transpose(0, 2, 3, 1)


def _at_once(*shape: int) -> int:
    return max(1, AT_ONCE // int(np.prod(shape)))


@dataclass(frozen=True)
class ReferenceFile:
    """A file of reference statistics, as OpenAI, EDM and clean-fid publish them.

    Attributes:
        path: The file.
        digest: SHA-256 of its bytes, which identifies it in protocols.
        moments: Its mean and covariance; None if it has none or no metric needs them.
        pictures: Shape (N, H, W, C) of its pictures; None if it has none.
    """

    path: Path
    digest: str
    moments: Moments | None
    pictures: Pictures | None

    def blocks(self) -> Iterator[np.ndarray]:
        """Yields the pictures in order, read block by block: (B, H, W, C) uint8.

        Raises:
            ValueError: If the file is damaged.
        """
        assert self.pictures is not None
        count, *shape = self.pictures
        size = _at_once(*shape)
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as file:
                _header(file)
                for start in range(0, count, size):
                    wanted = (min(size, count - start), *shape)
                    content = file.read(int(np.prod(wanted)))
                    yield np.frombuffer(content, np.uint8).reshape(wanted)
        except NOT_READ as error:
            raise ValueError(f"{self.path} is damaged ({_reason(error)}): get it again") from None

    def reference(self, extractor: Extractor, folder: Path, metrics: Collection[str]) -> Reference:
        """Returns what these metrics are measured against.

        Mean and covariance come from the file if it has them, else from its pictures.

        Args:
            extractor: Computes the features of the pictures.
            folder: The folder that caches the features.
            metrics: Those of fd, kd and precision_recall to measure.
        """
        if self.moments is not None and not set(NEED_FEATURES) & set(metrics):
            return Reference(self.moments, None)
        assert self.pictures is not None
        name = f"{extractor.name}-{extractor.version}-{self.digest[:16]}.npz"
        found = of_pictures(self.blocks(), self.pictures[0], extractor, folder / name)
        return found._replace(moments=self.moments or found.moments)


def open_file(path: Path, extractor: str, metrics: Collection[str]) -> ReferenceFile:
    """Opens a file of reference statistics; its pictures stay on the disk.

    It has `mu` and `sigma`, or pictures as `arr_0`, or both. Other arrays are ignored (`mu_s` and
    `sigma_s`, of OpenAI's sFID; labels).

    Args:
        path: The file.
        extractor: Name of the extractor that its mean and covariance should come from.
        metrics: The metrics to measure.

    Raises:
        ValueError: If it is not such a file or is not enough for these metrics; the message says
            what to do.
    """
    key = f"evaluation.reference={path}"
    if not path.is_file():
        remote = ": download it first" if ":/" in str(path) else ""
        raise ValueError(f"{key} is not a file{remote}")
    _refuse_pickle(path, key)
    try:
        headers, names = _headers(path)
    except NOT_READ as error:
        raise ValueError(f"{key} cannot be read as .npz ({_reason(error)})") from None
    wrong = _wrong(headers, names)
    if wrong is not None:
        raise ValueError(f"{key} {wrong}")
    pictures = cast(Pictures, headers["arr_0"].shape) if "arr_0" in headers else None
    impossible = [metric for metric in NEED_FEATURES if metric in metrics and pictures is None]
    if impossible:
        rest = ",".join(metric for metric in metrics if metric not in impossible)
        raise ValueError(
            f"{key} has only mu and sigma, which are enough for fd; {' and '.join(impossible)} "
            f"would need pictures (arr_0): give evaluation.metrics=[{rest}]"
        )
    moments = None
    if "fd" in metrics and "mu" in headers:
        (length,) = headers["mu"].shape
        if length != LENGTHS[extractor]:
            others = [name for name in LENGTHS if LENGTHS[name] == length]
            raise ValueError(
                f"{key} has mu and sigma of {length} features, but evaluation.extractor={extractor}"
                f" has {LENGTHS[extractor]}"
                f"{f': give evaluation.extractor={others[0]}' if others else ''}"
            )
        moments = _moments(path, key)
    return ReferenceFile(path, sha256(path), moments, pictures)


def _refuse_pickle(path: Path, key: str) -> None:
    with path.open("rb") as content:
        start = content.read(6)
    if start == b"\x93NUMPY":
        raise ValueError(
            f"{key} is a .npy, one array: give an .npz, as written by numpy.savez('FILE.npz', "
            "mu=..., sigma=...)"
        )
    if path.suffix in (".pkl", ".pickle") or start[:1] == b"\x80":
        raise ValueError(
            f"{key} is a pickle, which can run any code when it is opened: use the .npz that is "
            'published with it, or, if you trust it, convert it with python -c "import numpy, '
            "pickle; s = pickle.load(open('FILE.pkl', 'rb')); s = s.get('fid', s); "
            "numpy.savez('FILE.npz', mu=s['mu'], sigma=s['sigma'])\""
        )


def _headers(path: Path) -> tuple[dict[str, Header], list[str]]:
    """The headers of those arrays of an .npz that are in READ, and the names of all arrays."""
    found = {}
    with zipfile.ZipFile(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        for name in READ:
            if name in names:
                with archive.open(f"{name}.npy") as file:
                    found[name] = _header(file)
    return found, names


def _header(file: IO[bytes]) -> Header:
    major, minor = np.lib.format.read_magic(file)
    if major == 1:
        return Header(*np.lib.format.read_array_header_1_0(file))
    if major == 2:
        return Header(*np.lib.format.read_array_header_2_0(file))
    raise ValueError(f"version {major}.{minor} of NumPy's format")


def _wrong(headers: Mapping[str, Header], names: Sequence[str]) -> str | None:
    """What is wrong with the arrays of a file, or None."""
    mean, covariance, pictures = (headers.get(name) for name in READ)
    if pictures is None and (mean is None or covariance is None):
        some = ", ".join(sorted(names)[:8]) or "nothing"
        return f"has {some}; it should have mu and sigma, or pictures as arr_0"
    if (mean is None) != (covariance is None):
        return "has only one of mu and sigma"
    if mean is not None and covariance is not None:
        right = len(mean.shape) == 1 and mean.shape[0] > 0 and covariance.shape == mean.shape * 2
        if not (right and mean.type.kind == covariance.type.kind == "f"):
            return (
                f"has mu {mean.shape} of {mean.type} and sigma {covariance.shape} of "
                f"{covariance.type}; they should be (D,) and (D, D), both of floating point"
            )
    if pictures is not None:
        right = len(pictures.shape) == 4 and pictures.shape[3] in (1, 3) and min(pictures.shape) > 0
        if not right or pictures.type != np.uint8 or pictures.columns_first:
            return (
                f"has arr_0 {pictures.shape} of {pictures.type}; pictures should be "
                "(N, H, W, 1 or 3) of uint8"
            )
    return None


def _moments(path: Path, key: str) -> Moments:
    try:
        with np.load(path, allow_pickle=False) as found:
            mean, covariance = (found[name].astype(np.float64) for name in READ[:2])
    except NOT_READ as error:
        raise ValueError(f"{key} cannot be read as .npz ({_reason(error)})") from None
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError(f"{key} has numbers in mu or sigma that are infinite or NaN")
    if not np.allclose(covariance, covariance.T, rtol=1e-4, atol=1e-6 * np.abs(covariance).max()):
        raise ValueError(f"{key} has a sigma that is not symmetric and so is not a covariance")
    return Moments(torch.from_numpy(mean), torch.from_numpy(covariance), 0)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
