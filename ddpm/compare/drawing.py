"""Shared parts of plots: stacked panels, legends beside them, text that is never cut off."""

import functools
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ddpm.system.files import whole

MOST = 24  # entries of a legend, at most
SPREAD = 12  # values that a legend lists of a setting with more than MOST
STYLES: list[tuple[Any, str | None]] = [
    (line, marker) for marker in (None, "o", "s", "^") for line in ("-", "--", ":", "-.")
]
GREY = (0.5, 0.5, 0.5, 1.0)


def require_matplotlib() -> None:
    """Checks that matplotlib is installed.

    Raises:
        ValueError: If it is not.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError("plots need matplotlib: pip install -e '.[plots]'") from error


class Legend:
    """The legend beside a panel.

    Args:
        handles: Artists of the entries.
        texts: Plain text of each entry.
        title: Plain text; empty for none.
    """

    def __init__(self, handles: Sequence[Any], texts: Sequence[str], title: str = "") -> None:
        self.handles = handles
        self.texts = [wrapped(text) for text in texts]
        self.title = wrapped(title)

    @property
    def lines(self) -> int:
        """Number of lines of text."""
        return sum(text.count("\n") + 1 for text in [*self.texts, self.title])


def panels(lines: Sequence[int]) -> tuple[Any, list[Any]]:
    """Creates a figure of stacked panels, each as high as its legend needs.

    Args:
        lines: Number of lines in each panel's legend.

    Returns:
        The figure and the panels' axes.
    """
    from matplotlib.figure import Figure

    heights = [max(4.2, 0.19 * count + 0.6) for count in lines]
    figure = Figure(figsize=(8, sum(heights)), layout="constrained")
    grid = figure.subplots(len(heights), squeeze=False, height_ratios=heights)
    return figure, list(grid[:, 0])


def legend(axes: Any, made: Legend) -> None:
    """Puts a legend to the right of a panel."""
    drawn = axes.legend(
        made.handles,
        made.texts,
        title=made.title or None,
        fontsize="small",
        title_fontsize="small",
        alignment="left",
        loc="upper left",
        bbox_to_anchor=(1.01, 1),
        borderaxespad=0,
    )
    drawn.set_in_layout(False)  # the panel keeps its width; the picture grows by the legend


def title(axes: Any, text: str) -> None:
    """Sets a panel's title, wrapped."""
    axes.set_title(wrapped(text, 90), loc="left", fontsize="medium")


def save(figure: Any, path: Path) -> None:
    """Writes the figure as a PNG large enough for all of its text."""
    legends = [axes.get_legend() for axes in figure.axes if axes.get_legend() is not None]
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as scratch:
        figure.savefig(
            scratch,
            dpi=120,
            format="png",
            bbox_inches="tight",
            bbox_extra_artists=legends,
            pad_inches=0.15,
        )


def scale(axes: Any, values: Sequence[np.ndarray], ratio: float) -> None:
    """Makes the y axis logarithmic if all values are positive and span at least this ratio."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    finite = np.concatenate([value[np.isfinite(value)] for value in values])
    if not len(finite) or finite.min() <= 0 or finite.max() < finite.min() * ratio:
        return
    axes.set_yscale("log")
    if finite.max() < finite.min() * 1e3:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def colours(values: Sequence[Any]) -> list[Any]:
    """Returns a distinct color per value: numbers from dark to light, others far apart.

    Args:
        values: All different. A number's color follows its rank; None is gray.
    """
    import matplotlib

    numbers = sorted(value for value in values if _is_number(value))
    others = [value for value in values if value is not None and not _is_number(value)]
    if others:
        numbers, others = [], [value for value in values if value is not None]
    few = next((name for name, most in (("tab10", 10), ("tab20", 20)) if len(others) <= most), None)
    apart = matplotlib.colormaps[few or "turbo"]
    ranked = matplotlib.colormaps["viridis"]
    found = []
    for value in values:
        if value is None:
            found.append(GREY)
        elif others:
            place = others.index(value)
            found.append(apart(place if few else place / (len(others) - 1)))
        else:  # the palest yellow is hard to see
            found.append(ranked(0.92 * numbers.index(value) / max(1, len(numbers) - 1)))
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def wrapped(text: str, width: int = 60) -> str:
    """Returns wrapped text for matplotlib: no math, and letters its font lacks are escaped."""
    there = _letters()
    plain = "".join(
        letter if ord(letter) in there else letter.encode("unicode_escape").decode()
        for letter in text
    )
    lines = textwrap.wrap(plain, width) or [""]
    return "\n".join(lines).replace("$", r"\$")


@functools.cache
def _letters() -> frozenset[int]:
    from matplotlib import font_manager

    font = font_manager.get_font(font_manager.findfont(font_manager.FontProperties()))
    return frozenset(font.get_charmap())
