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

# Of a reference with more pictures the features of so many, evenly spaced, are kept: 410 MB of
# Inception's. Mean and covariance are of all.
KEPT = 50_000
AT_ONCE = 2**24  # bytes of pictures that are read together
NEED_FEATURES = ("kd", "precision_recall")  # mean and covariance do not suffice for them
READ = ("mu", "sigma", "arr_0")  # the arrays of a file that are looked at
# what a damaged or strange file makes NumPy and zipfile raise
NOT_READ = (OSError, EOFError, ValueError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error)
Pictures = tuple[int, int, int, int]  # (N, H, W, C)


class Header(NamedTuple):
    """What an array of a file says of itself."""

    shape: tuple[int, ...]
    columns_first: bool
    type: np.dtype


class Reference(NamedTuple):
    """A network's features of the pictures that drawn images are compared with.

    Attributes:
        moments: Of all pictures; None of a single one.
        features: (min(N, KEPT), D) float32, see `kept`; None where a file has no pictures.
    """

    moments: Moments | None
    features: Tensor | None


def kept(count: int) -> np.ndarray:
    """Returns which of `count` pictures the features are kept of, evenly spaced: (n,) int64."""
    size = min(count, KEPT)
    return np.arange(size) * count // size


def of_pictures(
    blocks: Iterable[np.ndarray], count: int, extractor: Extractor, cache: Path
) -> Reference:
    """Returns what a network sees in pictures, from the cache if it was computed before.

    Memory holds a block of the pictures, a covariance and the features that are kept. A second
    process that wants the same waits for the first.

    Args:
        blocks: Of the pictures, each (B, H, W, C) uint8, read when they are needed.
        count: Of the pictures.
        extractor: What computes the features.
        cache: A file of these pictures and this extractor.
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
    """Has one process at a time make a file; those that wait can be told to stop."""
    with ExitStack() as held:
        while True:
            check()
            with suppress(Timeout):
                held.enter_context(lock(cache.with_name(f".{cache.name}.lock"), wait=1))
                break
        yield


def blocks_of(images: ImageSet) -> Iterator[np.ndarray]:
    """Yields the pictures of a set in its order: (B, H, W, C) uint8."""
    size = _at_once(*images.stored.shape[1:])
    for start in range(0, len(images), size):
        yield images.stored[images.rows[start : start + size]].transpose(0, 2, 3, 1)


def _at_once(*shape: int) -> int:
    return max(1, AT_ONCE // int(np.prod(shape)))


@dataclass(frozen=True)
class ReferenceFile:
    """A file of reference statistics, as OpenAI, EDM and clean-fid publish them.

    Attributes:
        path: Of the file.
        digest: SHA-256 of its bytes, which tells it in protocols.
        moments: Its mean and covariance; None where it has none, or none are wanted.
        pictures: (N, H, W, C) of its pictures; None where it has none.
    """

    path: Path
    digest: str
    moments: Moments | None
    pictures: Pictures | None

    def blocks(self) -> Iterator[np.ndarray]:
        """Yields the pictures in their order, read block by block: (B, H, W, C) uint8.

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

        Mean and covariance are the file's where it has them, else those of its pictures.

        Args:
            extractor: What computes the features of pictures.
            folder: Where these are kept.
            metrics: Of fd, kd and precision_recall, those that are wanted.
        """
        if self.moments is not None and not set(NEED_FEATURES) & set(metrics):
            return Reference(self.moments, None)
        assert self.pictures is not None
        name = f"{extractor.name}-{extractor.version}-{self.digest[:16]}.npz"
        found = of_pictures(self.blocks(), self.pictures[0], extractor, folder / name)
        return found._replace(moments=self.moments or found.moments)


def open_file(path: Path, extractor: str, metrics: Collection[str]) -> ReferenceFile:
    """Opens a file of reference statistics; its pictures stay on the disk.

    It has `mu` and `sigma`, or pictures as `arr_0`, or both. What else it has is left alone (`mu_s`
    and `sigma_s`, of OpenAI's sFID; labels).

    Args:
        path: Of the file.
        extractor: Whose features its mean and covariance should be of.
        metrics: What is to be measured.

    Raises:
        ValueError: If it is no such file, or none for these metrics; it says what to do.
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
            f"{key} has mu and sigma, which suffice for fd alone; {' and '.join(impossible)} would "
            f"need pictures (arr_0): give evaluation.metrics=[{rest}]"
        )
    moments = None
    if "fd" in metrics and "mu" in headers:
        (length,) = headers["mu"].shape
        if length != LENGTHS[extractor]:
            others = [name for name in LENGTHS if LENGTHS[name] == length]
            raise ValueError(
                f"{key} has mu and sigma of {length} features, and evaluation.extractor={extractor}"
                f" has {LENGTHS[extractor]}{f': give {others[0]}' if others else ''}"
            )
        moments = _moments(path, key)
    return ReferenceFile(path, sha256(path), moments, pictures)


def _refuse_pickle(path: Path, key: str) -> None:
    with path.open("rb") as content:
        start = content.read(6)
    if start == b"\x93NUMPY":
        raise ValueError(
            f"{key} is a .npy, one array: give an .npz, as numpy.savez('FILE.npz', mu=..., "
            "sigma=...) writes it"
        )
    if path.suffix in (".pkl", ".pickle") or start[:1] == b"\x80":
        raise ValueError(
            f"{key} is a pickle, which can run any code when it is opened: take the .npz that is "
            'published beside it, or make one where you trust it, by python -c "import numpy, '
            "pickle; s = pickle.load(open('FILE.pkl', 'rb')); s = s.get('fid', s); "
            "numpy.savez('FILE.npz', mu=s['mu'], sigma=s['sigma'])\""
        )


def _headers(path: Path) -> tuple[dict[str, Header], list[str]]:
    """What the arrays of an .npz that are looked at say of themselves; and the names of all."""
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
    """What is wrong with the arrays of a file."""
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
        raise ValueError(f"{key} has numbers in mu or sigma that are infinite or not a number")
    if not np.allclose(covariance, covariance.T, rtol=1e-4, atol=1e-6 * np.abs(covariance).max()):
        raise ValueError(f"{key} has a sigma that is not symmetric, and so no covariance")
    return Moments(torch.from_numpy(mean), torch.from_numpy(covariance), 0)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
