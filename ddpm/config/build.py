"""Builds the objects that a checked configuration names.

Building is also the last check: each constructor rejects values that it cannot work with.
"""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from torch import nn

from ddpm.config.compose import shipped_option, shipped_options
from ddpm.config.schema import Config, Data
from ddpm.data.batches import to_floats
from ddpm.data.decoding import Decoding, reason_of
from ddpm.data.image_set import ImageSet, decodes_later, image_set
from ddpm.data.listing import listed
from ddpm.data.shards import MOST_BYTES, Source
from ddpm.diffusion.process import GaussianDiffusion
from ddpm.diffusion.samplers import Sampler
from ddpm.diffusion.spacing import named_count
from ddpm.diffusion.timesteps import LossSecondMoment, Uniform
from ddpm.system import randomness
from ddpm.system.bounded import read_file
from ddpm.system.devices import cores, to_device

# (step, num_steps, lr) -> learning rate of that update
LrSchedule = Callable[[int, int, float], float]


def network(config: Config, device: torch.device, num_classes: int) -> nn.Module:
    """Builds the network with its initial weights, which depend only on the seed.

    Args:
        config: The run's configuration.
        device: Where to build it; on "meta" it has shapes only.
        num_classes: Number of classes in the data set.
    """
    arguments = network_arguments(config, num_classes)
    torch.manual_seed(randomness.host_key(randomness.INITIAL_WEIGHTS, config.seed))
    with _naming("model"), torch.device("meta" if device.type == "meta" else "cpu"):
        built: nn.Module = instantiate(config.model, **arguments, _convert_="all")
    if config.runtime.recompute:
        with _naming("runtime"):
            recompute = getattr(built, "recompute", None)
            if not callable(recompute):
                raise ValueError(
                    f"recompute={config.runtime.recompute}: {config.model['_target_']} has no "
                    "recompute(levels) method"
                )
            recompute(config.runtime.recompute)
    return to_device(built, device)


def network_arguments(config: Config, num_classes: int) -> dict[str, int]:
    """Returns the constructor arguments that config.model does not hold.

    A learned variance doubles the output channels. Label dropout adds one class, "any".

    Raises:
        ValueError: If training is conditional and the constructor takes no num_classes.
    """
    arguments = {
        "out_channels": config.data.channels * (2 if diffusion(config).learns_variance else 1)
    }
    if config.training.conditional:
        _check_takes_classes(config.model["_target_"])
        arguments["num_classes"] = num_classes + (any_class(config, num_classes) is not None)
    return arguments


def _check_takes_classes(target: str) -> None:
    taken = inspect.signature(get_object(target)).parameters.values()
    if not any(one.name == "num_classes" or one.kind is one.VAR_KEYWORD for one in taken):
        raise ValueError(
            f"training.conditional=true: {target} takes no num_classes argument; use another "
            "model, or training.conditional=false to train without classes"
        )


def any_class(config: Config, num_classes: int) -> int | None:
    """Returns the index of the class "any", or None if training drops no labels."""
    return (
        num_classes if config.training.conditional and config.training.label_dropout > 0 else None
    )


def diffusion(config: Config) -> GaussianDiffusion:
    """Builds the diffusion process of the run's schedule and objective."""
    with _naming("schedule"):
        betas = instantiate(config.schedule, _convert_="all")
    with _naming("objective"):
        return instantiate(config.objective, _convert_="all")(betas)


