"""Measures a run's network by a protocol, mostly on drawn images."""

import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from tqdm import tqdm

from ddpm.config import build
from ddpm.config.schema import EvaluationSettings
from ddpm.config.validation import Node
from ddpm.data.image_set import ImageSet
from ddpm.evaluate import distances, features, metrics, of_data, reference
from ddpm.evaluate.features import Extractor, Features
from ddpm.evaluate.job import Job, Keep, file_of
from ddpm.evaluate.reference import Reference, ReferenceFile
from ddpm.evaluate.splits import Splits
from ddpm.runs import results
from ddpm.runs.results import Measurement
from ddpm.sample.drawing import Drawing
from ddpm.sample.folder import (
    claim_folder,
    draw_missing,
    holds,
    num_missing,
    read_samples,
    sample_file,
    word_for,
)
from ddpm.sample.images import read_image, save_png
from ddpm.sample.subject import Trained
from ddpm.sample.tuning import tuned
from ddpm.system.files import write_arrays
from ddpm.system.processes import agree, gather, share
from ddpm.system.text import say
from ddpm.tune.decide import Tune

OF_REFERENCE = ("fd", "kd", "precision_recall")  # metrics of drawn images against a reference
OF_FEATURES = ("fd", "kd", "inception_score", "precision_recall", "classes", "nearest")
OF_SAMPLES = (*OF_FEATURES, "colour")  # metrics that need drawn images


def job_of(
    trained: Trained,
    sampler: Node,
    settings: EvaluationSettings,
    processes: PartialState,
    device: torch.device,
    keep: Keep,
    data: ImageSet | None = None,
    tune: Tune = False,
) -> Job:
    """Prepares to measure a run's network at its step. Every process must call this.

    Args:
        trained: The network.
        sampler: Settings of the sampler, as in conf/sampler/.
        settings: The metrics and their protocol.
        processes: The processes that share the work.
        device: The device of this process.
        keep: Records figures, on the main process, as soon as they are measured.
        data: The run's pictures, if they are loaded; None to load them.
        tune: How the network is executed while it draws (ddpm.sample.tuning).

    Raises:
        ValueError: If the reference does not fit, or the pictures are not the run's.
    """
    file = _reference_file(settings, trained.subject.shape)
    diffusion = trained.subject.diffusion
    sampler = build.sampler_settings(sampler, diffusion)
    built = build.sampler(sampler, diffusion)
    drawing = trained.subject.drawing(built, settings.seed, device, settings.precision)
    splits = Splits(trained, data)
    about = {
        "weights": trained.kind,
        "step": trained.step,
        "data": splits.fingerprint,
        "seed": settings.seed,
        "precision": settings.precision,
        "resize": trained.config.data.resize,
    }
    network = trained.subject.identity()
    entries = results.read_measurements(trained.run.path / "evaluation.json")
    entries = gather([entries], processes)[0]  # all follow what the main process sees
    return Job(
        *(trained, settings, processes, drawing, sampler, file, splits, about, network, entries),
        *(keep, tune),
    )


def measure(job: Job, keep_samples: bool = True) -> tuple[list[Measurement], list[str]]:
    """Measures a run's network at its step. Every process must call this.

    Figures that are recorded for the same network and protocol are not measured again.

    Args:
        job: The evaluation.
        keep_samples: Keep the drawn images for later evaluations.

    Returns:
        The measurements, complete on the main process; and why some metrics could not be measured.

    Raises:
        ValueError: If the data does not have the split that a metric needs.
    """
    settings = job.settings
    if {"losses", "bits_per_dim"} & set(settings.metrics):
        job.splits.of(settings.bound_split)  # fails before anything is measured
    wanted: list[str] = [metric for metric in OF_SAMPLES if metric in settings.metrics]
    protocols = {metric: _protocol_of_samples(job, metric) for metric in wanted}
    left = {metric: said for metric, said in protocols.items() if not job.has(metric, said)}
    if left:
        _of_samples(job, left, keep_samples)
    if "losses" in settings.metrics:
        of_data.losses(job)
    if "bits_per_dim" in settings.metrics:
        of_data.bits_per_dim(job)
    return job.found, job.missing


def _reference_file(
    settings: EvaluationSettings, shape: tuple[int, int, int] | None = None
) -> ReferenceFile | None:
    """Opens evaluation.reference if a metric is measured against it."""
    if settings.reference is None or not set(OF_REFERENCE) & set(settings.metrics):
        return None
    path = Path(settings.reference).expanduser()
    file = reference.open_file(path, settings.extractor, settings.metrics)
    if file.pictures is not None and shape is not None and file.pictures[1:3] != shape[1:]:
        (_, height, width), theirs = shape, file.pictures
        raise ValueError(
            f"evaluation.reference={path} has pictures of {theirs[1]}x{theirs[2]} pixels, but this "
            f"network draws {height}x{width}: give a reference of that size"
        )
    return file


