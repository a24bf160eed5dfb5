"""Courses of a measure over training: one per group of seeds, over steps or any cost."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ddpm.compare import order
from ddpm.compare.tables import but_for_seed, differences, metric_columns, protocol_of
from ddpm.config.compose import nearest
from ddpm.runs.contents import read_lines
from ddpm.runs.costs import read_costs
from ddpm.runs.reader import Compared
from ddpm.runs.results import scalar_curve, window_means

Over = Literal["step", "images", "hours", "device_hours", "flops"]
SMOOTH = 0.05  # share of a run's steps to average training's reports over


@dataclass(frozen=True)
class Course:
    """One measure over training, of runs that differ only in their seed.

    Attributes:
        settings: The settings that differ between all compared runs, except the seed.
        num_seeds: The fewest and the most runs at one step.
        failed: Whether the runs failed. Failed runs are never averaged with others.
        over: (N,) step or cost, averaged over the runs.
        mean: (N,) mean of the measure over the runs.
        least: (N,) minimum over the runs.
        most: (N,) maximum over the runs.
    """

    settings: dict[str, Any]
    num_seeds: tuple[int, int]
    failed: bool
    over: np.ndarray
    mean: np.ndarray
    least: np.ndarray
    most: np.ndarray


@dataclass(frozen=True)
class Panel:
    """The courses of one measure by one protocol.

    Attributes:
        name: Name of the measure and protocol.
        measure: Name of the measure alone.
        reported: Whether training reports it, and it is averaged; False for evaluations.
        courses: One or more courses, in the order of the runs.
        left_out: Folders of runs that have the measure but not the cost.
    """

    name: str
    measure: str
    reported: bool
    courses: list[Course]
    left_out: list[str]


def find(compared: Sequence[Compared], metric: str, over: Over) -> list[Panel]:
    """Returns one panel per protocol that METRIC names.

    Args:
        compared: The runs.
        metric: `loss` or `eval/NAME` as in ddpm.compare.order, or a value that training reports,
            such as `train/grad_norm`. Reports and the loss are averaged over a twentieth of a run's
            steps.
        over: Unit of the horizontal axis.

    Raises:
        ValueError: If there is nothing to draw.
    """
    reported = metric.startswith("train/")
    if reported:
        columns = {
            f"{metric} {column.partition(' ')[2]}".strip(): protocol
            for column, protocol in metric_columns(compared).items()
            if protocol[0] == "loss"
        }
    elif metric == "loss" or metric.startswith(("eval/", "loss:")):
        columns = order.choose(compared, metric, "plot_of")
    else:
        raise ValueError(f"plot_of={metric}: give loss, eval/NAME or train/NAME")
    tag = metric if reported else "train/loss"
    found = [
        panel
        for column, protocol in columns.items()
        for panel in [_panel(compared, column, protocol, tag, over)]
        if panel.courses or panel.left_out
    ]
    if not found:
        lines = [
            line.record for one in compared for line in read_lines(one.run.path / "metrics.jsonl")
        ]
        names = sorted({key for line in lines if line for key in line} - {"step"})
        raise ValueError(f"plot_of={metric}: no run has reported it{nearest(metric, names)}")
    if not any(panel.courses for panel in found):
        raise ValueError(
            f"plot_over={over}: none of these runs has a costs.jsonl (earlier versions did not "
            "write it); use plot_over=step"
        )
    return [panel for panel in found if panel.courses]


def _panel(
    compared: Sequence[Compared], column: str, protocol: order.Protocol, tag: str, over: Over
) -> Panel:
    groups: dict[tuple[str, bool], list[int]] = {}
    drawn: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
    left_out = []
    for index, one in enumerate(compared):
        points = _points(one, protocol, tag)
        if not points:
            continue
        steps, values = (np.array(part, dtype=float) for part in zip(*points, strict=True))
        costs = _costs(one, steps, over)
        known = np.isfinite(costs)
        if not known.any():
            left_out.append(str(one.run.path))
            continue
        drawn[index] = steps[known], costs[known], values[known]
        groups.setdefault((but_for_seed(one), one.status == "failed"), []).append(index)
    apart = differences(compared)
    courses = []
    for (_, failed), members in groups.items():
        settings = {key: value for key, value in apart[members[0]].items() if key != "seed"}
        runs = [drawn[index] for index in members]
        courses.append(_course(settings, failed, runs, whole=over != "step"))
    measure = column.partition("@")[0].partition(" ")[0]
    return Panel(column, measure, protocol[0] == "loss", courses, left_out)


def _points(one: Compared, protocol: order.Protocol, tag: str) -> list[tuple[int, float]]:
    """Returns a run's (step, finite value) pairs, one per step."""
    result = next((found for found in one.results if protocol_of(found) == protocol), None)
    if result is None:
        return []
    points: Sequence[tuple[int, float]] = result.measured
    if result.metric == "loss":
        curve = [point for point in scalar_curve(one.run.path, tag) if np.isfinite(point[1])]
        points = window_means(curve, share=SMOOTH)
    return sorted({step: value for step, value in points if np.isfinite(value)}.items())


def _costs(one: Compared, steps: np.ndarray, over: Over) -> np.ndarray:
    """Interpolates a run's cost at each step; NaN beyond its last line of costs.jsonl."""
    if over == "step":
        return steps
    lines = read_costs(one.run.path)
    key = {"hours": "seconds", "device_hours": "device_seconds"}.get(over, over)
    unit = 3600.0 if over.endswith("hours") else 1.0
    if not lines or any(line.get(key) is None for line in lines):
        return np.full(len(steps), np.nan)
    at = [0.0, *(line["step"] for line in lines)]
    spent = [0.0, *(line[key] / unit for line in lines)]
    return np.interp(steps, at, spent, right=np.nan)


def _course(
    settings: dict[str, Any],
    failed: bool,
    members: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    whole: bool,
) -> Course:
    """Averages runs at each step that any of them reports, over those that got that far.

    `whole` keeps only the steps that all runs cover: elsewhere the mean cost would jump back.
    """
    steps = np.unique(np.concatenate([at for at, _, _ in members]))
    first, last = max(at[0] for at, _, _ in members), min(at[-1] for at, _, _ in members)
    if whole and first <= last:
        steps = steps[(steps >= first) & (steps <= last)]
    over, values = (
        np.stack([np.interp(steps, member[0], member[part], np.nan, np.nan) for member in members])
        for part in (1, 2)
    )
    counts = np.isfinite(values).sum(axis=0)
    return Course(
        settings,
        (int(counts.min()), int(counts.max())),
        failed,
        np.nanmean(over, axis=0),
        np.nanmean(values, axis=0),
        np.nanmin(values, axis=0),
        np.nanmax(values, axis=0),
    )
