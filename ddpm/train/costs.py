"""What a run costs: pictures, operations, and time by the kind of work that it went into."""

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

Kind = Literal["checkpoint", "preview", "evaluation"]  # of work between updates
PASSES_OF_TRAINING = 3  # forward ones, in operations: the backward pass has twice the products
INTERVALS = 10  # between reports, that the time of an update is taken from


def forward_flops(config: Config, device: torch.device) -> int:
    """Counts the operations of one image's pass forward, without memory or arithmetic.

    A multiplication and an addition count as 2. Of what several ways compute, that of the device
    is counted.
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
    """Pictures and time of a run, over all its starts.

    Time is of three kinds: that of updates, that of the work between them (`doing`), and what is
    left. All processes keep it alike; what waits for data is the own process's.

    Args:
        batches: The run's.
        step: Optimizer updates done before this start.
        record: The content of run.json, whose `timed` is what `timed` gave at the last checkpoint.
        devices: That train in this start.

    Attributes:
        seconds_each: What work of a kind took when it was last done.
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
        saved_at = record.get("step", step)  # of `before`: a damaged checkpoint is passed over
        trained = before.get("images_trained", batches.images_before(saved_at))
        self._images = trained - batches.images_before(saved_at) + batches.images_before(step)
        self.seconds_each: dict[str, float] = dict(before.get("seconds_each", {}))
        if "seconds_to_save" in before:
            self.seconds_each["checkpoint"] = before["seconds_to_save"]
        self._intervals: deque[tuple[int, float]] = deque(maxlen=INTERVALS)
        self._is_first = True  # of this start's intervals, the one that is there
        self._step = step
        self._reported = self._images, self._in_steps
        self.go_on()

    def pause(self, step: int) -> None:
        """Notes that the updates to `step` are done, and what follows is none."""
        seconds = time.perf_counter() - self._since
        images = self._batches.images_before(step) - self._batches.images_before(self._step)
        if self._is_first and self._intervals:
            self._intervals.clear()  # it has what is done once
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
        """Times work of a kind between updates."""
        began = time.perf_counter()
        yield
        self.seconds_each[kind] = time.perf_counter() - began

    def seconds_of_update(self, step: int) -> float:
        """Returns what an update took lately, after `step` of them."""
        if self._intervals:
            return sum(taken for _, taken in self._intervals) / sum(n for n, _ in self._intervals)
        return (time.perf_counter() - self._since) / max(step - self._step, 1)

    def since_last(self) -> tuple[int, float]:
        """Returns pictures, and seconds in updates, since the last call; to the last `pause`."""
        images, seconds = self._reported
        self._reported = self._images, self._in_steps
        return self._images - images, self._in_steps - seconds

    def costs(self) -> dict[str, float]:
        """Returns pictures and seconds so far; those of updates to the last `pause`."""
        now = time.perf_counter() - self._started
        return {
            "images": self._images,
            "seconds": self._seconds_before + now,
            "device_seconds": self._of_devices_before + now * self._devices,
            "seconds_in_steps": self._in_steps,
            "seconds_waiting": self._waiting,
        }

    def timed(self) -> dict[str, Any]:
        """Returns what run.json keeps: `costs`, of which `images` are those that were timed."""
        return {
            **self.costs(),
            "images": self._timed_images,
            "images_trained": self._images,
            "seconds_each": self.seconds_each,
        }


def costs_of(config: Config, spent: Spent, device: torch.device, num_processes: int) -> "Costs":
    """Returns what counts a run's costs; it measures what the device can do.

    A network that does not compute without memory, as one of the user's may, has no operations.

    Args:
        config: The run's configuration.
        spent: Pictures and time.
        device: Of this process.
        num_processes: That train, each on such a device.
    """
    flops, peak = None, quick_peak(device, config.training.precision)
    try:
        flops = PASSES_OF_TRAINING * forward_flops(config, device)
    except Exception as error:
        reason = " ".join(str(error).split())
        log.warning("FLOPs are not counted, for which the network runs on meta: %.200s", reason)
    return Costs(spent, flops, None if peak is None else peak * num_processes, device)


class Costs:
    """The lines of costs.jsonl.

    Args:
        spent: Pictures and time.
        flops_of_image: Operations that an image's training takes; None if not known.
        peak: FLOP/s that all devices reach at most; None if not known.
        device: Whose memory is looked at.
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
        """Returns what has been spent so far.

        Args:
            images: Since the line before.
            seconds: In updates since then.
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
