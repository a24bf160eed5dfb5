"""Reads a run's results from its folder: each metric with its protocol, final and best value.

Nothing is instantiated, and nothing in the folder is executed.
"""

import bisect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from ddpm.runs.contents import Line, read_figures, read_lines
from ddpm.runs.folder import RunFolder
from ddpm.runs.identity import canonical, flat
from ddpm.system.files import as_key, lock, write_text

# one timestep bucket or quartile, one channel, one term of the bound
PARTS = (
    "loss_t",
    "loss_q",
    "channel_",
    "bits_per_dim_",
)
# the meaning of fields that older protocols lack: in all figures, in figures of samples, and in
# metrics by the first part of their names
BEFORE: dict[str, Any] = {"precision": "tf32", "resize": "bicubic"}
BEFORE_OF_SAMPLES: dict[str, Any] = {"quantize": "round"}
BEFORE_OF: dict[str, dict[str, Any]] = {
    "inception_score": {"splits": 10},
    "class_score_": {"splits": 10},
    "precision": {"num_reference": None},
    "recall": {"num_reference": None},
}
MAY_MISS = ("deviation", "floor", "network")  # optional in an entry of evaluation.json
# share of a run's steps to average a loss over, so that the log interval does not matter
WINDOW = 0.1


@dataclass(frozen=True)
class Measurement:
    """One measured figure.

    Attributes:
        metric: The metric's name.
        value: The measured value.
        protocol: Everything that decides the value except the network. Figures compare only if
            their protocols are equal.
        deviation: Standard deviation over subsets or splits.
        floor: The same distance between two random halves of the data, which no network beats.
        network: Hash of the weights and process measured. It is not part of the protocol: figures
            of several networks compare, and a retrained network's figure replaces the old one.
    """

    metric: str
    value: float
    protocol: dict[str, Any] = field(hash=False)
    deviation: float | None = None
    floor: float | None = None
    network: str | None = None

    @property
    def id(self) -> str:
        """The metric, protocol and step in one word.

        For example fid@50k:train:inception:ancestral1000:ema:step800000.
        """
        return f"{name(self.metric, self.protocol)}:step{self.protocol['step']}"


def name(metric: str, protocol: Mapping[str, Any]) -> str:
    """Returns a metric and its protocol, without the step, in one word.

    Fields that older protocols lack appear only if their values differ from the old behavior.
    """
    said = [
        f"reference-{protocol[key][:8]}" if key == "reference" else str(protocol[key])
        for key in ("split", "reference", "extractor", "sampler", "weights")
        if key in protocol
    ]
    for key, value in _before(metric, protocol).items():
        if protocol.get(key, value) != value:
            said.append(protocol[key] if key == "precision" else f"{key}_{protocol[key]}")
    count = protocol["count"]
    return ":".join(
        [f"{metric}@{count // 1000}k" if count % 1000 == 0 else f"{metric}@{count}", *said]
    )


