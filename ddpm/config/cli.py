"""The main function that all commands share: help, jobs, one-line errors, exit codes."""

import contextlib
import functools
import importlib
import os
import re
import sys
import textwrap
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from ddpm.config import launching, search, sweeps
from ddpm.config.compose import (
    CONF,
    EXPERIMENTS,
    Composed,
    at_home,
    from_hydra,
    refuse_hidden,
    refuse_paths,
    register_experiments,
    searchpath,
)
from ddpm.config.explain import explain, explain_composition
from ddpm.system import signals, slurm, torchrun
from ddpm.system.files import InUse
from ddpm.system.internals import (
    around_launches,
    before_sweeps,
    flags_last,
    hydra_parser,
)
from ddpm.system.signals import Preempted
from ddpm.system.text import guard_logs, keep_streams, say, shown

Run = Callable[[Composed], object]


def lazily(name: str) -> Callable[..., Any]:
    """Returns the function with this dotted name, and imports it only when it is called.

    This keeps --help from waiting for torch.
    """

    def call(*arguments: Any) -> Any:
        module, _, function = name.rpartition(".")
        return getattr(importlib.import_module(module), function)(*arguments)

    return call


def command(
    name: str,
    run: Run,
    what: str,
    examples: Sequence[str],
    config_name: str | None = None,
    facts: sweeps.Facts = lambda composed: {},
    check: sweeps.Check | None = None,
    heeds: bool = False,
    scored: search.Scored | None = None,
    recipes: bool = True,
) -> Callable[[], None]:
    """Returns the main function of `python -m ddpm.<name>`.

    The main function composes the command's YAML with the command line and calls `run`, once per
    job in a sweep.

    An error prints one line on standard error and exits with code 1; Ctrl-C does the same with
    code 130. HYDRA_FULL_ERROR=1 shows the traceback of either. A job that fails does not stop the
    rest of a sweep.

    Args:
        name: The command's name.
        run: Carries out the command.
        what: Summary for --help.
        examples: Command lines for --help.
        config_name: Name of the command's file in conf/; None for the command's own name.
        facts: Returns the columns that a job adds to the table at the end of a sweep.
        check: Raises ValueError for a job that cannot run. It is called for every job before a
            sweep starts, and told whether the job runs on this machine.
        heeds: Whether the command stops on a signal and can be resumed (ddpm.system.signals). A
            sweep of it then stops, too.
        scored: Returns the score of a complete job for a search (hydra/sweeper=optuna).
        recipes: Whether the command takes experiment=. Registering the recipes takes half a second.
    """
    config_name = config_name or name

    def main() -> None:
        keep_streams()
        guard_logs()
        if {"--help", "-h"} & set(sys.argv[1:]):
            print(help_text(CONF, EXPERIMENTS, config_name, what, examples))
            return
        wants_traceback = os.environ.get("HYDRA_FULL_ERROR", "0") not in ("", "0")
        slurm.join_step()
        sys.argv[1:] = typed = flags_last([at_home(word) for word in sys.argv[1:]])
        process = os.getpid()
        parsed = _parsed(typed)
        own = parsed.config_dir and str(Path(parsed.config_dir).resolve())

        def told(error: Exception, words: Sequence[str]) -> str:
            return explain_composition(error, words, config_name, own)

        checked = functools.partial(sweeps.check_jobs, check, told)
        sweep = launching.Sweep(facts, heeds, wants_traceback, checked, scored)
        ended, outcomes = sweep.ended, sweep.outcomes

        def job(cfg: DictConfig) -> sweeps.Outcome | None:
            elsewhere = os.getpid() != process  # the launcher started a process for this job
            if elsewhere:
                sys.argv[1:] = typed
                slurm.join_step()
            if HydraConfig.get().mode != RunMode.MULTIRUN:
                outcomes.append(_run_alone(cfg, run, wants_traceback))
                return outcomes[-1]
            with _as_worker(heeds) if elsewhere else contextlib.nullcontext():
                outcome = _run_job(cfg, run, facts, wants_traceback)
            if not elsewhere:
                if outcome is not None:
                    ended[HydraConfig.get().job.num] = outcome
                if heeds:
                    signals.check()
            return outcome

        job.__module__ = f"ddpm.{name}"  # Hydra derives its job name from this
        if recipes:
            register_experiments()
        sweeps.set_defaults()
        # make Hydra raise instead of printing its own multi-line message
        os.environ["HYDRA_FULL_ERROR"] = "1"
        start = hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(job)
        with contextlib.nullcontext() if wants_traceback else _errors_in_a_line(told, parsed):
            refuse_paths(parsed.overrides)
            refuse_hidden([*([own] if own else []), *searchpath(parsed.overrides)])
            sweeps.refuse_in_process_group(typed)
            with (
                signals.commanded(),
                _table_at_the_end(sweep),
                contextlib.closing(sweep),
                before_sweeps(checked),
                around_launches(sweep.launch),
            ):
                start()
        codes = {outcome.code for outcome in outcomes} - {0}
        if codes:
            sys.exit(max(codes))

    return main


@contextlib.contextmanager
def _table_at_the_end(sweep: launching.Sweep) -> Iterator[None]:
    """Prints the table of jobs, even if a search ends early."""
    try:
        yield
    finally:
        if any(outcome.facts for outcome in sweep.outcomes):
            print(f"\n{sweeps.job_table(sweep.outcomes)}", flush=True)
        if sweep.scores:
            say(search.best(sweep.scores))


@contextlib.contextmanager
def _errors_in_a_line(
    told: Callable[[Exception, Sequence[str]], str], parsed: Namespace
) -> Iterator[None]:
    """Turns an error into one line and an exit code; jobs catch their own errors."""
    try:
        yield
    except KeyboardInterrupt:
        say("interrupted", to_error=True)
        sys.exit(130)
    except sweeps.WrongJobs as error:
        sys.exit(str(error))
    except Exception as error:
        sys.exit(f"error: {shown(told(error, parsed.overrides))}")


