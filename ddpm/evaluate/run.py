"""One call of ddpm.evaluate: rebuild the network from its run folder, draw, measure, and write the figures where they can be compared."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from omegaconf import OmegaConf
from pydantic import Field
from torch.utils.tensorboard import SummaryWriter

from ddpm.config import build
from ddpm.config.compose import Composed
from ddpm.config.schema import EvaluationSettings, Metric, plain_config
from ddpm.config.validation import Node, Section, Text, check_node, validated
from ddpm.evaluate.measure import measure
from ddpm.runs import checkpoint, recording, results
from ddpm.runs.folder import RunFolder
from ddpm.runs.results import Figure, read_results, scalars
from ddpm.sample.drawing import Drawing
from ddpm.system import devices
from ddpm.system.processes import find_processes


def table(figures: Sequence[Figure], expected: Sequence[Metric]) -> str:
    """The figures in lines: value, deviation, floor, what the recipe expects of a metric of that name, protocol."""
    lines = []
    for figure in figures:
        value = f"{figure.value:.4f}" + (f" +- {figure.deviation:.4f}" if figure.deviation is not None else "")
        floor = f"floor {figure.floor:.4f}" if figure.floor is not None else ""
        published = "; ".join(f"published {metric.value:g} +- {metric.tolerance:g} ({metric.protocol})" for metric in expected if metric.name == figure.metric)
        lines.append(f"  {figure.metric:<26} {value:<22} {floor:<16} {figure.id}" + (f"\n  {'':<26} {published}" if published else ""))
    return "\n".join(lines)


class EvaluateConfig(Section):
    """What to measure. See conf/evaluate.yaml for each key."""

    run: Text
    step: Annotated[int, Field(ge=1)] | None
    weights: Literal["ema", "raw"]
    device: Literal["auto", "cpu", "cuda", "mps"]
    outputs: Text
    trusted_modules: list[str]
    sampler: Node
    evaluation: EvaluationSettings

    @classmethod
    def of(cls, composed: Composed) -> "EvaluateConfig":
        """The settings of one call, checked.    Raises ValueError, one line."""
        if OmegaConf.is_missing(composed.cfg, "run"):
            raise ValueError("run is missing: give run=DIR, a folder that ddpm.train made")
        run = RunFolder(Path(str(composed.cfg.run)))
        composed.cfg.objective = run.config(list(composed.cfg.trusted_modules)).objective  # ancestral sampling has the run's variance
        plain = plain_config(composed)
        del plain["objective"]
        config = validated(cls, plain)
        check_node("sampler", config.sampler, config.trusted_modules)
        return config


def carry_out(config: EvaluateConfig) -> None:
    """Measure, write evaluation.json and the pictures, and print the table.

    A metric that cannot be had here (no weights of an extractor, say) is named with the reason, and the others go on. Raises ValueError, one line, if
    there is no such run or checkpoint, or if any metric could not be had, after the others.
    """
    processes, settings = find_processes(config.device), config.evaluation
    device = processes.device if processes.num_processes > 1 else devices.device(config.device)
    run = RunFolder(Path(config.run))
    trained = run.config(config.trusted_modules)
    found = checkpoint.find(run.checkpoints, config.step)
    diffusion = build.diffusion(trained)
    names = run.classes()
    network = build.network(trained, device, len(names)).eval()
    weights = {name: tensor.to(device) for name, tensor in found.weights(config.weights).items()}
    shape = (trained.data.channels, *build.image_size(trained.data))
    sampler = build.sampler(config.sampler, diffusion)
    drawing = Drawing(network, weights, diffusion, sampler, shape, settings.seed, build.any_class(trained, len(names)))
    figures, missing = measure(drawing, config.sampler, settings, trained, names, run, found.step, config.weights, processes)
    if processes.is_main_process:
        shown = {results.key(entry) for entry in results.recorded(run.path / "evaluation.json")}
        results.record(run.path / "evaluation.json", figures)
        with SummaryWriter(str(run.path)) as board:
            for figure in (figure for figure in figures if results.key({"metric": figure.metric, "protocol": figure.protocol}) not in shown):
                board.add_scalar(f"eval/{results.name(figure.metric, figure.protocol)}", figure.value, found.step)
        status = run.record()["status"]
        if status != "running":
            recording.conclude(run.path, status, run.record()["step"], scalars(read_results(run, trained.model_dump(mode="json"))))
        print(table(figures, trained.recipe.expect.metrics if trained.recipe else []))
        print(f"figures {run.path / 'evaluation.json'}", flush=True)
    processes.wait_for_everyone()
    if missing:
        raise ValueError("; ".join(missing))
