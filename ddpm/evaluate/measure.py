"""Measuring a run's network by a protocol: from drawn images, and from the data's own pictures."""

import functools
import hashlib
import json
import operator
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor
from tqdm import tqdm

from ddpm.config import build
from ddpm.config.schema import Config, EvaluationSettings, Split
from ddpm.config.validation import Node
from ddpm.data.batches import to_floats
from ddpm.data.image_set import ImageSet
from ddpm.diffusion.process import Model
from ddpm.evaluate import bound, distances, features, metrics
from ddpm.evaluate.features import Extractor, Features
from ddpm.runs import pictures
from ddpm.runs.folder import RunFolder
from ddpm.runs.results import Measurement, told
from ddpm.sample.drawing import Drawing
from ddpm.sample.folder import (
    claim_folder,
    draw_missing,
    read_samples,
    sample_file,
    word_for,
)
from ddpm.sample.images import read_image, save_png
from ddpm.sample.subject import Trained
from ddpm.system.devices import halve_to_fit
from ddpm.system.files import short_hash, write_text
from ddpm.system.processes import agree, gather, share

OF_DISTANCES = ("fd", "kd", "inception_score", "precision_recall")
OF_FEATURES = (*OF_DISTANCES, "nearest")
OF_SAMPLES = (*OF_FEATURES, "colour")  # metrics that need drawn images


@dataclass(frozen=True)
class _Job:
    """What every measure of one call needs; `about` is the protocol that all have in common.

    `network` is the identity of what is measured: no part of a protocol, but of what is kept of it.
    """

    trained: Trained
    settings: EvaluationSettings
    processes: PartialState
    drawing: Drawing
    splits: "_Splits"
    about: dict[str, Any]
    network: str


def measure(
    trained: Trained,
    sampler: Node,
    settings: EvaluationSettings,
    processes: PartialState,
    device: torch.device,
    keep_samples: bool = True,
    data: ImageSet | None = None,
) -> tuple[list[Measurement], list[str]]:
    """Measures a run's network at its step. Every process must call this.

    Args:
        trained: The network.
        sampler: What the samples are drawn with, as in conf/sampler/.
        settings: Which metrics, by which protocol.
        processes: Those that share the work.
        device: Where this one works.
        keep_samples: Leave the drawn images for whoever measures them again.
        data: The run's pictures, if they are at hand; else they are read.

    Returns:
        The measurements, whole on the main process; and why metrics that could not be had here
        could not.

    Raises:
        ValueError: If the data has no such split, or the pictures are not the run's.
    """
    diffusion = trained.subject.diffusion
    sampler = build.sampler_settings(sampler, diffusion)
    built = build.sampler(sampler, diffusion)
    drawing = trained.subject.drawing(built, settings.seed, device, settings.precision)
    splits = _Splits(trained, data)
    about = {
        "weights": trained.kind,
        "step": trained.step,
        "data": splits.of("train").fingerprint,
        "seed": settings.seed,
        "precision": settings.precision,
        "resize": trained.config.data.resize,
    }
    network = trained.subject.identity()
    job = _Job(trained, settings, processes, drawing, splits, about, network)
    found: list[Measurement] = []
    missing: list[str] = []
    parts: dict[str, Callable[[], list[Measurement]]] = {}
    if set(OF_SAMPLES) & set(settings.metrics):
        parts["samples"] = lambda: _of_samples(job, sampler, missing, keep_samples)
    if {"losses", "bits_per_dim"} & set(settings.metrics):
        splits.of(settings.bound_split)  # is refused before anything is measured
    if "losses" in settings.metrics:
        for split in dict.fromkeys(["train", settings.bound_split]):
            parts[f"losses {split}"] = functools.partial(_losses, job, split)
    if "bits_per_dim" in settings.metrics:
        parts["bits_per_dim"] = lambda: _bits_per_dim(job, settings.bound_split)
    unfinished = _unfinished(job, sampler)
    for name, part in parts.items():
        found += _once(name, part, unfinished, processes, missing)
    if processes.is_main_process:
        unfinished.unlink(missing_ok=True)
    return [replace(one, network=network) for one in found], missing


def _unfinished(job: _Job, sampler: Node) -> Path:
    """What is kept of a call that was given up, for the same call again."""
    return _file(job, "unfinished", {"sampler": sampler, **job.settings.model_dump(mode="json")})


