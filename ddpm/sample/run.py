"""python -m ddpm.sample: draws images from a run or a folder of weights, and writes them."""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from accelerate import PartialState
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from pydantic import Field
from torch import Tensor

from ddpm.config import build
from ddpm.config.compose import Composed, compose
from ddpm.config.explain import explain_composition
from ddpm.config.rules import says_network
from ddpm.config.schema import Config, Place, plain_config, training_config
from ddpm.config.validation import Count, FileCount, Node, Section, Text, check_node, validate
from ddpm.runs import pictures
from ddpm.runs.folder import RunFolder
from ddpm.sample import figures
from ddpm.sample.drawing import Drawing
from ddpm.sample.figures import Figure
from ddpm.sample.folder import (
    claim_folder,
    draw_missing,
    num_missing,
    pack_samples,
    read_samples,
    word_for,
)
from ddpm.sample.images import grid, save_png
from ddpm.sample.previews import drawn_by
from ddpm.sample.subject import (
    Subject,
    Trained,
    class_numbers,
    class_words,
    of_file,
    of_folder,
    of_run,
)
from ddpm.sample.tuning import check as check_tune
from ddpm.sample.tuning import tuned
from ddpm.system import signals
from ddpm.system.names import Name, Precision
from ddpm.system.processes import (
    agree,
    device_of,
    find_processes,
    gather,
    naming_lost,
    together,
    wait_to_leave,
)
from ddpm.system.signals import Preempted
from ddpm.system.text import say
from ddpm.weights import folders
from ddpm.weights.published import Published, file_at


class Settings(Section):
    """What to draw. conf/sample.yaml documents each key."""

    run: Text | None
    source: Annotated[Text | None, Field(alias="from")]
    step: Annotated[int, Field(ge=1)] | None
    weights: Literal["ema", "raw"]
    num_samples: FileCount
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    batch_size: Count
    classes: list[int | str] | None
    format: Annotated[list[Literal["png", "npz"]], Field(min_length=1)]
    animate: bool
    frames: Annotated[int, Field(ge=2, le=10_000)]
    figure: (
        Literal[
            "progressive",
            "shared_latents",
            "interpolate",
            "interpolate_coarse",
            "grid_over_training",
        ]
        | None
    )
    pictures: Annotated[list[int | str], Field(min_length=2, max_length=2)]
    device: Literal["auto", "cpu", "cuda", "mps"]
    precision: Precision
    tune: bool | Literal["auto"] | Name
    to: Text | None
    outputs: Text
    trusted_modules: list[str]
    data: Place
    sampler: Node


def run(composed: Composed) -> Path:
    """Draws and writes images, and prints where they are.

    Returns:
        The folder of the images.

    Raises:
        ValueError: If there is no such run, checkpoint, folder or device, or a setting is invalid.
        Preempted: If a signal asks the process to stop.
    """
    settings = settings_of(composed)
    processes = find_processes(settings.device)
    device = device_of(processes, settings.device)
    check_tune(settings.tune, device)
    subject, trained, name = _opened(settings, composed)
    sampler = build.sampler(settings.sampler, subject.diffusion)
    names = subject.classes or []
    numbers = class_numbers(settings.classes, subject.classes)
    protocol = {
        "network": subject.identity(),
        "sampler": build.sampler_settings(settings.sampler, subject.diffusion),
        "seed": settings.seed,
        "classes": None if numbers is None else [names[number] for number in numbers],
        "precision": settings.precision,
    }
    folder = Path(settings.to) if settings.to else _own_folder(settings, trained, name, protocol)
    if trained is not None and settings.to is None:
        trained.run.refuse_links()
    count, leads = settings.num_samples, processes.is_main_process
    classes = None
    if numbers is not None:
        classes = [numbers[index % len(numbers)] for index in range(count)]
    drawing = subject.drawing(sampler, settings.seed, device, settings.precision)
    if leads and settings.figure != "grid_over_training":
        what = settings.figure or f"{count} images"
        steps = len(drawing.timesteps)
        say(f"{what} with the weights of {name}, {steps} steps each, on {device}")
        if numbers:
            say(class_words(numbers[:count], names))
    with naming_lost(), signals.listening(), together():
        if settings.figure is not None:
            if leads:
                _draw_figure(settings, trained, drawing, classes, folder)
            return folder
        if leads:
            claim_folder(folder, protocol)
        agree()
        cache = Path(trained.config.data.cache if trained else f"{settings.outputs}/cache")
        left = gather([num_missing(folder, count)], processes)[0]
        rest = (subject, classes, settings.batch_size, left, processes, settings.tune, cache)
        draws = left and not _is_packed(folder, settings)
        with tuned(drawing, *rest) if draws else nullcontext(drawing) as drawing:
            _fill(folder, settings, drawing, classes, processes)
    if leads:
        say(f"samples {folder / 'grid.png'}")
    wait_to_leave()
    return folder


