"""Plots a measure of many runs over training, with a legend that is never cut off."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ddpm.compare import drawing
from ddpm.compare.courses import SMOOTH, Course, Over, Panel
from ddpm.compare.drawing import MOST, SPREAD, STYLES, Legend
from ddpm.runs.reader import format_value
from ddpm.system.files import as_key

AXES: dict[Over, str] = {
    "step": "step (optimizer updates)",
    "images": "images trained on",
    "hours": "hours of training (previews, measures and saving included)",
    "device_hours": "hours of training times devices",
    "flops": "floating point operations of training",
}
Look = dict[str, Any]  # a curve's color, line style and marker


class Styles(NamedTuple):
    """The looks of curves, and the settings behind them.

    Attributes:
        looks: One look per curve.
        keys: The setting that determines the color, then those that determine the line style.
    """

    looks: list[Look]
    keys: list[str]


def draw_courses(path: Path, panels: Sequence[Panel], over: Over, colour_by: str | None) -> None:
    """Draws a measure over training, one panel per protocol.

    Runs that differ only in their seed share a curve, their mean, in a band from their minimum to
    their maximum. One setting determines the color, the others the line style. Failed runs get
    curves of their own, which end in an x.

    Args:
        path: The PNG to write.
        panels: One or more panels.
        over: Unit of the horizontal axis.
        colour_by: The setting that determines the color; None for the one with the most values.
    """
    styles = [_styles(panel.courses, colour_by) for panel in panels]
    legends = [_legend(panel.courses, *style) for panel, style in zip(panels, styles, strict=True)]
    figure, grid = drawing.panels([made.lines for made in legends])
    for axes, panel, style, made in zip(grid, panels, styles, legends, strict=True):
        for course, look in zip(panel.courses, style.looks, strict=True):
            _draw_course(axes, course, look)
        values = [course.least for course in panel.courses]
        drawing.scale(axes, values, ratio=3 if panel.reported else 10)
        axes.set(xlabel=AXES[over], ylabel=drawing.wrapped(panel.measure, 40))
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        averaged = f", averaged over {SMOOTH:.0%} of a run's steps" if panel.reported else ""
        drawing.title(axes, panel.name + averaged)
        drawing.legend(axes, made)
    drawing.save(figure, path)


def _draw_course(axes: Any, course: Course, look: Look) -> None:
    count = len(course.over)
    alone = {"marker": look.get("marker") or "o", "markersize": 4} if count == 1 else {}
    axes.plot(
        course.over, course.mean, linewidth=1.3, markevery=max(1, count // 8), **{**look, **alone}
    )
    if course.num_seeds[1] > 1:
        band = {"color": look["color"], "alpha": 0.18, "linewidth": 0}
        if count == 1:
            axes.vlines(course.over, course.least, course.most, color=look["color"], alpha=0.5)
        else:
            axes.fill_between(course.over, course.least, course.most, **band)
    if course.failed:
        axes.plot(course.over[-1:], course.mean[-1:], "x", color=look["color"], markersize=8)


def _styles(courses: Sequence[Course], colour_by: str | None) -> Styles:
    keys = _apart(courses)
    by = colour_by or max(keys, key=lambda key: len(_values(courses, [key])), default=None)
    if by is None:  # no setting differs: runs on different pictures, or a single run
        colours = drawing.colours([str(number) for number in range(len(courses))])
        return Styles([{"color": colour} for colour in colours], [])
    others = [key for key in keys if key != by]
    values = [row[0] for row in _values(courses, [by]).values()]
    colour = dict(zip(map(as_key, values), drawing.colours(values), strict=True))
    lines = list(_values(courses, others))
    looks = []
    for course in courses:
        line = lines.index(as_key([course.settings.get(key) for key in others]))
        linestyle, marker = STYLES[line % len(STYLES)]
        look = {"linestyle": linestyle, "marker": marker, "markersize": 4}
        looks.append({"color": colour[as_key(course.settings.get(by))], **look})
    return Styles(looks, [by, *others])


def _legend(courses: Sequence[Course], looks: Sequence[Look], keys: Sequence[str]) -> Legend:
    """Returns one line per curve, or, for many curves, what colors and line styles mean."""
    bands = any(course.num_seeds[1] > 1 for course in courses)
    said = ["band: lowest to highest seed"] if bands else []
    if len(courses) > MOST:
        return _meanings(courses, looks, keys, said)
    texts = [_text(course, keys) for course in courses]
    handles = [_handle(course, look) for course, look in zip(courses, looks, strict=True)]
    return Legend(handles, texts, "; ".join(said))


def _meanings(
    courses: Sequence[Course], looks: Sequence[Look], keys: Sequence[str], said: list[str]
) -> Legend:
    from matplotlib.lines import Line2D

    said = [f"{len(courses)} curves, {_seeds(courses)}", *said]
    handles, texts = [], []
    for key in keys[:1]:
        pairs = {
            as_key(course.settings.get(key)): look["color"]
            for course, look in zip(courses, looks, strict=True)
        }
        values = sorted((row[0] for row in _values(courses, [key]).values()), key=_rank)
        shown = _spread(values) if len(values) > MOST else values
        handles += [Line2D([], [], color=pairs[as_key(value)], linewidth=3) for value in shown]
        texts += [f"{_last(key)} {_shown(value)}" for value in shown]
        if len(shown) < len(values):
            said.append(f"{len(values) - len(shown)} more values of {_last(key)}")
    others = list(_values(courses, keys[1:]).values()) if keys[1:] else []
    for (line, marker), values in zip(STYLES, others, strict=False):
        handles.append(Line2D([], [], color="black", linestyle=line, marker=marker, markersize=4))
        texts.append(_words(keys[1:], values))
    if len(others) > len(STYLES):
        said.append(
            f"{len(others) - len(STYLES)} more combinations of "
            f"{', '.join(map(_last, keys[1:]))}, which reuse these line styles"
        )
    if any(course.failed for course in courses):
        said.append("x: failed")
    return Legend(handles, texts, "; ".join(said))


def _apart(courses: Sequence[Course]) -> list[str]:
    """Returns the settings that differ between courses."""
    keys = dict.fromkeys(key for course in courses for key in course.settings)
    return [key for key in keys if len(_values(courses, [key])) > 1]


def _values(courses: Sequence[Course], keys: Sequence[str]) -> dict[str, list[Any]]:
    """Returns the distinct values of these settings."""
    rows = [[course.settings.get(key) for key in keys] for course in courses]
    return {as_key(row): row for row in rows}


def _handle(course: Course, look: Look) -> Any:
    from matplotlib.lines import Line2D

    marker = (
        "x" if course.failed else look.get("marker") or ("o" if len(course.over) == 1 else None)
    )
    return Line2D([], [], **{**look, "marker": marker, "markersize": 4})


def _text(course: Course, keys: Sequence[str]) -> str:
    words = [_words(keys, [course.settings.get(key) for key in keys])] if keys else []
    return ", ".join([*words, _seeds([course]), *(["failed"] if course.failed else [])])


def _words(keys: Sequence[str], values: Sequence[Any]) -> str:
    pairs = zip(keys, values, strict=True)
    return ", ".join(f"{_last(key)} {_shown(value)}" for key, value in pairs)


def _seeds(courses: Sequence[Course]) -> str:
    counts = [count for course in courses for count in course.num_seeds]
    if max(counts) == 1:
        return "one seed" if len(courses) == 1 else "one seed each"
    return f"mean of {' to '.join(map(str, sorted({min(counts), max(counts)})))} seeds"


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _shown(value: Any) -> str:
    return "null" if value is None else format_value(value)


def _rank(value: Any) -> tuple[bool, float, str]:
    number = isinstance(value, int | float)
    return (not number, value if number else 0.0, str(value))


def _spread(values: Sequence[Any]) -> list[Any]:
    """Returns SPREAD values, evenly spaced from the first to the last."""
    return [values[round(index)] for index in np.linspace(0, len(values) - 1, SPREAD)]
