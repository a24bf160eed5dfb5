"""One call of ddpm.benchmark: a run's training step and sampler step in rounds, and what they are measured against."""

import json
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import accelerate
import numpy as np
import psutil
import torch

import ddpm
from ddpm.config import build
from ddpm.config.compose import Composed
from ddpm.config.schema import Config, training_config
from ddpm.config.validation import Count, PositiveFloat, Section, validated
from ddpm.plan.sizes import images_at_once, sizes
from ddpm.plan.timing import HostWaits, SamplerStep, TrainingStep, made_up, matrix_products
from ddpm.system.devices import compile_in_place, decide
from ddpm.system.files import write_whole
from ddpm.system.processes import accelerator_for

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Settings(Section):
    """What ddpm.benchmark adds to a run's keys. See conf/benchmark.yaml for each."""

    rounds: Count
    seconds: PositiveFloat
    sample_batch: Count
    pictures: Literal["made_up", "data"]
    to: str | None


def benchmark(composed: Composed) -> None:
    """Time it, print it, and write it to the JSON file `to`.    Raises ValueError, one line, for a key that cannot be."""
    settings = validated(Settings, {key: composed.cfg.pop(key) for key in Settings.model_fields})
    config = training_config(composed)
    build.check(config)
    report: dict[str, Any] = {"settings": list(composed.overrides), "choices": composed.choices}
    with accelerator_for(config.runtime.device, config.training.precision) as accelerator:
        compiles, why = decide(config.runtime.compile, accelerator.device)
        report |= {"machine": machine(accelerator.device), "precision": config.training.precision, "compiled": compiles, "because": why}
        products = matrix_products(accelerator.device, DTYPES[config.training.precision], 2048 if accelerator.device.type == "cpu" else 8192)
        report["matrix_products_gflop_per_second"] = {name: round(speed / 1e9, 1) for name, speed in products.items()}
        batch = images_at_once(config)
        pictures, decoding = _pictures(config, settings, batch)
        flops, peak = sizes(config).forward_flops, max(products.values())
        _show("machine", ", ".join(str(value) for value in report["machine"].values()))
        _show("peak", ", ".join(f"{name} {speed / 1e9:,.0f} GFLOP/s" for name, speed in products.items()))
        _show("compiled", f"{'yes' if compiles else 'no'} ({why})")
        if decoding is not None:
            report["decoding_s"] = decoding
            _show("decoding", f"{len(pictures):,} pictures in {decoding:.1f} s")

        step = TrainingStep(config, accelerator, pictures, batch)
        began = time.perf_counter()
        step.run(1)
        from_start, first = time.time() - psutil.Process().create_time(), time.perf_counter() - began
        with HostWaits() as waits:
            step.run(1)
        if compiles:
            compile_in_place(step.network)
            began = time.perf_counter()
            step.run(1)
            first = time.perf_counter() - began
        step.batches.seconds = 0.0
        speed, seconds = timed(step.run, batch, settings)
        report["training"] = {
            "batch": batch,
            "images_per_second": speed,
            "gflop_per_image": round(3 * flops / 1e9, 2),
            "share_of_peak": round(speed["median"] * 3 * flops / peak, 3),
            "first_step_s": round(first, 2),
            "process_start_to_first_step_s": round(from_start, 2),
            "waiting_for_data": round(step.batches.seconds / seconds, 5),
            "host_waits_per_step": waits.count,
            "peak_memory_bytes": _peak_memory(accelerator.device),
        }
        _show("training", _words(report["training"]))
        _show("", f"the first step took {first:.2f} s, and was done {from_start:.1f} s after the process was started")
        shares = f"{step.batches.seconds / seconds:.2%} of the time waiting for data, {waits.count} waits for the device in a step"
        _show("", f"{shares}, {_peak_memory(accelerator.device) / 1e9:.2f} GB at most")

        sampler = SamplerStep(config, accelerator.device, settings.sample_batch, compiles)
        began = time.perf_counter()
        sampler.run(1)
        first = time.perf_counter() - began
        speed, _ = timed(sampler.run, settings.sample_batch, settings, at_most=len(sampler.drawing.timesteps))
        calls = 2 if config.sampler["function"]["_target_"].endswith(".heun") else 1
        report["sampling"] = {
            "batch": settings.sample_batch,
            "timesteps": len(sampler.drawing.timesteps),
            "images_per_second": speed,
            "gflop_per_image": round(calls * flops / 1e9, 2),
            "share_of_peak": round(speed["median"] * calls * flops / peak, 3),
            "first_step_s": round(first, 2),
        }
        _show("sampling", f"{_words(report['sampling'])}, a step of {len(sampler.drawing.timesteps)}")
    if settings.to is not None:
        write_whole(Path(settings.to), json.dumps(report, indent=1) + "\n")
        _show("written to", settings.to)


def timed(run: Callable[[int], None], images: int, settings: Settings, at_most: int | None = None) -> tuple[dict[str, float], float]:
    """(images/s over the rounds, seconds that all rounds took) of `run`, which does its work so many times, on so many images each.

    at_most: how often it can at once.
    """
    began = time.perf_counter()
    run(1)
    once = time.perf_counter() - began
    count = max(1, min(int(settings.seconds / settings.rounds / once), at_most or 1 << 30))
    speeds, total = [], 0.0
    for _ in range(settings.rounds):
        began = time.perf_counter()
        run(count)
        seconds = time.perf_counter() - began
        speeds.append(images * count / seconds)
        total += seconds
    return {"median": statistics.median(speeds), "lowest": min(speeds), "highest": max(speeds), "rounds": len(speeds), "steps_a_round": count}, total


def machine(device: torch.device) -> dict[str, Any]:
    """What was measured on: device, cores, versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    threads = {"threads": f"{torch.get_num_threads()} threads"} if device.type == "cpu" else {}
    versions = {"torch": f"torch {torch.__version__}", "accelerate": f"accelerate {accelerate.__version__}", "ddpm": f"ddpm {ddpm.__version__}"}
    return {"device": f"{device.type} ({name})", **threads, "python": f"Python {platform.python_version()}", **versions}


def _processor() -> str:
    """The processor's name as Linux tells it, with the instructions that torch uses."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def _pictures(config: Config, settings: Settings, batch: int) -> tuple[np.ndarray, float | None]:
    """The pictures to train on, and the seconds that it took to have them decoded, if they are the run's."""
    if settings.pictures == "made_up":
        return made_up(config, batch), None
    began = time.perf_counter()
    stored = build.images(config, build.source(config), config.runtime.workers or torch.get_num_threads()).images
    return stored, round(time.perf_counter() - began, 2)


def _peak_memory(device: torch.device) -> int:
    """Bytes: of the device's memory, or, on a CPU, of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _words(measured: dict[str, Any]) -> str:
    speed, flops = measured["images_per_second"], measured["gflop_per_image"]
    return (
        f"{speed['median']:,.4g} images/s ({speed['lowest']:,.4g} to {speed['highest']:,.4g} in {speed['rounds']} rounds), batch {measured['batch']}, "
        f"{flops:,.4g} GFLOP an image, {measured['share_of_peak']:.0%} of the peak"
    )


def _show(what: str, words: str) -> None:
    print(f"{what:<11} {words}", flush=True)