def check_extractor(settings: EvaluationSettings, device: torch.device) -> None:
    """Checks that the extractor and the reference that these metrics need are available.

    Training calls this before it starts, so that a missing file does not stop a run halfway.

    Raises:
        ValueError: If one of them is missing.
    """
    _reference_file(settings)
    if set(OF_FEATURES) & set(settings.metrics):
        _extractor(settings, device)


def write_reference(
    trained: Trained, settings: EvaluationSettings, device: torch.device, to: Path
) -> int:
    """Writes a file for evaluation.reference: mean and covariance of features of a run's data.

    Args:
        trained: The run's network.
        settings: The settings that name the split and the extractor.
        device: Where the features are computed.
        to: The .npz file to write.

    Returns:
        The number of pictures.

    Raises:
        ValueError: If the extractor or the pictures are missing.
    """
    extractor = _extractor(settings, device)
    found = Splits(trained, None).reference(settings.split, extractor).moments
    if found is None:
        raise ValueError(f"evaluation.split={settings.split} has 1 picture; a covariance needs 2")
    write_arrays(to, mu=found.mean.numpy(), sigma=found.covariance.numpy())
    return found.count


def _protocol_of_samples(job: Job, metric: str) -> dict[str, Any]:
    """The protocol of a metric of drawn images."""
    settings, kept = job.settings, reference.KEPT
    split = "train" if metric == "nearest" else settings.split
    protocol: dict[str, Any] = {
        "count": settings.num_samples,
        **({} if metric == "classes" else {"split": split}),
        "sampler": _sampler_name(job.sampler, job.drawing),
        "sampler_settings": job.sampler,
        "quantize": settings.quantize,
        **job.about,
    }
    if metric in OF_FEATURES:
        protocol["extractor"] = settings.extractor
    if metric == "inception_score":
        protocol["splits"] = settings.inception_splits
    if metric in OF_REFERENCE and job.file is not None:
        del protocol["split"]
        protocol["reference"] = job.file.digest
    if metric == "precision_recall":
        protocol["num_reference"] = settings.num_reference
    if metric in ("kd", "precision_recall", "nearest"):  # fd uses all pictures
        of_file = job.file is not None and "reference" in protocol and job.file.pictures
        count = of_file[0] if of_file else len(job.splits.of(protocol["split"]))
        if count > kept and protocol.get("num_reference") is None:
            protocol["num_reference"] = kept
    return protocol


def _of_samples(job: Job, protocols: dict[str, dict[str, Any]], keep_samples: bool) -> None:
    """Measures distances, nearest pictures and colors on one set of drawn images."""
    settings = job.settings
    if job.file is None or not set(protocols) <= {*OF_REFERENCE, "inception_score", "classes"}:
        job.splits.of(settings.split)  # fails before anything is drawn
    extractor = None
    if set(OF_FEATURES) & set(protocols):
        try:
            extractor = _extractor(settings, job.drawing.device)
        except ValueError as error:  # metrics without an extractor go on
            job.missing.append(str(error))
    if extractor is None and "colour" not in protocols:
        return
    folder = _drawn(job)
    drawn = None if extractor is None else _features_of_folder(job, folder, extractor)
    if not job.processes.is_main_process:
        return
    if extractor is not None and drawn is not None:
        _of_features(job, extractor, drawn, folder, protocols)
    if "colour" in protocols:
        samples = read_samples(folder, settings.num_samples, settings.quantize)
        data = reference.blocks_of(job.splits.of(settings.split))
        gaps, warnings = distances.colour([samples], data, protocols["colour"])
        job.add(gaps)
        for warning in warnings:
            say(f"warning: {warning}", to_error=True)
    if not keep_samples and folder.parent == file_of(job, "").parent:
        shutil.rmtree(folder, ignore_errors=True)


def _of_features(
    job: Job,
    extractor: Extractor,
    drawn: Features,
    folder: Path,
    protocols: dict[str, dict[str, Any]],
) -> None:
    """Measures the metrics that use features."""
    against: Reference | None = None
    if compared := set(OF_REFERENCE) & set(protocols):
        if job.file is None:
            against = job.splits.reference(job.settings.split, extractor)
        else:
            against = job.file.reference(extractor, job.splits.folder, compared)
    for metric in [name for name in OF_FEATURES if name in protocols]:
        try:
            if metric == "nearest":
                job.add([_nearest(job, extractor, drawn, folder, protocols[metric])])
            elif metric == "classes":
                asked = _classes_asked(job, len(drawn.features))
                job.add(distances.classes(drawn, asked, extractor, protocols[metric]))
            else:
                seed = job.settings.seed
                job.add(
                    distances.distance(metric, drawn, against, extractor, protocols[metric], seed)
                )
        except metrics.CannotBeHad as error:
            job.missing.append(str(error))


