"""The pieces of work that are timed.

ddpm.benchmark, ddpm.plan and the comparison with other projects use them.
"""

from itertools import islice
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm.config import build
from ddpm.config.schema import Config
from ddpm.data.ahead import copies_to
from ddpm.data.batches import TimedBatches
from ddpm.diffusion.samplers import step_noise
from ddpm.sample.subject import of_config
from ddpm.system.devices import compile_in_place
from ddpm.system.peak import wait_for
from ddpm.train.loop import updates
from ddpm.train.start import prepare


class TrainingStep:
    """A run's own training step: the updates of ddpm.train, with nothing between them.

    Args:
        config: Of the run.
        accelerator: Accelerate's.
        images: (N, C, H, W) uint8 to train on, N at least batch.
        batch: Images an update.
        compiled: Compile the network, at the first update.
    """

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        images: np.ndarray,
        batch: int,
        compiled: bool = False,
    ) -> None:
        self.device, num_classes = accelerator.device, config.data.num_classes or 1
        diffusion = build.diffusion(config)
        labels = np.arange(len(images)) % num_classes if config.training.conditional else None
        self.network = build.network(config, self.device, num_classes)
        if compiled:
            compile_in_place(self.network)
        self.state = prepare(config, accelerator, diffusion, self.network)
        self.batches = TimedBatches(
            images,
            batch,
            config.seed,
            self.device,
            drop_last=True,
            flip=config.data.flip,
            labels=labels,
            copies=copies_to(self.device),
        )
        at_once = config.runtime.device_batch
        self._updates = updates(
            self.state,
            diffusion,
            self.batches,
            lr_at=lambda step: 0.0,
            seed=config.seed,
            num_steps=1 << 60,
            device_batch=None if isinstance(at_once, str) else at_once,
            grad_clip=config.training.grad_clip,
        )

    def run(self, count: int) -> None:
        """Makes so many updates, and waits for the last."""
        for _ in islice(self._updates, count):
            pass
        wait_for(self.device)


class SamplerStep:
    """The sampler of a run on its network, from the noisiest timestep on, and all around it.

    Args:
        config: Of the run.
        device: Where it draws.
        batch: Images at once.
        compiled: Compile the network, at the first step.
    """

    def __init__(
        self, config: Config, device: torch.device, batch: int, compiled: bool = False
    ) -> None:
        num_classes = config.data.num_classes or 1
        network = build.network(config, device, num_classes)
        if compiled:
            compile_in_place(network)
        classes = [str(number) for number in range(num_classes)]
        subject = of_config(config, classes, lambda device: network, network.state_dict)
        sampler = build.sampler(config.sampler, subject.diffusion)
        precision = config.training.precision
        self.drawing = subject.drawing(sampler, config.seed, device, precision)
        self._noise = self.drawing.latents(range(batch))
        self._step_noise = step_noise(subject.shape, range(batch), config.seed, device)
        self._classes = subject.classes_in_turn(batch)

    def run(self, count: int) -> None:
        """Walks so many steps, and waits for the last."""
        timesteps = self.drawing.timesteps[:count]
        self.drawing.walk(self._noise, timesteps, self._step_noise, self._classes)
        wait_for(self.drawing.device)


class HostWaits(TorchDispatchMode):
    """Counts, in `count`, the operations that make the host wait for the device.

    These are a number read, or a tensor copied to the host's memory.
    """

    READS = (
        torch.ops.aten._local_scalar_dense,
        torch.ops.aten.equal,
        torch.ops.aten.nonzero,
        torch.ops.aten.masked_select,
    )
    COPIES = (torch.ops.aten._to_copy, torch.ops.aten.copy_)

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in self.READS:
            self.count += 1
        elif func.overloadpacket in self.COPIES:
            source = args[1] if func.overloadpacket is torch.ops.aten.copy_ else args[0]
            self.count += source.device.type != "cpu" and out.device.type == "cpu"
        return out


def random_images(config: Config, count: int) -> np.ndarray:
    """Makes random pictures of the run's shape: (count, C, H, W) uint8."""
    return np.random.default_rng(0).integers(
        0, 256, (count, config.data.channels, *build.image_size(config.data)), dtype=np.uint8
    )
