"""Getting ready what a later batch needs while an earlier one is computed."""

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Span = tuple[int, int, int]  # step, start, stop: positions of a step's batch


class Ahead(Generic[T]):
    """What was begun for batches that will be asked for, each begun once.

    Args:
        begin: Begins it.
        drop: Is given what was begun and will not be asked for.
    """

    def __init__(
        self, begin: Callable[[Span], T], drop: Callable[[T], None] = lambda begun: None
    ) -> None:
        self._begin, self._drop = begin, drop
        self._begun: dict[Span, T] = {}

    def start(self, span: Span) -> None:
        """Begins what this span needs, unless it was."""
        if span not in self._begun:
            self._begun[span] = self._begin(span)

    def take(self, span: Span) -> T:
        """Returns what was begun for a span, now if it was not, and drops that of earlier steps."""
        self.start(span)
        found = self._begun.pop(span)
        for old in [other for other in self._begun if other[0] < span[0]]:
            self._drop(self._begun.pop(old))
        return found


class Copies:
    """Copies to a GPU on a stream of its own, beside what the GPU computes.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def room(self, shape: tuple[int, ...]) -> Tensor:
        """Returns uint8 memory to copy from: pinned, so that a copy does not wait for the host."""
        return torch.empty(shape, dtype=torch.uint8, pin_memory=True)

    def send(self, pixels: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        """Begins to copy, and waits for nothing.

        Args:
            pixels: In a `room`, which torch gives to nobody else before the copy is done.
        """
        with torch.cuda.stream(self._stream):
            return pixels.to(self._device, non_blocking=True), self._stream.record_event()

    def receive(self, sent: tuple[Tensor, torch.cuda.Event]) -> Tensor:
        """Returns the copy; what the present stream does from now on comes after it."""
        copy, done = sent
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(done)
        copy.record_stream(
            stream
        )  # else another copy could be written where this one is still read
        return copy


def without_waiting(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns a tensor on a device; the host does not wait for the copy, nor for what is before."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # from other memory the copy waits for the device
    return tensor.to(device, non_blocking=True)


def copies_to(device: torch.device) -> Copies | None:
    """Returns how images reach a device while it computes; None where they need not."""
    return Copies(device) if device.type == "cuda" else None
