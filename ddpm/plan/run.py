"""One call of ddpm.plan: sizes from the network built without memory, speed from a few real steps, expectations checked."""

import time
from datetime import datetime, timedelta
from typing import Annotated, NamedTuple

from omegaconf import OmegaConf
from pydantic import Field

from ddpm.config import build
from ddpm.config.compose import Composed
from ddpm.config.schema import Config, Expect, training_config
from ddpm.config.validation import Count, PositiveFloat, Section, validated
from ddpm.plan.sizes import Sizes, expected_speed, images_at_once, number_of_steps, sizes, steps_per_epoch
from ddpm.plan.timing import TrainingStep, made_up
from ddpm.runs.identity import locate
from ddpm.system.processes import accelerator_for
from ddpm.weights import folders


class Verdict(NamedTuple):
    """One expectation of a recipe. passed: None if it cannot be measured without training."""

    what: str
    expected: str
    found: str
    passed: bool | None


class PlanSettings(Section):
    """What ddpm.plan is asked besides. See conf/plan.yaml for each key."""

    probe: Annotated[float, Field(ge=0)]
    speed: PositiveFloat | None
    devices: list[Count]
    bandwidth: PositiveFloat


def plan(composed: Composed) -> None:
    """Print the plan of a run.    Raises ValueError, naming the first, if an expectation of the recipe does not hold."""
    asked = validated(
        PlanSettings, {name: OmegaConf.to_object(composed.cfg[name]) if name == "devices" else composed.cfg[name] for name in PlanSettings.model_fields}
    )
    for name in PlanSettings.model_fields:
        del composed.cfg[name]
    config = folders.with_content(training_config(composed))
    build.check(config)
    training, data = config.training, config.data
    found = sizes(config)
    batches_per_epoch = steps_per_epoch(config)
    num_steps = number_of_steps(config)
    print(f"run         {locate(config, composed).path}")
    print(f"network     {found.parameters:,} parameters, {found.forward_flops / 1e9:.1f} GFLOP an image forward, about 3 times that to train")
    print(f"attention   {', '.join(f'{height}x{width} in {count} blocks' for (height, width), count in found.attention.items()) or 'none'}")
    images = f"{data.num_images:,} images as published" if data.num_images else "number of images unknown until they are read"
    print(f"data        {data.name}, {images}" + (f", {batches_per_epoch:,} steps an epoch" if batches_per_epoch else ""))
    at_once = images_at_once(config)
    print(f"batch       {training.batch_size} images an update, {at_once} at once on one device")
    if num_steps:
        print(f"duration    {num_steps:,} steps, {num_steps * training.batch_size:,} images")
    weights = 4 * found.parameters
    print(f"disk        {4 * weights / 1e9:.2f} GB a checkpoint (weights, average, Adam's two moments), {config.runtime.keep_checkpoints} kept")
    print(
        f"memory      about {(5 * weights + at_once * found.saved_bytes) / 1e9:.1f} GB in float32: weights, gradients, Adam and average "
        f"{5 * weights / 1e9:.2f} GB, activations {found.saved_bytes / 1e9:.3f} GB an image"
    )
    speed = asked.speed
    if speed is not None:
        print(f"speed       {speed:.4g} images/s of one device, as given")
    elif asked.probe > 0:
        speed, device = probe(config, asked.probe)
        print(f"speed       {speed:.3g} images/s, {speed * 3 * found.forward_flops / 1e9:,.0f} GFLOP/s, on {device}")
    if speed is not None:
        for devices in asked.devices:
            print(_time(devices, speed, config, found, num_steps, asked.bandwidth))
        if any(devices > 1 for devices in asked.devices):
            print(
                f"            assumed: {asked.bandwidth:g} GB/s between devices, float32 gradients sent behind the backward pass, "
                "each device as fast with its share of the batch"
            )
    if config.recipe is None:
        return
    verdicts = expectations(config, config.recipe.expect, found, num_steps)
    print(f"recipe      {config.recipe.source}" + (f"; takes {config.recipe.takes}" if config.recipe.takes else ""))
    for verdict in verdicts:
        word = {True: "pass", False: "FAIL", None: "not measurable yet"}[verdict.passed]
        print(f"  {word:<19} {verdict.what}: expected {verdict.expected}" + (f", found {verdict.found}" if verdict.found else ""))
    failed = [verdict for verdict in verdicts if verdict.passed is False]
    if failed:
        raise ValueError(
            f"recipe.expect.{failed[0].what} expects {failed[0].expected}, and the run has {failed[0].found} ({len(failed)} of {len(verdicts)} fail)"
        )


