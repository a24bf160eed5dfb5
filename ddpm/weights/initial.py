"""Loads what init_from= names: a folder of weights, a hub repository, a run folder or a file."""

from torch import Tensor, nn

from ddpm.config.schema import Config
from ddpm.weights import folders
from ddpm.weights.published import Published, file_at


def with_initial_weights(config: Config) -> Config:
    """Returns the configuration with the digest of init_from's weights, unless it has one.

    Raises:
        ValueError: If there are no usable weights.
    """
    if config.init_from is None or config.init_weights is not None:
        return config
    return config.model_copy(update={"init_weights": _named(config).digest()})


def initial_weights(config: Config, network: nn.Module) -> dict[str, Tensor]:
    """Returns the weights at init_from for this network.

    Raises:
        ValueError: If they do not fit, or no longer have the digest in the configuration.
    """
    found = _named(config)
    if found.digest() != config.init_weights:
        raise ValueError(
            f"init_from={config.init_from} has changed since the command was started; start it "
            "again"
        )
    return found.weights_for(network, config.model)


def assumptions(config: Config) -> list[str]:
    """Returns what is assumed about the weights at init_from, in at most one line."""
    file = _file(config)
    return [] if file is None else [file.assumed()]


def _named(config: Config) -> folders.Pretrained | Published:
    return _file(config) or folders.find(str(config.init_from), "init_from")


def _file(config: Config) -> Published | None:
    name = config.init_from
    file = None if name is None else file_at(name, "init_from")
    return None if file is None else Published(f"init_from={name}", file, config.init_attention)
