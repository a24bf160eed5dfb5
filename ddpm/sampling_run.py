"""One call of ddpm.sample: rebuild the network from a run folder, or a diffusers folder, alone, draw, and write."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from ddpm import build, checkpoint, diffusers_folder, figures, images, sample_folder
from ddpm.cli import Composed
from ddpm.config import plain_config
from ddpm.diffusion import GaussianDiffusion
from ddpm.processes import find_processes
from ddpm.run_folder import RunFolder
from ddpm.sampling import Drawing
from ddpm.validation import Count, Node, Section, Text, check_node, validated


class SampleConfig(Section):
    """What to draw. See conf/sample.yaml for each key."""

    run: Text | None
    source: Annotated[Text | None, Field(alias="from")]
    step: Annotated[int, Field(ge=1)] | None
    weights: Literal["ema", "raw"]
    num_samples: Count
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    batch_size: Count
    classes: list[int | str] | None
    format: Annotated[list[Literal["png", "npz"]], Field(min_length=1)]
    animate: bool
    frames: Annotated[int, Field(ge=2)]
    figure: Literal["progressive", "shared_latents", "interpolate", "interpolate_coarse", "grid_over_training"] | None
    pictures: Annotated[list[int | str], Field(min_length=2, max_length=2)]
    device: Literal["auto", "cpu", "cuda", "mps"]
    to: Text | None
    outputs: Text
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
    """What is drawn from.

    classes: names, None for a network without.    any_class: see Drawing.    folder: where to write if nothing else is said.    name: of the weights.
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


def carry_out(config: SampleConfig) -> None:
    """Draw and write, and print where to.    Raises ValueError, one line, if there is no such run, checkpoint, folder or device."""
    processes = find_processes(config.device)
    device = processes.device if processes.num_processes > 1 else build.device(config.device)
    subject = _of_run(config, config.run) if config.run is not None else _of_folder(config, str(config.source))
    sampler = build.sampler(config.sampler, subject.diffusion)
    classes = _classes(config, subject.classes)
    network = subject.build(device)
    weights = {name: tensor.to(device) for name, tensor in subject.weights().items()}
    drawing = Drawing(network, weights, subject.diffusion, sampler, subject.shape, config.seed, subject.any_class)
    folder = Path(config.to) if config.to else subject.folder
    if processes.is_main_process and config.figure != "grid_over_training":
        what = config.figure or f"{config.num_samples} images"
        print(f"{what} with the weights of {subject.name}, {len(drawing.timesteps)} steps each, on {device}", flush=True)
    if config.figure is not None:
        if processes.is_main_process:
            _draw_figure(config, subject, drawing, classes, folder)
        processes.wait_for_everyone()
        return
    if processes.is_main_process:
        sample_folder.claim(folder, {"of": subject.name, "sampler": config.sampler, "seed": config.seed, "classes": config.classes})
    processes.wait_for_everyone()
    count, packed = config.num_samples, folder / "samples.npz"
    if not (packed.is_file() and "png" not in config.format and len(np.load(packed, mmap_mode="r")["arr_0"]) == count):
        sample_folder.fill(drawing, folder, count, classes, config.batch_size, processes.process_index, processes.num_processes)
        processes.wait_for_everyone()
        if processes.is_main_process:
            images.save_png(folder / "grid.png", images.grid(sample_folder.read(folder, min(count, 100))))
            if "npz" in config.format:
                sample_folder.pack(folder, count, keep="png" in config.format)
    if processes.is_main_process:
        if config.animate:
            shown = min(count, 36)
            frames = figures.denoising(drawing, shown, None if classes is None else classes[:shown], config.frames)
            figures.save_gif(folder / "denoising.gif", frames, seconds=4, hold=2)
            print(f"animation {folder / 'denoising.gif'}", flush=True)
        print(f"samples {folder / 'grid.png'}", flush=True)


