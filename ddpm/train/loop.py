"""The training loop: one function, read from top to bottom."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ddpm.data.batches import Batches
from ddpm.diffusion.process import GaussianDiffusion
from ddpm.diffusion.timesteps import LossSecondMoment, Uniform
from ddpm.system import randomness
from ddpm.system.signals import Preempted
from ddpm.train.meter import Guard, Meter
from ddpm.train.state import EMA


def train(
    *,
    accelerator: Accelerator,
    model: nn.Module,
    diffusion: GaussianDiffusion,
    optimizer: torch.optim.Optimizer,
    lr_at: Callable[[int], float],
    ema: EMA,
    batches: Batches,
    timestep_sampler: Uniform | LossSecondMoment,
    seed: int,
    meter_sums: Tensor | None,
    steps: Iterable[int],
    num_steps: int,
    device_batch: int | None,
    grad_clip: float | None,
    log_every: int,
    sample_every: int,
    evaluate_every: int | None,
    checkpoint_every: int,
    log: Callable[[int, dict[str, float]], None],
    save_samples: Callable[[int], None],
    evaluate: Callable[[int], None],
    save_checkpoint: Callable[[int, Tensor], None],
    stopped_by: Callable[[int], str | None],
) -> None:
    """Algorithm 1 of Ho et al. 2020.    steps: the updates to do, in order, the first of all being 0 and the last num_steps - 1.

    model, optimizer: as Accelerate prepared them; model is (x_t, t) or, where batches has classes, (x_t, t, classes) -> output.
    lr_at: update, counted from 0 -> learning rate.    device_batch: images a device takes at once, None for all of its share.
    grad_clip: largest global gradient norm, None for none.
    log, save_samples, evaluate, save_checkpoint: called with the number of updates done, at multiples of their interval and at the last step; log by
    every process, with the means since the last time; save_checkpoint also with the sums of what is still to be reported (a row for each process),
    which meter_sums brings back.
    stopped_by: updates done -> the signal to stop for, if any.
    Nothing in a step waits for the device.
    Raises NotFinite, before anything is saved, if a loss or a gradient was not finite; the weights are those of before that update.
    Raises Preempted, after a checkpoint, if told to stop.
    """
    device = accelerator.device
    parameters = list(model.parameters())
    meter = Meter(diffusion.num_timesteps, device)
    meter.load(meter_sums, accelerator)
    guard = Guard(optimizer, scaled=accelerator.scaler is not None, device=device)
    for step in steps:
        lr = lr_at(step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        batch_size = batches.size(step)
        spans = micro_batches(batch_size, accelerator.num_processes, accelerator.process_index, device_batch)
        seen: list[tuple[Tensor, Tensor]] = []
        for start, stop in spans:
            with nullcontext() if stop == spans[-1][1] else accelerator.no_sync(model):
                t, losses = backward(accelerator, model, diffusion, batches, timestep_sampler, seed, step, start, stop)
            seen.append((t, losses))
            meter.add_losses(losses, t)
        norm = accelerator.clip_grad_norm_(parameters, grad_clip if grad_clip is not None else float("inf"))
        guard.see(step, norm)
        meter.add_norm(norm.nan_to_num(0, 0, 0) if accelerator.scaler is not None else norm)  # there, a skipped update is no failure
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
        if timestep_sampler.learns:
            t, losses = (torch.cat(parts) for parts in zip(*seen, strict=True))
            timestep_sampler.update(*of_all_processes(accelerator, t, losses, batch_size))

        done = step + 1
        signal = stopped_by(done)
        evaluates = evaluate_every is not None and is_due(done, evaluate_every, num_steps)
        saves = evaluates or signal is not None or is_due(done, checkpoint_every, num_steps)
        if saves or is_due(done, log_every, num_steps):  # nothing is saved unseen
            means = meter.means(accelerator)
            guard.check(step, means)
            if is_due(done, log_every, num_steps):
                log(done, {**means, "train/lr": lr})
                meter.reset()
        if is_due(done, sample_every, num_steps):
            save_samples(done)
        if evaluates:
            evaluate(done)
        if saves:
            save_checkpoint(done, meter.sums(accelerator))
        if signal is not None and done < num_steps:
            raise Preempted(f"{signal} after step {done}")


def backward(
    accelerator: Accelerator,
    model: nn.Module,
    diffusion: GaussianDiffusion,
    batches: Batches,
    timestep_sampler: Uniform | LossSecondMoment,
    seed: int,
    step: int,
    start: int,
    stop: int,
) -> tuple[Tensor, Tensor]:
    """Add to the gradients what the images at positions start to stop of a step's batch give; (timesteps (B,) int64, losses (B,)) of these."""
    positions = torch.arange(start, stop, device=accelerator.device)
    x0 = batches.images(step, start, stop)
    classes = batches.classes(step, start, stop)
    t, weights = timestep_sampler.draw(randomness.stream_keys(randomness.TRAIN_TIMESTEP, seed, step, positions))
    noise = randomness.normal(randomness.stream_keys(randomness.TRAIN_NOISE, seed, step, positions), tuple(x0.shape[1:]))
    torch.manual_seed(randomness.host_key(randomness.TRAIN_DROPOUT, seed, step, start))
    predict = model if classes is None else partial(model, classes=classes)
    losses = diffusion.losses(predict, x0, t, noise.contiguous(memory_format=torch.channels_last))
    total = losses.sum() if weights is None else (weights * losses).sum()
    accelerator.backward(total * (accelerator.num_processes / batches.size(step)))  # DDP averages over processes
    return t, losses.detach()


def is_due(step: int, every: int, last: int) -> bool:
    """Whether something done every so many steps is due after `step`: at multiples, and always at the last step."""
    return step % every == 0 or step == last


def of_all_processes(accelerator: Accelerator, t: Tensor, losses: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """Timesteps and losses of the whole global batch, in the order of its positions, from those of each process's share."""
    if accelerator.num_processes == 1:
        return t, losses
    shares = [
        span[0][1] - span[0][0] for span in (micro_batches(batch_size, accelerator.num_processes, rank, None) for rank in range(accelerator.num_processes))
    ]
    width = max(shares)
    padded = torch.zeros(2, width, device=t.device, dtype=torch.float64)
    padded[0, : len(t)], padded[1, : len(t)] = t.double(), losses.double()
    gathered = accelerator.gather(padded[None])
    whole = torch.cat([gathered[rank, :, :share] for rank, share in enumerate(shares)], dim=1)
    return whole[0].long(), whole[1].float()


def micro_batches(batch_size: int, num_processes: int, process: int, device_batch: int | None) -> list[tuple[int, int]]:
    """The positions (start, stop) of the global batch that one process takes, in pieces of at most device_batch.

    Raises ValueError if there are more processes than images.
    """
    if batch_size < num_processes:
        raise ValueError(f"a batch of {batch_size} images cannot be shared by {num_processes} processes")
    first, end = (batch_size * index // num_processes for index in (process, process + 1))
    size = device_batch or end - first
    return [(start, min(start + size, end)) for start in range(first, end, size)]
