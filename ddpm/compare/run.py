"""python -m ddpm.compare: find runs, print their table, and write what is asked for."""

import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field

from ddpm.compare import curves, report, tables
from ddpm.compare.curves import Curve, OverSeeds
from ddpm.compare.plots import draw_scales, draw_steps, plot
from ddpm.config import build
from ddpm.config.compose import Composed
from ddpm.config.schema import plain_config
from ddpm.config.validation import Count, Node, Section, check_node, validate
from ddpm.runs.reader import Compared, read
from ddpm.sample.figures import Figure, draw_labels
from ddpm.sample.images import save_png, to_picture, to_uint8
from ddpm.sample.subject import of_run
from ddpm.system import devices
from ddpm.system.files import write_text


class Settings(Section):
    """What to compare. See conf/compare.yaml for each key."""

    runs: str | list[str] | None
    to: str | None
    report: str | None
    plot: bool
    over_seeds: OverSeeds
    grid: bool
    weights: Literal["ema", "raw"]
    num_samples: Count
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    device: Literal["auto", "cpu", "cuda", "mps"]
    outputs: str
    trusted_modules: list[str]
    sampler: Node


def run(composed: Composed) -> list[Compared]:
    """Prints the table, writes it and the pictures into a folder, and prints where.

    Raises:
        ValueError: If there is no run at all, or a picture cannot be drawn.
    """
    settings = validate(Settings, plain_config(composed))
    page = None if settings.report is None else Path(settings.report).expanduser()
    if page is not None:
        report.check(page)
    width = shutil.get_terminal_size((200, 24)).columns
    found, empty = tables.find(settings.runs, settings.outputs)
    for given in empty:
        print(f"warning: {given}: no run there", file=sys.stderr, flush=True)
    compared, copies = tables.once([read(one) for one in found])
    for words in copies:
        print(f"note: {words}", file=sys.stderr, flush=True)
    for one in compared:
        for number in one.damaged:
            line = f"{one.run.path / 'metrics.jsonl'}, line {number}"
            print(f"warning: {line}: damaged and left out", file=sys.stderr, flush=True)
    if isinstance(settings.runs, str):  # a list keeps its order
        compared = tables.sort_runs(compared)
    over_steps, over_scales = curves.find_curves(compared, settings.over_seeds)
    swept = [*over_steps, *over_scales]
    rows = tables.list_runs(compared) if settings.runs is None else tables.rows(compared)
    if settings.runs is None:
        print(tables.text(rows, width))
    else:
        _print_rows(compared, swept, settings.over_seeds, width)
    if page is not None:
        size = report.write(page, compared, _asked(settings))
        print(f"report {page} ({size / 1e6:.1f} MB)", flush=True)
    folder = Path(settings.outputs) / "comparison"
    if settings.to is not None:
        folder = Path(settings.to)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "table.csv", tables.as_csv(rows))
        write_text(folder / "table.json", tables.as_json(compared))
        print(f"table {folder / 'table.csv'}", flush=True)
        if swept:
            write_text(folder / "curves.csv", curves.as_csv(swept, settings.over_seeds))
            print(f"curves {folder / 'curves.csv'}", flush=True)
    if settings.grid:
        folder.mkdir(parents=True, exist_ok=True)
        save_png(folder / "grid.png", draw(settings, compared))
        print(f"grid {folder / 'grid.png'}", flush=True)
    if settings.plot:
        folder.mkdir(parents=True, exist_ok=True)
        plot(folder / "loss.png", compared)
        print(f"plot {folder / 'loss.png'}", flush=True)
        if over_steps:
            draw_steps(folder / "steps.png", over_steps, settings.over_seeds)
            print(f"plot {folder / 'steps.png'}", flush=True)
        if over_scales:
            draw_scales(folder / "scales.png", over_scales)
            print(f"plot {folder / 'scales.png'}", flush=True)
    return compared


def _asked(settings: Settings) -> str:
    runs = settings.runs
    return (
        f"all below {settings.outputs}"
        if runs is None
        else ", ".join([runs] if isinstance(runs, str) else runs)
    )


def draw(settings: Settings, compared: Sequence[Compared]) -> np.ndarray:
    """Draws a row of samples for each run, a column for each noise: (H, W, 3) uint8.

    Networks of the same image size start from the same noise. A run that cannot be drawn from is
    left out, and named with the reason.

    Raises:
        ValueError: If none can.
    """
    device = devices.device(settings.device)
    check_node("sampler", settings.sampler, settings.trusted_modules)
    drawn: list[np.ndarray] = []
    labels: list[str] = []
    for one, differs in zip(compared, tables.differences(compared), strict=True):
        try:
            drawn.append(_samples(settings, one, device))
            labels.append(tables.label(differs))
        except ValueError as error:
            path = one.run.path
            print(f"warning: {path} has no row in the grid: {error}", file=sys.stderr, flush=True)
    if not drawn:
        raise ValueError("grid=true: none of these runs can be drawn from")
    height, width = (max(row.shape[side] for row in drawn) for side in (1, 2))
    rows = [np.stack([_resized(image, height, width) for image in row]) for row in drawn]
    heads = [f"noise {index}" for index in range(settings.num_samples)]
    return draw_labels(Figure(rows, labels, heads, {}))


def _print_rows(
    compared: Sequence[Compared], swept: Sequence[Curve], over_seeds: OverSeeds, width: int
) -> None:
    """The table, and what it does not show; figures over a sampler's settings as curves."""
    if swept:  # a column each would be hundreds
        compared = [
            replace(one, results=[o for o in one.results if "sampler_settings" not in o.protocol])
            for one in compared
        ]
    print(tables.text(tables.rows(compared), width))
    if swept:
        print(f"\n{curves.lines(swept, over_seeds)}")
        print("every figure of drawn images has a column in table.csv (to=DIR)")
    _print_more(compared, width)


def _print_more(compared: Sequence[Compared], width: int) -> None:
    """What the table does not show: means over seeds, and why runs ended."""
    seeds = tables.over_seeds(compared)
    if seeds:
        print(f"\nover seeds\n{tables.text(seeds, width)}")
    for one in compared:
        if one.status in ("failed", "preempted"):
            print(f"\n{one.run.path} {one.status}: {one.record.get('error')}")


def _samples(settings: Settings, one: Compared, device: torch.device) -> np.ndarray:
    """A run's row: (num_samples, H, W, C) uint8."""
    subject = of_run(one.run, None, settings.weights, settings.trusted_modules).subject
    sampler = build.sampler(settings.sampler, subject.diffusion)
    drawing = subject.drawing(sampler, settings.seed, device, "tf32")
    count = settings.num_samples
    return to_uint8(drawing.images(range(count), subject.classes_in_turn(count)))


def _resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W, C) uint8 as (height, width, 3), each pixel as it is."""
    return np.asarray(to_picture(image).convert("RGB").resize((width, height), resample=0))
