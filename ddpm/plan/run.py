"""python -m ddpm.plan: a run's sizes, its speed from a few real steps, and its recipe checked."""

import json
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field

from ddpm.config import build
from ddpm.config.compose import Composed
from ddpm.config.schema import Config, Expect, Recipe, settings_and_config
from ddpm.config.validation import Count, PositiveFloat, Section
from ddpm.plan.sizes import (
    Sizes,
    expected_speed,
    images_at_once,
    number_of_steps,
    sizes,
    steps_per_epoch,
)
from ddpm.runs.finding import locate
from ddpm.runs.identity import flat
from ddpm.runs.pictures import with_pictures
from ddpm.sample.previews import cost, previews_of
from ddpm.system.devices import device as device_named
from ddpm.system.files import by_value
from ddpm.system.processes import accelerator_for
from ddpm.system.text import say
from ddpm.train.timed import TrainingStep, random_images
from ddpm.weights.initial import with_initial_weights

GIGA = 1e9


class Settings(Section):
    """The keys that ddpm.plan adds to a run's. See conf/plan.yaml for each."""

    probe: Annotated[float, Field(ge=0)]
    speed: PositiveFloat | None
    devices: list[Count]
    bandwidth: PositiveFloat


class Verdict(NamedTuple):
    """One expectation of a recipe; `passed` is None if only training can tell."""

    what: str
    expected: str
    found: str
    passed: bool | None


class Departure(NamedTuple):
    """A setting in which a recipe departs from its source.

    Attributes:
        key: The dotted key.
        published: The source's value.
        found: The run's value.
    """

    key: str
    published: str
    found: str


def run(composed: Composed) -> list[Verdict]:
    """Prints the plan of a run.

    Returns:
        One verdict per expectation of the recipe.

    Raises:
        ValueError: If an expectation fails; the error names the first.
    """
    settings, config = settings_and_config(Settings, composed)
    config = with_initial_weights(config)
    build.check(config)
    name = config.runtime.device  # need not be on this machine
    planned = device_named(name) if name == "auto" else torch.device(name)
    needs, num_steps = sizes(config, planned), number_of_steps(config)
    _show("run", _folder(config))
    _show_sizes(config, needs, num_steps)
    speed = settings.speed
    if speed is not None:
        _show("speed", f"{speed:.4g} images/s per device, as given")
    elif settings.probe > 0:
        speed, device = probe(config, settings.probe)
        flops = speed * 3 * needs.forward_flops / GIGA
        _show("speed", f"{speed:.3g} images/s, {flops:,.0f} GFLOP/s, on {device}")
    if speed is not None:
        for devices in settings.devices:
            words = _time(devices, speed, config, needs, num_steps, settings.bandwidth)
            _show("time", f"{devices} device{'s' * (devices > 1)}: {words}")
        if any(devices > 1 for devices in settings.devices):
            _show(
                "",
                f"assuming {settings.bandwidth:g} GB/s between devices, float32 gradients sent "
                "during the backward pass, and no device slowed by its smaller share of the batch",
            )
    if config.recipe is None:
        return []
    verdicts = expectations(config, config.recipe.expect, needs, num_steps)
    _show_recipe(config.recipe, verdicts, departures(config, config.recipe))
    return verdicts


def _folder(config: Config) -> str:
    """The run's folder; a user's own pictures must be there, since they decide its name."""
    path = config.data.path
    if config.data.name == "folder" and not (path and Path(path).expanduser().exists()):
        return f"known once the pictures are there (data.path={path})"
    config, _ = with_pictures(config)
    return str(locate(config).path)


def _show(what: str, words: str) -> None:
    say(f"{what:<11} {words}")


def _show_sizes(config: Config, needs: Sizes, num_steps: int | None) -> None:
    """Prints network, data, batch, duration, disk and memory, one line each."""
    training, data = config.training, config.data
    forward, weights = needs.forward_flops / GIGA, 4 * needs.parameters / GIGA  # float32
    _show(
        "network",
        f"{needs.parameters:,} parameters, {forward:.1f} GFLOP per image forward, about 3 times "
        "that to train",
    )
    attention = [
        f"{height}x{width} in {count} blocks" for (height, width), count in needs.attention.items()
    ]
    _show("attention", ", ".join(attention) or "none")
    images = "number of images unknown until read"
    if data.num_images:
        images = f"{data.num_images:,} images as published"
    of_epoch = steps_per_epoch(config)
    _show(
        "data", f"{data.name}, {images}" + (f", {of_epoch:,} steps per epoch" if of_epoch else "")
    )
    at_once = images_at_once(config)
    _show("batch", f"{training.batch_size} images per update, {at_once} at once per device")
    if num_steps:
        _show("duration", f"{num_steps:,} steps, {num_steps * training.batch_size:,} images")
    _show(
        "disk",
        f"{4 * weights:.2f} GB per checkpoint (weights, average, Adam's two moments), "
        f"{config.runtime.keep_checkpoints} kept",
    )
    _show("previews", cost(config, num_steps, previews_of(config, num_steps)))
    activations = needs.activation_bytes / GIGA
    _show(
        "memory",
        f"about {5 * weights + at_once * activations:.1f} GB in float32: weights, gradients, Adam "
        f"and average {5 * weights:.2f} GB, activations {activations:.3f} GB per image; on "
        "a GPU, cuDNN takes up to 2 GB more as its workspace",
    )


