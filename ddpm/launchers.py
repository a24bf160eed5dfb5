"""How the jobs of a sweep are started: the defaults of Hydra's launchers, the devices there are, and what the jobs return."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from hydra._internal.hydra import Hydra
from hydra.core.config_store import ConfigLoadError, ConfigStore
from hydra.core.plugins import Plugins
from omegaconf import OmegaConf

from ddpm.sweep import Outcome

LAUNCHERS: dict[str, dict[str, Any]] = {  # what is not as the plugins have it
    "joblib": {"n_jobs": "${num_devices:}"},
    "submitit_slurm": {"timeout_min": 1440, "max_num_timeout": 100, "signal_delay_s": 300},
}


@contextmanager
def collecting(outcomes: list[Outcome]) -> Iterator[None]:
    """Keep what the jobs of a sweep return, in whatever process they ran: hydra.main drops it."""
    multirun = Hydra.multirun

    def collect(self: Hydra, *arguments: Any, **named: Any) -> Any:
        batches = multirun(self, *arguments, **named)
        outcomes.extend(done.return_value for batch in batches for done in batch)
        return batches

    Hydra.multirun = collect  # type: ignore[method-assign]  # no public way to what jobs return
    try:
        yield
    finally:
        Hydra.multirun = multirun  # type: ignore[method-assign]  # put back


def set_defaults(arguments: Sequence[str]) -> None:
    """Have the launchers that are installed (extra sweep) run a job for each device, and queue a Slurm job again as often as its time runs out."""
    if not any(argument.startswith("hydra/launcher=") for argument in arguments):
        return
    OmegaConf.register_new_resolver("num_devices", lambda: max(1, len(visible_devices())), replace=True)
    Plugins.instance()  # which puts their options into the store
    store = ConfigStore.instance()
    for name, settings in LAUNCHERS.items():
        with suppress(ConfigLoadError):  # not installed
            store.store(group="hydra/launcher", name=name, node=OmegaConf.merge(store.load(f"hydra/launcher/{name}.yaml").node, settings), provider="ddpm")


def visible_devices() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them. Starts none of them."""
    said = os.environ.get("CUDA_VISIBLE_DEVICES")
    if said is not None:
        return [name for name in said.split(",") if name]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]
