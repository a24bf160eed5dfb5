"""Training batches: which pictures each step sees, as floats in [-1, 1].

There is no state to save: step and position alone determine each image.
"""

import time
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpm.data.ahead import Ahead, Copies, Span, without_waiting
from ddpm.data.stored import Packed
from ddpm.system import randomness
from ddpm.system.devices import memory_format


def to_floats(pixels: Tensor) -> Tensor:
    """Converts uint8 images (B, C, H, W) to float32 in [-1, 1], in the device's memory_format."""
    layout = memory_format(pixels.device)
    x0 = torch.empty_like(pixels, dtype=torch.float32, memory_format=layout)
    # converting all channels at once is several times slower on a CPU
    for channel in range(pixels.shape[1]):
        x0[:, channel] = pixels[:, channel]
    return x0.div_(127.5).sub_(1)


def _cancel(started: list[Future[np.ndarray]]) -> None:
    for picture in started:
        picture.cancel()


class Batches:
    """The training batches of a run: step s, position p -> image.

    They are the same for any number of processes and after any resume.

    Args:
        images: (M, C, H, W) uint8: an array, or a Packed that decodes on access.
        batch_size: Images per step, over all processes.
        seed: Determines the order, the mirroring and the dropped labels.
        device: Where the batches go.
        drop_last: Skip the last, short batch of an epoch.
        flip: Mirror half of the images left to right, chosen anew each time.
        labels: (N,) int64; None to train without classes.
        label_dropout: Share of labels replaced by `any_class`, chosen anew each time (Ho & Salimans
            2022, Algorithm 1).
        any_class: The class number that replaces dropped labels.
        rows: (N,) int64, the rows of `images` that make up the data set; None for all.
        on_device: Keep all images on the device. Otherwise each step reads its own from `images`;
            a Packed decodes one step ahead.
        copies: Copies images to the device ahead of time (`copies_to`) where `on_device` is false;
            None to copy them on request.

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
        copies: Copies | None = None,
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
        self._images: Tensor | Packed = (
            images
            if isinstance(images, Packed)
            else (torch.from_numpy(images).to(device if on_device else "cpu"))
        )
        self._decoding = Ahead(self._decode, _cancel)
        self._copies = None if on_device else copies
        self._sent = Ahead(self._send)
        home = device if on_device else torch.device("cpu")
        self._rows = torch.from_numpy(rows).to(home)
        self._labels = torch.from_numpy(labels).to(home) if labels is not None else None
        self._any_class = any_class
        self._label_dropout = label_dropout
        self._orders: dict[int, Tensor] = {}  # epoch -> its permutation

    def size(self, step: int) -> int:
        """Returns the number of images in this step's global batch.

        That is batch_size, or fewer in the last step of an epoch unless drop_last skips it.
        """
        first = step % self.steps_per_epoch * self.batch_size
        return min(self.batch_size, self.num_images - first)

    def images_before(self, step: int) -> int:
        """Returns the number of images in all steps before this one."""
        epochs, within = divmod(step, self.steps_per_epoch)
        of_epoch = min(self.steps_per_epoch * self.batch_size, self.num_images)
        return epochs * of_epoch + within * self.batch_size

    def indices(self, step: int, start: int, stop: int) -> Tensor:
        """Returns the indices of the images at positions start to stop of this step's batch.

        Returns:
            (stop - start,) int64. An index appears at most once per epoch.
        """
        epoch, within = divmod(step, self.steps_per_epoch)
        if epoch not in self._orders:
            generator = torch.Generator().manual_seed(
                randomness.host_key(randomness.DATA_ORDER, self.seed, epoch)
            )
            # decoding one step ahead enters an epoch while the one before is still in use
            self._orders = {
                other: order for other, order in self._orders.items() if other == epoch - 1
            }
            order = torch.randperm(self.num_images, generator=generator)
            self._orders[epoch] = without_waiting(order, self._rows.device)
        return self._orders[epoch][
            within * self.batch_size + start : within * self.batch_size + stop
        ]

    def images(self, step: int, start: int, stop: int) -> Tensor:
        """Returns the images at positions start to stop of this step's batch.

        Returns:
            (stop - start, C, H, W) float32 in [-1, 1] on the device, see to_floats.
        """
        span = step, start, stop
        if self._copies is not None:
            chosen = self._copies.receive(self._sent.take(span))
        else:
            chosen = without_waiting(self._chosen(span), self.device)
        if self.flip:  # before the conversion to floats, which take four times the bytes
            positions = torch.arange(start, stop, device=self.device)
            mirrored = randomness.coin(
                randomness.stream_keys(randomness.TRAIN_FLIP, self.seed, step, positions)
            )
            all_bits = mirrored.to(torch.uint8).neg()[:, None, None, None]
            # torch.where would process the bytes one at a time
            chosen = chosen ^ ((chosen ^ chosen.flip(-1)) & all_bits)
        return to_floats(chosen)

    def send(self, step: int, start: int, stop: int) -> None:
        """Starts copying the images of a later `images` call to the GPU while it still computes.

        Does nothing if the images are kept on the device or there is no `copies`.
        """
        if self._copies is not None:
            self._sent.start((step, start, stop))

    def _send(self, span: Span) -> Any:
        assert self._copies is not None
        room = self._copies.room((span[2] - span[1], *self._images.shape[1:]))
        return self._copies.send(self._chosen(span, room))

    def _chosen(self, span: Span, room: Tensor | None = None) -> Tensor:
        """The images of a span, on the device that stores them; written into `room` if given."""
        if not isinstance(self._images, Packed):
            return torch.index_select(self._images, 0, self._chosen_rows(span), out=room)
        started = self._decoding.take(span)
        step, start, stop = span
        after = self.size(step + 1)
        self._decoding.start((step + 1, min(start, after), min(stop, after)))
        return torch.from_numpy(Packed.result(started, None if room is None else room.numpy()))

    def _chosen_rows(self, span: Span) -> Tensor:
        return self._rows[self.indices(*span)]

    def _decode(self, span: Span) -> list[Future[np.ndarray]]:
        assert isinstance(self._images, Packed)
        return self._images.start(self._chosen_rows(span).numpy())

    def classes(self, step: int, start: int, stop: int) -> Tensor | None:
        """Returns the classes at positions start to stop of this step's batch, after label dropout.

        Returns:
            (stop - start,) int64 on the device; None without labels.
        """
        if self._labels is None:
            return None
        labels = without_waiting(self._labels[self.indices(step, start, stop)], self.device)
        if not self._label_dropout:
            return labels
        keys = randomness.stream_keys(
            randomness.TRAIN_LABEL, self.seed, step, torch.arange(start, stop, device=self.device)
        )
        return torch.where(
            randomness.uniform(keys, 1)[:, 0] < self._label_dropout, self._any_class, labels
        )


class TimedBatches(Batches):
    """Batches that add up in `seconds` how long the host takes to deliver them."""

    seconds = 0.0

    def images(self, step: int, start: int, stop: int) -> Tensor:
        """Returns what Batches.images does, and times it."""
        began = time.perf_counter()
        found = super().images(step, start, stop)
        self.seconds += time.perf_counter() - began
        return found

    def send(self, step: int, start: int, stop: int) -> None:
        """Does what Batches.send does, and times it."""
        began = time.perf_counter()
        super().send(step, start, stop)
        self.seconds += time.perf_counter() - began