def _run_alone(cfg: DictConfig, run: Run, wants_traceback: bool) -> sweeps.Outcome:
    """Runs the only job of a command that is not a sweep, and prints its error in one line."""
    composed = from_hydra(cfg, HydraConfig.get())
    try:
        run(composed)
    except Exception as error:
        signals.check_interrupted()
        if wants_traceback:
            raise
        say(f"error: {explain(error)}", to_error=True)
        torchrun.leave_word(explain(error))
        return sweeps.Outcome(composed.overrides, 1)
    except SystemExit as stopped:
        torchrun.leave_word(f"told to stop: {getattr(stopped, 'why', stopped.code)}")
        raise
    return sweeps.Outcome(composed.overrides, 0)


def _run_job(
    cfg: DictConfig, run: Run, facts: sweeps.Facts, wants_traceback: bool
) -> sweeps.Outcome | None:
    """Runs one job of a sweep, and returns None if the sweep was told to stop before it."""
    composed = from_hydra(cfg, HydraConfig.get())
    if signals.noted():
        return None
    code, ended, known = 0, "done", True
    try:
        with signals.one_of_several():
            run(composed)
    except InUse as error:
        code, ended = signals.CARRIES_ON, "running elsewhere"
        say(f"error: {explain(error)}", to_error=True)
    except Exception as error:
        signals.check_interrupted()
        if wants_traceback:
            raise
        code, ended = 1, "failed"
        say(f"error: {explain(error)}", to_error=True)
    except Preempted:
        code, ended, known = signals.CARRIES_ON, "preempted", False
    told = sweeps.shown(facts, composed)
    last = {"status": ended} if code and known else {}
    return sweeps.Outcome(composed.overrides, code, {"status": ended, **told, **last})


@contextlib.contextmanager
def _as_worker(heeds: bool) -> Iterator[None]:
    """Sets up a process that a launcher started for a job: its signals and its device."""
    stays = str(HydraConfig.get().launcher.get("_target_")).endswith(".JoblibLauncher")
    held = signals.obeying if stays else signals.listening
    with held() if heeds else contextlib.nullcontext():
        if stays and not signals.noted():
            sweeps.claim_device(sweeps.visible_devices())
        yield
    if slurm.submitted_by_submitit() and signals.was_told() and slurm.queued_again():
        # leave no result: the submitting command waits for one, and this job will go on
        sys.exit(signals.CARRIES_ON)


def _parsed(arguments: Sequence[str]) -> Namespace:
    """Parses flags and overrides, and exits with one line if a flag is unknown."""

    def refuse(message: str) -> NoReturn:
        wrong = next((word for word in arguments if re.match("-+[a-z_.]+=", word)), None)
        sys.exit(
            shown(
                f"error: {message}"
                + (f"; settings take no dashes: {wrong.lstrip('-')}" if wrong else "; see --help")
            )
        )

    return hydra_parser(refuse).parse_args(arguments)


DEFAULT = re.compile(r"^  - (?P<group>\w+): (?P<option>\w+) *(?:# (?P<remark>.*))?$", re.M)
SECTION = re.compile(r"^(?P<section>\w+): +# (?P<remark>.*)\n(?P<inner>(?:  .*\n)+)", re.M)
KEY = re.compile(r"^(?P<key>\w+): (?P<value>[^#\s][^#\n]*?) *(?:# (?P<remark>.*))?$", re.M)


def help_text(
    conf: Path, experiments: Path, config_name: str, what: str, examples: Sequence[str]
) -> str:
    """Returns the --help text of the command that composes conf/<config_name>.yaml.

    Args:
        conf: The folder conf/.
        experiments: The folder experiments/.
        config_name: Name of the command's file in conf/.
        what: Summary of what the command does.
        examples: Command lines.
    """
    text = (conf / f"{config_name}.yaml").read_text(encoding="utf-8")
    if "\n  - config\n" in text:
        text = (conf / "config.yaml").read_text(encoding="utf-8") + text
    groups: list[str] = []
    for found in re.finditer(DEFAULT, text):
        if found["group"] != "hydra":
            folder = experiments if found["group"] == "experiment" else conf / found["group"]
            options = sorted(file.stem for file in folder.glob("*.yaml"))
            marked = [f"{one}*" if one == found["option"] else one for one in options]
            groups += _listed(found["group"], marked, found["remark"])
    for found in re.finditer(SECTION, text):
        inner = re.findall(r"^  (\w+):", found["inner"], flags=re.M)
        groups += _listed(f"{found['section']}.", inner, found["remark"])
    keys = [
        f"  {found['key'] + '=' + found['value']:<22} {found['remark'] or ''}".rstrip()
        for found in re.finditer(KEY, text)
    ]
    chosen = "Groups (choose with group=option; * marks the default) and the keys of sections:"
    return "\n".join(
        [
            what,
            "",
            *(f"  {example}" for example in examples),
            "",
            *([chosen, *groups, ""] if groups else []),
            "Other keys and their defaults:",
            *keys,
            "",
            "--cfg job prints every key; -m sweeps over key=a,b; HYDRA_FULL_ERROR=1 shows "
            "tracebacks; --hydra-help explains Hydra's own flags.",
        ]
    )


def _listed(name: str, words: list[str], remark: str | None) -> list[str]:
    wrapped = textwrap.wrap(" ".join(words), width=120, break_on_hyphens=False)
    return [f"  {name:<12} {remark or ''}".rstrip(), *(f"  {'':<12}   {line}" for line in wrapped)]
