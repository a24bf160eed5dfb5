"""Measuring a network by a protocol: from drawn images, and from the data's own pictures."""

import functools
import hashlib
import json
import operator
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm

from ddpm.config import build
from ddpm.config.schema import Config, EvaluationSettings, Split
from ddpm.config.validation import Node
from ddpm.data.image_set import ImageSet
from ddpm.evaluate import bound, distances, features
from ddpm.evaluate.features import Extractor, Features
from ddpm.runs.folder import RunFolder
from ddpm.runs.results import Figure
from ddpm.sample import images
from ddpm.sample.drawing import Drawing
from ddpm.sample.folder import claim_folder, draw_missing, read_samples, sample_file

OF_FEATURES = ("fd", "kd", "inception_score", "precision_recall", "nearest")
OF_SAMPLES = (*OF_FEATURES, "colour")  # metrics that need drawn images


def measure(
    drawing: Drawing,
    sampler: Node,
    settings: EvaluationSettings,
    trained: Config,
    names: list[str],
    run: RunFolder,
    step: int,
    weights: Literal["ema", "raw"],
    processes: PartialState,
) -> tuple[list[Figure], list[str]]:
    """The figures of one step of a run, whole on the main process, and why metrics that could not be had could not.

    drawing, sampler: what draws, and the settings it was built from.    names: of the data's classes.    Every process must call this.
    """
    sets = _Sets(trained)
    about: dict[str, Any] = {"weights": weights, "step": step, "data": sets.of("train").fingerprint, "seed": settings.seed}
    figures: list[Figure] = []
    missing: list[str] = []
    if set(OF_SAMPLES) & set(settings.metrics):
        name = f"{str(sampler['function']['_target_']).rpartition('.')[2]}{sampler['num_steps'] or drawing.diffusion.num_timesteps}"
        protocol = {"count": settings.num_samples, "split": settings.split, "sampler": name, "sampler_settings": sampler, **about}
        figures += _of_samples(settings, run, drawing, sets, len(names) if trained.training.conditional else None, protocol, processes, missing)
    for split in dict.fromkeys(["train", settings.bound_split]) if "losses" in settings.metrics else []:
        figures += _losses(drawing, sets.of(split), trained, settings, {**about, "split": split}, processes)
    if "bits_per_dim" in settings.metrics:
        figures += _bits_per_dim(drawing, sets.of(settings.bound_split), trained, settings, {**about, "split": settings.bound_split}, processes, run)
    return figures, missing


class _Sets:
    """The parts of a run's data, read when they are asked for."""

    def __init__(self, trained: Config) -> None:
        self.trained = trained
        self._found: dict[str, ImageSet] = {}

    def of(self, split: Split) -> ImageSet:
        """Raises ValueError, one line, if the data has no such part."""
        if split not in self._found:
            trained = self.trained
            if split == "test":
                if "split" not in trained.data.source:
                    raise ValueError(f"data={trained.data.name} has no test split; train with data.holdout=0.1 and use heldout")
                source = {**trained.data.source, "split": "test"}
                trained = trained.model_copy(update={"data": trained.data.model_copy(update={"source": source})})
            whole = build.images(trained, build.source(trained), workers=1)
            train, held_out = whole.split(trained.data.holdout) if split != "test" else (whole, whole)
            if split == "heldout" and not len(held_out):
                raise ValueError("nothing was held out of this run: train with data.holdout=0.1 to have a split heldout")
            self._found[split] = held_out if split == "heldout" else train
        return self._found[split]


