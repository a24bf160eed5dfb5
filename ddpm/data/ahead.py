"""Prepares a later batch while an earlier one is still being computed."""

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Span = tuple[int, int, int]  # (step, start, stop): positions start to stop of that step's batch


class Ahead(Generic[T]):
    """Work started before its batch is requested; each span is started once.

    Args:
        begin: Starts the work for a span and returns a handle to it.
        drop: Called with each handle that will never be taken.
    """

    def __init__(
        self, begin: Callable[[Span], T], drop: Callable[[T], None] = lambda begun: None
    ) -> None:
        self._begin, self._drop = begin, drop
        self._begun: dict[Span, T] = {}

    def start(self, span: Span) -> None:
        """Starts the work for this span unless it is already under way."""
        if span not in self._begun:
            self._begun[span] = self._begin(span)

    def take(self, span: Span) -> T:
        """Returns the handle of a span and drops the handles of earlier steps.

        Starts the work now if `start` was not called for this span.
        """
        self.start(span)
        found = self._begun.pop(span)
        for old in [other for other in self._begun if other[0] < span[0]]:
            self._drop(self._begun.pop(old))
        return found


class Copies:
    """Copies images to a GPU on a stream of its own, while the GPU computes.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def room(self, shape: tuple[int, ...]) -> Tensor:
        """Returns a uint8 buffer to copy from, pinned so that the copy runs asynchronously."""
        return torch.empty(shape, dtype=torch.uint8, pin_memory=True)

    def send(self, pixels: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        """Starts a copy and returns at once.

        Args:
            pixels: A buffer from `room`; torch does not reuse it before the copy is done.

        Returns:
            The copy, and the event that marks its end; see `receive`.
        """
        with torch.cuda.stream(self._stream):
            return pixels.to(self._device, non_blocking=True), self._stream.record_event()

    def receive(self, sent: tuple[Tensor, torch.cuda.Event]) -> Tensor:
        """Returns the copy and makes the current stream wait until it is complete."""
        copy, done = sent
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(done)
        # keeps the allocator from reusing the memory while this stream still reads it
        copy.record_stream(stream)
        return copy


def without_waiting(tensor: Tensor, device: torch.device) -> Tensor:
    """Moves a tensor to a device; the host waits neither for the copy nor for earlier work."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # a copy from pageable memory waits for the device
    return tensor.to(device, non_blocking=True)


def copies_to(device: torch.device) -> Copies | None:
    """Returns what copies images to a GPU while it computes; None for any other device."""
    return Copies(device) if device.type == "cuda" else None
