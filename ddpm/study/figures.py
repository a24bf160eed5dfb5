"""What the runs of a study came to: one number for each setting, seed and measure."""

import functools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ddpm.compare import verdicts
from ddpm.config import build
from ddpm.config.compose import Composed, compose
from ddpm.config.schema import plain_config, training_config
from ddpm.diffusion.process import GaussianDiffusion
from ddpm.evaluate.job import NAMES
from ddpm.runs.folder import RunFolder
from ddpm.runs.results import read_measurements, scalar_curve
from ddpm.study import plan
from ddpm.study.plan import Claim, Job, Settings, Study, matches
from ddpm.system.files import as_key

MEASURES = "evaluation."  # begins what says how a run is measured


@dataclass(frozen=True)
class StudyRun:
    """A run of a study.

    Attributes:
        job: Its settings.
        seed: Its seed, which its samples have too.
        run: Its folder.
    """

    job: Job
    seed: int
    run: RunFolder


@dataclass(frozen=True)
class Cell:
    """One run, measured in one way.

    Attributes:
        settings: Those of the run and of the measurement, as typed, but the seed.
        seed: The run's.
        run: Its folder, as text.
        status: How it stands.
        values: What it came to, by measure.
        floors: What no network beats, where the measure has such a floor.
    """

    settings: Settings
    seed: int
    run: str
    status: str
    values: dict[str, float]
    floors: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Tried:
    """A claim, and what the runs say of it.

    Attributes:
        claim: The claim.
        numbers: One for each seed, below 0 where it bears the claim out.
        missing: In a line each, what could not be counted, and why.
        verdict: What follows.
    """

    claim: Claim
    numbers: dict[int, float]
    missing: list[str]
    verdict: verdicts.Verdict


def cells(study: Study, one: StudyRun) -> list[Cell]:
    """Returns a run of a study, once for each way in which it was measured."""
    of_run = _of_training(one.run, [claim.of for claim in study.claims])
    path, status = str(one.run.path), one.run.status()
    found: dict[str, Cell] = {}
    for way in plan.jobs(study.evaluate) or [Job([], {})]:
        # what evaluation. says is what is measured, and no setting of it
        said = {key: value for key, value in way.settings.items() if not key.startswith(MEASURES)}
        settings = {**one.job.settings, **said}
        fresh = Cell(settings, one.seed, path, status, dict(of_run))
        cell = found.setdefault(as_key(settings), fresh)
        for entry in _measured(one, way) if way.words else []:
            cell.values[entry["metric"]] = entry["value"]
            if entry["floor"] is not None:
                cell.floors[entry["metric"]] = entry["floor"]
    return list(found.values())


def is_measured(one: StudyRun, way: Job) -> bool:
    """Whether a run has the figures of all metrics that a call of ddpm.evaluate measures."""
    metrics = _asked(tuple(way.words)).cfg.evaluation.metrics
    found = [entry["metric"] for entry in _measured(one, way)]
    return all(any(name.startswith(NAMES[metric]) for name in found) for metric in metrics)


def _of_training(run: RunFolder, measures: Sequence[str]) -> dict[str, float]:
    """Returns the means of scalars over the second half of a run's steps, those of `train/`."""
    found = {}
    for tag in measures:
        if tag.startswith("train/"):
            curve = scalar_curve(run.path, tag)
            late = [value for step, value in curve if step > curve[-1][0] / 2]
            if late:
                found[tag] = statistics.fmean(late)
    return found


def _measured(one: StudyRun, way: Job) -> list[dict[str, Any]]:
    """The entries of a run's evaluation.json that a call of ddpm.evaluate makes.

    Raises:
        ValueError: If two are of the same measure.
    """
    entries = read_measurements(one.run.path / "evaluation.json")
    if not entries:
        return []
    asked = _asked(tuple(way.words))
    wanted = _protocol(one, asked)
    begin = tuple(start for metric in asked.cfg.evaluation.metrics for start in NAMES[metric])
    found = [
        entry
        for entry in entries
        if entry["metric"].startswith(begin)
        and all(
            as_key(entry["protocol"].get(key, value)) == as_key(value)
            for key, value in wanted.items()
        )
        and _is_of(entry["protocol"], asked.cfg.evaluation)
    ]
    names = [entry["metric"] for entry in found]
    if len(set(names)) < len(names):
        raise ValueError(f"{one.run.path} has several figures of one measure by {way.words}")
    return found


@functools.cache
def _asked(words: tuple[str, ...]) -> Composed:
    """A call of ddpm.evaluate, whatever the run and the seed."""
    return compose(["run=DIR", *words], "evaluate")