def _of_samples(
    settings: EvaluationSettings,
    run: RunFolder,
    drawing: Drawing,
    sets: _Sets,
    num_classes: int | None,
    protocol: dict[str, Any],
    processes: PartialState,
    missing: list[str],
) -> list[Figure]:
    """Distances, nearest pictures and colours, from one set of drawn images."""
    count, sampler = settings.num_samples, protocol["sampler_settings"]
    extractor = _extractor(settings, drawing.device, missing) if set(OF_FEATURES) & set(settings.metrics) else None
    if extractor is None and "colour" not in settings.metrics:
        return []
    folder = samples_folder(run, protocol)
    if processes.is_main_process:
        claim_folder(folder, {"sampler": sampler, "seed": settings.seed})
    processes.wait_for_everyone()
    classes = None if num_classes is None else [index % num_classes for index in range(count)]
    draw_missing(drawing, folder, count, classes, settings.batch_size, processes.process_index, processes.num_processes)
    processes.wait_for_everyone()
    data, training = sets.of(settings.split), sets.of("train")
    figures: list[Figure] = []
    if extractor is not None:
        drawn = _features_of_folder(folder, count, extractor, settings.batch_size, processes)
        with_extractor = {**protocol, "extractor": extractor.name}
        if processes.is_main_process:
            reference = distances.reference_features(data.images, extractor, _cache(sets, extractor, settings.split))
            figures += distances.distances(settings.metrics, drawn, reference, extractor, with_extractor, settings.seed)
            if "nearest" in settings.metrics:
                trained_on = distances.reference_features(training.images, extractor, _cache(sets, extractor, "train"))
                ratio, pairs = distances.nearest_pairs(drawn, trained_on, {**with_extractor, "split": "train"})
                figures.append(ratio)
                sheet = distances.pairs_sheet(pairs, read_samples(folder, count), training.images)
                path = run.path / "evaluation" / f"nearest_step_{protocol['step']:08d}.png"
                images.save_png(path, sheet)
                print(f"nearest {path}", flush=True)
    if "colour" in settings.metrics and processes.is_main_process:
        gaps, warnings = distances.colour(read_samples(folder, count), data.images, protocol)
        figures += gaps
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr, flush=True)
    return figures


def _extractor(settings: EvaluationSettings, device: torch.device, missing: list[str]) -> Extractor | None:
    """The feature extractor, or None with the reason added to `missing`: what needs none goes on."""
    try:
        return _built_extractor(settings, device)
    except ValueError as error:
        missing.append(str(error))
        return None


def _built_extractor(settings: EvaluationSettings, device: torch.device) -> Extractor:
    if settings.extractor == "inception":
        return features.inception(settings.weights_path, settings.download, device, settings.batch_size)
    return features.efficientnet_lite0(device, settings.batch_size)


def check_extractor(settings: EvaluationSettings, device: torch.device) -> None:
    """Raises ValueError, one line, if the extractor that these metrics need cannot be had here: better known before a run than in the middle of it."""
    if set(OF_FEATURES) & set(settings.metrics):
        _built_extractor(settings, device)


def _features_of_folder(folder: Path, count: int, extractor: Extractor, batch_size: int, processes: PartialState) -> Features:
    """Features of drawn images, each process computing its share; whole on every process."""
    mine: list[tuple[int, Any, Any]] = []
    for turn, start in enumerate(tqdm(range(0, count, batch_size), desc=extractor.name, unit="batch", disable=None if processes.is_main_process else True)):
        if turn % processes.num_processes == processes.process_index:
            pictures = [images.read_png(sample_file(folder, index)) for index in range(start, min(start + batch_size, count))]
            found = extractor(np.stack(pictures))
            mine.append((start, found.features, found.probabilities))
    parts = sorted(gather_object(mine) if processes.num_processes > 1 else mine, key=lambda part: part[0])
    probabilities = None if parts[0][2] is None else torch.cat([part[2] for part in parts])
    return Features(torch.cat([part[1] for part in parts]), probabilities)


def _losses(drawing: Drawing, data: ImageSet, trained: Config, settings: EvaluationSettings, protocol: dict[str, Any], processes: PartialState) -> list[Figure]:
    """Mean loss in ten buckets of timesteps."""
    sums = [
        bound.loss_sums(model, drawing.diffusion, [batch], settings.seed) for model, batch in _batches(drawing, data, trained, settings, processes, "losses")
    ]
    found = _added(sums, processes).mean()
    protocol = {**protocol, "count": min(settings.num_images, len(data)), "loss": trained.objective["loss"], "prediction": trained.objective["prediction"]}
    return [Figure(f"loss_t{bucket.first:04d}_{bucket.last:04d}", bucket.loss, protocol) for bucket in found]


