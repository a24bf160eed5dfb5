"""One call of ddpm.sample: rebuild the network from a run folder, or a diffusers folder, alone, draw, and write."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from tqdm import tqdm

from ddpm import build, checkpoint, diffusers_folder, images
from ddpm.cli import Composed
from ddpm.config import Node, Section, check_node, plain_config, validated
from ddpm.diffusion import GaussianDiffusion
from ddpm.run_folder import RunFolder
from ddpm.sampling import Drawing


class SampleConfig(Section):
    """What to draw. See conf/sample.yaml for each key."""

    run: str | None
    source: Annotated[str | None, Field(alias="from")]
    step: Annotated[int, Field(ge=1)] | None
    weights: Literal["ema", "raw"]
    num_samples: PositiveInt
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    batch_size: PositiveInt
    classes: list[int | str] | None
    device: Literal["auto", "cpu", "cuda", "mps"]
    to: str | None
    outputs: str
    trusted_modules: list[str]
    sampler: Node

    @classmethod
    def of(cls, composed: Composed) -> "SampleConfig":
        """The settings of one call, checked.    Raises ValueError, one line."""
        cfg, source = composed.cfg, composed.cfg["from"]
        if (cfg.run is None) == (source is None):
            what = "run is missing" if source is None else f"run={cfg.run} and from={source}: give one of them"
            raise ValueError(f"{what}: give run=DIR, a folder that ddpm.train made, or from=FOLDER, of diffusers or on the hub")
        if source is None:
            cfg.objective = RunFolder(Path(str(cfg.run))).config(list(cfg.trusted_modules)).objective  # ancestral sampling has the run's variance
        else:
            chain = diffusers_folder.find(str(source), "from").chain()
            cfg.objective = {"variance": chain.diffusion.variance}
            if not chain.clip and not any(override.startswith("sampler.clip=") for override in composed.overrides):
                cfg.sampler.clip = False
        plain = plain_config(composed)
        del plain["objective"]
        config = validated(cls, plain)
        if source is not None and (config.step is not None or config.weights != "ema"):
            raise ValueError(f"step={config.step} and weights={config.weights} choose among what a run keeps; from={source} has one set of weights")
        check_node("sampler", config.sampler, config.trusted_modules)
        return config


class Subject(NamedTuple):
    """What is drawn from.    classes: names, None for a network without.    any_class: see Drawing.    folder: where to write if nothing else is said."""

    build: Callable[[torch.device], nn.Module]
    weights: Callable[[], dict[str, Tensor]]
    diffusion: GaussianDiffusion
    shape: tuple[int, int, int]
    classes: list[str] | None
    any_class: int | None
    folder: Path


def carry_out(config: SampleConfig) -> None:
    """Draw and write, and print where to.    Raises ValueError, one line, if there is no such run, checkpoint, folder or device."""
    subject = _of_run(config, config.run) if config.run is not None else _of_folder(config, str(config.source))
    sampler = build.sampler(config.sampler, subject.diffusion)
    classes = _classes(config, subject.classes)
    device = build.device(config.device)
    network = subject.build(device)
    weights = {name: tensor.to(device) for name, tensor in subject.weights().items()}
    drawing = Drawing(network, weights, subject.diffusion, sampler, subject.shape, config.seed, subject.any_class)
    folder = Path(config.to) if config.to else subject.folder
    folder.mkdir(parents=True, exist_ok=True)
    drawn: list[np.ndarray] = []
    with tqdm(total=config.num_samples, desc="sampling", unit="img", disable=None) as bar:
        for batch in drawing.batches(range(config.num_samples), classes, config.batch_size):
            for image in images.to_uint8(batch):
                images.save_png(folder / f"{len(drawn):05d}.png", image)
                drawn.append(image)
            bar.update(len(batch))
    images.save_png(folder / "grid.png", images.grid(np.stack(drawn)))
    print(f"samples {folder / 'grid.png'}", flush=True)


def _of_run(config: SampleConfig, path: str) -> Subject:
    run = RunFolder(Path(path))
    trained = run.config(config.trusted_modules)
    found = checkpoint.find(run.checkpoints, config.step)
    names = run.record()["data"]["classes"]
    return Subject(
        build=lambda device: build.network(trained, device, len(names)),
        weights=lambda: found.weights(config.weights),
        diffusion=build.diffusion(trained),
        shape=(trained.data.channels, *build.image_size(trained.data)),
        classes=names if trained.training.conditional else None,
        any_class=build.any_class(trained, len(names)),
        folder=run.samples / f"step_{found.step:08d}_{config.weights}_seed_{config.seed}",
    )


def _of_folder(config: SampleConfig, name: str) -> Subject:
    """A folder knows its classes by number alone, and of none that it stands for "any"."""
    found = diffusers_folder.find(name, "from")
    network, resolution, num_classes = found.network(), found.model["resolution"], found.model["num_classes"]
    height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
    return Subject(
        build=lambda device: network.to(device).to(memory_format=torch.channels_last),  # type: ignore[call-overload]
        weights=lambda: found.fitting(network, found.model),
        diffusion=found.chain().diffusion,
        shape=(found.model["in_channels"], height, width),
        classes=None if num_classes is None else [str(number) for number in range(num_classes)],
        any_class=None,
        folder=Path(config.outputs) / f"samples-{Path(name).expanduser().resolve().name}" / f"seed_{config.seed}",
    )


def _classes(config: SampleConfig, names: list[str] | None) -> list[int] | None:
    """The class number of each sample: those asked for, or all in turn.    Raises ValueError, one line, for one that the run does not know."""
    if names is None:
        if config.classes is not None:
            raise ValueError(f"classes={config.classes}: the network was trained without classes (training.conditional=false)")
        return None
    chosen = []
    for wanted in config.classes if config.classes is not None else range(len(names)):
        number = names.index(wanted) if isinstance(wanted, str) and wanted in names else wanted
        if not isinstance(number, int) or not 0 <= number < len(names):
            raise ValueError(f"classes has {wanted}; the run knows 0 to {len(names) - 1}: {', '.join(names[:24])}")
        chosen.append(number)
    return [chosen[index % len(chosen)] for index in range(config.num_samples)]
