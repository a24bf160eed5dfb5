"""Train, reproduce and compare denoising diffusion models (Ho et al. 2020, arXiv 2006.11239).

The packages in order, each of which imports only from those before it: `system` (files, signals,
processes, devices, randomness); `models` (x_t, t -> output) and `diffusion` (the process, its
schedules and samplers), which know no configuration; `data`, which turns pictures into batches;
`config`, which composes a command line (compose), checks it before anything that it names is
imported (schema, validation), and builds what it names (build), so that a typo costs no time and
nothing loaded runs code. `runs` is a run's folder, `weights` are other people's, `tune` finds how
fast a network can run; `sample`, `evaluate` and `train` do the work; `compare`, `plan`, `export`,
`recipes`, `benchmark`, `study` and `library` (ddpm.load) use it. The command `python -m ddpm.NAME`
is the package NAME. For a tour read train/run.py, train/steps.py, train/loop.py,
diffusion/process.py, models/unet.py.
"""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddpm.library import Run
    from ddpm.runs.folder import RunFolder

__version__ = "0.1.0"

# public names, imported when first used
_PACKAGE_OF = {
    "GaussianDiffusion": "diffusion",
    "UNet": "models",
    "ReadmeUNet": "models",
    "Sampler": "diffusion.samplers",
}
_PACKAGES = ("data", "diffusion", "models")

__all__ = ["load", "run"]


def __getattr__(name: str) -> Any:
    if name in _PACKAGE_OF:
        return getattr(importlib.import_module(f"ddpm.{_PACKAGE_OF[name]}"), name)
    if name in _PACKAGES:
        return importlib.import_module(f"ddpm.{name}")
    raise AttributeError(f"module 'ddpm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PACKAGE_OF, *_PACKAGES])


def load(path: "str | Path | RunFolder", trusted_modules: Sequence[str] = ()) -> "Run":
    """Opens a trained run: its configuration, network, samples and metrics.

    Args:
        path: The run's folder, as training prints it first and last, or as `run` returns it.
        trusted_modules: Prefixes of your own modules that the run's `_target_`s may name.

    Raises:
        ValueError: If this is no run's folder, or it names classes that are not trusted.
    """
    from ddpm.library import Run

    return Run(path, trusted_modules)


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
    from ddpm.system.slurm import join_step
    from ddpm.train.run import run as train

    join_step()
    return train(compose(overrides))