def _once(
    name: str,
    part: Callable[[], list[Measurement]],
    unfinished: Path,
    processes: PartialState,
    missing: list[str],
) -> list[Measurement]:
    """What a part of a call measures, or what it did before the call was given up."""
    kept = json.loads(unfinished.read_text()) if unfinished.is_file() else {}
    kept = gather([kept], processes)[0]  # what the main process sees counts
    if name in kept:
        return [Measurement(**entry) for entry in kept[name]] if processes.is_main_process else []
    reasons = len(missing)
    found = part()
    if processes.is_main_process and len(missing) == reasons:
        unfinished.parent.mkdir(exist_ok=True)
        kept[name] = [asdict(one) for one in found]
        write_text(unfinished, json.dumps(kept))
    return found


def check_extractor(settings: EvaluationSettings, device: torch.device) -> None:
    """Looks whether the extractor that these metrics need is here, before a run and not in it.

    Raises:
        ValueError: If it is not.
    """
    if set(OF_FEATURES) & set(settings.metrics):
        _extractor(settings, device)


class _Splits:
    """The parts of a run's data, read when they are asked for."""

    def __init__(self, trained: Trained, data: ImageSet | None) -> None:
        self.config = trained.config
        self._run, self._data = trained.run, data
        self._found: dict[str, ImageSet] = {}

    def of(self, split: Split) -> ImageSet:
        """The pictures of a part.

        Raises:
            ValueError: If the data has no such part.
        """
        if split not in self._found:
            if split in ("validation", "test"):
                config = _of_source_split(self.config, split)
                found = build.images(config, build.source(config), workers=1)
                self._found[split] = _with_the_classes(self._run, config, found, split)
                return self._found[split]
            self._data = self._data or pictures.of_run(self._run, self.config)
            train, held_out = self._data.split(self.config.data.holdout)
            if split == "heldout" and not len(held_out):
                raise ValueError(
                    "nothing was held out of this run: "
                    "train with data.holdout=0.1 to have a split heldout"
                )
            self._found[split] = held_out if split == "heldout" else train
        return self._found[split]

    def features(self, split: Split, extractor: Extractor) -> Features:
        """Of a part's pictures, kept by content, size of the pictures and extractor."""
        images, data = self.of(split), self.config.data
        about = [data.holdout, data.resolution, data.channels, data.crop, data.background]
        about += [] if data.resize == "bicubic" else [data.resize]  # the files are older than it
        chosen = hashlib.sha256(images.digests.tobytes()).hexdigest()
        digest = short_hash(
            [images.fingerprint, chosen, split, extractor.version, data.white, *about]
        )
        cache = Path(data.cache) / "features" / f"{extractor.name}-{digest}.npz"
        return distances.reference_features(images.images, extractor, cache)


def _of_source_split(config: Config, split: Split) -> Config:
    if "split" not in config.data.source:
        raise ValueError(
            f"data={config.data.name} has no {split} split; "
            "train with data.holdout=0.1 and use heldout"
        )
    source = {**config.data.source, "split": split}
    return config.model_copy(update={"data": config.data.model_copy(update={"source": source})})


def _with_the_classes(run: RunFolder, config: Config, found: ImageSet, split: str) -> ImageSet:
    """The pictures of another split; a ValueError if a network with classes cannot tell theirs."""
    if config.training.conditional and found.classes != run.classes():
        raise ValueError(
            f"the split {split} has {len(found.classes)} classes, and not the {len(run.classes())} "
            "that the network was trained with: their folders or columns have to name the same"
        )
    return found


def _of_samples(
    job: _Job, sampler: Node, missing: list[str], keep_samples: bool
) -> list[Measurement]:
    """Distances, nearest pictures and colours, from one set of drawn images."""
    settings, processes = job.settings, job.processes
    extractor = None
    if set(OF_FEATURES) & set(settings.metrics):
        try:
            extractor = _extractor(settings, job.drawing.device)
        except ValueError as error:  # what needs none goes on
            missing.append(str(error))
    if extractor is None and "colour" not in settings.metrics:
        return []
    protocol = {
        "count": settings.num_samples,
        "split": settings.split,
        "sampler": _sampler_name(sampler, job.drawing),
        "sampler_settings": sampler,
        "quantize": settings.quantize,
        **job.about,
    }
    folder = _drawn(job, protocol)
    drawn = None if extractor is None else _features_of_folder(job, folder, extractor)
    found: list[Measurement] = []
    if not processes.is_main_process:
        return found
    if extractor is not None and drawn is not None:
        found += _of_features(job, extractor, drawn, folder, protocol, missing)
    if "colour" in settings.metrics:
        samples = read_samples(folder, settings.num_samples, settings.quantize)
        data = job.splits.of(settings.split).images
        gaps, warnings = distances.colour(samples, data, protocol)
        found += gaps
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr, flush=True)
    if not keep_samples:
        shutil.rmtree(folder, ignore_errors=True)
    return found


