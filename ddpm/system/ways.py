"""Ways: how a network is carried out. All compute the same, to rounding, at different speeds."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ddpm.system.devices import lay, memory_format
from ddpm.system.internals import (
    Compilation,
    compilations,
    keep_dropout_when_compiled,
    naming_limit,
)
from ddpm.system.names import Precision
from ddpm.system.precision import AUTOCAST

# Shapes of batches, and modes, that code is made for; torch's own limit, 8, is reached by previews
# and measures.
SHAPES = 64


@dataclass(frozen=True)
class Way:
    """One way to carry out a network.

    Attributes:
        layout: How convolutions' weights lie in memory, and so what they make.
        compiled: By torch.compile, for each shape of batch by itself: the whole network at once, or
            each of its blocks.
        graphs: What is compiled is recorded as CUDA graphs, which start without the host.
        search: cuDNN times its algorithms for each convolution, and takes the fastest.
    """

    layout: Literal["nchw", "channels_last"]
    compiled: Literal["no", "whole", "blocks"] = "no"
    graphs: bool = False
    search: bool = False


LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
_PLAIN = {
    "nchw": Way("nchw"),
    "channels_last": Way("channels_last"),
    "compiled": Way("channels_last", "whole"),
    "compiled_blocks": Way("channels_last", "blocks"),
    "graphs": Way("channels_last", "whole", graphs=True),
}
SEARCH = "_search"
WAYS = _PLAIN | {
    f"{name}{SEARCH}": Way(way.layout, way.compiled, way.graphs, search=True)
    for name, way in _PLAIN.items()
}


def default(device: torch.device) -> str:
    """Returns the name of the way of a device that nothing was tried on."""
    return "nchw" if memory_format(device) == torch.contiguous_format else "channels_last"


def possible(device: torch.device, alone: bool, repeats: bool) -> list[str]:
    """Returns the names of the ways that a device has, the default first, then the likeliest.

    What cuDNN's search adds to one of them is left out.

    Args:
        device: Where the network runs.
        alone: Whether one process takes each batch, in one piece. CUDA graphs need it: what a graph
            gives is overwritten when it is replayed for the next piece, and DDP's sending is no
            part of it.
        repeats: Whether the network has `blocks`.
    """
    first = default(device)
    graphs = ["graphs"] if device.type == "cuda" and alone else []
    (other,) = {"nchw", "channels_last"} - {first}
    return [first, "compiled", *graphs, other, *(["compiled_blocks"] if repeats else [])]


def check(name: str, device: torch.device, deterministic: bool) -> None:
    """Refuses the name of a way that a device does not have.

    Raises:
        ValueError: If it does not.
    """
    way = WAYS[name]
    if device.type != "cuda" and (way.graphs or way.search):
        there = ", ".join(known for known in WAYS if not (WAYS[known].graphs or WAYS[known].search))
        raise ValueError(
            f"tune={name} needs an NVIDIA GPU, and this runs on {device.type}; here are {there}"
        )
    if way.search and deterministic:
        raise ValueError(
            f"tune={name}: what cuDNN's search takes may differ each time, and "
            "runtime.deterministic=true promises the same bits"
        )


def put(network: nn.Module, name: str) -> None:
    """Has a network carried out this way from now on; what is compiled is when first called.

    Its weights keep their plain names, and dropout its masks. Each shape is compiled by itself: the
    code for all shapes that torch otherwise makes at the second one fails in attention on a CPU
    (torch 2.13), as in a sweep over resolutions. A last, short batch of an epoch is a shape more.

    Args:
        network: Changed in place.
        name: Of WAYS.
    """
    way = WAYS[name]
    lay(network, LAYOUTS[way.layout])
    if way.compiled == "no":
        return
    keep_dropout_when_compiled()
    for part in blocks(network) if way.compiled == "blocks" else [network]:
        part.compile(dynamic=False, mode="reduce-overhead" if way.graphs else None)


def of_batch(network: nn.Module, name: str, size: int) -> Callable[..., Tensor]:
    """Returns a call of the network that is carried out this way for batches of one size.

    For other batches, such as the last, the network runs as it is. Unlike `put` this leaves all
    else that calls the network alone, and what it returns is never overwritten.

    Args:
        network: Its layout is changed in place.
        name: Of WAYS, not by blocks.
        size: Images of a batch.
    """
    way = WAYS[name]
    lay(network, LAYOUTS[way.layout])
    if way.compiled == "no":
        return network
    keep_dropout_when_compiled()
    made = torch.compile(network, dynamic=False, mode="reduce-overhead" if way.graphs else None)

    def call(x_t: Tensor, t: Tensor, *rest: Tensor) -> Tensor:
        if len(x_t) != size:
            return network(x_t, t, *rest)
        if not way.graphs:
            return made(x_t, t, *rest)
        torch.compiler.cudagraph_mark_step_begin()
        return made(x_t, t, *rest).clone()

    return call


def blocks(network: nn.Module) -> list[nn.Module]:
    """Returns the largest parts with parts of their own whose kind occurs more than once."""
    called = [part for part in network.modules() if type(part).forward is not nn.Module.forward]
    kinds = [type(part) for part in called if next(part.children(), None) is not None]
    found: list[nn.Module] = []

    def collect(part: nn.Module) -> None:
        if kinds.count(type(part)) > 1:
            found.append(part)
            return
        for child in part.children():
            collect(child)

    collect(network)
    return found


@contextmanager
def carried_out(name: str) -> Iterator[None]:
    """Has all networks of this process carried out as the way needs beside what `put` does.

    Raises:
        ValueError: If a network is called with more shapes than code is made for.
    """
    way = WAYS[name]
    cudnn = torch.backends.cudnn
    before, limit = cudnn.benchmark, SHAPES if way.compiled != "blocks" else 64 * SHAPES
    cudnn.benchmark = way.search
    try:
        with naming_limit(limit, TOO_MANY) if way.compiled != "no" else nullcontext():
            yield
    finally:
        cudnn.benchmark = before


TOO_MANY = (
    f"the compiler has made code for {SHAPES} shapes of batches and makes no more; "
    "training.drop_last=true, a device batch that divides the batch, or tune=false does without"
)


def as_it_is() -> AbstractContextManager[Any]:
    """Returns the context in which networks run as they are, compiled or not."""
    return torch.compiler.set_stance("force_eager")


class Recompilations:
    """What the compiler makes after the first step, when all should be there.

    Attributes:
        count: Of all of it so far.
    """

    def __init__(self) -> None:
        self.count = 0
        self._seen: set[str] | None = None

    def since(self) -> list[Compilation]:
        """Returns what was compiled since the call before; the first call returns nothing."""
        found = [one for one in compilations() if one.id not in (self._seen or ())]
        begins, self._seen = self._seen is None, {one.id for one in found} | (self._seen or set())
        if begins:
            return []
        self.count += len(found)
        return found


def in_words(made: Sequence[Compilation]) -> str:
    """Returns in a line what was compiled, for how long, and why what was there did not do."""
    seconds = sum(one.seconds for one in made)
    why = dict.fromkeys(f"{one.name}, {one.why or 'for the first time'}" for one in made)
    more = f"; and {len(why) - 2} more" if len(why) > 2 else ""
    return f"{len(made)} in {seconds:.1f} s: {'; '.join(list(why)[:2])}{more}"


class Difference(NamedTuple):
    """How far the results of a way are from the plain one's.

    Attributes:
        of: What is farthest from it.
        times: How often the rounding allowed it is.
    """

    of: str
    times: float


def difference(
    found: dict[str, Tensor], plain: dict[str, Tensor], again: dict[str, Tensor], least: float
) -> Difference:
    """Compares results of a way with those of the plain one, each tensor by its norm.

    What rounding does is measured: the plain way computes the same once more, in pieces. A tensor
    may be as far off as there, or as the median of all tensors is, or `least`.

    Args:
        found: By name.
        plain: The same of the plain way.
        again: The same of the plain way in pieces.
        least: See `rounding`.
    """

    def far(one: dict[str, Tensor]) -> dict[str, float]:
        return {name: float((one[name].float() - plain[name].float()).norm()) for name in plain}

    off, rounded = far(found), far(again)
    for name, value in off.items():
        if not math.isfinite(value):
            return Difference(f"{name}, which is not finite", math.inf)
    norms = {name: float(tensor.float().norm()) for name, tensor in plain.items()}
    shares = sorted(rounded[name] / norm for name, norm in norms.items() if norm > 0)
    share = max(shares[len(shares) // 2] if shares else 0.0, least)
    nothing = least * share * max(norms.values())  # a gradient that is 0 but for rounding
    times = {
        name: value / max(rounded[name], share * norms[name], nothing, 1e-30)
        for name, value in off.items()
    }
    worst = max(times, key=lambda name: times[name])
    return Difference(worst, times[worst])


def rounding(device: torch.device, precision: Precision) -> float:
    """Returns what a network's rounding makes of a tensor at least, as a share of its norm."""
    if precision in AUTOCAST:
        return 2 * torch.finfo(AUTOCAST[precision]).eps
    return 2.0**-8 if precision == "tf32" and device.type == "cuda" else 2.0**-20
