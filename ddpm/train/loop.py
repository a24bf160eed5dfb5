"""The training loop, Algorithm 1 of Ho et al. 2020: a generator that yields after each update."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor

from ddpm.data.batches import Batches
from ddpm.diffusion.process import GaussianDiffusion
from ddpm.system import randomness
from ddpm.system.devices import memory_format
from ddpm.system.signals import at_once
from ddpm.train.state import TrainingState


def updates(
    state: TrainingState,
    diffusion: GaussianDiffusion,
    batches: Batches,
    lr_at: Callable[[int], float],
    seed: int,
    num_steps: int,
    device_batch: int | None,
    grad_clip: float | None,
) -> Iterator[int]:
    """Makes the optimizer updates from state.step to num_steps, one per iteration.

    Nothing in an update waits for the device. Between two updates the caller may do anything, as
    long as all processes do the same.

    Args:
        state: The training state, which is changed in place.
        diffusion: The process whose loss is minimized.
        batches: The images of each update.
        lr_at: Maps an update, counted from 0, to its learning rate.
        seed: Seed of timesteps, noise and dropout.
        num_steps: Steps of the whole run.
        device_batch: Images that a device takes at once; None for its whole share.
        grad_clip: Largest global gradient norm; None for none.

    Yields:
        The number of updates done, after each.

    Raises:
        NotFinite: See Meter.add_norm.
        Preempted: If told to stop during the first update, which is lost.
    """
    first = state.step
    for step in range(first, num_steps):
        # the first update may compile for minutes, and nothing is lost by giving it up
        alone = step == first and state.accelerator.num_processes == 1
        with at_once() if alone else nullcontext():
            _update(state, diffusion, batches, lr_at(step), seed, step, device_batch, grad_clip)
        if step + 1 < num_steps:  # while a GPU still computes
            for span in _spans(state.accelerator, batches, step + 1, device_batch):
                batches.send(step + 1, *span)
        yield state.step


def _update(
    state: TrainingState,
    diffusion: GaussianDiffusion,
    batches: Batches,
    lr: float,
    seed: int,
    step: int,
    device_batch: int | None,
    grad_clip: float | None,
) -> None:
    """Makes update number `step`, counted from 0."""
    accelerator, optimizer = state.accelerator, state.optimizer
    parameters: list[Tensor] = []
    for group in optimizer.param_groups:
        group["lr"] = lr
        parameters += group["params"]
    spans = _spans(accelerator, batches, step, device_batch)
    seen: list[tuple[Tensor, Tensor]] = []
    for span in spans:
        last = span == spans[-1]
        with nullcontext() if last else accelerator.no_sync(state.model):
            t, losses = backward(state, diffusion, batches, seed, step, *span)
        state.meter.add_losses(losses, t)
        seen.append((t, losses))
    norm = accelerator.clip_grad_norm_(parameters, float("inf") if grad_clip is None else grad_clip)
    state.meter.add_norm(step, norm, optimizer)
    optimizer.step()
    optimizer.zero_grad()
    state.ema.update()
    if state.timesteps.learns:
        t, losses = (torch.cat(parts) for parts in zip(*seen, strict=True))
        size = batches.size(step)
        state.timesteps.update(*of_all_processes(accelerator, t, losses, size))
    state.step = step + 1


def _spans(
    accelerator: Accelerator, batches: Batches, step: int, device_batch: int | None
) -> list[tuple[int, int]]:
    """The positions (start, stop) of a step's batch that this process takes, one per piece."""
    size, count = batches.size(step), accelerator.num_processes
    return micro_batches(size, count, accelerator.process_index, device_batch)


def backward(
    state: TrainingState,
    diffusion: GaussianDiffusion,
    batches: Batches,
    seed: int,
    step: int,
    start: int,
    stop: int,
) -> tuple[Tensor, Tensor]:
    """Accumulates the gradients of the images at positions start to stop of a step's batch.

    Returns:
        Their timesteps, (B,) int64, and losses, (B,).
    """
    positions = torch.arange(start, stop, device=state.accelerator.device)
    x0 = batches.images(step, start, stop)  # (B, C, H, W)
    classes = batches.classes(step, start, stop)  # (B,) or None

    def keys(purpose: int) -> Tensor:
        return randomness.stream_keys(purpose, seed, step, positions)

    t, weights = state.timesteps.draw(keys(randomness.TRAIN_TIMESTEP))
    noise = randomness.normal(keys(randomness.TRAIN_NOISE), tuple(x0.shape[1:]))
    noise = noise.contiguous(memory_format=memory_format(noise.device))
    # for what a user's network draws; ours take their masks from keys
    torch.manual_seed(randomness.host_key(randomness.TRAIN_DROPOUT, seed, step, start))
    given = {} if classes is None else {"classes": classes}
    if state.uses_dropout_keys:
        given["dropout_keys"] = keys(randomness.TRAIN_DROPOUT)

    def model(x_t: Tensor, t: Tensor) -> Tensor:
        with state.accelerator.autocast():
            return state.model(x_t, t, **given)

    losses = diffusion.losses(model, x0, t, noise)  # (B,)
    total = losses.sum() if weights is None else (weights * losses).sum()
    processes = state.accelerator.num_processes
    state.accelerator.backward(total * (processes / batches.size(step)))  # DDP takes the mean
    return t, losses.detach()


def is_due(step: int, every: int | None, last: int) -> bool:
    """Whether work is due at a step: at multiples of `every`, and at the last step."""
    return every is not None and (step % every == 0 or step == last)


def of_all_processes(
    accelerator: Accelerator, t: Tensor, losses: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """Gathers the timesteps and losses of a global batch of `size` images, by position."""
    count = accelerator.num_processes
    if count == 1:
        return t, losses
    spans = [micro_batches(size, count, rank, None)[0] for rank in range(count)]
    shares = [stop - start for start, stop in spans]
    padded = torch.zeros(2, max(shares), device=t.device, dtype=torch.float64)
    padded[0, : len(t)], padded[1, : len(t)] = t.double(), losses.double()
    gathered = accelerator.gather(padded[None])
    parts = [gathered[rank, :, :share] for rank, share in enumerate(shares)]
    whole = torch.cat(parts, dim=1)
    return whole[0].long(), whole[1].float()


def micro_batches(
    size: int, num_processes: int, process: int, device_batch: int | None
) -> list[tuple[int, int]]:
    """Returns the positions (start, stop) of a global batch that one process takes.

    A piece has at most device_batch images.

    Raises:
        ValueError: If there are more processes than images.
    """
    if size < num_processes:
        raise ValueError(
            f"a batch of {size} images cannot be split over {num_processes} processes: start fewer "
            "processes, or raise training.batch_size"
        )
    first, end = (size * index // num_processes for index in (process, process + 1))
    piece = device_batch or end - first
    return [(start, min(start + piece, end)) for start in range(first, end, piece)]