@functools.cache
def _process(words: tuple[str, ...]) -> GaussianDiffusion:
    return build.diffusion(training_config(compose(words)))


def _is_of(protocol: dict[str, Any], evaluation: Any) -> bool:
    """Whether a figure is of as many images as asked, and of that part of the data."""
    if "sampler" in protocol:
        count, split = evaluation.num_samples, evaluation.split
        return protocol["count"] == count and protocol.get("split", split) == split
    # of a smaller part it is all there are
    return (
        protocol["count"] <= evaluation.num_images and protocol["split"] == evaluation.bound_split
    )


def _protocol(one: StudyRun, asked: Composed) -> dict[str, Any]:
    """The fields of a protocol that a call decides, where the protocol has them."""
    cfg, process = asked.cfg, _process(tuple(one.job.words))
    return {
        "step": cfg.step or one.run.record().get("step"),
        "seed": one.seed,
        "weights": cfg.weights,
        "sampler_settings": build.sampler_settings(plain_config(asked)["sampler"], process),
        "extractor": cfg.evaluation.extractor,
        "quantize": cfg.evaluation.quantize,
        "precision": cfg.evaluation.precision,
    }


def tried(claim: Claim, cells: Sequence[Cell]) -> Tried:
    """Returns what the runs say of a claim."""
    about = [cell for cell in cells if matches(cell.settings, claim.where) and _counts(claim, cell)]
    numbers: dict[int, float] = {}
    missing = [] if any(claim.of in cell.values for cell in about) else [f"no run has {claim.of}"]
    for seed in sorted({cell.seed for cell in about}):
        of_seed = [cell for cell in about if cell.seed == seed]
        missing += [
            f"seed {seed}, {in_words(cell.settings)}: {cell.status}, no {claim.of}"
            for cell in of_seed
            if claim.of not in cell.values and cell.status != "complete"
        ]
        number = _number(claim, [cell for cell in of_seed if claim.of in cell.values])
        if number is not None:
            numbers[seed] = number
    return Tried(claim, numbers, missing, verdicts.verdict(list(numbers.values())))


def _counts(claim: Claim, cell: Cell) -> bool:
    """Whether a cell belongs to what a claim compares."""
    if claim.less is not None and claim.than is not None:
        return matches(cell.settings, claim.less) or matches(cell.settings, claim.than)
    key = claim.falls_with or claim.rises_with
    return key in cell.settings


def _number(claim: Claim, cells: Sequence[Cell]) -> float | None:
    """The number of one seed; None where a side of the claim has no run."""
    if claim.less is not None and claim.than is not None:
        return _difference(claim, cells)
    key = claim.falls_with or claim.rises_with
    assert key is not None
    values: dict[float, list[Cell]] = {}
    for cell in cells:
        if key in cell.settings:
            values.setdefault(float(cell.settings[key]), []).append(cell)
    if len(values) < 2:
        return None
    over = sorted(values)
    found = verdicts.slope(over, [_of_place(claim, values[place]) for place in over])
    return found if claim.falls_with else -found


def _of_place(claim: Claim, cells: Sequence[Cell]) -> float:
    if claim.best is None:
        return statistics.fmean(cell.values[claim.of] for cell in cells)
    best = min(cells, key=lambda cell: cell.values[claim.of])
    return math.log2(float(best.settings[claim.best]))


def _difference(claim: Claim, cells: Sequence[Cell]) -> float | None:
    """The mean difference over the settings that both sides have."""
    assert claim.less is not None
    assert claim.than is not None
    decided = {*claim.less, *claim.than}
    sides: list[dict[str, float]] = []
    for side in (claim.less, claim.than):
        sides.append(
            {
                as_key({k: v for k, v in cell.settings.items() if k not in decided}): cell.values[
                    claim.of
                ]
                for cell in cells
                if matches(cell.settings, side)
            }
        )
    shared = sides[0].keys() & sides[1].keys()
    if not shared:
        return None
    return statistics.fmean(sides[0][key] - sides[1][key] for key in shared)


def varied(cells: Sequence[Cell]) -> list[str]:
    """Returns the settings that are not the same in all cells."""
    keys = dict.fromkeys(key for cell in cells for key in cell.settings)
    return [key for key in keys if len({cell.settings.get(key) for cell in cells}) > 1]


def in_words(settings: Mapping[str, str], keys: Sequence[str] | None = None) -> str:
    """Returns settings in a line, keys by their last word."""
    shown = settings if keys is None else {key: settings[key] for key in keys if key in settings}
    return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in shown.items())
