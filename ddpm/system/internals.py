"""All uses of the libraries' private APIs, one function each, with the reason.

If a new release of Hydra, torch or Accelerate breaks something, it breaks here.
"""

import argparse
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple


def hydra_parser(refuse: Any = None) -> argparse.ArgumentParser:
    """Returns Hydra's parser of command-line flags.

    Hydra builds the parser in a private function, so there is no class to derive from.

    Args:
        refuse: Called with the error message, instead of printing Hydra's usage.
    """
    from hydra._internal.utils import get_args_parser

    parser: argparse.ArgumentParser = get_args_parser()
    if refuse is not None:
        parser.error = refuse  # type: ignore[method-assign]
    return parser


def compose_once() -> None:
    """Stops Hydra from composing everything an extra time just to learn whether hydra.mode is set.

    That takes half of a command's startup. Hydra still does it where the user's overrides or config
    folder may set hydra.mode.
    """
    from hydra._internal.hydra import Hydra

    get_mode = Hydra.get_mode

    def quick(self: Hydra, config_name: Any, overrides: list[str]) -> Any:
        path = self.config_loader.get_search_path().get_path()
        if any(one.provider == "command-line" for one in path) or any(
            re.match(r"[+~]*hydra\b", word) for word in overrides
        ):
            return get_mode(self, config_name, overrides)
        return None

    Hydra.get_mode = quick  # type: ignore[method-assign]


def bound_yaml(bounded: type) -> None:
    """Puts a mixin in front of the YAML loader of OmegaConf, and so of Hydra.

    OmegaConf builds the loader anew for each file and has no option to choose another.

    Args:
        bounded: The mixin class.
    """
    import omegaconf._utils

    make = omegaconf._utils.get_yaml_loader

    def get_yaml_loader() -> Any:
        return type("Loader", (bounded, make()), {})

    omegaconf._utils.get_yaml_loader = get_yaml_loader


def share_recipes() -> None:
    """Stops Hydra from copying all recipes for each composition, a third of its time.

    Hydra deep-copies its config sources, registered options included. It copies the options that it
    uses once more, so sharing the originals is safe.
    """
    from hydra.core.config_store import ConfigStore

    ConfigStore.__deepcopy__ = lambda self, memo: self  # type: ignore[attr-defined]


def read_yaml_quickly() -> None:
    """Makes OmegaConf, and so Hydra, parse YAML with libyaml, which is ten times as fast.

    OmegaConf derives its loader, with its own number syntax and its check for duplicate keys, from
    PyYAML's slow one. Does nothing if PyYAML was built without libyaml.
    """
    import yaml
    from omegaconf import _utils

    if not yaml.__with_libyaml__:
        return
    from yaml._yaml import CParser

    slow: Any = _utils.get_yaml_loader()

    class Loader(CParser, slow):
        def __init__(self, stream: Any) -> None:
            CParser.__init__(self, stream)
            yaml.constructor.SafeConstructor.__init__(self)
            yaml.resolver.Resolver.__init__(self)

    _utils.get_yaml_loader = lambda: Loader


class Option(NamedTuple):
    """An option file, as Hydra has read it.

    Attributes:
        path: The option, such as experiment/cifar10.
        package: The package of its keys; empty or None for the top level.
        place: The config folder, such as file:///conf or pkg://hydra.conf.
        provider: The name under which Hydra knows that folder.
        config: The content, below its package.
    """

    path: str
    package: str | None
    place: str
    provider: str
    config: Any


def tap_composition(
    words: Callable[[list[str], Any, bool, str], list[str]],
    file: Callable[[Option], None],
    whole: Callable[[Any], None],
) -> None:
    """Hooks three functions into every composition that Hydra makes in this process.

    Hydra's own callbacks run when a job starts, which is after the composition.

    Args:
        words: Called with the overrides as typed, the loader, whether this is for a sweep, and the
            name of the configuration. Returns the overrides to compose instead; the composed
            configuration still lists the typed ones.
        file: Called with each option file before Hydra merges it.
        whole: Called with the composed configuration.
    """
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra.types import RunMode
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    load, load_file = ConfigLoaderImpl.load_configuration, ConfigLoaderImpl._load_single_config

    def tapped(
        self: Any, config_name: Any, overrides: Any, run_mode: Any, *rest: Any, **named: Any
    ) -> Any:
        composed = words(overrides, self, run_mode == RunMode.MULTIRUN, str(config_name))
        cfg = load(self, config_name, composed, run_mode, *rest, **named)
        cfg.hydra.overrides.task = [
            word for word in overrides if not re.match(r"[+~]*hydra[./]", word)
        ]
        whole(cfg)
        return cfg

    def tapped_file(self: Any, default: Any, repo: Any) -> Any:
        try:
            loaded = load_file(self, default, repo)
        except OmegaConfBaseException as error:  # whose message does not name the file
            words = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"{default.config_path}.yaml: {words}") from error
        if OmegaConf.is_dict(loaded.config):
            about = (default.config_path, default.package, loaded.path, loaded.provider)
            file(Option(*about, loaded.config))
        return loaded

    ConfigLoaderImpl.load_configuration = tapped  # type: ignore[method-assign]
    ConfigLoaderImpl._load_single_config = tapped_file  # type: ignore[method-assign]


