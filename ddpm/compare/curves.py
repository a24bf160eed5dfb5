"""Figures over a sampler's settings: distance over steps, precision and recall over scales."""

import csv
import io
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from ddpm.compare.tables import deviation, differences, label
from ddpm.runs.identity import flat
from ddpm.runs.reader import Compared, format_value
from ddpm.runs.results import Result, name
from ddpm.system.files import as_key, by_value
from ddpm.system.text import cell
from ddpm.system.text import shown as safe

OverSeeds = Literal["mean", "min_of_3"]
DISTANCES = ("fid", "fd_", "kid", "kd_")
# fields of the protocol in which curves of one panel may differ
DIFFER = ("weights", "sampler", "sampler_settings")


class Value(NamedTuple):
    """One figure over several seeds of the samples.

    Attributes:
        value: The mean over seeds, or the minimum of three.
        deviation: Sample standard deviation; None unless value is a mean of two seeds or more.
        seeds: The seeds.
    """

    value: float
    deviation: float | None
    seeds: list[int]


class Point(NamedTuple):
    """A value of the sampler's setting, and the figures there, one per metric."""

    at: float
    values: list[Value]


@dataclass(frozen=True)
class Curve:
    """Figures of one run that differ only in one setting of the sampler and in their seeds.

    Attributes:
        panel: The panel's name: the metrics and protocol that its curves share.
        label: What distinguishes the curve within its panel.
        run: The run's folder.
        metrics: One metric, or precision and recall.
        over: The setting: num_steps or guidance_scale.
        step: Optimizer updates of the measured network.
        protocol: The protocol without that setting and the seed.
        points: Two or more points, ordered by the setting.
    """

    panel: str
    label: str
    run: str
    metrics: tuple[str, ...]
    over: str
    step: int
    protocol: dict[str, Any]
    points: list[Point]


def find_curves(
    compared: Sequence[Compared], over_seeds: OverSeeds
) -> tuple[list[Curve], list[Curve]]:
    """Returns distances over sampler steps, and precision with recall over guidance scales.

    The minimum of three is that of the three lowest seeds, and applies only to distances. Settings
    measured with fewer seeds then get no point.

    Args:
        compared: The runs.
        over_seeds: How to combine the seeds of a figure.
    """
    distances = sorted(
        {found.metric for one in compared for found in one.results if _is_distance(found.metric)}
    )
    over_steps = [
        curve
        for metric in distances
        for curve in _curves(compared, (metric,), "num_steps", over_seeds)
    ]
    return over_steps, _curves(compared, ("precision", "recall"), "guidance_scale", "mean")


def _is_distance(metric: str) -> bool:
    return metric.startswith(DISTANCES)


def _curves(
    compared: Sequence[Compared], metrics: tuple[str, ...], over: str, over_seeds: OverSeeds
) -> list[Curve]:
    found: list[tuple[int, int, dict[str, Any], list[Point]]] = []
    for index, one in enumerate(compared):
        groups: dict[str, list[Result]] = {}
        for result in one.results:
            if result.metric in metrics and "sampler_settings" in result.protocol:
                key = as_key([result.final[1], _without(result.protocol, over)])
                groups.setdefault(key, []).append(result)
        for same in groups.values():
            points = _points(same, metrics, over, over_seeds)
            if len(points) > 1:
                rest = _without(same[0].protocol, over)
                found.append((index, same[0].final[1], rest, points))
    if not found:
        return []
    apart = differences(compared)
    panels: dict[str, list[int]] = {}
    for number, (_, _, protocol, _) in enumerate(found):
        panels.setdefault(as_key(_without_keys(protocol, DIFFER)), []).append(number)
    curves = []
    for title, members in zip(_titles(found, metrics, panels), panels.values(), strict=True):
        own = [
            {
                **(apart[found[number][0]] if len(compared) > 1 else {}),
                "step": found[number][1],
                **_of_sampler(found[number][2], over),
            }
            for number in members
        ]
        said = _differing(own)
        for number, words in zip(members, said, strict=True):
            index, step, protocol, points = found[number]
            run = str(compared[index].run.path)
            curves.append(Curve(title, label(words), run, metrics, over, step, protocol, points))
    return curves


def _of_sampler(protocol: dict[str, Any], over: str) -> dict[str, Any]:
    """Returns the fields in which curves of one panel may differ, by readable names."""
    settings = dict(protocol["sampler_settings"])
    if over != "num_steps":
        settings["num_steps"] = _setting(protocol, "num_steps")
    words = by_value(flat({"weights": protocol["weights"], **settings}))
    return {
        key.removesuffix("._target_"): value.rpartition(".")[2] if "_target_" in key else value
        for key, value in words.items()
    }


