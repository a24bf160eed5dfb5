"""Train, reproduce and compare denoising diffusion models (Ho et al. 2020, arXiv 2006.11239).

A command line is composed to a configuration, checked, and built into objects; they train, and the
run's folder holds all that other commands need. `python -m ddpm.NAME` is the room of that name.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ddpm.runs.folder import RunFolder

__version__ = "0.1.0"


def run(overrides: Sequence[str] = ()) -> "RunFolder":
    """Trains the run of these overrides, as `python -m ddpm.train` does; torch comes only now.

    Args:
        overrides: As on the command line: ["model=unet32", "data=cifar10", "training.steps=100"].

    Returns:
        The run's folder.

    Raises:
        ValueError: For what the command would refuse in one line.
    """
    from ddpm.config.compose import compose
    from ddpm.train.run import run as train

    return train(compose(overrides))
