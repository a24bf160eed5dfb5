"""A self-contained HTML page of a sweep: its table, curves, settings, samples and runs.

Everything from run folders is in one escaped JSON block, and enters the page only as text.
"""

import base64
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ddpm import __version__
from ddpm.compare import tables
from ddpm.compare.strips import Strips, strips_of
from ddpm.compare.tables import protocol_of
from ddpm.compare.told import told_of, whole_configuration
from ddpm.runs.contents import read_lines
from ddpm.runs.costs import read_costs
from ddpm.runs.reader import Compared
from ddpm.runs.results import PARTS, Result, better
from ddpm.system.files import write_text
from ddpm.system.text import shown

PAGE = Path(__file__).with_name("page")
STYLES = ("page.css",)
SCRIPTS = ("page.js", "table.js", "charts.js", "settings.js", "samples.js", "runs.js")
POINTS = 400_000  # points of all curves in a page, shared evenly
MOST_POINTS = 1000  # per curve
FEWEST_POINTS = 40  # per curve
COSTS = (
    "images",
    "seconds",
    "device_seconds",
    "flops",
)  # keys of costs.jsonl for the horizontal axis
DIGITS = 5  # significant digits of a curve's values; the table keeps all digits


def check(path: Path) -> None:
    """Checks before runs are read that a report can be written.

    Args:
        path: The HTML file to write.

    Raises:
        ValueError: If the path is not that of an HTML file, or Plotly is missing.
    """
    if path.suffix.lower() not in (".html", ".htm") or path.is_dir():
        raise ValueError(f"report={path}: give the page's file, such as report=sweep.html")
    _plotly()


def write(path: Path, compared: Sequence[Compared], asked: str) -> int:
    """Writes the page of these runs.

    Args:
        path: The HTML file to write.
        compared: The runs, in the table's order.
        asked: The value of runs=, for the page's header.

    Returns:
        The page's size in bytes.

    Raises:
        ValueError: If Plotly is missing.
    """
    scripts = [_plotly(), "\n".join(_part(name) for name in SCRIPTS)]
    parts = {
        "policy": " ".join(f"'sha256-{_digest(script)}'" for script in scripts),
        "styles": "\n".join(_part(name) for name in STYLES),
        "data": embedded(contents(compared, asked)),
        "plotly": scripts[0],
        "script": scripts[1],
    }
    # in one pass, so that {{...}} inside a part stays as it is
    page = re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], _part("page.html"))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page)
    return path.stat().st_size