def _titles(
    found: Sequence[tuple[int, int, dict[str, Any], list[Point]]],
    metrics: tuple[str, ...],
    panels: dict[str, list[int]],
) -> list[str]:
    """Returns the names of panels, told apart by further fields where two would be equal."""
    protocols = [_without_keys(found[members[0]][2], DIFFER) for members in panels.values()]
    words = [name(" and ".join(metrics), protocol) for protocol in protocols]
    more = _differing([flat(protocol) for protocol in protocols])
    return [
        f"{word} {label(said)}" if words.count(word) > 1 else word
        for word, said in zip(words, more, strict=True)
    ]


def _points(
    results: Sequence[Result], metrics: tuple[str, ...], over: str, over_seeds: OverSeeds
) -> list[Point]:
    by_setting: dict[float, dict[str, dict[int, float]]] = {}
    for result in results:
        here = by_setting.setdefault(_setting(result.protocol, over), {})
        here.setdefault(result.metric, {})[result.protocol["seed"]] = result.final[0]
    points = []
    for at, figures in sorted(by_setting.items()):
        seeds = sorted(set.intersection(*(set(figures.get(metric, {})) for metric in metrics)))
        if over_seeds == "min_of_3":
            seeds = seeds[:3] if len(seeds) >= 3 else []
        if seeds:
            values = [
                _of_seeds([figures[metric][seed] for seed in seeds], seeds, over_seeds)
                for metric in metrics
            ]
            points.append(Point(at, values))
    return points


def _of_seeds(values: list[float], seeds: list[int], over_seeds: OverSeeds) -> Value:
    if over_seeds == "min_of_3":
        return Value(min(values), None, seeds)
    spread = deviation(values) if len(values) > 1 else None
    return Value(statistics.mean(values), spread, seeds)


def _setting(protocol: dict[str, Any], over: str) -> float | int:
    settings = protocol["sampler_settings"]
    if over == "num_steps":  # null means all T steps; the sampler's name has the number
        function = str(settings["function"]["_target_"]).rpartition(".")[2]
        return int(protocol["sampler"].removeprefix(function))
    return float(settings.get(over, 1))


def _without(protocol: dict[str, Any], over: str) -> dict[str, Any]:
    """Returns a protocol without the seed and one setting of the sampler."""
    settings = _without_keys(protocol["sampler_settings"], (over,))
    gone = ("seed", "sampler") if over == "num_steps" else ("seed",)
    return {**_without_keys(protocol, gone), "sampler_settings": settings}


def _without_keys(mapping: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if key not in keys}


def _differing(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns, for each row, the entries that differ between rows."""
    keys = [
        key
        for key in dict.fromkeys(key for row in rows for key in row)
        if len({as_key(row.get(key)) for row in rows}) > 1
    ]
    return [{key: row.get(key) for key in keys} for row in rows]


def how(curve: Curve, over_seeds: OverSeeds) -> str:
    """Returns how a curve combines seeds, in words: a mean of so many, or the minimum of three."""
    if over_seeds == "min_of_3" and _is_distance(curve.metrics[0]):
        return "minimum of 3 seeds"
    counts = sorted({len(value.seeds) for point in curve.points for value in point.values})
    if counts == [1]:
        return "one seed"
    return f"mean of {' to '.join(map(str, sorted({counts[0], counts[-1]})))} seeds"


def lines(curves: Sequence[Curve], over_seeds: OverSeeds) -> str:
    """Returns two lines of text per curve: its name and its values."""
    shown = []
    for curve in curves:
        apart = "" if curve.label == "-" else f"; {curve.label}"
        shown.append(safe(f"{curve.panel} over {curve.over}{apart}; {how(curve, over_seeds)}"))
        shown.append("  " + "   ".join(map(_words, curve.points)))
    return "\n".join(shown)


def _words(point: Point) -> str:
    values = " / ".join(
        format_value(one.value) + ("" if one.deviation is None else f" +- {one.deviation:.2g}")
        for one in point.values
    )
    return f"{point.at:g}: {values}"


def as_csv(curves: Sequence[Curve], over_seeds: OverSeeds) -> str:
    """Returns the curves as CSV, every value with all digits and its whole protocol."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(
        ["run", "step", "metric", "over", "at", "value", "deviation", "seeds", "of", "protocol"]
    )
    for curve in curves:
        for point in curve.points:
            for metric, one in zip(curve.metrics, point.values, strict=True):
                writer.writerow(
                    cell(value)
                    for value in [
                        *(
                            str(curve.run),
                            curve.step,
                            metric,
                            curve.over,
                            f"{point.at:g}",
                            one.value,
                        ),
                        "" if one.deviation is None else one.deviation,
                        " ".join(map(str, one.seeds)),
                        how(curve, over_seeds),
                        json.dumps(curve.protocol, sort_keys=True),
                    ]
                )
    return file.getvalue()