def optimizer(config: Config, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Builds the optimizer of these parameters."""
    with _naming("optimizer"):
        return instantiate(config.optimizer, _convert_="all")(parameters)


def lr_schedule(config: Config) -> LrSchedule:
    """Builds the learning rate schedule."""
    with _naming("lr_schedule"):
        return instantiate(config.lr_schedule, _convert_="all")


def sampler_settings(node: Mapping[str, Any], process: GaussianDiffusion) -> dict[str, Any]:
    """Returns the settings of group `sampler` with its nulls filled in.

    A null variance becomes that of the process. A null num_steps becomes the count that the spacing
    names, if it names one.
    """
    settings, function = dict(node), node["function"]
    if "variance" in function and function["variance"] is None:
        settings["function"] = {**function, "variance": process.variance}
    if node.get("num_steps", 0) is None and "spacing" in node:
        settings["num_steps"] = named_count(node["spacing"])
    return settings


def sampler(node: Mapping[str, Any], process: GaussianDiffusion) -> Sampler:
    """Builds the sampler and checks that it fits this diffusion process.

    Raises:
        ValueError: If it does not fit; the message names the key.
    """
    variance = node["function"].get("variance")
    if variance in ("learned", "learned_range") and variance != process.variance:
        raise ValueError(
            f"sampler.function.variance={variance}: the network was trained with "
            f"{process.variance}; use null, fixed_small or fixed_large"
        )
    with _naming("sampler"):
        built = instantiate(sampler_settings(node, process), _convert_="all")
        built.timesteps(process)
    return built


def preview_sampler(config: Config, name: str, process: GaussianDiffusion) -> dict[str, Any]:
    """Returns the settings of the preview sampler, with the guidance scale of the run's sampler.

    Args:
        config: The run's configuration.
        name: "run" for the run's own sampler, or an option of conf/sampler.
        process: The run's diffusion process.

    Raises:
        ValueError: If there is no such option, or it does not fit the run.
    """
    own = sampler_settings(config.sampler, process)
    if name == "run":
        return own
    options = shipped_options("sampler")
    if name not in options:
        raise ValueError(
            f"runtime.preview_sampler={name} must be auto, run, or an option of sampler: "
            f"{', '.join(options)}"
        )
    node = {**shipped_option("sampler", name), "guidance_scale": own["guidance_scale"]}
    try:
        sampler(node, process)
    except ValueError as error:
        raise ValueError(f"runtime.preview_sampler={name}: {error}") from error
    return sampler_settings(node, process)


def timestep_sampler(
    process: GaussianDiffusion, device: torch.device
) -> Uniform | LossSecondMoment:
    """Returns the timestep sampler that training uses with this diffusion process."""
    if process.timestep_sampling == "loss_second_moment":
        return LossSecondMoment(process.num_timesteps, device)
    return Uniform(process.num_timesteps)


def source(config: Config) -> Source:
    """Finds the pictures, and lists local ones by their content.

    Raises:
        ValueError: If there are none; the message names the key.
    """
    with _naming("data"):
        found: Source = instantiate(config.data.source, _convert_="all")
        return listed(found, Path(config.data.cache), config.runtime.workers or cores())


def images(config: Config, found: Source, workers: int) -> ImageSet:
    """Returns the data set at the run's resolution; runtime.feed says when it is decoded."""
    decoding, cache = _decoding(config.data), Path(config.data.cache)
    later = decodes_later(config.runtime.feed, found, decoding, cache)
    return image_set(found, decoding, cache, workers, config.data.max_unreadable, later)


def load_images(
    config: Config, wanted: list[int | str], data: Callable[[], ImageSet]
) -> torch.Tensor:
    """Reads pictures and preprocesses them as training does.

    Args:
        config: The run's configuration.
        wanted: Indices into the run's data set, or file names.
        data: Loads the data set; called only if there is an index.

    Returns:
        (N, C, H, W) float32 in [-1, 1].

    Raises:
        ValueError: If an index is out of range or a file cannot be read.
    """
    found = []
    for name in wanted:
        if isinstance(name, str):
            try:
                content = read_file(Path(name).expanduser(), MOST_BYTES)
                found.append(_decoding(config.data)(content))
            except Exception as error:  # decoders raise all sorts of errors on a damaged file
                raise ValueError(f"pictures has {name}: {reason_of(error)}") from error
            continue
        decoded_set = data()
        if not 0 <= name < len(decoded_set):
            raise ValueError(f"pictures has {name}; the data set has 0 to {len(decoded_set) - 1}")
        found.append(decoded_set.images[name])
    return to_floats(torch.from_numpy(np.stack(found)))


def check(config: Config) -> None:
    """Builds everything that needs no data, using no device.

    Raises:
        ValueError: If a value is invalid or two do not fit together; the message names the key.
    """
    process = diffusion(config)
    if sampler(config.sampler, process).guidance_scale != 1 and any_class(config, 1) is None:
        raise ValueError(
            f"sampler.guidance_scale={config.sampler['guidance_scale']} needs a network trained "
            "with classes and label dropout: training.conditional=true training.label_dropout=0.1"
        )
    if config.runtime.preview_sampler != "auto":
        preview_sampler(config, config.runtime.preview_sampler, process)
    lr_schedule(config)
    network(config, torch.device("meta"), config.data.num_classes or 1)
    optimizer(config, [nn.Parameter(torch.zeros(1))])
    with _naming("data"):
        _decoding(config.data)


def image_size(data: Data) -> tuple[int, int]:
    """Returns (height, width) of the run's images, in pixels."""
    return (
        (data.resolution, data.resolution) if isinstance(data.resolution, int) else data.resolution
    )


def _decoding(data: Data) -> Decoding:
    return Decoding(
        *image_size(data),
        data.channels,
        data.crop,
        data.background,
        data.white,
        data.max_pixels,
        data.resize,
    )


@contextmanager
def _naming(group: str) -> Iterator[None]:
    """Prefixes errors with the group, so that they name the key to change."""
    try:
        yield
    except (ValueError, TypeError, InstantiationException) as error:
        complaint = str(error.__cause__ or error)  # Hydra wraps what a constructor raised
        starts_with_key = re.match(r"[a-z_]+(=| has )", complaint) is not None
        named = (
            complaint
            if f"{group}." in complaint
            else f"{group}.{complaint}"
            if starts_with_key
            else f"{group}: {complaint}"
        )
        raise ValueError(named) from error