def _classes_asked(job: Job, count: int) -> list[str] | None:
    """The class name that each image was drawn for; None for a network without classes."""
    subject = job.trained.subject
    in_turn, names = subject.classes_in_turn(count), subject.classes
    return None if in_turn is None or names is None else [names[index] for index in in_turn]


def _nearest(
    job: Job, extractor: Extractor, drawn: Features, folder: Path, protocol: dict[str, Any]
) -> Measurement:
    """Measures how near drawn images are to training pictures; saves a sheet of nearest pairs."""
    training = job.splits.of("train")
    among = job.splits.reference("train", extractor).features
    assert among is not None
    ratio, pairs = distances.nearest_pairs(drawn, among, protocol)
    rows = training.rows[reference.kept(len(training))[[pair[1] for pair in pairs]]]
    files = [sample_file(folder, pair[0], job.settings.quantize) for pair in pairs]
    samples = np.stack([read_image(file).round().astype(np.uint8) for file in files])
    path = file_of(job, "nearest", protocol).with_suffix(".png")
    path.parent.mkdir(exist_ok=True)
    save_png(path, distances.pairs_sheet(samples, training.stored[rows].transpose(0, 2, 3, 1)))
    say(f"nearest {path}")
    return ratio


def _decides(job: Job) -> dict[str, Any]:
    """Everything that determines the drawn images; the classes take turns."""
    return {
        "network": job.network,
        "sampler": job.sampler,
        "seed": job.settings.seed,
        "classes": job.trained.subject.classes,
        "precision": job.settings.precision,
        "quantize": job.settings.quantize,
    }


def _drawn(job: Job) -> Path:
    """The folder of the images, after drawing those that are missing."""
    settings, processes, count = job.settings, job.processes, job.settings.num_samples
    decides = _decides(job)
    digest = word_for(decides)
    # folders of ddpm.sample; all processes follow what the main process sees
    shared = gather([[str(one) for one in _sampled(job, digest, decides)]], processes)[0]
    if shared:
        return Path(shared[0])
    name = _sampler_name(job.sampler, job.drawing)
    folder = file_of(job, f"{name}_seed_{settings.seed}-{digest}")
    if processes.is_main_process:
        claim_folder(folder, decides)
    agree()
    classes = job.trained.subject.classes_in_turn(count)
    left = gather([num_missing(folder, count, settings.quantize)], processes)[0]
    batch, cache = settings.batch_size, Path(job.trained.config.data.cache)
    rest = (job.trained.subject, classes, batch, left, processes, job.tune, cache)
    with tuned(job.drawing, *rest) if left else nullcontext(job.drawing) as drawing:
        draw_missing(drawing, folder, count, classes, batch, processes, settings.quantize)
    agree()
    return folder


def _sampled(job: Job, digest: str, decides: dict[str, Any]) -> list[Path]:
    """Folders in which ddpm.sample has drawn all images of this evaluation."""
    return [
        folder
        for folder in sorted(job.trained.run.samples.glob(f"*-{digest}"))
        if holds(folder, decides)
        and all(
            sample_file(folder, index, job.settings.quantize).is_file()
            for index in range(job.settings.num_samples)
        )
    ]


def _sampler_name(sampler: Node, drawing: Drawing) -> str:
    function = str(sampler["function"]["_target_"]).rpartition(".")[2]
    return f"{function}{sampler['num_steps'] or drawing.diffusion.num_timesteps}"


def _extractor(settings: EvaluationSettings, device: torch.device) -> Extractor:
    if settings.extractor == "inception":
        return features.inception(
            settings.weights_path, settings.download, device, settings.batch_size
        )
    named = {"efficientnet_lite0": features.efficientnet_lite0, "digits": features.of_digits}
    return named[settings.extractor](device, settings.batch_size)


def _features_of_folder(job: Job, folder: Path, extractor: Extractor) -> Features:
    """Features of the drawn images: each process computes its share, and every one gets all."""
    count, size, quantize = (
        job.settings.num_samples,
        job.settings.batch_size,
        job.settings.quantize,
    )
    mine: list[tuple[int, Any, Any]] = []
    hidden = None if job.processes.is_main_process else True
    starts = share(range(0, count, size), job.processes)
    for start in tqdm(starts, desc=extractor.name, unit="batch", disable=hidden):
        indices = range(start, min(start + size, count))
        images = [read_image(sample_file(folder, index, quantize)) for index in indices]
        found = extractor(np.stack(images), quantized=quantize != "none")
        mine.append((start, found.features, found.probabilities))
    parts = sorted(gather(mine, job.processes), key=lambda part: part[0])
    probabilities = None if parts[0][2] is None else torch.cat([part[2] for part in parts])
    return Features(torch.cat([part[1] for part in parts]), probabilities)
