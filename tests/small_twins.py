"""Twenty updates of each recipe's small twin, and the golden files that record them.

    python tests/small_twins.py             rewrites tests/golden/*.txt
    python tests/small_twins.py NAME ...    rewrites those of the named recipes

A twin is its recipe with a small network at 8 pixels, four generated pictures per update, three
classes, and float64 instead of the recipe's precision, so that a machine's rounding does not show.
It keeps the recipe's noise schedule, objective, timesteps, dropout, flips, classes, clipping,
learning rate, optimizer and averaging. Its twenty updates stand for steps spread over the whole
run, dense at first, and take the learning rate and the EMA decay of those steps. The network of the
original README comes in one size, too large for this, so a small U-Net replaces it.
"""

import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from ddpm.config import build
from ddpm.config.compose import EXPERIMENTS, compose
from ddpm.config.schema import Config, training_config
from ddpm.data.batches import Batches
from ddpm.data.image_set import ImageSet
from ddpm.plan.sizes import number_of_steps
from ddpm.train.loop import updates
from ddpm.train.start import batches_of, prepare

GOLDEN = Path(__file__).parent / "golden"
NAMES = sorted(file.stem for file in EXPERIMENTS.glob("*.yaml"))
UPDATES, BATCH, PICTURES, SIDE, CLASSES = 20, 4, 21, 8, 3
SMALL = {
    "resolution": SIDE,
    "base_channels": 8,
    "channel_multipliers": [1, 2],
    "attention_resolutions": [SIDE // 2],
    "num_res_blocks": 1,
    "norm_groups": 4,
}
WITHIN = 1e-4
COLUMNS = ("loss", "gradient", "weights", "average")


class Float64:
    """A run's batches in float64."""

    def __init__(self, batches: Batches) -> None:
        self.size, self.classes, self.send = batches.size, batches.classes, batches.send
        self._images = batches.images

    def images(self, step: int, start: int, stop: int) -> Tensor:
        return self._images(step, start, stop).double()


def twin(*overrides: str) -> Config:
    """Returns the configuration of overrides such as experiment=cifar10, made small."""
    config = training_config(compose(list(overrides)))
    model = config.model
    if model["_target_"] != "ddpm.models.UNet":
        model = {"_target_": "ddpm.models.UNet", "in_channels": config.data.channels}
    heads = {"head_channels": 4} if model.get("head_channels") else {}
    length = {"steps": number_of_steps(config), "epochs": None, "batch_size": BATCH}
    small = {
        "model": model | SMALL | heads,
        "data": config.data.model_copy(update={"resolution": SIDE}),
        "training": config.training.model_copy(update=length),
    }
    return config.model_copy(update=small)


def curve(config: Config) -> list[tuple[float, ...]]:
    """Trains a twin.

    Returns:
        One row per update: the mean loss, the gradient's norm before clipping, the distance that
        the weights have moved, and the norm of their average, which starts at zero here.
    """
    steps = config.training.steps
    assert steps is not None
    places = [round(steps ** (update / (UPDATES - 1))) - 1 for update in range(UPDATES)]
    diffusion, lr_schedule = build.diffusion(config), build.lr_schedule(config)
    network = build.network(config, torch.device("cpu"), CLASSES).double()
    state = prepare(config, Accelerator(cpu=True), diffusion, network)
    averages = state.ema.state_dict()
    state.ema.load_state_dict({name: 0 * average for name, average in averages.items()}, 0)
    first = [weight.detach().clone() for weight in network.parameters()]
    learned = state.timesteps.state_dict()
    if learned:  # importance sampling needs ten losses per timestep, too many for a twin
        losses = 1 / (1 + torch.arange(diffusion.num_timesteps))
        filled = {"losses": losses[:, None], "seen": torch.tensor(10)}
        state.timesteps.load_state_dict(filled)

    def lr_at(update: int) -> float:
        state.ema.num_updates = places[update]
        return lr_schedule(places[update], steps, float(config.optimizer["lr"]))

    batches: Any = Float64(batches_of(pictures(config.data.channels), config, torch.device("cpu")))
    rest = lr_at, config.seed, UPDATES, None, config.training.grad_clip
    rows = []
    for _ in updates(state, diffusion, batches, *rest):
        means = state.meter.means()
        state.meter.reset()
        moved = [now - then for now, then in zip(network.parameters(), first, strict=True)]
        distance, size = norm(moved), norm(averages.values())
        rows.append((means["train/loss"], means["train/grad_norm"], distance, size))
    return rows


def norm(tensors: Iterable[Tensor]) -> float:
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors]).norm().item()


def pictures(channels: int) -> ImageSet:
    """Returns generated pictures of three classes."""
    numbers = np.random.default_rng(0)
    pixels = numbers.integers(0, 256, (PICTURES, channels, SIDE, SIDE), dtype=np.uint8)
    rows = np.arange(PICTURES)
    digests, labels = numbers.integers(0, 2**64, PICTURES, dtype=np.uint64), rows % CLASSES
    classes = [str(number) for number in range(CLASSES)]
    return ImageSet(pixels, rows, digests, labels, classes, "", {}, [], Path())


def header(name: str, config: Config) -> str:
    """Returns the first line of a recipe's file, with settings that the twin may not show."""
    clip, precision = config.training.grad_clip, config.training.precision
    return f"{name}: grad_clip={clip}, float64 in place of precision={precision}"


def differences(name: str, config: Config) -> list[str]:
    """Returns one line per difference between a twin and its recipe's golden file.

    Raises:
        ValueError: If the recipe has no file.
    """
    file = GOLDEN / f"{name}.txt"
    if not file.exists():
        raise ValueError(
            f"tests/golden/{name}.txt is missing: python tests/small_twins.py {name} writes it"
        )
    first, _, *lines = file.read_text().splitlines()
    found = [] if first == header(name, config) else [f"{header(name, config)}; was {first}"]
    golden = [tuple(map(float, line.split())) for line in lines]
    for update, (now, then) in enumerate(zip(curve(config), golden, strict=True), 1):
        for column, value, before in zip(COLUMNS, now, then, strict=True):
            if not math.isclose(value, before, rel_tol=WITHIN):
                found.append(f"{name}, update {update}: {column} {value:.8g}; was {before:.8g}")
    return found


def write(name: str) -> None:
    config = twin(f"experiment={name}")
    lines = [header(name, config), " ".join(f"{column:>14}" for column in COLUMNS)]
    lines += [" ".join(f"{value:14.8e}" for value in row) for row in curve(config)]
    (GOLDEN / f"{name}.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name in sys.argv[1:] or NAMES:
        write(name)
