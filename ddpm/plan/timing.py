"""The pieces of work that ddpm.benchmark, ddpm.plan and the comparison with other projects time, and what they are measured against."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm.config import build
from ddpm.config.schema import Config
from ddpm.data.batches import Batches
from ddpm.diffusion.samplers import step_noise
from ddpm.sample.drawing import Drawing
from ddpm.system.devices import compile_in_place
from ddpm.train.loop import train
from ddpm.train.state import EMA


class TrainingStep:
    """A run's own training step: the loop of ddpm.train, with nothing between the steps.

    pictures: (N, C, H, W) uint8, N at least batch.    batch: images an update.    compiled: compile the network, at the first update.
    """

    def __init__(self, config: Config, accelerator: Accelerator, pictures: np.ndarray, batch: int, compiled: bool = False) -> None:
        self.config, self.accelerator = config, accelerator
        self.device, self.diffusion = accelerator.device, build.diffusion(config)
        num_classes = config.data.num_classes or 1
        labels = np.arange(len(pictures)) % num_classes if config.training.conditional else None
        self.network = build.network(config, self.device, num_classes).train()
        if compiled:
            compile_in_place(self.network)
        self.model, self.optimizer = accelerator.prepare(self.network, build.optimizer(config, list(self.network.parameters())))
        self.ema = EMA(self.network, config.training.ema_decay, config.training.ema_warmup)
        self.batches = TimedBatches(pictures, batch, config.seed, self.device, drop_last=True, flip=config.data.flip, labels=labels)
        self.done = 0

    def run(self, count: int) -> None:
        """Make so many updates, and wait for the last."""
        at_once = self.config.runtime.device_batch
        train(
            accelerator=self.accelerator,
            model=self.model,
            diffusion=self.diffusion,
            optimizer=self.optimizer,
            lr_at=lambda step: 0.0,
            ema=self.ema,
            batches=self.batches,
            timestep_sampler=build.timestep_sampler(self.diffusion, self.device),
            seed=self.config.seed,
            meter_sums=None,
            steps=range(self.done, self.done + count),
            num_steps=1 << 60,
            device_batch=None if isinstance(at_once, str) else at_once,
            grad_clip=self.config.training.grad_clip,
            log_every=1 << 60,
            sample_every=1 << 60,
            evaluate_every=None,
            checkpoint_every=1 << 60,
            log=_nothing,
            save_samples=_nothing,
            evaluate=_nothing,
            save_checkpoint=_nothing,
            stopped_by=_nothing,
        )
        self.done += count
        wait_for(self.device)


class SamplerStep:
    """The sampler of a run on its network: network calls and all around them, from the noisiest timestep on.    batch: images at once."""

    def __init__(self, config: Config, device: torch.device, batch: int, compiled: bool = False) -> None:
        num_classes, diffusion = config.data.num_classes or 1, build.diffusion(config)
        network = build.network(config, device, num_classes).eval()
        if compiled:
            compile_in_place(network)
        weights = {name: tensor.detach() for name, tensor in network.state_dict().items()}
        shape = (config.data.channels, *build.image_size(config.data))
        self.drawing = Drawing(network, weights, diffusion, build.sampler(config.sampler, diffusion), shape, config.seed, build.any_class(config, num_classes))
        self.noise = self.drawing.latents(range(batch))
        self.step_noise = step_noise(shape, range(batch), config.seed, device)
        self.classes = [index % num_classes for index in range(batch)] if config.training.conditional else None

    def run(self, count: int) -> None:
        """Walk so many steps, and wait for the last."""
        self.drawing.walk(self.noise, self.drawing.timesteps[:count], self.step_noise, self.classes)
        wait_for(self.drawing.device)


class TimedBatches(Batches):
    """Batches that add up how long the host took to hand them over, in `seconds`."""

    seconds = 0.0

    def images(self, step: int, start: int, stop: int) -> Tensor:
        began = time.perf_counter()
        found = super().images(step, start, stop)
        self.seconds += time.perf_counter() - began
        return found


class HostWaits(TorchDispatchMode):
    """Counts, in `count`, the operations that make the host wait for the device: a number read, or a tensor copied to the host's memory."""

    READS = (torch.ops.aten._local_scalar_dense, torch.ops.aten.equal, torch.ops.aten.nonzero, torch.ops.aten.masked_select)
    COPIES = (torch.ops.aten._to_copy, torch.ops.aten.copy_)

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in self.READS:
            self.count += 1
        elif func.overloadpacket in self.COPIES:
            source = args[1] if func.overloadpacket is torch.ops.aten.copy_ else args[0]
            self.count += source.device.type != "cpu" and out.device.type == "cpu"
        return out


def made_up(config: Config, count: int) -> np.ndarray:
    """Random pictures of the run's shape: (count, C, H, W) uint8."""
    return np.random.default_rng(0).integers(0, 256, (count, config.data.channels, *build.image_size(config.data)), dtype=np.uint8)


def matrix_products(device: torch.device, dtype: torch.dtype, size: int) -> dict[str, float]:
    """FLOP/s of (size, size) matrix products, the best of ten each: as torch.mm, and as the 1x1 convolution that is one too.    size: a multiple of 16.

    They may differ: on a CPU the one is MKL's, the other oneDNN's.
    """
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    rows = a.reshape(16, 1, size // 16, size).permute(0, 3, 1, 2)  # channels_last; a batch of 16, below which one thread has MKL's here too
    return {
        "torch.mm": 2 * size**3 / _best_of_ten(lambda: torch.mm(a, b), device),
        "1x1 convolution": 2 * size**3 / _best_of_ten(lambda: F.conv2d(rows, b[:, :, None, None]), device),
    }


def wait_for(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _best_of_ten(call: Callable[[], Tensor], device: torch.device) -> float:
    """Seconds."""
    call()
    found = []
    for _ in range(10):
        wait_for(device)
        began = time.perf_counter()
        call()
        wait_for(device)
        found.append(time.perf_counter() - began)
    return min(found)


def _nothing(*_: object) -> None:
    """Between the steps."""