def _draw_figure(config: SampleConfig, subject: Subject, drawing: Drawing, classes: list[int] | None, folder: Path) -> None:
    folder = folder.parent if config.to is None else folder  # a figure stands beside the folders of samples
    folder.mkdir(parents=True, exist_ok=True)
    pair = "_".join(Path(str(picture)).stem for picture in config.pictures)
    name = f"{config.figure}_{pair}" if str(config.figure).startswith("interpolate") else str(config.figure)
    drawn = config.figure != "grid_over_training"  # which shows what training drew
    path = folder / (f"{name}_{subject.folder.name}.png" if drawn and config.to is None else f"{name}.png")
    count = min(config.num_samples, 8)
    if config.figure == "grid_over_training":
        if subject.run is None:
            raise ValueError("figure=grid_over_training needs run=DIR")
        frames, figure = figures.over_training(sorted(subject.run.samples.glob("step_*[0-9].png")), config.frames)
        figures.save_gif(path.with_suffix(".gif"), frames, seconds=4, hold=2)
        print(f"animation {path.with_suffix('.gif')}", flush=True)
    elif config.figure == "progressive":
        figure = figures.progressive(drawing, count, classes)
    elif config.figure == "shared_latents":
        figure = figures.shared_latents(drawing, count, classes)
    elif config.figure == "interpolate":
        figure = figures.interpolate(drawing, subject.pair(config.pictures), classes, drawing.diffusion.num_timesteps // 2)
    else:
        figure = figures.interpolate_coarse(drawing, subject.pair(config.pictures), classes)
    figures.save_figure(path, figure)
    print(f"figure {path}", flush=True)


def _of_run(config: SampleConfig, path: str) -> Subject:
    run = RunFolder(Path(path))
    trained = run.config(config.trusted_modules)
    found = checkpoint.find(run.checkpoints, config.step)
    names, record = run.classes(), run.record()
    if record.get("status") != "complete":
        print(f"run {run.path} is not complete: this is step {found.step} of {record.get('num_steps')}", flush=True)
    return Subject(
        build=lambda device: build.network(trained, device, len(names)),
        weights=lambda: found.weights(config.weights),
        diffusion=build.diffusion(trained),
        shape=(trained.data.channels, *build.image_size(trained.data)),
        classes=names if trained.training.conditional else None,
        any_class=build.any_class(trained, len(names)),
        folder=run.samples / f"step_{found.step:08d}_{config.weights}_{_folder_name(config)}",
        name=f"step {found.step} {config.weights}",
        run=run,
        pair=lambda wanted: build.pictures(trained, wanted),
    )


def _of_folder(config: SampleConfig, name: str) -> Subject:
    """A folder knows its classes by number alone, and of none that it stands for "any"."""
    found = diffusers_folder.find(name, "from")
    network, resolution, num_classes = found.network(), found.model["resolution"], found.model["num_classes"]
    height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
    return Subject(
        build=lambda device: build.placed(network, device),
        weights=lambda: found.fitting(network, found.model),
        diffusion=found.chain().diffusion,
        shape=(found.model["in_channels"], height, width),
        classes=None if num_classes is None else [str(number) for number in range(num_classes)],
        any_class=None,
        folder=Path(config.outputs) / f"samples-{Path(name).expanduser().resolve().name}" / _folder_name(config),
        name=Path(name).expanduser().resolve().name,
        run=None,
        pair=_of_no_data,
    )


def _of_no_data(wanted: list[int | str]) -> Tensor:
    raise ValueError("figure=interpolate needs a run's data: give run=DIR")


def _folder_name(config: SampleConfig) -> str:
    """Sampler, steps and seed to read, and a hash of all that decides the images to tell apart what the words do not."""
    function = str(config.sampler["function"]["_target_"]).rpartition(".")[2]
    digest = hashlib.sha256(json.dumps([config.sampler, config.classes], sort_keys=True).encode()).hexdigest()[:8]
    return f"{function}{config.sampler['num_steps'] or ''}_seed_{config.seed}-{digest}"


def _classes(config: SampleConfig, names: list[str] | None) -> list[int] | None:
    """The class number of each sample: those asked for, or all in turn.    Raises ValueError, one line, for one that the run does not know."""
    if names is None:
        if config.classes is not None:
            raise ValueError(f"classes={config.classes}: the network was trained without classes; training.conditional=true trains with them")
        return None
    chosen = []
    for wanted in config.classes if config.classes is not None else range(len(names)):
        number = names.index(wanted) if isinstance(wanted, str) and wanted in names else wanted
        if not isinstance(number, int) or not 0 <= number < len(names):
            raise ValueError(f"classes has {wanted}; the run knows 0 to {len(names) - 1}: {', '.join(names[:24])}")
        chosen.append(number)
    return [chosen[index % len(chosen)] for index in range(config.num_samples)]