def _fill(
    folder: Path,
    settings: Settings,
    drawing: Drawing,
    classes: list[int] | None,
    processes: PartialState,
) -> None:
    """Draws the missing images, then makes the grid, the archive and the animation."""
    count, leads = settings.num_samples, processes.is_main_process
    if not _is_packed(folder, settings):
        try:
            draw_missing(drawing, folder, count, classes, settings.batch_size, processes)
            agree()
        except Preempted:
            if leads:
                say(f"images so far in {folder}; the same command draws the rest")
            raise
        if leads:
            save_png(folder / "grid.png", grid(read_samples(folder, min(count, 100))))
            if "npz" in settings.format:
                pack_samples(folder, count, keep="png" in settings.format)
    if leads and settings.animate:
        _animate(drawing, classes, folder / "denoising.gif", min(count, 36), settings.frames)


def settings_of(composed: Composed) -> Settings:
    """Returns the validated settings of a command."""
    cfg, source = composed.cfg, composed.cfg["from"]
    if (cfg.run is None) == (source is None):
        both = f"run={cfg.run} and from={source}: give one of them"
        raise ValueError(
            f"{'run is missing' if source is None else both}: give run=DIR (a folder of "
            "ddpm.train), from=FOLDER (of diffusers, local or on the hub) or from=FILE"
        )
    if source is not None and not _clips(str(source)) and not _is_typed(composed, "sampler.clip"):
        cfg.sampler.clip = False
    settings = validate(Settings, plain_config(composed))
    if source is not None and (settings.step is not None or settings.weights != "ema"):
        raise ValueError(
            f"step={settings.step} and weights={settings.weights} choose among a run's weights; "
            f"from={source} has only one set"
        )
    words = _words(composed) if source is not None else []
    if words and file_at(str(source), "from") is None:
        raise ValueError(f"{words[0]}: from={source} already defines its network and process")
    check_node("sampler", settings.sampler, settings.trusted_modules)
    return settings


def _clips(source: str) -> bool:
    """Returns whether a folder's own scheduler clips x0_hat; for a file the answer is yes."""
    return file_at(source, "from") is not None or folders.find(source, "from").chain().clip


def _words(composed: Composed) -> list[str]:
    """Returns the overrides that describe the network of a file."""
    parsed = OverridesParser.create().parse_overrides(composed.overrides)
    return [str(one.input_line) for one in parsed if says_network(one)]


def _told(composed: Composed, settings: Settings) -> Config:
    """Returns the configuration that the overrides give a file's network and process."""
    words = _words(composed)
    groups = {word.partition("=")[0] for word in words}
    if "experiment" not in groups and not {"model", "schedule"} <= groups:
        raise ValueError(
            f"from={settings.source} is a file of weights only: give experiment=NAME, or model= "
            "and schedule=, for its network and process"
        )
    if not groups & {"experiment", "data"}:
        words.insert(0, "data.channels=3")  # both codebases have color images only
    words.append(f"runtime.trusted_modules=[{','.join(settings.trusted_modules)}]")
    try:
        config = training_config(compose(words, config_dir=composed.config_dir))
    except HydraException as error:
        told = explain_composition(error, words, "config", composed.config_dir)
        raise ValueError(told) from error
    build.check(config)
    return config


def _is_typed(composed: Composed, key: str) -> bool:
    return any(override.startswith(f"{key}=") for override in composed.overrides)