def embedded(content: Any) -> str:
    """Returns JSON that is safe inside an HTML page, whatever its strings hold.

    `<`, `>` and `&` are escaped, so nothing can end the block. Non-finite numbers, which JSON
    lacks, become strings, and invisible characters in strings are escaped.
    """
    text = json.dumps(_plain(content), allow_nan=False, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def contents(compared: Sequence[Compared], asked: str) -> dict[str, Any]:
    """Returns the page's content; rows and numbers are those of table.csv and table.json."""
    rows = tables.rows(compared)
    labels = _labels(compared)
    settings = [whole_configuration(one) for one in compared]
    strips = strips_of(compared, settings)
    common, told = told_of(compared, settings)
    count = min(max(POINTS // max(_num_curves(compared), 1), FEWEST_POINTS), MOST_POINTS)
    names = {protocol: name for name, protocol in tables.metric_columns(compared).items()}
    return {
        "asked": asked,
        "made": datetime.now(UTC).isoformat(timespec="minutes"),
        "version": __version__,
        "columns": _columns(compared, rows),
        "groups": _groups(compared),
        "common": common,
        "reduced": strips.reduced,
        "points": count,
        "runs": [
            {
                "label": label,
                "path": str(one.run.path),
                "status": one.status,
                "row": row,
                "series": _series(one, names, count),
                "costs": _costs(one, count),
                "samples": _samples(strips, index),
                **about,
            }
            for index, (one, row, label, about) in enumerate(
                zip(compared, rows, labels, told, strict=True)
            )
        ],
    }


def _labels(compared: Sequence[Compared]) -> list[str]:
    """Returns a label per run: what differs, or its folder's name if that is ambiguous."""
    said = [tables.label(settings) for settings in tables.differences(compared)]
    return [
        one.run.path.name
        if words == "-" or not one.settings
        else words
        if said.count(words) == 1
        else f"{words} ({one.run.path.name})"
        for one, words in zip(compared, said, strict=True)
    ]


def _columns(compared: Sequence[Compared], rows: Sequence[tables.Row]) -> list[dict[str, Any]]:
    """Describes each column of the rows: a setting, state, or a figure with its protocol."""
    settings = {key for row in tables.differences(compared) for key in row}
    figures = tables.metric_columns(compared)
    results = {protocol_of(found): found for one in compared for found in one.results}
    columns: list[dict[str, Any]] = []
    for key in dict.fromkeys(key for row in rows for key in row):
        figure = key.removesuffix(" best") if key not in figures else key
        if key in settings:
            columns.append({"key": key, "kind": "setting"})
        elif figure in figures:
            columns.append({"key": key, **_figure(figure, key, results[figures[figure]])})
        elif key != "run":
            columns.append({"key": key, "kind": "state"})
    return columns


def _figure(name: str, key: str, result: Result) -> dict[str, Any]:
    choose = min if result.metric == "loss" else better(result.metric)
    return {
        "kind": "figure",
        "figure": name,
        "of": "final" if key == name else "best",
        "protocol": result.protocol,
        "part": result.metric.startswith(PARTS),
        "better": None if choose is None else choose.__name__,
    }


def _groups(compared: Sequence[Compared]) -> list[dict[str, Any]]:
    """Returns groups of runs that differ only in their seed, with mean and deviation of figures."""
    columns = tables.metric_columns(compared)
    groups = []
    for members, row in zip(tables.seed_groups(compared), tables.over_seeds(compared), strict=True):
        figures = {
            name: [row[f"{name} mean"], row[f"{name} deviation"], row.get(f"{name} runs")]
            for name in columns
            if f"{name} mean" in row
        }
        groups.append({"members": members, "figures": figures})
    return groups


def _num_curves(compared: Sequence[Compared]) -> int:
    return sum(7 + sum(len(found.measured) > 1 for found in one.results) for one in compared)


def _series(one: Compared, names: Mapping[tuple[str, str], str], count: int) -> list[Any]:
    """Returns the curves of one run, grouped by their steps: [[steps, {name: values}], ...].

    Losses have their column's name, so losses of different objectives are different curves.
    """
    if not one.settings:
        return []
    loss = next((found for found in one.results if found.metric == "loss"), None)
    suffix = names[protocol_of(loss)].removeprefix("loss") if loss else ""
    curves: dict[str, list[tuple[int, float]]] = {}
    lines = read_lines(one.run.path / "metrics.jsonl")
    for record in [line.record for line in lines if line.record]:
        for tag, value in record.items():
            if tag.startswith("train/"):  # figures come from evaluation.json, with their protocol
                name = tag.removeprefix("train/")
                name += suffix if name.startswith("loss") else ""
                curves.setdefault(name, []).append((record["step"], value))
    for found in one.results:
        if found.measured:
            curves[names[protocol_of(found)]] = list(found.measured)
    together: dict[tuple[int, ...], dict[str, list[float]]] = {}
    for name, points in curves.items():
        steps, values = _thinned(points, count)
        together.setdefault(steps, {})[name] = values
    return [[steps, values] for steps, values in together.items()]


def _thinned(
    points: Sequence[tuple[int, float]], count: int
) -> tuple[tuple[int, ...], list[float]]:
    """Reduces a curve to `count` points: means of equal bins, each at its last step."""
    size = math.ceil(len(points) / count)
    bins = [points[first : first + size] for first in range(0, len(points), size)]
    means = [math.fsum(value for _, value in some) / len(some) for some in bins]
    return tuple(some[-1][0] for some in bins), [_rounded(mean) for mean in means]


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def _costs(one: Compared, count: int) -> dict[str, list[float]] | None:
    """Returns the run's cost at some of its steps, or None if it has no costs.jsonl."""
    wanted = ("step", *COSTS)
    lines = read_costs(one.run.path)
    some = lines[:: math.ceil(len(lines) / count)] if lines else []
    if some and some[-1] is not lines[-1]:
        some.append(lines[-1])
    if not some:
        return None
    found = {name: [line[name] for line in some if line.get(name) is not None] for name in wanted}
    return {name: known for name, known in found.items() if len(known) == len(some)}


def _samples(strips: Strips, index: int) -> dict[str, Any] | None:
    found = strips.of_run.get(index)
    if found is None:
        return None
    shown = [
        [step, f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"]
        for step, kind, picture in found.pictures
    ]
    return {
        "noise": found.noise,
        "columns": found.columns,
        "size": found.size,
        "by": found.drawn_by,
        "steps": shown,
    }


def _plain(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {_plain(str(key)): _plain(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_plain(value) for value in content]
    if isinstance(content, str):
        return "\n".join(map(shown, content.split("\n")))
    if isinstance(content, float) and not math.isfinite(content):
        return "NaN" if math.isnan(content) else "Infinity" if content > 0 else "-Infinity"
    return content if isinstance(content, str | int | float | None) else str(content)


def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ValueError("report= needs Plotly: pip install -e '.[report]'") from error
    return str(get_plotlyjs()).replace("</script", "<\\/script")


def _part(name: str) -> str:
    return (PAGE / name).read_text(encoding="utf-8")


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
