"""Turns a run, a folder of weights or a network in training into a Drawing."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ddpm.config import build
from ddpm.config.schema import Config
from ddpm.diffusion.process import GaussianDiffusion
from ddpm.diffusion.samplers import Sampler
from ddpm.runs import checkpoint
from ddpm.runs.folder import RunFolder
from ddpm.runs.pictures import moved
from ddpm.sample.drawing import Drawing
from ddpm.system.devices import to_device
from ddpm.system.files import short_hash
from ddpm.system.names import Precision
from ddpm.weights import folders
from ddpm.weights.published import Published


@dataclass(frozen=True)
class Subject:
    """A network to draw images from, with the facts about its images.

    Attributes:
        network: Returns the network on a device, with its weights.
        weights: Returns the weights by name, on any device.
        model: The network's class and all its arguments, as in conf/model/.
        diffusion: The process that the network was trained for.
        shape: (C, H, W) of its images.
        classes: Names of its classes; None for a network without classes.
        any_class: See Drawing.
    """

    network: Callable[[torch.device], nn.Module]
    weights: Callable[[], dict[str, Tensor]]
    model: dict[str, Any]
    diffusion: GaussianDiffusion
    shape: tuple[int, int, int]
    classes: list[str] | None
    any_class: int | None

    def drawing(
        self, sampler: Sampler, seed: int, device: torch.device, precision: Precision
    ) -> Drawing:
        """Returns a Drawing with the network on this device.

        Raises:
            ValueError: If the sampler asks for guidance that the network has not learned.
        """
        network, shape, any_class = self.network(device), self.shape, self.any_class
        return Drawing(network, self.diffusion, sampler, shape, seed, any_class, precision)

    def identity(self) -> str:
        """Returns a hash of weights, network and process: they turn noise and class into images."""
        weights = hashlib.sha256()
        for name, tensor in sorted(self.weights().items()):
            plain = tensor.detach().cpu().contiguous()
            weights.update(f"{name} {plain.dtype} {tuple(plain.shape)}".encode())
            weights.update(plain.flatten().view(torch.uint8).numpy().data)
        process = self.diffusion
        betas = hashlib.sha256(process.betas.numpy().data).hexdigest()
        says = [process.prediction, process.variance, process.rescale_timesteps]
        return short_hash([weights.hexdigest(), self.model, betas, says, self.any_class])

    def classes_in_turn(self, count: int) -> list[int] | None:
        """Returns one class per image, cycling through all; None for a network without classes."""
        if self.classes is None:
            return None
        return [index % len(self.classes) for index in range(count)]


@dataclass(frozen=True)
class Trained:
    """A run's network after some optimizer step.

    Attributes:
        subject: The network to draw from.
        config: The run's configuration.
        run: The run's folder.
        step: Optimizer steps done.
        kind: The weights: their moving average ("ema") or as trained ("raw").
    """

    subject: Subject
    config: Config
    run: RunFolder
    step: int
    kind: Literal["ema", "raw"]


def of_run(
    run: RunFolder,
    step: int | None,
    kind: Literal["ema", "raw"],
    trusted_modules: list[str],
    data_path: str | None = None,
) -> Trained:
    """Opens a run's checkpoint.

    Args:
        run: The run's folder.
        step: The checkpoint's step; None for the newest whole one.
        kind: The weights: their moving average ("ema") or as trained ("raw").
        trusted_modules: Prefixes of the user's own code that the run may name.
        data_path: Where the run's pictures are now; None for where they were.

    Raises:
        ValueError: If there is no such run or checkpoint, or the run names untrusted code.
    """
    config = moved(run.config(trusted_modules), data_path)
    found = checkpoint.find(run.checkpoints, step)
    classes = run.classes()

    def network(device: torch.device) -> nn.Module:
        built = build.network(config, device, len(classes))
        built.load_state_dict(found.weights(kind))
        return built

    subject = of_config(config, classes, network, lambda: found.weights(kind))
    return Trained(subject, config, run, found.step, kind)


def of_config(
    config: Config,
    classes: list[str],
    network: Callable[[torch.device], nn.Module],
    weights: Callable[[], dict[str, Tensor]],
) -> Subject:
    """Returns the subject of a configuration, for data with these classes.

    Subject documents the other arguments.
    """
    return Subject(
        network=network,
        weights=weights,
        model={**config.model, **build.network_arguments(config, len(classes))},
        diffusion=build.diffusion(config),
        shape=(config.data.channels, *build.image_size(config.data)),
        classes=classes if config.training.conditional else None,
        any_class=build.any_class(config, len(classes)),
    )


def of_folder(name: str) -> tuple[Subject, str]:
    """Opens a folder of weights or a hub repository; returns its network and its last name.

    Only a folder that ddpm.export wrote tells the names of the classes, and which class stands for
    "any", which guidance needs.

    Raises:
        ValueError: If nothing is there, or its network and process cannot be expressed here.
    """
    found = folders.find(name, "from")
    network, resolution = found.network(), found.model["resolution"]
    network.load_state_dict(found.weights_for(network, found.model))
    classes, any_class = found.classes()
    height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
    subject = Subject(
        network=lambda device: to_device(network, device),
        weights=lambda: found.weights_for(network, found.model),
        model=found.model,
        diffusion=found.chain().diffusion,
        shape=(found.model["in_channels"], height, width),
        classes=classes,
        any_class=any_class,
    )
    return subject, Path(name).expanduser().resolve().name


def of_file(source: Published, config: Config) -> Subject:
    """Returns the configuration's network with the weights of a file; class names are numbers.

    Raises:
        ValueError: If the weights do not fit, which shows before the network is built.
    """
    count = config.data.num_classes or 1
    meta = build.network(config, torch.device("meta"), count)
    weights = source.weights_for(meta, config.model)
    return of_config(
        config,
        [str(number) for number in range(count)],
        lambda device: build.network(config, device, count),
        lambda: weights,
    )


def class_number(wanted: int | str, names: list[str]) -> int:
    """Returns the number of a class by its name, or by its number if no name is a number.

    Folders named 1 to 12 have the numbers 0 to 11 in alphabetical order: a user who types 2 means
    the folder of that name.

    Raises:
        ValueError: If there is no such class.
    """
    if str(wanted) in names:
        return names.index(str(wanted))
    by_number = not any(name.isdecimal() for name in names)
    if by_number and isinstance(wanted, int) and 0 <= wanted < len(names):
        return wanted
    numbers = f"0 to {len(names) - 1}: " if by_number else ""
    raise ValueError(f"classes has {wanted}; the network knows {numbers}{', '.join(names[:24])}")


def class_numbers(wanted: Sequence[int | str] | None, names: list[str] | None) -> list[int] | None:
    """Returns the classes to draw in turn, by number.

    Args:
        wanted: Classes by name or number; None for all of them.
        names: Those of the network; None if it has none.

    Raises:
        ValueError: If there is no such class.
    """
    if names is None:
        if wanted is not None:
            raise ValueError(
                f"classes={list(wanted)}: the network was trained without classes; "
                "training.conditional=true trains with them"
            )
        return None
    if wanted is None:
        return list(range(len(names)))
    return [class_number(one, names) for one in wanted]


def class_words(numbers: Sequence[int], names: Sequence[str]) -> str:
    """Lists classes in words, such as "class 2: cat, class 0: ant"."""
    shown = [f"class {number}: {names[number]}" for number in dict.fromkeys(numbers)]
    more = f" and {len(shown) - 12} more" if len(shown) > 12 else ""
    return ", ".join(shown[:12]) + more