def _of_features(
    job: _Job,
    extractor: Extractor,
    drawn: Features,
    folder: Path,
    protocol: dict[str, Any],
    missing: list[str],
) -> list[Measurement]:
    """What is measured on features; for nearest pictures also their sheet."""
    settings = job.settings
    protocol = {**protocol, "extractor": extractor.name}
    reference = job.splits.features(settings.split, extractor)
    found: list[Measurement] = []
    for metric in [name for name in OF_DISTANCES if name in settings.metrics]:
        try:
            found += distances.distance(
                metric,
                drawn,
                reference,
                extractor,
                protocol,
                settings.seed,
                settings.inception_splits,
                settings.num_reference,
            )
        except metrics.TooFew as error:
            missing.append(str(error))
    if "nearest" in settings.metrics:
        training = job.splits.features("train", extractor)
        try:
            ratio, pairs = distances.nearest_pairs(drawn, training, {**protocol, "split": "train"})
        except metrics.TooFew as error:
            missing.append(str(error))
            return found
        found.append(ratio)
        samples = read_samples(folder, settings.num_samples, settings.quantize)
        sheet = distances.pairs_sheet(pairs, samples, job.splits.of("train").images)
        path = _file(job, "nearest", protocol).with_suffix(".png")
        save_png(path, sheet)
        print(f"nearest {path}", flush=True)
    return found


def _decides(job: _Job, protocol: dict[str, Any]) -> dict[str, Any]:
    """All that decides the drawn images; which classes in turn the network's identity has."""
    sampler, classes = protocol["sampler_settings"], job.trained.subject.classes
    return {
        "network": job.network,
        "sampler": sampler,
        "seed": job.settings.seed,
        "classes": classes,
        "precision": job.settings.precision,
        "quantize": job.settings.quantize,
    }


def _file(job: _Job, words: str, protocol: dict[str, Any] | None = None) -> Path:
    """Where something of this step is kept; what has a protocol is told apart by all of it."""
    more = "" if protocol is None else f"-{short_hash([job.network, told(words, protocol)])}"
    name = f"step_{job.trained.step:08d}_{job.trained.kind}_{words}{more}"
    return job.trained.run.path / "evaluation" / name


def _drawn(job: _Job, protocol: dict[str, Any]) -> Path:
    """The folder of the protocol's images, all of them drawn."""
    settings, processes = job.settings, job.processes
    words = f"{protocol['sampler']}_seed_{settings.seed}-{word_for(_decides(job, protocol))}"
    folder = _file(job, words)
    if processes.is_main_process:
        claim_folder(folder, _decides(job, protocol))
    agree()
    count = settings.num_samples
    classes = job.trained.subject.classes_in_turn(count)
    draw_missing(
        job.drawing, folder, count, classes, settings.batch_size, processes, settings.quantize
    )
    agree()
    return folder


def _sampler_name(sampler: Node, drawing: Drawing) -> str:
    function = str(sampler["function"]["_target_"]).rpartition(".")[2]
    return f"{function}{sampler['num_steps'] or drawing.diffusion.num_timesteps}"


def _extractor(settings: EvaluationSettings, device: torch.device) -> Extractor:
    if settings.extractor == "inception":
        return features.inception(
            settings.weights_path, settings.download, device, settings.batch_size
        )
    return features.efficientnet_lite0(device, settings.batch_size)


