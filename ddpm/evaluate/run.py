"""python -m ddpm.evaluate: measure a run's network, and write the figures down."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

from accelerate import PartialState
from omegaconf import OmegaConf
from pydantic import Field
from torch.utils.tensorboard import SummaryWriter

from ddpm.config.compose import Composed
from ddpm.config.schema import EvaluationSettings, Metric, Place, plain_config
from ddpm.config.validation import Node, Section, Text, check_node, validate
from ddpm.evaluate.measure import measure
from ddpm.runs import recording, results
from ddpm.runs.folder import RunFolder
from ddpm.runs.results import Measurement
from ddpm.sample.subject import Trained, of_run
from ddpm.system import signals
from ddpm.system.precision import Precision
from ddpm.system.processes import (
    device_of,
    find_processes,
    naming_lost,
    together,
    wait_to_leave,
)
from ddpm.system.signals import Preempted


class Settings(Section):
    """What to measure. See conf/evaluate.yaml for each key."""

    run: Text
    step: Annotated[int, Field(ge=1)] | None
    weights: Literal["ema", "raw"]
    device: Literal["auto", "cpu", "cuda", "mps"]
    precision: Precision
    outputs: Text
    trusted_modules: list[str]
    data: Place
    sampler: Node
    evaluation: EvaluationSettings


def run(composed: Composed) -> list[Measurement]:
    """Measures, writes evaluation.json and the pictures, and prints the figures.

    A metric that cannot be had here (no weights of an extractor, say) is named with the reason at
    the end, and the others go on.

    Returns:
        The measurements, whole on the main process.

    Raises:
        ValueError: If there is no such run or checkpoint; or, after the others, if a metric could
            not be had.
        Preempted: When told to stop.
    """
    settings = _settings(composed)
    processes = find_processes(settings.device)
    folder = RunFolder(Path(settings.run))
    trusted, path = settings.trusted_modules, settings.data.path
    trained = of_run(folder, settings.step, settings.weights, trusted, path)
    device = device_of(processes, settings.device)
    with naming_lost(), signals.listening(), _saying_what_stays(processes), together():
        found, missing = measure(trained, settings.sampler, settings.evaluation, processes, device)
    if processes.is_main_process:
        _write(trained, found)
        recipe = trained.config.recipe
        print(lines(found, recipe.expect.metrics if recipe else []))
        print(f"figures {folder.path / 'evaluation.json'}", flush=True)
    wait_to_leave()
    if missing:
        raise ValueError("; ".join(missing))
    return found


@contextmanager
def _saying_what_stays(processes: PartialState) -> Iterator[None]:
    try:
        yield
    except Preempted:
        if processes.is_main_process:
            print("what is drawn and measured so far is kept; the same command goes on", flush=True)
        raise


def lines(found: Sequence[Measurement], expected: Sequence[Metric]) -> str:
    """Puts each measurement in a line: value, deviation, floor, id, and what the recipe expects."""
    shown = []
    for one in found:
        value = f"{one.value:.4f}" + _if(one.deviation, " +- {:.4f}")
        shown.append(
            f"  {one.metric:<26} {value:<22} {_if(one.floor, 'floor {:.4f}'):<16} {one.id}"
        )
        published = [
            f"published {metric.value:g} +- {metric.tolerance:g} ({metric.protocol})"
            for metric in expected
            if metric.name == one.metric
        ]
        if published:
            shown.append(f"  {'':<26} {'; '.join(published)}")
    return "\n".join(shown)


def _if(value: float | None, words: str) -> str:
    return "" if value is None else words.format(value)


def _settings(composed: Composed) -> Settings:
    """The settings of one call, checked."""
    if OmegaConf.is_missing(composed.cfg, "run"):
        raise ValueError("run is missing: give run=DIR, a folder that ddpm.train made")
    settings = validate(Settings, plain_config(composed))
    check_node("sampler", settings.sampler, settings.trusted_modules)
    return settings


def _write(trained: Trained, found: Sequence[Measurement]) -> None:
    """To evaluation.json, and to TensorBoard what was not there yet."""
    folder, file = trained.run, trained.run.path / "evaluation.json"
    before = {results.key(entry) for entry in results.read_measurements(file)}
    results.record(file, found)
    with SummaryWriter(str(folder.path)) as board:
        for one in found:
            if results.key({"metric": one.metric, "protocol": one.protocol}) not in before:
                tag = f"eval/{results.name(one.metric, one.protocol)}"
                board.add_scalar(tag, one.value, trained.step)
    record = folder.record()
    if record["status"] != "running":
        ended = results.read_results(folder, trained.config.model_dump(mode="json"))
        recording.conclude(folder.path, record["status"], record["step"], results.scalars(ended))
