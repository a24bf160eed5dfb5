"""Plots of figures over a sampler's settings: distance over steps, precision over recall."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ddpm.compare import drawing
from ddpm.compare.curves import Curve, OverSeeds, how
from ddpm.compare.drawing import MOST, STYLES


def draw_steps(path: Path, curves: Sequence[Curve], over_seeds: OverSeeds) -> None:
    """Draws distances over sampler steps, one panel per metric and protocol.

    Args:
        path: The PNG to write.
        curves: One or more curves.
        over_seeds: How their values combine seeds.
    """

    def draw(axes: Any, curve: Curve, style: dict[str, Any]) -> None:
        values = [point.values[0] for point in curve.points]
        axes.errorbar(
            [point.at for point in curve.points],
            [one.value for one in values],
            yerr=[one.deviation or 0 for one in values],
            capsize=3,
            **style,
        )
        axes.set(xlabel="sampler steps", ylabel=drawing.wrapped(curve.metrics[0]), xscale="log")
        drawing.title(axes, curve.panel)
        steps = _apart_by(sorted({point.at for other in curves for point in other.points}), 1.12)
        axes.set_xticks(steps, [f"{step:g}" for step in steps])
        axes.minorticks_off()

    _draw(path, curves, over_seeds, draw)


def draw_scales(path: Path, curves: Sequence[Curve]) -> None:
    """Draws precision against recall, each point labeled with its guidance scale.

    Args:
        path: The PNG to write.
        curves: One or more curves.
    """

    def draw(axes: Any, curve: Curve, style: dict[str, Any]) -> None:
        precision, recall = (
            [point.values[which].value for point in curve.points] for which in (0, 1)
        )
        axes.plot(recall, precision, **style)
        for point, x, y in zip(curve.points, recall, precision, strict=True):
            place = {"textcoords": "offset points", "xytext": (5, 4), "fontsize": "x-small"}
            axes.annotate(f"{point.at:g}", (x, y), color=style["color"], **place)
        axes.set(xlabel="recall", ylabel="precision")
        drawing.title(axes, f"{curve.panel}, by guidance scale")

    _draw(path, curves, "mean", draw)


def _draw(
    path: Path,
    curves: Sequence[Curve],
    over_seeds: OverSeeds,
    draw: Callable[[Any, Curve, dict[str, Any]], None],
) -> None:
    from matplotlib.lines import Line2D

    names = list(dict.fromkeys(curve.panel for curve in curves))
    members = [[curve for curve in curves if curve.panel == name] for name in names]
    colours = [drawing.colours([str(index) for index in range(len(same))]) for same in members]
    legends = []
    for same, colour in zip(members, colours, strict=True):
        texts = [_text(curve, over_seeds) for curve in same[:MOST]]
        handles = [Line2D([], [], **_look(index, colour[index])) for index in range(len(texts))]
        all_said = len(texts) == len(same)
        said = f"the first {MOST} of {len(same)} curves; curves.csv (to=DIR) has all"
        legends.append(drawing.Legend(handles, texts, "" if all_said else said))
    figure, grid = drawing.panels([made.lines for made in legends])
    for axes, same, colour, made in zip(grid, members, colours, legends, strict=True):
        for index, curve in enumerate(same):
            draw(axes, curve, _look(index, colour[index]))
        axes.grid(alpha=0.3)
        drawing.legend(axes, made)
    drawing.save(figure, path)


def _look(index: int, colour: Any) -> dict[str, Any]:
    line = STYLES[index // 10 % 4][0]
    return {"color": colour, "linestyle": line, "marker": "o", "markersize": 4}


def _text(curve: Curve, over_seeds: OverSeeds) -> str:
    said = [] if curve.label == "-" else [curve.label]
    return ", ".join([*said, how(curve, over_seeds)])


def _apart_by(values: Sequence[float], ratio: float) -> list[float]:
    """Returns those ascending values that exceed the last one kept by at least this ratio."""
    found: list[float] = []
    for value in values:
        if not found or value >= found[-1] * ratio:
            found.append(value)
    return found
