"""A run's training step by itself: to be timed, and tried in other ways."""

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
        config: Of the run.
        accelerator: Accelerate's.
        images: (N, C, H, W) uint8 to train on, N at least batch.
        batch: Images an update.
        way: How the network is carried out (ddpm.system.ways); None: as its device has it.
        device_batch: Images that a device takes at once; None: as the run says, else all.
        num_classes: Of the data; None: as the run expects.
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
        """Makes so many updates, and waits for the last."""
        for _ in islice(self._updates, count):
            pass
        wait_for(self.device)

    def gradients(self, step: int, device_batch: int) -> dict[str, Tensor]:
        """Returns what an update number `step` would be made of, and makes none.

        Args:
            step: From 0; another one has other images, timesteps and noise.
            device_batch: Images at once.

        Returns:
            By parameter its gradient, and the losses of the images, (B,), as "the loss".
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
    """Makes random pictures of the run's shape: (count, C, H, W) uint8."""
    return np.random.default_rng(0).integers(
        0, 256, (count, config.data.channels, *build.image_size(config.data)), dtype=np.uint8
    )
