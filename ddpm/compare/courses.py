"""How a measure went over training: a course for each run, seeds together, over any cost."""

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
SMOOTH = 0.05  # share of a run's steps that what training reports is averaged over


@dataclass(frozen=True)
class Course:
    """One measure over training, of runs that differ in their seed alone.

    Attributes:
        settings: What is not the same in all runs compared, but the seed.
        num_seeds: Runs that it is of: the fewest and the most at one step.
        failed: Whether they failed. Such are never averaged with others.
        over: (N,) step or cost, the mean of the runs.
        mean: (N,) of the measure.
        least: (N,) of any run.
        most: (N,) of any run.
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
    """Courses of one measure by one protocol.

    Attributes:
        name: Of both.
        measure: The measure alone.
        reported: Whether training reports it, so that it is averaged; else it is measured.
        courses: One or more, in the runs' order.
        left_out: Folders of runs that have the measure, but not the cost.
    """

    name: str
    measure: str
    reported: bool
    courses: list[Course]
    left_out: list[str]


def find(compared: Sequence[Compared], metric: str, over: Over) -> list[Panel]:
    """Returns a panel for each protocol that METRIC names.

    Args:
        compared: The runs.
        metric: `loss` or `eval/NAME` as in ddpm.compare.order, or what training reports, such as
            `train/grad_norm`. That and the loss are averaged over a twentieth of a run's steps.
        over: What it is drawn over.

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
            f"plot_over={over}: none of these runs has a costs.jsonl, which earlier versions did "
            "not write; plot_over=step needs none"
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
    """The (step, finite value) of a run, none twice at a step."""
    result = next((found for found in one.results if protocol_of(found) == protocol), None)
    if result is None:
        return []
    points: Sequence[tuple[int, float]] = result.measured
    if result.metric == "loss":
        curve = [point for point in scalar_curve(one.run.path, tag) if np.isfinite(point[1])]
        points = window_means(curve, share=SMOOTH)
    return sorted({step: value for step, value in points if np.isfinite(value)}.items())


def _costs(one: Compared, steps: np.ndarray, over: Over) -> np.ndarray:
    """What a run had cost at each step, between its lines linear; NaN where no line tells."""
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
    """The mean of runs at each step that one of them reports; of those that got so far.

    `whole` leaves out steps that only some have: a mean of hours would go back there.
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