@contextmanager
def before_sweeps(
    check: Callable[[Callable[[list[str]], Any], list[list[str]]], None],
) -> Iterator[None]:
    """Calls `check` with all jobs of a sweep before the first one starts.

    It replaces the sweeper's own check, which stops at the first job that does not compose. Hydra
    builds the sweeper itself, so it cannot be configured.

    Args:
        check: Called with a function that composes a job, and the overrides of each job.
    """
    from hydra.core.plugins import Plugins

    instantiate = Plugins.instantiate_sweeper

    def watched(self: Plugins, **named: Any) -> Any:
        sweeper: Any = instantiate(self, **named)
        loader, checked = named["hydra_context"].config_loader, False

        def look(batch: Any) -> None:
            nonlocal checked
            known = getattr(sweeper, "overrides", None)  # of all batches, if known in advance
            if not (known and checked):
                jobs = [list(job) for part in known or [batch] for job in part]
                check(lambda job: loader.load_sweep_config(sweeper.config, job), jobs)
            checked = True

        sweeper.validate_batch_is_legal = look
        return sweeper

    Plugins.instantiate_sweeper = watched  # type: ignore[method-assign]
    try:
        yield
    finally:
        Plugins.instantiate_sweeper = instantiate  # type: ignore[method-assign]


def flags_last(words: list[str]) -> list[str]:
    """Returns a command line with Hydra's flags moved behind the settings.

    Hydra's parser (up to 1.3.8) accepts settings only on one side of the flags.
    """
    parser = hydra_parser()
    settings: list[str] = []
    flags: list[str] = []
    takes_next = False
    for word in words:
        takes_next = takes_next and not word.startswith("-")
        (flags if takes_next or word.startswith("-") else settings).append(word)
        option = parser._option_string_actions.get(word)
        takes_next = option is not None and option.nargs is None
    return settings + flags


@contextmanager
def around_launches(
    launch: Callable[[Any, Any, Callable[[list[str]], Any], list[list[str]], int], list[Any]],
) -> Iterator[None]:
    """Makes `launch` start the jobs of a sweep instead of Hydra's launcher.

    Hydra builds the launcher itself, its callbacks see neither the launcher's errors nor the jobs'
    return values, and hydra.main discards what a sweep returns.

    Args:
        launch: Called with the sweeper's settings, the launcher, a function that composes a job,
            the overrides of each job, and the number of the first job. Returns an object with a
            `return_value` for each job.
    """
    from hydra.core.plugins import Plugins

    instantiate = Plugins.instantiate_launcher

    def watched(self: Plugins, hydra_context: Any, task_function: Any, config: Any) -> Any:
        launcher = instantiate(self, hydra_context, task_function, config)

        def compose_job(words: list[str]) -> Any:
            return hydra_context.config_loader.load_sweep_config(config, words)

        def launched(job_overrides: Any, initial_job_idx: int) -> list[Any]:
            jobs = [*map(list, job_overrides)]
            return launch(config.hydra.sweeper, launcher, compose_job, jobs, initial_job_idx)

        return SimpleNamespace(launch=launched)

    Plugins.instantiate_launcher = watched  # type: ignore[method-assign]
    try:
        yield
    finally:
        Plugins.instantiate_launcher = instantiate  # type: ignore[method-assign]


def submit_to_slurm(launcher: Any, jobs: Sequence[Sequence[str]], first: int) -> list[Any]:
    """Submits jobs through Hydra's submitit launcher, and returns submitit's jobs without waiting.

    The launcher itself waits, raises at the first job without a result, and asks only Slurm's
    accounting whether a job is alive.

    Args:
        launcher: Hydra's submitit launcher.
        jobs: The overrides of each job.
        first: The number of the first job.
    """
    import submitit

    map_array = submitit.AutoExecutor.map_array

    def submit(executor: Any, *arguments: Any) -> Any:
        submitted = map_array(executor, *arguments)
        return [SimpleNamespace(results=lambda job=job: [job]) for job in submitted]

    submitit.AutoExecutor.map_array = submit  # type: ignore[method-assign, assignment]
    try:
        return launcher.launch(jobs, first)
    finally:
        submitit.AutoExecutor.map_array = map_array  # type: ignore[method-assign]


