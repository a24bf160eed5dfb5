"""What is not public in the libraries and has no public way: each in one function, with why.

A new release of Hydra, torch or Accelerate that breaks something breaks it here.
"""

import argparse
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple


def hydra_parser(refuse: Any = None) -> argparse.ArgumentParser:
    """Hydra's own parser of flags; `refuse` is called with what is wrong, in place of its usage.

    Hydra makes the parser itself, so there is no class to derive from.
    """
    from hydra._internal.utils import get_args_parser

    parser: argparse.ArgumentParser = get_args_parser()
    if refuse is not None:
        parser.error = refuse  # type: ignore[method-assign]
    return parser


def compose_once() -> None:
    """Has Hydra not compose everything a first time, only to find out whether hydra.mode is set.

    That is half of a command's start. Where words or files of the user may set it, it still does.
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
    """Has OmegaConf, and so Hydra, load YAML with a class before its loader's own.

    The loader is made anew for each file, and no option chooses another.
    """
    import omegaconf._utils

    make = omegaconf._utils.get_yaml_loader

    def get_yaml_loader() -> Any:
        return type("Loader", (bounded, make()), {})

    omegaconf._utils.get_yaml_loader = get_yaml_loader


def share_recipes() -> None:
    """Has a composition not copy all recipes first, which is a third of its time.

    Hydra copies where it reads from, registered options included; of those that it uses it makes
    copies again, so that nobody changes them.
    """
    from hydra.core.config_store import ConfigStore

    ConfigStore.__deepcopy__ = lambda self, memo: self  # type: ignore[attr-defined]


def read_yaml_quickly() -> None:
    """Has OmegaConf, and so Hydra, read YAML with libyaml's parser, which is ten times as fast.

    OmegaConf makes its loader, with its own numbers and its check for keys that come twice, of
    PyYAML's slow one. A PyYAML without libyaml stays as it is.
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
    """A file of options, as Hydra has read it.

    Attributes:
        path: The option, as experiment/cifar10.
        package: Where its keys go; empty or None for the top.
        place: The folder that it lies in, as file:///conf or pkg://hydra.conf.
        provider: Who added that folder.
        config: Its content, below its package.
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
    """Has each composition of Hydra in this process pass through three functions.

    Hydra's callbacks come when a job starts, and what they see is composed already.

    Args:
        words: Of the overrides typed, the loader, whether it is for a sweep, and the name of the
            configuration, makes those that are composed in their place. The configuration tells of
            those typed.
        file: Is called with each file, before it is merged into those before it.
        whole: Is called with what was composed.
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
        except OmegaConfBaseException as error:  # its own message has no file
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
    """Has `check` look at all jobs of a sweep before the first one starts.

    It takes the place of the sweeper's own look, which stops at the first job that does not
    compose. Hydra makes the sweeper itself.

    Args:
        check: Is called with a function that composes a job, and the overrides of each job.
    """
    from hydra.core.plugins import Plugins

    instantiate = Plugins.instantiate_sweeper

    def watched(self: Plugins, **named: Any) -> Any:
        sweeper: Any = instantiate(self, **named)
        loader, checked = named["hydra_context"].config_loader, False

        def look(batch: Any) -> None:
            nonlocal checked
            known = getattr(sweeper, "overrides", None)  # all batches, where they are known
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
    """Returns a command line with Hydra's flags after the settings, if it has them among these.

    Hydra's parser reads settings on one side of the flags alone (until its release after 1.3.8).
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
    """Has `launch` start the jobs of a sweep in place of its launcher.

    Hydra makes the launcher itself, a callback of Hydra's sees neither what it raises nor what the
    jobs return, and hydra.main drops what a sweep returns.

    Args:
        launch: Is called with the sweeper's settings, the launcher, a function that composes a job,
            the overrides of each job, and the first one's number; it returns what has a
            `return_value` for each.
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
    """Has submitit's launcher submit jobs, and returns submitit's jobs without waiting for them.

    The launcher itself waits, raises at the first job without a result, and asks accounting
    alone whether one lives.
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
    """Starts the processes that clear up after joblib's workers, if they are not there.

    joblib starts them right before the first worker, and thereby unblocks signals for all workers.
    """
    from multiprocessing import resource_tracker

    from joblib.externals.loky.backend import resource_tracker as loky_tracker

    resource_tracker.ensure_running()
    loky_tracker.ensure_running()


def end_loky_workers() -> None:
    """Ends joblib's workers, which else wait for more to do, and waits for them."""
    from joblib.externals.loky import get_reusable_executor

    get_reusable_executor(reuse=True).shutdown(wait=True)


def reset_accelerate() -> None:
    """Puts back what Accelerate keeps between two runs of one process, the process group aside.

    Its state is shared by all instances, and a second one of another precision is refused.
    """
    import torch
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    GradientState._reset_state()


@contextmanager
def keep_forward(network: Any) -> Iterator[None]:
    """Has Accelerate leave a network's forward as it is; whoever calls it enters its autocast.

    Accelerate puts a forward of its own, with autocast, in the place of the network's, so that
    previews and measures would compute in the training's precision too, whatever they say.
    """
    before = vars(network).get("forward")
    yield
    vars(network).pop("_original_forward", None)
    vars(network).pop("forward", None)
    if before is not None:
        network.forward = before


def default_store(name: str) -> Any:
    """Returns the store of the process group, by a connection and with names of its own.

    Its blocking calls hold a lock, so each thread needs a connection.
    """
    import torch
    from torch.distributed.distributed_c10d import _get_default_store

    store: Any = _get_default_store()
    return torch.distributed.PrefixStore(f"ddpm/{name}", store.clone())


def keep_dropout_when_compiled() -> None:
    """Has compiled code draw the random numbers that eager code would.

    The setting is Inductor's own, and not among the options of torch.compile.
    """
    import torch._inductor.config

    torch._inductor.config.fallback_random = True


class Compilation(NamedTuple):
    """Code that the compiler made.

    Attributes:
        id: The compiler's, such as 0/1, the second code of the first function, and when it began.
        name: Of the function.
        why: What did not fit the code that was there; None for a function's first.
        seconds: That it took.
    """

    id: str
    name: str
    why: str | None
    seconds: float


def compilations() -> list[Compilation]:
    """Returns the last code that the compiler has made in this process, up to 64 pieces.

    torch tells of it only in its log, where the user's own settings decide what is heard.
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
    """Has the compiler make so many pieces of code for a function, and stop when it needs more.

    Else it goes on without compiling, and tells its own log alone.

    Args:
        limit: How many; where torch's is higher already, it stays.
        words: Of the error.

    Raises:
        ValueError: In place of the compiler's.
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
    """Has an optimizer change nothing in its next step if `failed` is not 0, without a wait.

    Fused optimizers look at this on the device; it is how torch's gradient scaler tells them.

    Args:
        optimizer: torch's, or Accelerate's wrapper of one.
        failed: () float tensor on the device.

    Returns:
        Whether the optimizer looks at it.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    if not getattr(inner, "_step_supports_amp_scaling", False):
        return False
    inner.grad_scale = None
    inner.found_inf = failed
    return True


def storage_id(storage: Any) -> int:
    """What tells two storages apart where both have no memory, as on the meta device."""
    return storage._cdata
