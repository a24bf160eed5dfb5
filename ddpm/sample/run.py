"""One call of ddpm.sample: rebuild the network from a run folder, or a diffusers folder, alone, draw, and write."""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from ddpm.config import build
from ddpm.config.compose import Composed
from ddpm.config.schema import plain_config
from ddpm.config.validation import Count, Node, Section, Text, check_node, validated
from ddpm.runs.folder import RunFolder
from ddpm.sample import figures, images
from ddpm.sample.drawing import Drawing
from ddpm.sample.folder import claim_folder, draw_missing, pack_samples, read_samples
from ddpm.sample.subject import Subject, of_folder, of_run
from ddpm.system import devices
from ddpm.system.processes import find_processes
from ddpm.weights import folders


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
            chain = folders.find(str(source), "from").chain()
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


def carry_out(config: SampleConfig) -> None:
    """Draw and write, and print where to.    Raises ValueError, one line, if there is no such run, checkpoint, folder or device."""
    processes = find_processes(config.device)
    device = processes.device if processes.num_processes > 1 else devices.device(config.device)
    if config.run is not None:
        subject = of_run(config.run, config.step, config.weights, config.trusted_modules)
        drawn_in = subject.folder.with_name(f"{subject.folder.name}_{_folder_name(config)}")
    else:
        subject = of_folder(str(config.source), config.outputs)
        drawn_in = subject.folder / _folder_name(config)
    sampler = build.sampler(config.sampler, subject.diffusion)
    classes = _classes(config, subject.classes)
    network = subject.build(device)
    weights = {name: tensor.to(device) for name, tensor in subject.weights().items()}
    drawing = Drawing(network, weights, subject.diffusion, sampler, subject.shape, config.seed, subject.any_class)
    folder = Path(config.to) if config.to else drawn_in
    if processes.is_main_process and config.figure != "grid_over_training":
        what = config.figure or f"{config.num_samples} images"
        print(f"{what} with the weights of {subject.name}, {len(drawing.timesteps)} steps each, on {device}", flush=True)
    if config.figure is not None:
        if processes.is_main_process:
            _draw_figure(config, subject, drawing, classes, folder)
        processes.wait_for_everyone()
        return
    if processes.is_main_process:
        claim_folder(folder, {"of": subject.name, "sampler": config.sampler, "seed": config.seed, "classes": config.classes})
    processes.wait_for_everyone()
    count, packed = config.num_samples, folder / "samples.npz"
    if not (packed.is_file() and "png" not in config.format and len(np.load(packed, mmap_mode="r")["arr_0"]) == count):
        draw_missing(drawing, folder, count, classes, config.batch_size, processes.process_index, processes.num_processes)
        processes.wait_for_everyone()
        if processes.is_main_process:
            images.save_png(folder / "grid.png", images.grid(read_samples(folder, min(count, 100))))
            if "npz" in config.format:
                pack_samples(folder, count, keep="png" in config.format)
    if processes.is_main_process:
        if config.animate:
            shown = min(count, 36)
            frames = figures.denoising(drawing, shown, None if classes is None else classes[:shown], config.frames)
            figures.save_gif(folder / "denoising.gif", frames, seconds=4, hold=2)
            print(f"animation {folder / 'denoising.gif'}", flush=True)
        print(f"samples {folder / 'grid.png'}", flush=True)


def _draw_figure(config: SampleConfig, subject: Subject, drawing: Drawing, classes: list[int] | None, folder: Path) -> None:
    drawn_in = folder.name
    folder = folder.parent if config.to is None else folder  # a figure stands beside the folders of samples
    folder.mkdir(parents=True, exist_ok=True)
    pair = "_".join(Path(str(picture)).stem for picture in config.pictures)
    name = f"{config.figure}_{pair}" if str(config.figure).startswith("interpolate") else str(config.figure)
    drawn = config.figure != "grid_over_training"  # which shows what training drew
    path = folder / (f"{name}_{drawn_in}.png" if drawn and config.to is None else f"{name}.png")
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
