"""python -m ddpm.compare: finds runs, prints their table, and writes tables, plots and reports."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from ddpm.compare import courses, curves, order, report, tables
from ddpm.compare.course_plots import draw_courses
from ddpm.compare.courses import Over
from ddpm.compare.curves import Curve, OverSeeds
from ddpm.compare.drawing import require_matplotlib
from ddpm.compare.plots import draw_scales, draw_steps
from ddpm.config.compose import Composed
from ddpm.config.schema import plain_config
from ddpm.config.validation import Count, Node, Section, Text, validate
from ddpm.runs.many import read_many
from ddpm.runs.reader import Compared
from ddpm.system.files import write_text
from ddpm.system.text import say


class Settings(Section):
    """Settings of ddpm.compare. conf/compare.yaml explains each key."""

    runs: str | list[str] | None
    to: str | None
    order_by: Text | None
    top: Count | None
    best: Text | None
    report: str | None
    plot: bool
    plot_of: Text
    plot_over: Over
    colour_by: Text | None
    over_seeds: OverSeeds
    grid: bool
    weights: Literal["ema", "raw"]
    num_samples: Annotated[int, Field(gt=0, le=1000)]
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    device: Literal["auto", "cpu", "cuda", "mps"]
    outputs: str
    trusted_modules: list[str]
    sampler: Node


def run(composed: Composed) -> list[Compared]:
    """Prints the table, writes the files asked for, and prints their paths.

    With best=METRIC it prints only the folder of one run.

    Returns:
        The runs shown, in order.

    Raises:
        ValueError: If there is no run, a plot cannot be drawn, or runs cannot be sorted.
    """
    settings = validate(Settings, plain_config(composed))
    _check(settings)
    page = None if settings.report is None else Path(settings.report).expanduser()
    if page is not None:
        report.check(page)
    compared = _read(settings)
    if settings.best is not None:
        ordered = order.best(compared, settings.best)
        _say([ordered.note] if ordered.note else [], "note")
        say(str(ordered.compared[0].run.path))
        return ordered.compared[:1]
    if isinstance(settings.runs, str):  # a list keeps its order
        compared = tables.sort_runs(compared)
    first = None
    if settings.order_by is not None:
        first = order.by(compared, settings.order_by, "order_by")
        _say([first.note] if first.note else [], "note")
        compared = first.compared
    shown, colour = compared[: settings.top], settings.colour_by
    colour_by = colour and order.differing(shown, colour, "colour_by")
    over_steps, over_scales = curves.find_curves(shown, settings.over_seeds)
    swept = [*over_steps, *over_scales]
    rows = tables.list_runs(compared) if settings.runs is None else tables.rows(compared)
    if first is not None:
        values = zip(first.values, rows, strict=True)
        # leftmost, and shown even if the best value is the final one
        rows = [{first.column: None, **row, first.column: value} for value, row in values]
    if settings.runs is None:
        print(tables.text(rows[: settings.top], _width()))
    else:
        _print_rows(compared, rows, first, swept, settings)
    rows, compared = rows[: settings.top], shown
    if page is not None:
        size = report.write(page, compared, _asked(settings))
        say(f"report {page} ({size / 1e6:.1f} MB)")
    folder = Path(settings.outputs) / "comparison"
    if settings.to is not None:
        folder = Path(settings.to)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "table.csv", tables.as_csv(rows))
        write_text(folder / "table.json", tables.as_json(compared))
        say(f"table {folder / 'table.csv'}")
        if swept:
            write_text(folder / "curves.csv", curves.as_csv(swept, settings.over_seeds))
            say(f"curves {folder / 'curves.csv'}")
    if settings.grid:
        folder.mkdir(parents=True, exist_ok=True)
        _draw_grid(folder / "grid.png", compared, settings)
        say(f"grid {folder / 'grid.png'}")
    if settings.plot:
        file = folder / f"{'loss' if settings.plot_of == 'loss' else 'measure'}.png"
        panels = courses.find(compared, settings.plot_of, settings.plot_over)
        for panel in panels:
            _say(
                [f"{run} is not in {file}: it has no costs.jsonl" for run in panel.left_out], "note"
            )
        draw_courses(file, panels, settings.plot_over, colour_by)
        say(f"plot {file}")
        if over_steps:
            draw_steps(folder / "steps.png", over_steps, settings.over_seeds)
            say(f"plot {folder / 'steps.png'}")
        if over_scales:
            draw_scales(folder / "scales.png", over_scales)
            say(f"plot {folder / 'scales.png'}")
    return compared


def _check(settings: Settings) -> None:
    """Rejects settings that contradict each other, before any folder is read.

    Raises:
        ValueError: If some do.
    """
    if settings.top is not None and settings.order_by is None:
        raise ValueError(f"top={settings.top} needs order_by=METRIC")
    for key in ("order_by", "to", "report", "plot", "grid"):
        if settings.best is not None and getattr(settings, key):
            raise ValueError(f"best={settings.best} only prints a folder: leave out {key}=")
    if settings.plot:
        require_matplotlib()


def _read(settings: Settings) -> list[Compared]:
    """Reads each run once, and prints what is left out."""
    found, empty = tables.find(settings.runs, settings.outputs)
    _say([f"{given}: no run there" for given in empty], "warning")
    compared, copies = tables.once(read_many(found, Path(settings.outputs) / "cache"))
    _say(copies, "note")
    for one in compared:
        file = one.run.path / "metrics.jsonl"
        damaged = [f"{file}, line {number}: damaged and left out" for number in one.damaged]
        _say(damaged, "warning")
    return compared


def _say(lines: Sequence[str], kind: str) -> None:
    for line in lines:
        say(f"{kind}: {line}", to_error=True)


def _width() -> int:
    return shutil.get_terminal_size((200, 24)).columns


def _asked(settings: Settings) -> str:
    runs = settings.runs
    return (
        f"all below {settings.outputs}"
        if runs is None
        else ", ".join([runs] if isinstance(runs, str) else runs)
    )


def _draw_grid(file: Path, compared: Sequence[Compared], settings: Settings) -> None:
    from ddpm.compare import grid  # imports torch, which a table does not need

    grid.draw(
        file,
        compared,
        settings.sampler,
        settings.num_samples,
        settings.seed,
        settings.weights,
        settings.device,
        settings.trusted_modules,
    )


def _print_rows(
    compared: Sequence[Compared],
    rows: Sequence[tables.Row],
    first: order.Ordered | None,
    swept: Sequence[Curve],
    settings: Settings,
) -> None:
    """Prints the table, curves over a sampler's settings, means over seeds, and errors."""
    hidden = _swept_columns(compared) if swept else set()  # could be hundreds of columns
    if first is not None:
        hidden -= {first.column}
    print(tables.text(_but(hidden, rows[: settings.top]), _width()))
    if swept:
        print(f"\n{curves.lines(swept, settings.over_seeds)}")
        print("table.csv (to=DIR) has a column for every figure of drawn images")
    seeds = tables.over_seeds(compared if first is None else tables.sort_runs(compared))
    if first is not None:
        seeds = order.by_mean(seeds, first)
    if seeds:
        print(f"\nover seeds\n{tables.text(_but(hidden, seeds[: settings.top]), _width())}")
    for one in compared[: settings.top]:
        if one.status in ("failed", "preempted"):
            print()
            say(f"{one.run.path} {one.status}: {one.record.get('error')}")


def _swept_columns(compared: Sequence[Compared]) -> set[str]:
    """Returns the columns of figures of drawn images."""
    drawn = {
        tables.protocol_of(result)
        for one in compared
        for result in one.results
        if "sampler_settings" in result.protocol
    }
    columns = tables.metric_columns(compared).items()
    names = [column for column, protocol in columns if protocol in drawn]
    return {f"{name}{of}" for name in names for of in ("", " best", " mean", " deviation", " runs")}


def _but(hidden: set[str], rows: Sequence[tables.Row]) -> list[tables.Row]:
    return [{name: value for name, value in row.items() if name not in hidden} for row in rows]