def names(figures: Iterable[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """Returns a unique name for each figure, in the order in which they were recorded.

    The first figure with a name keeps it. Later ones append how their protocol differs from the
    first one's, such as fid@50k:train:...:ema:guidance_scale_1.5. So a figure's name does not
    change when more are recorded.

    Args:
        figures: The metric and protocol of each figure. The step does not count.
    """
    first: dict[str, dict[str, Any]] = {}
    found = []
    for metric, protocol in figures:
        said, own = name(metric, protocol), flat(protocol)
        known = first.setdefault(said, own)
        differs = [
            f"{key.removesuffix('._target_').rpartition('.')[2]}_{own.get(key)}"
            for key in dict.fromkeys([*known, *own])
            if key != "step" and own.get(key) != known.get(key)
        ]
        found.append(":".join([said, *differs]))
    return found


def tags(figures: Sequence[Measurement]) -> dict[str, float]:
    """Returns the values of one evaluation during training by unique names.

    A name is the metric's. If an evaluation has several figures of a metric, the values in which
    their protocols differ follow, the split first: loss_total:train, loss_total:heldout.
    """
    same: dict[str, list[Measurement]] = {}
    for figure in figures:
        same.setdefault(figure.metric, []).append(figure)
    found: dict[str, float] = {}
    for metric, some in same.items():
        protocols = [flat(figure.protocol) for figure in some]
        keys = dict.fromkeys(["split", *(key for protocol in protocols for key in protocol)])
        differ = [
            key for key in keys if len({as_key(protocol.get(key)) for protocol in protocols}) > 1
        ]
        enough = next(
            count
            for count in range(len(differ) + 1)
            if len({_said(protocol, differ[:count]) for protocol in protocols}) == len(some)
        )
        for figure, protocol in zip(some, protocols, strict=True):
            found[":".join([metric, *_said(protocol, differ[:enough])])] = figure.value
    return found


def _said(protocol: Mapping[str, Any], keys: Sequence[str]) -> tuple[str, ...]:
    return tuple(str(protocol.get(key)) for key in keys)


def whole_protocol(metric: str, protocol: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a protocol with the fields added that earlier versions did not record."""
    return {**_before(metric, protocol), **protocol}


def told(metric: str, protocol: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a protocol without the newer fields whose values are the old behavior."""
    before = _before(metric, protocol)
    return {key: value for key, value in protocol.items() if before.get(key, ...) != value}


def _before(metric: str, protocol: Mapping[str, Any]) -> dict[str, Any]:
    of_metric: dict[str, Any] = next(
        (some for start, some in BEFORE_OF.items() if metric.startswith(start)), {}
    )
    return {**BEFORE, **(BEFORE_OF_SAMPLES if "sampler" in protocol else {}), **of_metric}


def better(metric: str) -> Callable[..., Any] | None:
    """Returns min or max, whichever picks the better of two values of a metric.

    Returns None if neither direction is better (a color gap, a ratio of nearest distances).
    """
    if metric == "loss" or metric.startswith(
        ("fid", "fd_", "kid", "kd_", "bits_per_dim", "loss_", "rmse")
    ):
        return min
    return (
        max
        if metric.startswith(
            ("inception_score", "class_score_", "class_accuracy", "named", "precision", "recall")
        )
        else None
    )


def record(path: Path, figures: Sequence[Measurement]) -> None:
    """Adds figures to a file, atomically and under a lock, so concurrent processes lose none.

    A figure replaces the previous one with the same metric and protocol.
    """
    with lock(path.with_name(f".{path.name}.lock")):
        kept = {key(entry): entry for entry in read_measurements(path)}
        for figure in figures:
            entry = {"id": figure.id, **asdict(figure)}
            kept[key(entry)] = json.loads(json.dumps(entry))
        write_text(path, json.dumps(list(kept.values()), indent=1) + "\n")


def recorded(
    entries: Sequence[dict[str, Any]],
    names: tuple[str, ...],
    protocol: Mapping[str, Any],
    network: str,
) -> list[Measurement]:
    """Returns the recorded figures with this protocol and network.

    Args:
        entries: The entries, as `read_measurements` returns them.
        names: Prefixes of the metrics to return.
        protocol: The protocol.
        network: Hash of the weights and process.
    """
    wanted = as_key(protocol)
    return [
        Measurement(**{field.name: entry[field.name] for field in fields(Measurement)})
        for entry in entries
        if entry["metric"].startswith(names)
        and entry.get("network") == network
        and as_key(entry["protocol"]) == wanted
    ]


def read_measurements(path: Path) -> list[dict[str, Any]]:
    """Returns the entries of an evaluation.json, empty if there is none.

    Protocols of earlier versions get the fields that they lack, with the same meaning.

    Raises:
        Unreadable: If the file does not have the expected content.
    """
    return [
        {
            **entry,
            **{key: None for key in MAY_MISS if key not in entry},
            "protocol": whole_protocol(entry["metric"], entry["protocol"]),
        }
        for entry in read_figures(path)
    ]


def key(entry: dict[str, Any]) -> str:
    """Returns an entry's metric and protocol as text; two entries with the same key compare."""
    return as_key([entry["metric"], whole_protocol(entry["metric"], entry["protocol"])])


@dataclass(frozen=True)
class Result:
    """The values of one metric with one protocol in one run.

    Attributes:
        metric: The metric's name.
        protocol: Everything that decides the value except the network and the step.
        final: The last (value, step).
        best: The best (value, step); None if neither direction is better.
        deviation: Standard deviation of the final value, over subsets or splits.
        measured: (step, value) of every measurement, by step; empty for the training loss, see
            `loss_curve`.
    """

    metric: str
    protocol: dict[str, Any] = field(hash=False)
    final: tuple[float, int]
    best: tuple[float, int] | None
    deviation: float | None = None
    measured: tuple[tuple[int, float], ...] = ()

    @property
    def name(self) -> str:
        """The metric and protocol in one word, without the step.

        For example fid@50k:train:inception:ancestral1000:ema.
        """
        return name(self.metric, self.protocol) if "count" in self.protocol else self.metric

    @cached_property
    def measure(self) -> tuple[str, str]:
        """The metric and its protocol as text; results with the same text compare."""
        return self.metric, as_key(self.protocol)


def read_results(run: RunFolder, config: Mapping[str, Any]) -> list[Result]:
    """Returns the training loss, if any, then every figure of evaluation.json in its order.

    Args:
        run: The run's folder.
        config: The content of the run's config.yaml.

    Raises:
        ValueError: If a file does not have the expected content.
    """
    lines = read_lines(run.path / "metrics.jsonl")
    return results_of(config, run.record(), lines, read_measurements(run.path / "evaluation.json"))


def results_of(
    config: Mapping[str, Any],
    record: Mapping[str, Any],
    lines: Sequence[Line],
    measured: Sequence[dict[str, Any]],
) -> list[Result]:
    """Returns the same as `read_results`, from file contents.

    Args:
        config: The content of config.yaml.
        record: The content of run.json.
        lines: The lines of metrics.jsonl.
        measured: The entries of evaluation.json.
    """
    data = config.get("data") or {}
    # run settings, not evaluation settings, so evaluation.json does not have them
    pictures = {key: data[key] for key in ("resolution", "crop") if key in data}
    found = []
    means = window_means(curve_of(lines, "train/loss"))
    if means:
        decides = {
            key: value
            for group in ("schedule", "objective")
            for key, value in flat({group: canonical(config.get(group) or {}, group)}).items()
        }
        fingerprint = (record.get("data") or {}).get("fingerprint")
        pictures_of_loss = {**pictures, "resize": data.get("resize", BEFORE["resize"])}
        protocol = {"data": fingerprint, **pictures_of_loss, **decides}
        lowest = min(means, key=lambda mean: mean[1])
        found.append(Result("loss", protocol, (means[-1][1], means[-1][0]), (lowest[1], lowest[0])))
    entries: dict[str, list[dict[str, Any]]] = {}
    for entry in measured:
        protocol = {key: value for key, value in entry["protocol"].items() if key != "step"}
        entries.setdefault(as_key([entry["metric"], protocol]), []).append(entry)
    for same in entries.values():
        last = max(same, key=lambda entry: entry["protocol"]["step"])
        choose = better(last["metric"])
        chosen = choose(same, key=lambda entry: entry["value"]) if choose is not None else None
        best = None if chosen is None else (float(chosen["value"]), chosen["protocol"]["step"])
        protocol = {key: value for key, value in last["protocol"].items() if key != "step"}
        protocol |= pictures
        found.append(
            Result(
                last["metric"],
                protocol,
                (float(last["value"]), last["protocol"]["step"]),
                best,
                None if last["deviation"] is None else float(last["deviation"]),
                tuple(sorted((entry["protocol"]["step"], float(entry["value"])) for entry in same)),
            )
        )
    return found


def loss_curve(folder: Path) -> list[tuple[int, float]]:
    """Returns (step, mean training loss since the previous report) of every report so far."""
    return scalar_curve(folder, "train/loss")


def scalar_curve(folder: Path, tag: str) -> list[tuple[int, float]]:
    """Returns the (step, value) of every report of a scalar so far.

    The list is empty without a metrics.jsonl. Damaged lines and lines that are cut short are left
    out. Of two lines for the same step, the later one counts.

    Args:
        folder: The run's folder.
        tag: The scalar's name, such as train/grad_norm.
    """
    return curve_of(read_lines(folder / "metrics.jsonl"), tag)


def curve_of(lines: Sequence[Line], tag: str) -> list[tuple[int, float]]:
    """Returns the same as `scalar_curve`, from lines that have been read."""
    records = [line.record for line in lines if line.record and tag in line.record]
    return sorted({record["step"]: record[tag] for record in records if record["step"]}.items())


def window_means(
    records: Sequence[tuple[int, float]], share: float = WINDOW
) -> list[tuple[int, float]]:
    """Returns a moving average of the loss at each report.

    The window covers at least that report, and at most `share` of all steps.

    Args:
        records: (step, loss) of each report, as `loss_curve` returns them.
        share: Largest window, as a share of all steps.

    Returns:
        (step, mean loss) of each report.
    """
    steps = [0, *(step for step, _ in records)]
    sums = [0.0]
    for (step, loss), before in zip(records, steps, strict=False):
        sums.append(sums[-1] + loss * (step - before))
    means = []
    for index in range(1, len(steps)):
        first = min(bisect.bisect_left(steps, steps[index] - share * steps[-1]), index - 1)
        means.append((steps[index], (sums[index] - sums[first]) / (steps[index] - steps[first])))
    return means


def scalars(measures: Sequence[Result]) -> dict[str, float]:
    """Returns final and best values by tags that are the same in every run.

    The tags put each value next to its curve in TensorBoard. Parts of a figure (PARTS) are left
    out.
    """
    values = {}
    figures = [result for result in measures if "count" in result.protocol]
    named = dict(
        zip(map(id, figures), names((one.metric, one.protocol) for one in figures), strict=True)
    )
    for result in measures:
        if result.metric.startswith(PARTS):
            continue
        said = named.get(id(result), result.name)
        tag = f"train/{said}" if result.metric == "loss" else f"eval/{said}"
        values[f"{tag}_final"] = result.final[0]
        if result.best is not None:
            values[f"{tag}_best"] = result.best[0]
    return values
