"""One call of ddpm.sample: rebuild the network from a run folder alone, draw, and write."""

from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from omegaconf import OmegaConf
from pydantic import Field, PositiveInt
from tqdm import tqdm

from ddpm import build, checkpoint, images
from ddpm.cli import Composed
from ddpm.config import Node, Section, check_node, plain_config, validated
from ddpm.run_folder import RunFolder
from ddpm.sampling import Drawing


class SampleConfig(Section):
    """What to draw. See conf/sample.yaml for each key."""

    run: str
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
        if OmegaConf.is_missing(composed.cfg, "run"):
            raise ValueError("run is missing: give run=DIR, a folder that ddpm.train made")
        run = RunFolder(Path(str(composed.cfg.run)))
        composed.cfg.objective = run.config(list(composed.cfg.trusted_modules)).objective  # ancestral sampling has the run's variance
        plain = plain_config(composed)
        del plain["objective"]
        config = validated(cls, plain)
        check_node("sampler", config.sampler, config.trusted_modules)
        return config


def carry_out(config: SampleConfig) -> None:
    """Draw and write, and print where to.    Raises ValueError, one line, if there is no such run, checkpoint or device."""
    run = RunFolder(Path(config.run))
    trained = run.config(config.trusted_modules)
    found = checkpoint.find(run.checkpoints, config.step)
    diffusion = build.diffusion(trained)
    sampler = build.sampler(config.sampler, diffusion)
    names = run.record()["data"]["classes"]
    classes = _classes(config, trained.training.conditional, names)
    device = build.device(config.device)
    network = build.network(trained, device, len(names))
    weights = {name: tensor.to(device) for name, tensor in found.weights(config.weights).items()}
    folder = Path(config.to) if config.to else run.samples / f"step_{found.step:08d}_{config.weights}_seed_{config.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    shape = (trained.data.channels, *build.image_size(trained.data))
    drawing = Drawing(network, weights, diffusion, sampler, shape, config.seed, build.any_class(trained, len(names)))
    drawn: list[np.ndarray] = []
    with tqdm(total=config.num_samples, desc="sampling", unit="img", disable=None) as bar:
        for batch in drawing.batches(range(config.num_samples), classes, config.batch_size):
            for image in images.to_uint8(batch):
                images.save_png(folder / f"{len(drawn):05d}.png", image)
                drawn.append(image)
            bar.update(len(batch))
    images.save_png(folder / "grid.png", images.grid(np.stack(drawn)))
    print(f"samples {folder / 'grid.png'}", flush=True)


def _classes(config: SampleConfig, conditional: bool, names: list[str]) -> list[int] | None:
    """The class number of each sample: those asked for, or all in turn.    Raises ValueError, one line, for one that the run does not know."""
    if not conditional:
        if config.classes is not None:
            raise ValueError(f"classes={config.classes}: the run was trained without classes (training.conditional=false)")
        return None
    chosen = []
    for wanted in config.classes if config.classes is not None else range(len(names)):
        number = names.index(wanted) if isinstance(wanted, str) and wanted in names else wanted
        if not isinstance(number, int) or not 0 <= number < len(names):
            raise ValueError(f"classes has {wanted}; the run knows 0 to {len(names) - 1}: {', '.join(names[:24])}")
        chosen.append(number)
    return [chosen[index % len(chosen)] for index in range(config.num_samples)]