def _opened(settings: Settings, composed: Composed) -> tuple[Subject, Trained | None, str]:
    """Returns the network to draw from, its run if it has one, and a name of the weights."""
    if settings.run is None:
        name = str(settings.source)
        file = file_at(name, "from")
        if file is not None:
            config = _told(composed, settings)
            source = Published(f"from={name}", file, config.init_attention)
            subject = of_file(source, config)
            say(source.assumed())
            return subject, None, file.name
        subject, name = of_folder(name)
        return subject, None, name
    run = RunFolder(Path(settings.run))
    trusted, path = settings.trusted_modules, settings.data.path
    trained = of_run(run, settings.step, settings.weights, trusted, path)
    record = run.record()
    if record.get("status") != "complete":
        whole = record.get("num_steps")
        say(f"run {run.path} is not complete: this is step {trained.step} of {whole}")
    return trained.subject, trained, f"step {trained.step} {trained.kind}"


def _own_folder(
    settings: Settings, trained: Trained | None, name: str, protocol: dict[str, Any]
) -> Path:
    """Returns the default output folder: readable words and a hash of the protocol."""
    function = str(settings.sampler["function"]["_target_"]).rpartition(".")[2]
    steps = protocol["sampler"]["num_steps"] or ""
    words = f"{function}{steps}_seed_{settings.seed}-{word_for(protocol)}"
    if trained is None:
        return Path(settings.outputs) / f"samples-{name[-100:]}" / words
    return trained.run.samples / f"step_{trained.step:08d}_{trained.kind}_{words}"


def _is_packed(folder: Path, settings: Settings) -> bool:
    """Returns whether samples.npz already has all images and no PNGs are wanted."""
    packed = folder / "samples.npz"
    if "png" in settings.format or not packed.is_file():
        return False
    return len(np.load(packed, mmap_mode="r")["arr_0"]) == settings.num_samples


def _animate(
    drawing: Drawing, classes: list[int] | None, path: Path, count: int, frames: int
) -> None:
    """Writes the chain of the first images as a GIF."""
    chosen = None if classes is None else classes[:count]
    figures.save_gif(path, figures.denoising(drawing, count, chosen, frames), seconds=4, hold=2)
    say(f"animation {path}")


def _draw_figure(
    settings: Settings,
    trained: Trained | None,
    drawing: Drawing,
    classes: list[int] | None,
    folder: Path,
) -> None:
    """Writes one of the papers' figures, next to the folders of samples or in to=DIR."""
    place = folder.parent if settings.to is None else folder
    place.mkdir(parents=True, exist_ok=True)
    name, count = str(settings.figure), min(settings.num_samples, 8)
    if name.startswith("interpolate"):
        name += "_" + "_".join(Path(str(picture)).stem[:40] for picture in settings.pictures)
    if settings.figure != "grid_over_training" and settings.to is None:
        name += f"_{folder.name}"  # the exception draws nothing: it shows existing previews
    path = place / f"{name}.png"
    if settings.figure == "grid_over_training":
        figure = _over_training(settings, trained, path.with_suffix(".gif"))
    elif settings.figure == "progressive":
        figure = figures.progressive(drawing, count, classes)
    elif settings.figure == "shared_latents":
        figure = figures.shared_latents(drawing, count, classes)
    elif settings.figure == "interpolate":
        halfway = drawing.diffusion.num_timesteps // 2
        figure = figures.interpolate(drawing, _pair(settings, trained), classes, halfway)
    else:
        figure = figures.interpolate_coarse(drawing, _pair(settings, trained), classes)
    figures.save_figure(path, figure)
    say(f"figure {path}")


def _over_training(settings: Settings, trained: Trained | None, path: Path) -> Figure:
    """Writes a GIF of the run's previews, and returns a strip of them."""
    if trained is None:
        raise ValueError("figure=grid_over_training needs run=DIR")
    previews = sorted(trained.run.samples.glob("step_*[0-9].png"))
    if previews:
        say(f"previews drawn by {drawn_by(previews)}")
    frames, figure = figures.over_training(previews, settings.frames)
    figures.save_gif(path, frames, seconds=4, hold=2)
    say(f"animation {path}")
    return figure


def _pair(settings: Settings, trained: Trained | None) -> Tensor:
    """Returns the two pictures to interpolate: (2, C, H, W) in [-1, 1]."""
    if trained is None:
        raise ValueError("figure=interpolate needs a run's data: give run=DIR")
    return build.load_images(
        trained.config, settings.pictures, lambda: pictures.of_run(trained.run, trained.config)
    )
