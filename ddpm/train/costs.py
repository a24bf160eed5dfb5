"""What a run costs: images, operations, and time by kind of work."""

import logging
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch.utils.flop_counter import FlopCounterMode

from ddpm.config import build
from ddpm.config.schema import Config
from ddpm.data.batches import TimedBatches
from ddpm.models import fast
from ddpm.models.layers import takes_dropout_keys
from ddpm.system.peak import peak_memory, quick_peak

log = logging.getLogger("ddpm")

Kind = Literal["checkpoint", "preview", "evaluation"]  # work between updates
PASSES_OF_TRAINING = 3  # in forward passes: the backward pass has twice the products
INTERVALS = 10  # latest ones between reports, over which an update's time is averaged


def forward_flops(config: Config, device: torch.device) -> int:
    """Counts the operations of one image's forward pass.

    It runs on the meta device, so nothing is allocated or computed. A multiplication and an
    addition count as 2. Where the network has code for several devices, that for `device` counts.
    """
    meta = torch.device("meta")
    with fast.as_on(device):
        network = build.network(config, meta, config.data.num_classes or 1).train()
        shape = (config.data.channels, *build.image_size(config.data))
        x, t = torch.zeros(1, *shape, device=meta), torch.zeros(1, dtype=torch.int64, device=meta)
        given = {"classes": t} if config.training.conditional else {}
        given |= {"dropout_keys": t} if takes_dropout_keys(network) else {}
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(x, t, **given)
    return counter.get_total_flops()


class Spent:
    """Counts the images and the time of a run, over all its starts.

    Time is of three kinds: updates, the work between them (`doing`), and the rest. All processes
    count alike, but the time spent waiting for data is each process's own.

    Args:
        batches: The run's batches.
        step: Optimizer updates done before this start.
        record: The content of run.json. Its `timed` is what `timed` returned at the last
            checkpoint.
        devices: Number of devices that train in this start.

    Attributes:
        seconds_each: Kind of work -> seconds that it took last time.
    """

    def __init__(
        self, batches: TimedBatches, step: int, record: Mapping[str, Any], devices: int
    ) -> None:
        before = (record.get("timed") or {}) if step else {}
        self._batches = batches
        self._started = time.perf_counter()
        self._devices = devices
        self._seconds_before = before.get("seconds", 0.0)
        self._of_devices_before = before.get("device_seconds", self._seconds_before)
        self._in_steps = before.get("seconds_in_steps", 0.0)
        self._waiting = before.get("seconds_waiting", 0.0)
        self._timed_images = before.get("images", 0)
        # of `before`; later than `step` if a damaged checkpoint was skipped
        saved_at = record.get("step", step)
        trained = before.get("images_trained", batches.images_before(saved_at))
        self._images = trained - batches.images_before(saved_at) + batches.images_before(step)
        self.seconds_each: dict[str, float] = dict(before.get("seconds_each", {}))
        if "seconds_to_save" in before:
            self.seconds_each["checkpoint"] = before["seconds_to_save"]
        self._intervals: deque[tuple[int, float]] = deque(maxlen=INTERVALS)
        self._is_first = True  # whether this start had no interval but its first
        self._step = step
        self._reported = self._images, self._in_steps
        self.go_on()

    def pause(self, step: int) -> None:
        """Notes that the updates up to `step` are done and that other work follows."""
        seconds = time.perf_counter() - self._since
        images = self._batches.images_before(step) - self._batches.images_before(self._step)
        if self._is_first and self._intervals:
            self._intervals.clear()  # it includes one-time work, such as compiling
            self._is_first = False
        self._intervals.append((step - self._step, seconds))
        self._in_steps += seconds
        self._waiting += self._batches.seconds - self._waited
        self._images += images
        self._timed_images += images
        self._step = step

    def go_on(self) -> None:
        """Notes that updates follow."""
        self._since, self._waited = time.perf_counter(), self._batches.seconds

    @contextmanager
    def doing(self, kind: Kind) -> Iterator[None]:
        """Times one kind of work between updates."""
        began = time.perf_counter()
        yield
        self.seconds_each[kind] = time.perf_counter() - began

    def seconds_of_update(self, step: int) -> float:
        """Returns the recent seconds per update, after `step` updates."""
        if self._intervals:
            return sum(taken for _, taken in self._intervals) / sum(n for n, _ in self._intervals)
        return (time.perf_counter() - self._since) / max(step - self._step, 1)

    def since_last(self) -> tuple[int, float]:
        """Returns the images and seconds in updates from the last call to the last `pause`."""
        images, seconds = self._reported
        self._reported = self._images, self._in_steps
        return self._images - images, self._in_steps - seconds

    def costs(self) -> dict[str, float]:
        """Returns images and seconds so far; those of updates up to the last `pause`."""
        now = time.perf_counter() - self._started
        return {
            "images": self._images,
            "seconds": self._seconds_before + now,
            "device_seconds": self._of_devices_before + now * self._devices,
            "seconds_in_steps": self._in_steps,
            "seconds_waiting": self._waiting,
        }

    def timed(self) -> dict[str, Any]:
        """Returns what run.json keeps: `costs`, with `images` only those that were timed."""
        return {
            **self.costs(),
            "images": self._timed_images,
            "images_trained": self._images,
            "seconds_each": self.seconds_each,
        }


def costs_of(config: Config, spent: Spent, device: torch.device, num_processes: int) -> "Costs":
    """Measures the device's peak speed and returns the run's costs.

    FLOPs stay unknown for a network that does not run on the meta device, as a user's may not.

    Args:
        config: The run's configuration.
        spent: The run's images and time.
        device: This process's device.
        num_processes: Number of processes that train, each on such a device.
    """
    flops, peak = None, quick_peak(device, config.training.precision)
    try:
        flops = PASSES_OF_TRAINING * forward_flops(config, device)
    except Exception as error:
        reason = " ".join(str(error).split())
        log.warning("FLOPs are not counted: the network fails on the meta device: %.200s", reason)
    return Costs(spent, flops, None if peak is None else peak * num_processes, device)


class Costs:
    """Makes the lines of costs.jsonl.

    Args:
        spent: The run's images and time.
        flops_of_image: FLOPs to train on one image; None if unknown.
        peak: Peak FLOP/s of all devices together; None if unknown.
        device: The device to read the peak memory of.
    """

    def __init__(
        self,
        spent: Spent,
        flops_of_image: float | None,
        peak: float | None,
        device: torch.device,
    ) -> None:
        self._spent, self._flops, self._peak = spent, flops_of_image, peak
        self._device = device

    def line(self, images: int, seconds: float) -> dict[str, float | None]:
        """Returns what the run has cost so far.

        Args:
            images: Images since the last line.
            seconds: Seconds in updates since the last line.
        """
        costs = self._spent.costs()
        flops = share = None
        if self._flops is not None:
            flops = self._flops * costs["images"]
            if self._peak is not None and seconds > 0:
                share = self._flops * images / seconds / self._peak
        return {
            "images": costs["images"],
            "flops": flops,
            "seconds": costs["seconds"],
            "device_seconds": costs["device_seconds"],
            "seconds_in_steps": costs["seconds_in_steps"],
            "seconds_waiting": costs["seconds_waiting"],
            "share_of_peak": share,
            "peak_memory_bytes": peak_memory(self._device),
        }
