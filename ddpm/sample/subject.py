"""What images are drawn from: a run's checkpoint, or a folder of weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ddpm.config import build
from ddpm.diffusion.process import GaussianDiffusion
from ddpm.runs import checkpoint
from ddpm.runs.folder import RunFolder
from ddpm.system import devices
from ddpm.weights import folders


class Subject(NamedTuple):
    """What is drawn from.

    classes: names, None for a network without.    any_class: see Drawing.    folder: of its samples, to which their own name is added.    name: of the weights.
    run: its folder, if it is one.    pair: two pictures, by number in the data set or by file, (2, C, H, W) in [-1, 1].
    """

    build: Callable[[torch.device], nn.Module]
    weights: Callable[[], dict[str, Tensor]]
    diffusion: GaussianDiffusion
    shape: tuple[int, int, int]
    classes: list[str] | None
    any_class: int | None
    folder: Path
    name: str
    run: RunFolder | None
    pair: Callable[[list[int | str]], Tensor]


def of_run(path: str, step: int | None, weights: Literal["ema", "raw"], trusted_modules: list[str]) -> Subject:
    run = RunFolder(Path(path))
    trained = run.config(trusted_modules)
    found = checkpoint.find(run.checkpoints, step)
    names, record = run.classes(), run.record()
    if record.get("status") != "complete":
        print(f"run {run.path} is not complete: this is step {found.step} of {record.get('num_steps')}", flush=True)
    return Subject(
        build=lambda device: build.network(trained, device, len(names)),
        weights=lambda: found.weights(weights),
        diffusion=build.diffusion(trained),
        shape=(trained.data.channels, *build.image_size(trained.data)),
        classes=names if trained.training.conditional else None,
        any_class=build.any_class(trained, len(names)),
        folder=run.samples / f"step_{found.step:08d}_{weights}",
        name=f"step {found.step} {weights}",
        run=run,
        pair=lambda wanted: build.pictures(trained, wanted),
    )


def of_folder(name: str, outputs: str) -> Subject:
    """A folder knows its classes by number alone, and of none that it stands for "any"."""
    found = folders.find(name, "from")
    network, resolution, num_classes = found.network(), found.model["resolution"], found.model["num_classes"]
    height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
    return Subject(
        build=lambda device: devices.placed(network, device),
        weights=lambda: found.fitting(network, found.model),
        diffusion=found.chain().diffusion,
        shape=(found.model["in_channels"], height, width),
        classes=None if num_classes is None else [str(number) for number in range(num_classes)],
        any_class=None,
        folder=Path(outputs) / f"samples-{Path(name).expanduser().resolve().name}",
        name=Path(name).expanduser().resolve().name,
        run=None,
        pair=_of_no_data,
    )


def _of_no_data(wanted: list[int | str]) -> Tensor:
    raise ValueError("figure=interpolate needs a run's data: give run=DIR")