def _bits_per_dim(
    drawing: Drawing, data: ImageSet, trained: Config, settings: EvaluationSettings, protocol: dict[str, Any], processes: PartialState, run: RunFolder
) -> list[Figure]:
    """The variational bound and its parts, and its rate-distortion curve beside evaluation.json."""
    sums = [
        bound.bound_sums(model, drawing.diffusion, [batch], settings.seed) for model, batch in _batches(drawing, data, trained, settings, processes, "bits/dim")
    ]
    found = _added(sums, processes).mean()
    protocol = {**protocol, "count": found.num_images}
    if processes.is_main_process:
        path = run.path / "evaluation" / f"rate_distortion_step_{protocol['step']:08d}_{protocol['split']}"
        path.parent.mkdir(exist_ok=True)
        bound.save_rate_distortion(path.with_suffix(".png"), path.with_suffix(".csv"), found)
        print(f"rate-distortion {path.with_suffix('.png')}", flush=True)
    parts = {"bits_per_dim": found.total, "bits_per_dim_rate": found.rate, "bits_per_dim_distortion": found.distortion, "bits_per_dim_prior": found.prior}
    return [Figure(name, value, protocol) for name, value in {**parts, "rmse": float(found.rmse[0])}.items()]


def _batches(
    drawing: Drawing, data: ImageSet, trained: Config, settings: EvaluationSettings, processes: PartialState, what: str
) -> Iterator[tuple[Any, bound.Batch]]:
    """This process's share of num_images pictures, evenly spaced in the set: (the unguided model for their classes, (numbers, x0))."""
    unguided = replace(drawing, sampler=replace(drawing.sampler, guidance_scale=1.0))
    count = min(settings.num_images, len(data))
    chosen = np.arange(count) * len(data) // count
    starts = range(0, count, settings.batch_size)
    for turn, start in enumerate(tqdm(starts, desc=what, unit="batch", disable=None if processes.is_main_process else True)):
        if turn % processes.num_processes != processes.process_index:
            continue
        numbers = chosen[start : start + settings.batch_size]
        x0 = torch.from_numpy(data.stored[data.rows[numbers]]).to(drawing.device).float().div(127.5).sub(1)
        labels = torch.from_numpy(data.labels[numbers]).to(drawing.device) if trained.training.conditional and data.labels is not None else None
        yield unguided.model(labels), (torch.from_numpy(numbers).to(drawing.device), x0.contiguous(memory_format=torch.channels_last))


def _added(sums: Sequence[Any], processes: PartialState) -> Any:
    """The sums of all processes, in one."""
    mine = [functools.reduce(operator.add, sums)] if sums else []  # a process may have had no share
    return functools.reduce(operator.add, gather_object(mine) if processes.num_processes > 1 else mine)


def _cache(sets: _Sets, extractor: Extractor, split: Split) -> Path:
    """Where the features of a part of the data are kept: by content, size of the pictures and extractor."""
    data, trained = sets.of(split), sets.trained
    made_from = [data.fingerprint, split, trained.data.holdout, trained.data.resolution, trained.data.channels, trained.data.crop, trained.data.background]
    return Path(trained.data.cache) / "features" / f"{extractor.name}-{_digest(made_from)}.npz"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def samples_folder(run: RunFolder, protocol: dict[str, Any]) -> Path:
    """Where the drawn images of a protocol are kept, for whoever measures them again."""
    words = f"step_{protocol['step']:08d}_{protocol['weights']}_{protocol['sampler']}_seed_{protocol['seed']}"
    return run.path / "evaluation" / f"{words}-{_digest(protocol['sampler_settings'])}"
