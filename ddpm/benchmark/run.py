"""python -m ddpm.benchmark: a run's training step and sampler step, timed in rounds."""

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import accelerate
import numpy as np
import psutil
import torch
from accelerate import Accelerator, PartialState

import ddpm
from ddpm.config import build
from ddpm.config.compose import Composed
from ddpm.config.schema import Config, settings_and_config
from ddpm.config.validation import Count, PositiveFloat, Section
from ddpm.plan.sizes import images_at_once, number_of_steps, sizes
from ddpm.plan.timing import HostWaits, SamplerStep
from ddpm.sample.tuning import tuned
from ddpm.system import ways
from ddpm.system.files import write_text
from ddpm.system.peak import DTYPES, matrix_products, peak_memory
from ddpm.system.processes import accelerator_for
from ddpm.system.text import say
from ddpm.train.timed import TrainingStep, random_images
from ddpm.train.tuning import way_of


class Settings(Section):
    """The keys that ddpm.benchmark adds to a run's. See conf/benchmark.yaml for each."""

    rounds: Count
    seconds: PositiveFloat
    sample_batch: Count
    images: Literal["random", "data"]
    to: str | None


def run(composed: Composed) -> dict[str, Any]:
    """Times a run's steps, prints the results and writes them to the JSON file `to`, if given.

    Returns:
        The results, as in that file.

    Raises:
        ValueError: If a key is invalid.
    """
    settings, config = settings_and_config(Settings, composed)
    build.check(config)
    precision = config.training.precision
    report: dict[str, Any] = {"settings": list(composed.overrides), "choices": composed.choices}
    runtime = config.runtime
    with accelerator_for(runtime.device, precision, runtime.deterministic) as accelerator:
        device = accelerator.device
        report["machine"] = machine(device)
        report["precision"] = precision
        size = 2048 if device.type == "cpu" else 8192
        products = matrix_products(device, DTYPES[precision], size)
        peaks = {name: speed / 1e9 for name, speed in products.items()}
        report["matrix_products_gflop_per_second"] = {
            name: round(peak, 1) for name, peak in peaks.items()
        }
        _show("machine", ", ".join(str(value) for value in report["machine"].values()))
        _show("peak", ", ".join(f"{name} {peak:,.0f} GFLOP/s" for name, peak in peaks.items()))
        gflop, peak = sizes(config, device).forward_flops / 1e9, max(peaks.values())
        report |= _time_training(settings, config, accelerator, gflop, peak)
        report |= _time_sampling(settings, config, device, gflop, peak)
    if settings.to is not None:
        write_text(Path(settings.to), json.dumps(report, indent=1) + "\n")
        _show("written to", settings.to)
    return report


def _time_training(
    settings: Settings,
    config: Config,
    accelerator: Accelerator,
    gflop: float,
    peak: float,
) -> dict[str, Any]:
    """Times training; prints and returns its entries in the report."""
    batch, found = images_at_once(config), {}
    images, decoding = _images(config, settings, batch)
    if decoding is not None:
        found["decoding_s"] = decoding
        _show("decoding", f"{len(images):,} pictures in {decoding:.1f} s")
    step = TrainingStep(config, accelerator, images, batch)
    first = _seconds(step.run)
    from_start = time.time() - psutil.Process().create_time()
    with HostWaits() as waits:
        step.run(1)
    classes, steps = config.data.num_classes or 1, number_of_steps(config) or 0
    choice = way_of(config, None, accelerator, step.batches, classes, steps)
    _show("way", f"{choice.way} ({choice.why})")
    with ways.carried_out(choice.way):
        if choice.way != ways.default(accelerator.device) or choice.device_batch:
            accelerator.free_memory()
            size = choice.device_batch
            step = TrainingStep(config, accelerator, images, batch, choice.way, size)
            first = _seconds(step.run)
        step.batches.seconds = 0.0
        speed, seconds = time_rounds(step.run, batch, settings)
    waiting, memory = step.batches.seconds / seconds, peak_memory(accelerator.device)
    training = {
        "batch": batch,
        "images_per_second": speed,
        "gflop_per_image": round(3 * gflop, 2),
        "share_of_peak": round(speed["median"] * 3 * gflop / peak, 3),
        "first_step_s": round(first, 2),
        "process_start_to_first_step_s": round(from_start, 2),
        "waiting_for_data": round(waiting, 5),
        "host_waits_per_step": waits.count,
        "peak_memory_bytes": memory,
        "tuned": choice.plain(),
    }
    _show("training", _words(training))
    _show(
        "",
        (
            f"the first step took {first:.2f} s; {from_start:.1f} s passed from the start of the "
            "process to the end of its first step"
        ),
    )
    _show(
        "",
        (
            f"{waiting:.2%} of the time waiting for data, {waits.count} waits for the device per "
            f"step, {(memory or 0) / 1e9:.2f} GB at the peak"
        ),
    )
    return {**found, "training": training}