def start_loky_trackers() -> None:
    """Starts the resource trackers of joblib's workers, if they are not running.

    Otherwise joblib starts them right before the first worker, which unblocks signals for all
    workers.
    """
    from multiprocessing import resource_tracker

    from joblib.externals.loky.backend import resource_tracker as loky_tracker

    resource_tracker.ensure_running()
    loky_tracker.ensure_running()


def end_loky_workers() -> None:
    """Shuts down joblib's workers, which would otherwise stay idle, and waits for them to exit."""
    from joblib.externals.loky import get_reusable_executor

    get_reusable_executor(reuse=True).shutdown(wait=True)


def reset_accelerate() -> None:
    """Resets the state that Accelerate keeps between runs in one process, but no process group.

    All Accelerator instances share this state, and Accelerate refuses a second one with another
    precision.
    """
    import torch
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    GradientState._reset_state()


@contextmanager
def keep_forward(network: Any) -> Iterator[None]:
    """Undoes the change that Accelerate makes to a network's `forward` inside the block.

    Accelerate replaces `forward` with a version that enters autocast, so previews and metrics would
    use the training precision whatever theirs is. The caller enters autocast instead.
    """
    before = vars(network).get("forward")
    yield
    vars(network).pop("_original_forward", None)
    vars(network).pop("forward", None)
    if before is not None:
        network.forward = before


def default_store(name: str) -> Any:
    """Returns the process group's store, over a new connection and with its own key prefix.

    Blocking calls lock the connection, so each thread needs its own.

    Args:
        name: The key prefix.
    """
    import torch
    from torch.distributed.distributed_c10d import _get_default_store

    store: Any = _get_default_store()
    return torch.distributed.PrefixStore(f"ddpm/{name}", store.clone())


def keep_dropout_when_compiled() -> None:
    """Makes compiled code draw the same random numbers as eager code.

    This is a private setting of Inductor that torch.compile has no option for.
    """
    import torch._inductor.config

    torch._inductor.config.fallback_random = True


class Compilation(NamedTuple):
    """One compilation by torch.compile.

    Attributes:
        id: The compiler's id and start time; id 0/1 is the second compilation of function 0.
        name: The compiled function's name.
        why: Why the existing code did not fit; None for a function's first compilation.
        seconds: How long it took.
    """

    id: str
    name: str
    why: str | None
    seconds: float


def compilations() -> list[Compilation]:
    """Returns the last compilations in this process, at most 64.

    torch otherwise reports them only in its log, and the user's settings decide what it logs.
    """
    from torch._dynamo.utils import get_compilation_metrics

    return [
        Compilation(
            f"{one.compile_id} at {one.start_time_us}",
            one.co_name,
            one.recompile_reason,
            one.duration_us / 1e6,
        )
        for one in get_compilation_metrics()
        if one.compile_id and one.co_name and one.duration_us
    ]


@contextmanager
def naming_limit(limit: int, words: str) -> Iterator[None]:
    """Raises the compiler's limit of recompilations per function, and makes reaching it an error.

    By default torch then continues without compiling and only logs it.

    Args:
        limit: Compilations per function; torch's own limit stays if it is higher.
        words: The error message.

    Raises:
        ValueError: If a function needs more.
    """
    import torch._dynamo.config as settings
    from torch._dynamo.exc import FailOnRecompileLimitHit

    limits = {
        "recompile_limit": max(limit, settings.recompile_limit),
        "accumulated_recompile_limit": max(4 * limit, settings.accumulated_recompile_limit),
        "fail_on_recompile_limit_hit": True,
    }
    logger = logging.getLogger("torch._dynamo.convert_frame")

    def is_other(record: logging.LogRecord) -> bool:
        return "recompile_limit" not in record.getMessage()

    logger.addFilter(is_other)
    try:
        with settings.patch(limits):
            yield
    except FailOnRecompileLimitHit as error:
        raise ValueError(words) from error
    finally:
        logger.removeFilter(is_other)


def skip_updates_if(optimizer: Any, failed: Any) -> bool:
    """Makes an optimizer skip its next update if `failed` is not 0, without synchronizing.

    Fused optimizers read this flag on the device; torch's gradient scaler sets it the same way.

    Args:
        optimizer: A torch optimizer, or Accelerate's wrapper around one.
        failed: () float tensor on the device.

    Returns:
        Whether the optimizer supports this.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    if not getattr(inner, "_step_supports_amp_scaling", False):
        return False
    inner.grad_scale = None
    inner.found_inf = failed
    return True


def storage_id(storage: Any) -> int:
    """Returns a unique id of a storage, even for one without memory, as on the meta device."""
    return storage._cdata
