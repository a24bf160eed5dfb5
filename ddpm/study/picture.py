"""The picture of a study: its figures over settings, with every seed as a point."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddpm.compare import drawing
from ddpm.study.figures import Cell, in_words, varied
from ddpm.study.plan import Study


def draw(path: Path, study: Study, cells: Sequence[Cell]) -> None:
    """Draws one panel per measure, with a point per seed and the mean of each setting.

    The x-axis is a setting if a claim has the measure rise or fall with it, or the study names one.
    """
    over: dict[str, str | None] = {}
    for claim in study.claims:
        key = claim.falls_with or claim.rises_with
        over[claim.of] = over.get(claim.of) or (claim.best if claim.best else key)
    shown = {measure: [cell for cell in cells if measure in cell.values] for measure in over}
    shown = {measure: some for measure, some in shown.items() if some}
    best = {claim.of for claim in study.claims if claim.best is not None}
    figure, grid = drawing.panels([0] * len(shown))
    for axes, (measure, some) in zip(grid, shown.items(), strict=True):
        key = over[measure] or study.over
        of_key = [cell for cell in some if key in cell.settings]
        if key is None or not of_key:
            _points(axes, measure, some)
        else:
            _lines(axes, measure, key, of_key, mark=measure in best)
        drawing.scale(axes, [_array(some, measure)], ratio=10)
    drawing.save(figure, path)


def _array(cells: Sequence[Cell], measure: str) -> Any:
    import numpy as np

    return np.array([cell.values[measure] for cell in cells])


def _points(axes: Any, measure: str, cells: Sequence[Cell]) -> None:
    """Draws each setting at its own place on the x-axis."""
    groups = _groups(cells, varied(cells))
    for place, members in enumerate(groups.values()):
        values = _array(members, measure)
        axes.plot([place] * len(values), values, "o", color="tab:blue", alpha=0.5)
        axes.plot([place - 0.2, place + 0.2], [values.mean()] * 2, color="black")
    labels = [drawing.wrapped(name, 22) for name in groups]
    axes.set_xticks(range(len(groups)), labels, fontsize="small")
    axes.set(ylabel=measure)
    axes.grid(alpha=0.3, axis="y")


def _lines(axes: Any, measure: str, key: str, cells: Sequence[Cell], mark: bool) -> None:
    """Draws one line over `key` per combination of the other settings.

    `mark` rings the best point of a line and those within its deviation over seeds.
    """
    groups = _groups(cells, [name for name in varied(cells) if name != key])
    handles = []
    for colour, members in zip(drawing.colours(list(groups)), groups.values(), strict=True):
        places = sorted({float(cell.settings[key]) for cell in members})
        of_places = [
            _array([one for one in members if float(one.settings[key]) == place], measure)
            for place in places
        ]
        means = [values.mean() for values in of_places]
        over = [float(cell.settings[key]) for cell in members]
        axes.plot(over, _array(members, measure), "o", color=colour, alpha=0.35, markersize=4)
        handles += axes.plot(places, means, color=colour)
        if mark:
            near = near_best(of_places)
            look = {"markerfacecolor": "none", "markersize": 13, "color": colour}
            axes.plot([places[at] for at in near], [means[at] for at in near], "o", **look)
    axes.set_xscale("log", base=2)
    ticks = sorted({float(cell.settings[key]) for cell in cells})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set(xlabel=key, ylabel=measure)
    axes.grid(alpha=0.3)
    if len(groups) > 1:
        drawing.legend(axes, drawing.Legend(handles, list(groups)))


def near_best(of_places: Sequence[Any]) -> list[int]:
    """Returns the places whose mean is within the deviation over seeds of the least mean.

    Args:
        of_places: Per place an array (seeds,), less being better.
    """
    best = min(of_places, key=lambda values: values.mean())
    near = best.mean() + (best.std(ddof=1) if len(best) > 1 else 0)
    return [at for at, values in enumerate(of_places) if values.mean() <= near]


def _groups(cells: Sequence[Cell], keys: Sequence[str]) -> dict[str, list[Cell]]:
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(in_words(cell.settings, keys) or "all", []).append(cell)
    return groups
