"""What a run came to, read from its folder: each measure with its protocol, final and best. Nothing is built, nothing of the folder runs."""

import bisect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ddpm import evaluation
from ddpm.run_folder import RunFolder, flat

PARTS = ("loss_t", "channel_", "bits_per_dim_")  # one timestep bucket, one channel, one term of the bound
WINDOW = 0.1  # share of a run's steps that a loss is averaged over, so that runs with other log intervals compare


@dataclass(frozen=True)
class Result:
    """One measure of one run by one protocol.    final, best: (value, step); best is None where neither less nor more is better.

    deviation: of the final value, over subsets or splits.
    """

    metric: str
    protocol: dict[str, Any] = field(hash=False)
    final: tuple[float, int]
    best: tuple[float, int] | None
    deviation: float | None = None

    @property
    def name(self) -> str:
        """The measure with its protocol in one word, such as fid@50k:train:inception:ancestral1000:ema, whatever the step."""
        return evaluation.name(self.metric, self.protocol) if "count" in self.protocol else self.metric


def losses(folder: Path) -> list[tuple[int, float]]:
    """(step, training loss since the record before) of every report so far; none if there is no metrics.jsonl. A line cut short is left out."""
    file = folder / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.is_file() else []
    records = [json.loads(line) for line in lines if line]
    return [(record["step"], record["train/loss"]) for record in records if "train/loss" in record]


def windowed(records: Sequence[tuple[int, float]], share: float = WINDOW) -> list[tuple[int, float]]:
    """At each report the mean loss of the steps before it, of at least the last report and at most `share` of all steps."""
    steps = [0, *(step for step, _ in records)]
    sums = [0.0]
    for (step, loss), before in zip(records, steps, strict=False):
        sums.append(sums[-1] + loss * (step - before))
    means = []
    for index in range(1, len(steps)):
        first = min(bisect.bisect_left(steps, steps[index] - share * steps[-1]), index - 1)
        means.append((steps[index], (sums[index] - sums[first]) / (steps[index] - steps[first])))
    return means


def results(run: RunFolder, config: Mapping[str, Any]) -> list[Result]:
    """The loss first, then every figure of evaluation.json in its order; what was not measured is not there.    config: the run's config.yaml."""
    found = []
    means = windowed(losses(run.path))
    if means:
        decides = {key: value for group in ("schedule", "objective") for key, value in flat({group: config.get(group) or {}}).items()}
        protocol = {"data": (run.record().get("data") or {}).get("fingerprint"), **decides}
        lowest = min(means, key=lambda mean: mean[1])
        found.append(Result("loss", protocol, (means[-1][1], means[-1][0]), (lowest[1], lowest[0])))
    entries: dict[str, list[dict[str, Any]]] = {}
    for entry in evaluation.recorded(run.path / "evaluation.json"):
        protocol = {key: value for key, value in entry["protocol"].items() if key != "step"}
        entries.setdefault(json.dumps([entry["metric"], protocol], sort_keys=True), []).append(entry)
    for same in entries.values():
        last = max(same, key=lambda entry: entry["protocol"]["step"])
        better = evaluation.better(last["metric"])
        chosen = better(same, key=lambda entry: entry["value"]) if better is not None else None
        best = None if chosen is None else (chosen["value"], chosen["protocol"]["step"])
        protocol = {key: value for key, value in last["protocol"].items() if key != "step"}
        found.append(Result(last["metric"], protocol, (last["value"], last["protocol"]["step"]), best, last["deviation"]))
    return found


def scalars(measures: Sequence[Result]) -> dict[str, float]:
    """Final and best values under names that are the same in every run, beside the curves that they are of; of the parts of a figure, none."""
    values = {}
    for result in measures:
        if result.metric.startswith(PARTS):
            continue
        tag = f"train/{result.name}" if result.metric == "loss" else f"eval/{result.name}"
        values[f"{tag}_final"] = result.final[0]
        if result.best is not None:
            values[f"{tag}_best"] = result.best[0]
    return values


def images_per_second(record: Mapping[str, Any]) -> float | None:
    """Images a second in updates, over all starts of a run (run.json); None if none was timed."""
    timed = record.get("timed") or {}
    return timed["images"] / timed["seconds_in_steps"] if timed.get("seconds_in_steps") else None


def hours(record: Mapping[str, Any]) -> float | None:
    """Hours that the run has trained so far, with sampling, measuring and saving; None if unknown."""
    timed = record.get("timed") or {}
    return timed["seconds"] / 3600 if "seconds" in timed else None
