"""A run's training step on its own, for timing and for trying other ways to run it."""

from itertools import islice

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from ddpm.config import build
from ddpm.config.schema import Config
from ddpm.data.ahead import copies_to
from ddpm.data.batches import TimedBatches
from ddpm.system import ways
from ddpm.system.devices import wait_for
from ddpm.train.loop import backward, micro_batches, updates
from ddpm.train.start import prepare


class TrainingStep:
    """A run's own training step: the updates of ddpm.train, with nothing between them.

    Args:
        config: The run's configuration.
        accelerator: The accelerator to train on.
        images: (N, C, H, W) uint8 to train on, N at least batch.
        batch: Images per update.
        way: The way in which the network runs, by its name in ddpm.system.ways; None for the
            device's default.
        device_batch: Images that a device takes at once; None for runtime.device_batch, or for the
            whole batch if that is auto.
        num_classes: Number of classes of the data; None for data.num_classes.
    """

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        images: np.ndarray,
        batch: int,
        way: str | None = None,
        device_batch: int | None = None,
        num_classes: int | None = None,
    ) -> None:
        self.device, classes = accelerator.device, num_classes or config.data.num_classes or 1
        self.diffusion = build.diffusion(config)
        labels = np.arange(len(images)) % classes if config.training.conditional else None
        self.network = build.network(config, self.device, classes)
        ways.put(self.network, way or ways.default(self.device))
        self.state = prepare(config, accelerator, self.diffusion, self.network)
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
        at_once = device_batch or config.runtime.device_batch
        self.device_batch = None if isinstance(at_once, str) else at_once
        self._seed = config.seed
        self._updates = updates(
            self.state,
            self.diffusion,
            self.batches,
            lr_at=lambda step: 0.0,
            seed=config.seed,
            num_steps=1 << 60,
            device_batch=self.device_batch,
            grad_clip=config.training.grad_clip,
        )

    def run(self, count: int) -> None:
        """Makes `count` updates and waits for the last."""
        for _ in islice(self._updates, count):
            pass
        wait_for(self.device)

    def gradients(self, step: int, device_batch: int) -> dict[str, Tensor]:
        """Returns the gradients and losses of update number `step`, without making it.

        Args:
            step: The update, counted from 0; each has its own images, timesteps and noise.
            device_batch: Images at once.

        Returns:
            Parameter name -> its gradient, and "the loss" -> the losses of the images, (B,).
        """
        accelerator, losses = self.state.accelerator, []
        scaler, accelerator.scaler = accelerator.scaler, None
        try:
            for span in micro_batches(self.batches.size(step), 1, 0, device_batch):
                _, lost = backward(
                    self.state, self.diffusion, self.batches, self._seed, step, *span
                )
                losses.append(lost)
        finally:
            accelerator.scaler = scaler
        found = {"the loss": torch.cat(losses)}
        for name, parameter in self.network.named_parameters():
            if parameter.grad is not None:
                found[name], parameter.grad = parameter.grad, None
        wait_for(self.device)
        return found


def random_images(config: Config, count: int) -> np.ndarray:
    """Returns random images of the run's shape: (count, C, H, W) uint8."""
    return np.random.default_rng(0).integers(
        0, 256, (count, config.data.channels, *build.image_size(config.data)), dtype=np.uint8
    )
