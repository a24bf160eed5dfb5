"""From decoded pictures to training batches: which pictures a step sees, as floats in [-1, 1]. No state: step and position decide."""

import numpy as np
import torch
from torch import Tensor

from ddpm import randomness


class Batches:
    """The training batches of a run: step s, position p -> image, the same for any number of processes and after any resume.

    images: (M, C, H, W) uint8.    rows: (N,) int64, those of `images` that are the data set, the others never being seen; None for all.
    batch_size: images a step, over all processes.    drop_last: leave out an epoch's last, short batch.
    flip: mirror half of the images left to right, anew each time.    The images are kept whole on the device where they take less than a quarter of its
    free memory, else they are read from `images` each step.
    labels: (N,) int64, None to train without classes.    label_dropout: share of labels replaced, anew each time, by the class number `any_class`
    (Ho & Salimans 2022, Algorithm 1).    Raises ValueError if the batch is larger than the data set.
    """

    def __init__(
        self,
        images: np.ndarray,
        batch_size: int,
        seed: int,
        device: torch.device,
        drop_last: bool,
        flip: bool,
        labels: np.ndarray | None = None,
        label_dropout: float = 0.0,
        any_class: int = 0,
        rows: np.ndarray | None = None,
    ) -> None:
        rows = np.arange(len(images)) if rows is None else rows
        if batch_size > len(rows):
            raise ValueError(f"training.batch_size={batch_size} is more than the {len(rows)} images of the data set")
        self.num_images = len(rows)
        self.image_size = (images.shape[2], images.shape[3])
        self.batch_size = batch_size
        self.seed = seed
        self.device = device
        self.flip = flip
        self.steps_per_epoch = self.num_images // batch_size if drop_last else -(-self.num_images // batch_size)
        self._images = torch.from_numpy(images)
        if device.type == "cuda" and images.nbytes < torch.cuda.mem_get_info(device)[0] // 4:
            self._images = self._images.to(device)
        self._rows = torch.from_numpy(rows).to(self._images.device)
        self._labels = torch.from_numpy(labels).to(self._images.device) if labels is not None else None
        self._any_class = any_class
        self._label_dropout = label_dropout
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)

    def size(self, step: int) -> int:
        """Images of this step's global batch: batch_size, or fewer in an epoch's last step if that is not dropped."""
        first = step % self.steps_per_epoch * self.batch_size
        return min(self.batch_size, self.num_images - first)

    def indices(self, step: int, start: int, stop: int) -> Tensor:
        """Which images stand at positions start to stop of this step's batch: (stop - start,) int64, each image once an epoch."""
        epoch, within = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(randomness.host_key(randomness.DATA_ORDER, self.seed, epoch))
            self._order = torch.randperm(self.num_images, generator=generator).to(self._images.device)
            self._epoch = epoch
        return self._order[within * self.batch_size + start : within * self.batch_size + stop]

    def images(self, step: int, start: int, stop: int) -> Tensor:
        """The images at positions start to stop of this step's batch: (stop - start, C, H, W) float32 in [-1, 1], channels_last, on the device."""
        chosen = self._images[self._rows[self.indices(step, start, stop)]]
        if chosen.device != self.device:
            chosen = (chosen.pin_memory() if self.device.type == "cuda" else chosen).to(self.device, non_blocking=True)
        x0 = chosen.contiguous(memory_format=torch.channels_last).float().div_(127.5).sub_(1)
        if self.flip:
            positions = torch.arange(start, stop, device=self.device)
            mirrored = randomness.coin(randomness.stream_keys(randomness.TRAIN_FLIP, self.seed, step, positions))
            x0 = torch.where(mirrored[:, None, None, None], x0.flip(-1), x0)
        return x0

    def classes(self, step: int, start: int, stop: int) -> Tensor | None:
        """The classes at positions start to stop of this step's batch, some dropped: (stop - start,) int64 on the device; None without labels."""
        if self._labels is None:
            return None
        labels = self._labels[self.indices(step, start, stop)].to(self.device, non_blocking=True)
        if not self._label_dropout:
            return labels
        keys = randomness.stream_keys(randomness.TRAIN_LABEL, self.seed, step, torch.arange(start, stop, device=self.device))
        return torch.where(randomness.uniform(keys, 1)[:, 0] < self._label_dropout, self._any_class, labels)
