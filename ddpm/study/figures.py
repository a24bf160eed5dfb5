"""The results of a study's runs: one number per setting, seed and measure."""

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

MEASURES = "evaluation."  # prefix of the keys that say how a run is measured


@dataclass(frozen=True)
class StudyRun:
    """A run of a study.

    Attributes:
        job: Its settings.
        seed: Its seed, which its samples share.
        run: Its folder.
    """

    job: Job
    seed: int
    run: RunFolder


@dataclass(frozen=True)
class Cell:
    """One run, measured in one way.

    Attributes:
        settings: Settings of the run and of the measurement, as typed, without the seed.
        seed: The run's seed.
        run: The run's folder, as text.
        status: The run's status.
        values: Measure -> value.
        floors: Measure -> the value that no network beats, where there is one.
    """

    settings: Settings
    seed: int
    run: str
    status: str
    values: dict[str, float]
    floors: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Tried:
    """A claim, and what the runs say about it.

    Attributes:
        claim: The claim.
        numbers: Seed -> its number, which is below 0 if it supports the claim.
        missing: What could not be counted and why, one line each.
        verdict: The verdict on the claim.
    """

    claim: Claim
    numbers: dict[int, float]
    missing: list[str]
    verdict: verdicts.Verdict


def cells(study: Study, one: StudyRun) -> list[Cell]:
    """Returns the cells of a run, one per way in which it is measured."""
    of_run = _of_training(one.run, [claim.of for claim in study.claims])
    path, status = str(one.run.path), one.run.status()
    found: dict[str, Cell] = {}
    if of_run or not study.evaluate:  # what training recorded belongs to no measurement
        settings = dict(one.job.settings)
        found[as_key(settings)] = Cell(settings, one.seed, path, status, dict(of_run))
    for way in plan.jobs(study.evaluate):
        # evaluation.* says what is measured, and is no setting of the result
        said = {key: value for key, value in way.settings.items() if not key.startswith(MEASURES)}
        settings = {**one.job.settings, **said}
        fresh = Cell(settings, one.seed, path, status, {})
        cell = found.setdefault(as_key(settings), fresh)
        for entry in _measured(one, way):
            cell.values[entry["metric"]] = entry["value"]
            if entry["floor"] is not None:
                cell.floors[entry["metric"]] = entry["floor"]
    return list(found.values())


def is_measured(one: StudyRun, way: Job) -> bool:
    """Whether a run has figures for all metrics that a call of ddpm.evaluate measures."""
    metrics = _asked(tuple(way.words)).cfg.evaluation.metrics
    found = [entry["metric"] for entry in _measured(one, way)]
    return all(any(name.startswith(NAMES[metric]) for name in found) for metric in metrics)


def _of_training(run: RunFolder, measures: Sequence[str]) -> dict[str, float]:
    """The mean of each `train/` scalar over the second half of a run's steps."""
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
        ValueError: If two have the same measure.
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
        raise ValueError(
            f"{one.run.path}: evaluation.json has several figures of one measure by {way.words}"
        )
    return found


@functools.cache
def _asked(words: tuple[str, ...]) -> Composed:
    """A call of ddpm.evaluate, without its run and seed."""
    return compose(["run=DIR", *words], "evaluate")


@functools.cache
def _process(words: tuple[str, ...]) -> GaussianDiffusion:
    return build.diffusion(training_config(compose(words)))


def _is_of(protocol: dict[str, Any], evaluation: Any) -> bool:
    """Whether a figure has as many images as asked for, and the right part of the data."""
    if "sampler" in protocol:
        count, split = evaluation.num_samples, evaluation.split
        return protocol["count"] == count and protocol.get("split", split) == split
    # a part with fewer images is measured whole
    return (
        protocol["count"] <= evaluation.num_images and protocol["split"] == evaluation.bound_split
    )


def _protocol(one: StudyRun, asked: Composed) -> dict[str, Any]:
    """The fields of a protocol that a call decides, if the protocol has them."""
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
    """Returns what the runs say about a claim."""
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
    """Whether a claim compares this cell."""
    if claim.less is not None and claim.than is not None:
        return matches(cell.settings, claim.less) or matches(cell.settings, claim.than)
    key = claim.falls_with or claim.rises_with
    return key in cell.settings


def _number(claim: Claim, cells: Sequence[Cell]) -> float | None:
    """One seed's number; None if a side of the claim has no run."""
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
    """The mean difference over the settings that both sides have in common."""
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
    """Returns the keys of the settings that differ between cells."""
    keys = dict.fromkeys(key for cell in cells for key in cell.settings)
    return [key for key in keys if len({cell.settings.get(key) for cell in cells}) > 1]


def in_words(settings: Mapping[str, str], keys: Sequence[str] | None = None) -> str:
    """Returns settings as one line, each key by its last word."""
    shown = settings if keys is None else {key: settings[key] for key in keys if key in settings}
    return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in shown.items())