def _features_of_folder(job: _Job, folder: Path, extractor: Extractor) -> Features:
    """Features of drawn images, each process computing its share; whole on every process."""
    count, size, quantize = (
        job.settings.num_samples,
        job.settings.batch_size,
        job.settings.quantize,
    )
    mine: list[tuple[int, Any, Any]] = []
    for start in _bar(range(0, count, size), extractor.name, job.processes):
        indices = range(start, min(start + size, count))
        images = [read_image(sample_file(folder, index, quantize)) for index in indices]
        found = extractor(np.stack(images), quantized=quantize != "none")
        mine.append((start, found.features, found.probabilities))
    parts = sorted(gather(mine, job.processes), key=lambda part: part[0])
    probabilities = None if parts[0][2] is None else torch.cat([part[2] for part in parts])
    return Features(torch.cat([part[1] for part in parts]), probabilities)


def _losses(job: _Job, split: Split) -> list[Measurement]:
    """Mean loss in ten buckets of timesteps."""
    data, objective = job.splits.of(split), job.trained.config.objective
    found = _summed(job, split, "losses", bound.loss_sums).mean()
    protocol = {
        **job.about,
        "split": split,
        "count": min(job.settings.num_images, len(data)),
        "loss": objective["loss"],
        "prediction": objective["prediction"],
    }
    return [
        Measurement(f"loss_t{bucket.first:04d}_{bucket.last:04d}", bucket.loss, protocol)
        for bucket in found
    ]


def _bits_per_dim(job: _Job, split: Split) -> list[Measurement]:
    """The variational bound and its parts, and its rate-distortion curve as a file."""
    found = _summed(job, split, "bits/dim", bound.bound_sums).mean()
    protocol = {**job.about, "split": split, "count": found.num_images}
    if job.processes.is_main_process:
        path = _file(job, "rate_distortion", protocol)
        path.parent.mkdir(exist_ok=True)
        bound.save_rate_distortion(path.with_suffix(".png"), path.with_suffix(".csv"), found)
        print(f"rate-distortion {path.with_suffix('.png')}", flush=True)
    parts = {
        "bits_per_dim": found.total,
        "bits_per_dim_rate": found.rate,
        "bits_per_dim_distortion": found.distortion,
        "bits_per_dim_prior": found.prior,
        "rmse": float(found.rmse[0]),
    }
    return [Measurement(name, value, protocol) for name, value in parts.items()]


def _summed(job: _Job, split: Split, what: str, sums: Callable[..., Any]) -> Any:
    """What bound.loss_sums or bound.bound_sums find on the pictures, of all processes in one."""
    diffusion = job.drawing.diffusion
    mine: list[Any] = []
    with job.drawing.computing():
        for model, numbers, x0 in _batches(job, split, what):

            def part(span: slice, model: Any = model, n: Any = numbers, x0: Any = x0) -> Any:
                return sums(model(span), diffusion, [(n[span], x0[span])], job.settings.seed)

            mine += halve_to_fit(part, len(x0))
    added = [functools.reduce(operator.add, mine)] if mine else []  # a process may have no share
    return functools.reduce(operator.add, gather(added, job.processes))


def _batches(
    job: _Job, split: Split, what: str
) -> Iterator[tuple[Callable[[slice], Model], Tensor, Tensor]]:
    """This process's share of num_images pictures, evenly spaced in the set.

    Yields:
        The unguided model for the classes of a part of them, their numbers, and x0.
    """
    data, drawing, settings = job.splits.of(split), job.drawing, job.settings
    unguided = replace(drawing, sampler=replace(drawing.sampler, guidance_scale=1.0))
    count = min(settings.num_images, len(data))
    chosen = np.arange(count) * len(data) // count
    conditional = job.trained.subject.classes is not None
    for start in _bar(range(0, count, settings.batch_size), what, job.processes):
        numbers = chosen[start : start + settings.batch_size]
        x0 = to_floats(torch.from_numpy(data.stored[data.rows[numbers]]).to(drawing.device))
        labels: Tensor | None = None
        if conditional and data.labels is not None:
            labels = torch.from_numpy(data.labels[numbers]).to(drawing.device)

        def model(part: slice, labels: Tensor | None = labels) -> Model:
            return unguided.model(None if labels is None else labels[part])

        yield model, torch.from_numpy(numbers).to(drawing.device), x0


def _bar(starts: range, what: str, processes: PartialState) -> Iterator[int]:
    """This process's share of the batches' starts, under a progress bar on the main process."""
    hidden = None if processes.is_main_process else True
    yield from tqdm(share(starts, processes), desc=what, unit="batch", disable=hidden)
