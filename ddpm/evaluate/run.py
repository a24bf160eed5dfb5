"""python -m ddpm.evaluate: measure a run's network and record the figures."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import torch
from accelerate import PartialState
from omegaconf import OmegaConf
from pydantic import Field
from torch.utils.tensorboard import SummaryWriter

from ddpm.config.compose import Composed
from ddpm.config.schema import EvaluationSettings, Metric, Place, plain_config
from ddpm.config.validation import Node, Section, Text, check_node, validate
from ddpm.evaluate.measure import job_of, measure, write_reference
from ddpm.runs import recording, results
from ddpm.runs.folder import RunFolder
from ddpm.runs.results import Measurement
from ddpm.sample.subject import Trained, of_run
from ddpm.sample.tuning import check as check_tune
from ddpm.system import signals
from ddpm.system.files import lock
from ddpm.system.names import Name, Precision
from ddpm.system.processes import (
    device_of,
    find_processes,
    naming_lost,
    together,
    wait_to_leave,
)
from ddpm.system.signals import Preempted
from ddpm.system.text import say, shown


class Settings(Section):
    """What to measure. See conf/evaluate.yaml for each key."""

    run: Text
    step: Annotated[int, Field(ge=1)] | None
    reference_to: Text | None
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    weights: Literal["ema", "raw"]
    device: Literal["auto", "cpu", "cuda", "mps"]
    precision: Precision
    tune: bool | Literal["auto"] | Name
    outputs: Text
    trusted_modules: list[str]
    data: Place
    sampler: Node
    evaluation: EvaluationSettings


def run(composed: Composed) -> list[Measurement]:
    """Measures what is not recorded yet, writes evaluation.json and pictures, prints the figures.

    A metric that cannot be measured (because an extractor's weights are missing, say) does not stop
    the others; the error at the end names the reason.

    Returns:
        The measurements, complete on the main process.

    Raises:
        ValueError: If there is no such run or checkpoint; or, after all others were measured, if a
            metric could not be.
        Preempted: When told to stop.
    """
    settings = _settings(composed)
    processes = find_processes(settings.device)
    folder = RunFolder(Path(settings.run))
    trusted, path = settings.trusted_modules, settings.data.path
    trained = of_run(folder, settings.step, settings.weights, trusted, path)
    device = device_of(processes, settings.device)
    check_tune(settings.tune, device)
    if settings.reference_to is not None:
        with naming_lost(), signals.listening(), together():
            if processes.is_main_process:
                _write_reference(trained, settings, device)
        return []
    folder.refuse_links()
    file, fresh = folder.path / "evaluation.json", list[Measurement]()

    def keep(figures: list[Measurement]) -> None:
        results.record(file, figures)
        fresh.extend(figures)

    try:
        with naming_lost(), signals.listening(), _saying_what_stays(processes), together():
            job = job_of(
                *(trained, settings.sampler, settings.evaluation, processes, device, keep),
                tune=settings.tune,
            )
            found, missing = measure(job)
    finally:
        if fresh:
            _show(trained, fresh)
    if processes.is_main_process:
        recipe = trained.config.recipe
        print(lines(found, recipe.expect.metrics if recipe else []))
        before = len(found) - len(fresh)
        more = f" ({before} of {len(found)} recorded before, not measured again)" if before else ""
        say(f"figures {file}{more}")
    wait_to_leave()
    if missing:
        raise ValueError("; ".join(missing))
    return found


def _write_reference(trained: Trained, settings: Settings, device: torch.device) -> None:
    to = Path(str(settings.reference_to)).expanduser()
    count = write_reference(trained, settings.evaluation, device, to)
    say(f"reference {to}: {settings.evaluation.extractor} of {count} pictures")


@contextmanager
def _saying_what_stays(processes: PartialState) -> Iterator[None]:
    try:
        yield
    except Preempted:
        if processes.is_main_process:
            say("images and figures so far are kept; run the same command again to continue")
        raise


def lines(found: Sequence[Measurement], expected: Sequence[Metric]) -> str:
    """Formats a line per measurement: value, deviation, floor, id; and what the recipe expects."""
    told = []
    for one in found:
        value = f"{one.value:.4f}" + _if(one.deviation, " +- {:.4f}")
        told.append(
            shown(f"  {one.metric:<26} {value:<22} {_if(one.floor, 'floor {:.4f}'):<16} {one.id}")
        )
        published = [
            f"published {metric.value:g} +- {metric.tolerance:g} ({metric.protocol})"
            for metric in expected
            if metric.name == one.metric
        ]
        if published:
            told.append(shown(f"  {'':<26} {'; '.join(published)}"))
    return "\n".join(told)


def _if(value: float | None, words: str) -> str:
    return "" if value is None else words.format(value)


def _settings(composed: Composed) -> Settings:
    """The settings of one call, checked."""
    if OmegaConf.is_missing(composed.cfg, "run"):
        raise ValueError("run is missing: give run=DIR, a folder that ddpm.train made")
    settings = validate(Settings, plain_config(composed))
    if {"seed", "evaluation.seed"} <= {word.partition("=")[0] for word in composed.overrides}:
        raise ValueError(
            f"seed={settings.seed} and evaluation.seed={settings.evaluation.seed} are the same "
            "key: give only one of them"
        )
    to = settings.reference_to
    if to is not None and (not to.endswith(".npz") or Path(to).expanduser().exists()):
        why = "already exists" if to.endswith(".npz") else "does not end with .npz"
        raise ValueError(f"reference_to={to} {why}: give the name of a new file, FILE.npz")
    evaluation = settings.evaluation.model_copy(update={"seed": settings.seed})
    check_node("sampler", settings.sampler, settings.trusted_modules)
    return settings.model_copy(update={"evaluation": evaluation})


def _tags(folder: RunFolder, figures: Sequence[Measurement]) -> list[str]:
    """A tag for each figure, unique within the run."""
    entries = results.read_measurements(folder.path / "evaluation.json")
    named = results.names((entry["metric"], entry["protocol"]) for entry in entries)
    known = {results.key(entry): name for entry, name in zip(entries, named, strict=True)}
    return [f"eval/{known[results.key(asdict(one))]}" for one in figures]


def _show(trained: Trained, figures: Sequence[Measurement]) -> None:
    """Writes the figures to TensorBoard, and to the conclusion of a run that has ended."""
    folder = trained.run
    with SummaryWriter(str(folder.path)) as board:
        for tag, one in zip(_tags(folder, figures), figures, strict=True):
            board.add_scalar(tag, one.value, trained.step)
    record = folder.record()
    if record.get("status") not in (None, "running"):
        with lock(folder.path / ".conclusion.lock"):  # the last of several jobs sees all figures
            ended = results.read_results(folder, trained.config.model_dump(mode="json"))
            values = results.scalars(ended)
            recording.conclude(folder.path, record["status"], record.get("step", 0), values)