def _time_sampling(
    settings: Settings,
    config: Config,
    device: torch.device,
    gflop: float,
    peak: float,
) -> dict[str, Any]:
    """Times sampling; prints and returns its entry in the report."""
    batch = settings.sample_batch
    step, tune = SamplerStep(config, device, batch), config.runtime.tune
    timesteps, count = len(step.drawing.timesteps), config.evaluation.num_samples
    if tune in ways.WAYS and ways.WAYS[str(tune)].compiled == "blocks":
        tune = False  # blocks are compiled only for training
    cache = Path(config.data.cache)
    with tuned(
        step.drawing, step.subject, step.classes, batch, count, PartialState(), tune, cache
    ) as step.drawing:
        first = _seconds(step.run)
        speed, _ = time_rounds(step.run, batch, settings, at_most=timesteps)
    calls = 2 if config.sampler["function"]["_target_"].endswith(".heun") else 1
    sampling = {
        "batch": batch,
        "timesteps": timesteps,
        "images_per_second": speed,
        "gflop_per_image": round(calls * gflop, 2),
        "share_of_peak": round(speed["median"] * calls * gflop / peak, 3),
        "first_step_s": round(first, 2),
    }
    _show("sampling", f"{_words(sampling)}, one step of {timesteps}")
    return {"sampling": sampling}


def time_rounds(
    run: Callable[[int], None], images: int, settings: Settings, at_most: int | None = None
) -> tuple[dict[str, float], float]:
    """Times work in rounds; returns its images/s, and the seconds that all rounds took.

    Args:
        run: Does the work as many times as it is told.
        images: Images per time.
        settings: The number of rounds, and the seconds for all of them.
        at_most: The most times per round; None for no limit.
    """
    count = max(1, int(settings.seconds / settings.rounds / _seconds(run)))
    count = min(count, at_most or count)
    seconds = [_seconds(run, count) for _ in range(settings.rounds)]
    speeds = [images * count / each for each in seconds]
    speed = {
        "median": statistics.median(speeds),
        "lowest": min(speeds),
        "highest": max(speeds),
        "rounds": len(speeds),
        "steps_a_round": count,
    }
    return speed, sum(seconds)


def machine(device: torch.device) -> dict[str, Any]:
    """Returns what was measured on: device, threads, versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    threads = {"threads": f"{torch.get_num_threads()} threads"} if device.type == "cpu" else {}
    return {
        "device": f"{device.type} ({name})",
        **threads,
        "python": f"Python {platform.python_version()}",
        "torch": f"torch {torch.__version__}",
        "accelerate": f"accelerate {accelerate.__version__}",
        "ddpm": f"ddpm {ddpm.__version__}",
    }


def _processor() -> str:
    """The processor's name according to Linux, and the instruction set that torch uses."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def _images(config: Config, settings: Settings, batch: int) -> tuple[np.ndarray, float | None]:
    """The images to train on, and the seconds to decode them; None if they are random."""
    if settings.images == "random":
        return random_images(config, batch), None
    began = time.perf_counter()
    workers = config.runtime.workers or torch.get_num_threads()
    images = build.images(config, build.source(config), workers).images
    return images, round(time.perf_counter() - began, 2)


def _seconds(run: Callable[[int], None], count: int = 1) -> float:
    began = time.perf_counter()
    run(count)
    return time.perf_counter() - began


def _words(measured: dict[str, Any]) -> str:
    speed = measured["images_per_second"]
    return (
        f"{speed['median']:,.4g} images/s ({speed['lowest']:,.4g} to {speed['highest']:,.4g} in "
        f"{speed['rounds']} rounds), batch {measured['batch']}, "
        f"{measured['gflop_per_image']:,.4g} GFLOP per image, "
        f"{measured['share_of_peak']:.0%} of the peak"
    )


def _show(what: str, words: str) -> None:
    say(f"{what:<11} {words}")
