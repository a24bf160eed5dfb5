"""From decoded pictures to training batches: which pictures a step sees, as floats in [-1, 1].

No state: step and position decide.
"""

from concurrent.futures import Future

import numpy as np
import torch
from torch import Tensor

from ddpm.data.stored import Packed
from ddpm.system import randomness


def to_floats(pixels: Tensor) -> Tensor:
    """Returns images (B, C, H, W) of uint8 as float32 in [-1, 1], channels_last."""
    x0 = torch.empty_like(pixels, dtype=torch.float32, memory_format=torch.channels_last)
    for channel in range(pixels.shape[1]):  # the whole at once is several times slower on a CPU
        x0[:, channel] = pixels[:, channel]
    return x0.div_(127.5).sub_(1)


class _Ahead:
    """Decodes ahead what will be asked for: at most the images of one step."""

    def __init__(self, images: Packed) -> None:
        self._images = images
        self._started: dict[tuple[int, int, int], list[Future[np.ndarray]]] = {}

    def start(self, span: tuple[int, int, int], rows: Tensor) -> None:
        """Starts to decode these rows. `span` is their (step, start, stop)."""
        if span not in self._started:
            self._started[span] = self._images.start(rows.numpy())

    def take(self, span: tuple[int, int, int], rows: Tensor) -> Tensor:
        """Returns a span's images, started or not, and drops what was started for earlier steps."""
        self.start(span, rows)
        started = self._started.pop(span)
        for old in [other for other in self._started if other[0] < span[0]]:
            for picture in self._started.pop(old):
                picture.cancel()
        return torch.from_numpy(self._images.result(started))


class Batches:
    """The training batches of a run: step s, position p -> image.

    They are the same for any number of processes and after any resume.

    Args:
        images: (M, C, H, W) uint8, an array or one that decodes as it is asked.
        batch_size: Images per step, over all processes.
        seed: Decides the order, the mirroring and the dropped labels.
        device: Where the batches go.
        drop_last: Leave out an epoch's last, short batch.
        flip: Mirror half of the images left to right, anew each time.
        labels: (N,) int64, None to train without classes.
        label_dropout: Share of labels replaced, anew each time, by `any_class` (Ho & Salimans 2022,
            Algorithm 1).
        any_class: The class number that replaces them.
        rows: (N,) int64, those of `images` that are the data set; the others are never seen. None
            for all.
        on_device: Keep the images whole on the device. Otherwise they are read from `images` each
            step (those to be decoded, a step ahead).

    Raises:
        ValueError: If the batch is larger than the data set.
    """

    def __init__(
        self,
        images: np.ndarray | Packed,
        batch_size: int,
        seed: int,
        device: torch.device,
        drop_last: bool,
        flip: bool,
        labels: np.ndarray | None = None,
        label_dropout: float = 0.0,
        any_class: int = 0,
        rows: np.ndarray | None = None,
        on_device: bool = False,
    ) -> None:
        rows = np.arange(len(images)) if rows is None else rows
        if batch_size > len(rows):
            raise ValueError(
                f"training.batch_size={batch_size} is more than the {len(rows)} images "
                f"of the data set; give training.batch_size={len(rows)} or less"
            )
        self.num_images = len(rows)
        self.image_size = (images.shape[2], images.shape[3])
        self.batch_size = batch_size
        self.seed = seed
        self.device = device
        self.flip = flip
        self.on_device = on_device
        self.steps_per_epoch = (
            self.num_images // batch_size if drop_last else -(-self.num_images // batch_size)
        )
        self._images: torch.Tensor | _Ahead
        if isinstance(images, Packed):
            self._images = _Ahead(images)
        else:
            self._images = (
                torch.from_numpy(images).to(device) if on_device else torch.from_numpy(images)
            )
        home = device if on_device else torch.device("cpu")
        self._rows = torch.from_numpy(rows).to(home)
        self._labels = torch.from_numpy(labels).to(home) if labels is not None else None
        self._any_class = any_class
        self._label_dropout = label_dropout
        self._orders: dict[int, Tensor] = {}  # epoch -> its permutation

    def size(self, step: int) -> int:
        """Returns how many images this step's global batch has.

        That is batch_size, or fewer in an epoch's last step if that is not dropped.
        """
        first = step % self.steps_per_epoch * self.batch_size
        return min(self.batch_size, self.num_images - first)

    def indices(self, step: int, start: int, stop: int) -> Tensor:
        """Returns which images stand at positions start to stop of this step's batch.

        Returns:
            (stop - start,) int64. Each image comes once an epoch.
        """
        epoch, within = divmod(step, self.steps_per_epoch)
        if epoch not in self._orders:
            generator = torch.Generator().manual_seed(
                randomness.host_key(randomness.DATA_ORDER, self.seed, epoch)
            )
            # what is decoded ahead crosses the border
            self._orders = {
                other: order for other, order in self._orders.items() if other == epoch - 1
            }
            self._orders[epoch] = torch.randperm(self.num_images, generator=generator).to(
                self._rows.device
            )
        return self._orders[epoch][
            within * self.batch_size + start : within * self.batch_size + stop
        ]

    def images(self, step: int, start: int, stop: int) -> Tensor:
        """Returns the images at positions start to stop of this step's batch.

        Returns:
            (stop - start, C, H, W) float32 in [-1, 1], channels_last, on the device.
        """
        chosen = self._chosen(step, start, stop)
        if chosen.device.type != self.device.type:  # "cuda" is where "cuda:0" is
            chosen = (chosen.pin_memory() if self.device.type == "cuda" else chosen).to(
                self.device, non_blocking=True
            )
        if self.flip:  # while it is bytes
            positions = torch.arange(start, stop, device=self.device)
            mirrored = randomness.coin(
                randomness.stream_keys(randomness.TRAIN_FLIP, self.seed, step, positions)
            )
            all_bits = mirrored.to(torch.uint8).neg()[:, None, None, None]
            # torch.where takes bytes one by one
            chosen = chosen ^ ((chosen ^ chosen.flip(-1)) & all_bits)
        return to_floats(chosen)

    def _chosen(self, step: int, start: int, stop: int) -> Tensor:
        if not isinstance(self._images, _Ahead):
            return self._images.index_select(0, self._rows[self.indices(step, start, stop)])
        now = self._images.take((step, start, stop), self._rows[self.indices(step, start, stop)])
        after = self.size(step + 1)
        span = (step + 1, min(start, after), min(stop, after))
        self._images.start(span, self._rows[self.indices(*span)])
        return now

    def classes(self, step: int, start: int, stop: int) -> Tensor | None:
        """Returns the classes at positions start to stop of this step's batch, some dropped.

        Returns:
            (stop - start,) int64 on the device; None without labels.
        """
        if self._labels is None:
            return None
        labels = self._labels[self.indices(step, start, stop)].to(self.device, non_blocking=True)
        if not self._label_dropout:
            return labels
        keys = randomness.stream_keys(
            randomness.TRAIN_LABEL, self.seed, step, torch.arange(start, stop, device=self.device)
        )
        return torch.where(
            randomness.uniform(keys, 1)[:, 0] < self._label_dropout, self._any_class, labels
        )