def _time(devices: int, speed: float, config: Config, found: Sizes, num_steps: int | None, bandwidth: float) -> str:
    """How long the run takes on so many devices."""
    batch = config.training.batch_size
    words = f"time        {devices} device{'s' * (devices > 1)}: "
    if devices > batch:
        return f"{words}more than the {batch} images of a batch"
    together = expected_speed(speed, devices, batch, 4 * found.parameters, bandwidth * 1e9)
    words += f"{together:,.4g} images/s"
    if num_steps:
        left = timedelta(seconds=round(num_steps * batch / together))
        words += f", {left.total_seconds() / 3600:,.1f} hours; started now, done {_when(left)}"
    return words


def expectations(config: Config, expect: Expect, found: Sizes, num_steps: int | None) -> list[Verdict]:
    """Each expectation of a recipe against what its configuration comes to; published figures need a trained network."""
    verdicts: list[Verdict] = []

    def exact(what: str, expected: int | None, value: int | None) -> None:
        if expected is not None:
            verdicts.append(Verdict(what, f"{expected:,}", "unknown" if value is None else f"{value:,}", expected == value))

    def close(what: str, expected: float, value: float) -> None:
        verdicts.append(Verdict(what, f"{expected:.8g}", f"{value:.8g}", abs(value - expected) <= 1e-6 * abs(expected)))

    exact("parameters", expect.parameters, found.parameters)
    exact("steps_per_epoch", expect.steps_per_epoch, steps_per_epoch(config))
    exact("last_step", expect.last_step, None if num_steps is None else num_steps - 1)
    schedule = build.lr_schedule(config)
    for step, lr in expect.lr.items():
        if num_steps is not None:
            close(f"lr.{step}", lr, schedule(step, num_steps, float(config.optimizer["lr"])))
    alphas_cumprod = build.diffusion(config).alphas_cumprod
    for t, value in expect.alphas_cumprod.items():
        if not 0 <= t < len(alphas_cumprod):
            verdicts.append(Verdict(f"alphas_cumprod.{t}", f"{value:.8g}", f"no such timestep of {len(alphas_cumprod)}", False))
        else:
            close(f"alphas_cumprod.{t}", value, float(alphas_cumprod[t]))
    for metric in expect.metrics:
        verdicts.append(Verdict(metric.name, f"{metric.value} +- {metric.tolerance} ({metric.protocol})", "", None))
    return verdicts


def probe(config: Config, seconds: float) -> tuple[float, str]:
    """(images/s, device) of the run's own training step on made-up pictures, in about that many seconds. At most 8 images at once on a CPU."""
    with accelerator_for(config.runtime.device, config.training.precision) as accelerator:
        device = accelerator.device
        batch = min(images_at_once(config), 8 if device.type == "cpu" else 1 << 30)
        step = TrainingStep(config, accelerator, made_up(config, batch), batch)
        began = time.perf_counter()
        step.run(1)  # warms up, and is not counted
        start, count = time.perf_counter(), 0
        while count < 2 or (time.perf_counter() - began < seconds and count < 100):
            step.run(1)
            count += 1
        return batch * count / (time.perf_counter() - start), f"{device.type} ({batch} images at once)"


def _when(left: timedelta) -> str:
    try:
        return (datetime.now().astimezone() + left).strftime("%Y-%m-%d %H:%M %Z")
    except OverflowError:
        return "in the far future"