def _show_recipe(recipe: Recipe, verdicts: list[Verdict], others: list[Departure]) -> None:
    """Prints a recipe and one line per expectation; raises ValueError if one fails."""
    _show("recipe", recipe.source + (f"; takes {recipe.takes}" if recipe.takes else ""))
    for what, words in (("note", recipe.note), ("differs", recipe.differs)):
        if words:
            _show(what, words)
    for one in others:
        same = one.published == one.found
        say(f"  {'as published' if same else 'differs':<19} {_in_words(one)}")
    for verdict in verdicts:
        word = {True: "pass", False: "FAIL", None: "not measurable yet"}[verdict.passed]
        found = f", found {verdict.found}" if verdict.found else ""
        say(f"  {word:<19} {verdict.what}: expected {verdict.expected}{found}")
    failed = [verdict for verdict in verdicts if verdict.passed is False]
    if failed:
        first = failed[0]
        raise ValueError(
            f"recipe.expect.{first.what} expects {first.expected}, but the run has {first.found} "
            f"({len(failed)} of {len(verdicts)} fail)"
        )


def _in_words(one: Departure) -> str:
    if one.published == one.found:
        return f"{one.key}={one.found}"
    return (
        f"{one.key}: published {one.published}, the run has {one.found} "
        f"({one.key}={one.published} for the published one)"
    )


def _time(
    devices: int,
    speed: float,
    config: Config,
    needs: Sizes,
    num_steps: int | None,
    bandwidth: float,
) -> str:
    """The run's speed and duration on a number of devices, in words."""
    batch = config.training.batch_size
    if devices > batch:
        return f"more than the {batch} images of a batch"
    gradients = 4 * needs.parameters
    together = expected_speed(speed, devices, batch, gradients, bandwidth * GIGA)
    if not num_steps:
        return f"{together:,.4g} images/s"
    images = num_steps * batch
    previews = (previews_of(config, num_steps).share or 0) * images / speed  # one device draws them
    left = timedelta(seconds=round(images / together + previews))
    hours = left.total_seconds() / 3600
    return f"{together:,.4g} images/s, {hours:,.1f} hours; started now, done {_when(left)}"


def expectations(
    config: Config, expect: Expect, needs: Sizes, num_steps: int | None
) -> list[Verdict]:
    """Checks each expectation of a recipe against the configuration.

    Published metrics have no verdict, since they need a trained network.
    """
    verdicts: list[Verdict] = []

    def exact(what: str, expected: int | None, value: int | None) -> None:
        if expected is not None:
            found = "unknown" if value is None else f"{value:,}"
            verdicts.append(Verdict(what, f"{expected:,}", found, expected == value))

    def close(what: str, expected: float, value: float) -> None:
        passed = abs(value - expected) <= 1e-6 * abs(expected)
        verdicts.append(Verdict(what, f"{expected:.8g}", f"{value:.8g}", passed))

    exact("parameters", expect.parameters, needs.parameters)
    exact("steps_per_epoch", expect.steps_per_epoch, steps_per_epoch(config))
    exact("last_step", expect.last_step, None if num_steps is None else num_steps - 1)
    settings = flat(config.model_dump(mode="json"))
    for key, expected in expect.settings.items():
        found = _shown(settings, key)
        passed = key in settings and by_value(settings[key]) == by_value(expected)
        verdicts.append(Verdict(f"settings.{key}", _typed(expected), found, passed))
    schedule = build.lr_schedule(config)
    for step, lr in expect.lr.items():
        if num_steps is not None:
            close(f"lr.{step}", lr, schedule(step, num_steps, float(config.optimizer["lr"])))
    alphas_cumprod = build.diffusion(config).alphas_cumprod
    for t, value in expect.alphas_cumprod.items():
        what = f"alphas_cumprod.{t}"
        if 0 <= t < len(alphas_cumprod):
            close(what, value, float(alphas_cumprod[t]))
        else:
            none = f"no such timestep among {len(alphas_cumprod)}"
            verdicts.append(Verdict(what, f"{value:.8g}", none, False))
    for metric in expect.metrics:
        published = f"{metric.value} +- {metric.tolerance} ({metric.protocol})"
        verdicts.append(Verdict(metric.name, published, "", None))
    return verdicts


def departures(config: Config, recipe: Recipe) -> list[Departure]:
    """Returns the settings in which a recipe departs from its source, with the run's values."""
    settings = flat(config.model_dump(mode="json"))
    return [
        Departure(key, _typed(value), _shown(settings, key))
        for key, value in recipe.departs.items()
    ]


def _shown(settings: dict[str, Any], key: str) -> str:
    return _typed(settings[key]) if key in settings else "no such key"


def _typed(value: Any) -> str:
    """A value as typed on a command line."""
    return value if isinstance(value, str) else json.dumps(by_value(value))


def probe(config: Config, seconds: float) -> tuple[float, str]:
    """Times the run's own training step on random images, for about `seconds`.

    On a CPU it takes at most 8 images at once.

    Returns:
        Images/s, and the device in words.
    """
    runtime, precision = config.runtime, config.training.precision
    with accelerator_for(runtime.device, precision, runtime.deterministic) as accelerator:
        device = accelerator.device
        batch = min(images_at_once(config), 8 if device.type == "cpu" else 1 << 30)
        step = TrainingStep(config, accelerator, random_images(config, batch), batch)
        began = time.perf_counter()
        step.run(1)  # warm-up, not counted
        start, count = time.perf_counter(), 0
        while count < 2 or (time.perf_counter() - began < seconds and count < 100):
            step.run(1)
            count += 1
        speed = batch * count / (time.perf_counter() - start)
        return speed, f"{device.type} ({batch} images at once)"


def _when(left: timedelta) -> str:
    try:
        return (datetime.now().astimezone() + left).strftime("%Y-%m-%d %H:%M %Z")
    except OverflowError:
        return "in the far future"
