"""Ways to run a network. All compute the same up to rounding, at different speeds."""

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

# Most batch shapes and modes to compile for. Previews and metrics alone reach torch's limit, 8.
SHAPES = 64


@dataclass(frozen=True)
class Way:
    """One way to run a network.

    Attributes:
        layout: Memory format of the convolution weights, and so of the convolutions' outputs.
        compiled: What torch.compile compiles, for each batch shape separately: nothing, the whole
            network, or each of its blocks.
        graphs: Whether compiled code is recorded as CUDA graphs, which need no launches from the
            host.
        search: Whether cuDNN times its algorithms for each convolution and takes the fastest.
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
    """Returns the name of a device's way when none has been timed."""
    return "nchw" if memory_format(device) == torch.contiguous_format else "channels_last"


def possible(device: torch.device, alone: bool, repeats: bool) -> list[str]:
    """Returns the names of a device's ways, the default first, then the most promising.

    The variants with cuDNN's search are left out.

    Args:
        device: The device that the network runs on.
        alone: Whether a single process computes each batch in one piece. CUDA graphs need this: a
            replay for the next piece overwrites the graph's output, and a graph does not include
            DDP's communication.
        repeats: Whether the network has `blocks`.
    """
    first = default(device)
    graphs = ["graphs"] if device.type == "cuda" and alone else []
    (other,) = {"nchw", "channels_last"} - {first}
    return [first, "compiled", *graphs, other, *(["compiled_blocks"] if repeats else [])]


def check(name: str, device: torch.device, deterministic: bool) -> None:
    """Refuses a way that the device or `deterministic` rules out.

    Args:
        name: A key of WAYS.
        device: The device that the network runs on.
        deterministic: Whether the run promises the same bits each time.

    Raises:
        ValueError: If the device does not support it, or it is not deterministic.
    """
    way = WAYS[name]
    if device.type != "cuda" and (way.graphs or way.search):
        there = ", ".join(known for known in WAYS if not (WAYS[known].graphs or WAYS[known].search))
        raise ValueError(
            f"tune={name} needs an NVIDIA GPU, but this runs on {device.type}: choose {there}"
        )
    if way.search and deterministic:
        raise ValueError(
            f"tune={name} does not work with runtime.deterministic=true: cuDNN's search may "
            "pick another algorithm each time"
        )


def put(network: nn.Module, name: str) -> None:
    """Makes a network run this way from now on; compilation happens at the first call.

    The weights keep their plain names, and dropout its masks. Each batch shape is compiled
    separately: the dynamic-shape code that torch would make at the second one fails in attention on
    a CPU (torch 2.13), for instance in a sweep over resolutions. A short last batch of an epoch is
    one more shape.

    Args:
        network: The network, changed in place.
        name: A key of WAYS.
    """
    way = WAYS[name]
    lay(network, LAYOUTS[way.layout])
    if way.compiled == "no":
        return
    keep_dropout_when_compiled()
    for part in blocks(network) if way.compiled == "blocks" else [network]:
        part.compile(dynamic=False, mode="reduce-overhead" if way.graphs else None)


def of_batch(network: nn.Module, name: str, size: int) -> Callable[..., Tensor]:
    """Returns a function that runs the network this way for batches of one size.

    Batches of another size, such as the last, run through the network as it is. Unlike `put`, this
    does not affect other callers of the network, and outputs are never overwritten.

    Args:
        network: The network, whose memory format is changed in place.
        name: A key of WAYS, except those that compile blocks.
        size: Images per batch.
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
    """Returns the largest submodules with children whose type occurs more than once."""
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
    """Applies a way's process-wide settings inside the block, which `put` leaves alone.

    Raises:
        ValueError: If a network is called with more batch shapes than are compiled.
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
    f"the network was compiled for {SHAPES} batch shapes, the limit: use training.drop_last=true, "
    "a device batch that divides the batch, or tune=false"
)


def as_it_is() -> AbstractContextManager[Any]:
    """Returns a context in which compiled networks run uncompiled."""
    return torch.compiler.set_stance("force_eager")


class Recompilations:
    """Counts compilations after the first step, when everything should be compiled.

    Attributes:
        count: Compilations counted so far.
    """

    def __init__(self) -> None:
        self.count = 0
        self._seen: set[str] | None = None

    def since(self) -> list[Compilation]:
        """Returns the compilations since the previous call; the first call returns none."""
        found = [one for one in compilations() if one.id not in (self._seen or ())]
        begins, self._seen = self._seen is None, {one.id for one in found} | (self._seen or set())
        if begins:
            return []
        self.count += len(found)
        return found


def in_words(made: Sequence[Compilation]) -> str:
    """Returns one line on what was compiled, how long it took, and why it was needed."""
    seconds = sum(one.seconds for one in made)
    why = dict.fromkeys(f"{one.name}, {one.why or 'for the first time'}" for one in made)
    more = f"; and {len(why) - 2} more" if len(why) > 2 else ""
    return f"{len(made)} in {seconds:.1f} s: {'; '.join(list(why)[:2])}{more}"


class Difference(NamedTuple):
    """How far the results of a way are from those of the plain way.

    Attributes:
        of: The tensor that differs most.
        times: Its difference, in multiples of the allowed rounding error.
    """

    of: str
    times: float


def difference(
    found: dict[str, Tensor], plain: dict[str, Tensor], again: dict[str, Tensor], least: float
) -> Difference:
    """Compares the results of a way with those of the plain way, by the norm of each tensor.

    Rounding is measured: the plain way computes everything again, with the batch in pieces. A
    tensor may be off by the largest of its own rounding error, the median relative error of all
    tensors, and `least`.

    Args:
        found: The way's results by name.
        plain: The plain way's results.
        again: The plain way's results with the batch in pieces.
        least: The smallest relative error to allow, see `rounding`.
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
    nothing = least * share * max(norms.values())  # for gradients that are 0 up to rounding
    times = {
        name: value / max(rounded[name], share * norms[name], nothing, 1e-30)
        for name, value in off.items()
    }
    worst = max(times, key=lambda name: times[name])
    return Difference(worst, times[worst])


def rounding(device: torch.device, precision: Precision) -> float:
    """Returns the least relative error, in norm, that a network's rounding causes."""
    if precision in AUTOCAST:
        return 2 * torch.finfo(AUTOCAST[precision]).eps
    return 2.0**-8 if precision == "tf32" and device.type == "cuda" else 2.0**-20
