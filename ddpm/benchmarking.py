"""One call of ddpm.benchmark: the run's own training step and sampler step, timed in rounds; and the pieces of it that others time too."""

import numpy as np
import torch
from accelerate import Accelerator

from ddpm import build
from ddpm.config import Config
from ddpm.data.batches import Batches
from ddpm.ema import EMA
from ddpm.training_loop import train


class TrainingStep:
    """A run's own training step, the loop of ddpm.train with everything between the steps left out, on the pictures given or some made up.

    batch: images an update.    pictures: (N, C, H, W) uint8, N at least batch.
    """

    def __init__(self, config: Config, accelerator: Accelerator, batch: int, pictures: np.ndarray | None = None) -> None:
        self.config, self.accelerator, self.batch = config, accelerator, batch
        self.device, self.diffusion = accelerator.device, build.diffusion(config)
        num_classes = config.data.num_classes or 1
        if pictures is None:
            pictures = made_up(config, batch)
        labels = np.arange(len(pictures)) % num_classes if config.training.conditional else None
        self.network = build.network(config, self.device, num_classes).train()
        self.model, self.optimizer = accelerator.prepare(self.network, build.optimizer(config, list(self.network.parameters())))
        self.ema = EMA(self.network, config.training.ema_decay, config.training.ema_warmup)
        self.batches = Batches(pictures, batch, config.seed, self.device, drop_last=True, flip=config.data.flip, labels=labels)
        self.done = 0

    def run(self, count: int) -> None:
        """Make so many updates, and wait for the last."""
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
            device_batch=self.config.runtime.device_batch,
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


def made_up(config: Config, count: int) -> np.ndarray:
    """Random pictures of the run's shape: (count, C, H, W) uint8."""
    return np.random.default_rng(0).integers(0, 256, (count, config.data.channels, *build.image_size(config.data)), dtype=np.uint8)


def wait_for(device: torch.device) -> None:
    """Until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _nothing(*_: object) -> None:
    """Between the steps."""
