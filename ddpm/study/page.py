"""The results of studies: figures as JSON and as a picture, and one page for all studies."""

import json
import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ddpm.compare import drawing, verdicts
from ddpm.runs.reader import format_value
from ddpm.study import plan
from ddpm.study.figures import Cell, Tried, in_words, varied
from ddpm.study.plan import Study
from ddpm.system.files import as_key

INTRO = """\
# Studies

```bash
python -m ddpm.study
```

lists claims of the papers that are tested here at a small scale: networks trained for minutes, real
pictures, several seeds. The command above each table trains, measures, computes the verdicts and
writes this whole page. Run again, it resumes; `study.seeds=N` adds seeds.

- *holds*: the whole 95% interval (Student's t, one number per seed) lies on the claim's side;
  *does not hold here*: it lies on the other side; *undecided at these seeds*: it contains zero.
- Each number comes from one seed, which its runs and their samples share. A difference is between
  two runs of one seed; a slope is of the measure over log2 of the setting.
- The intervals are not corrected for the number of claims: of twenty claims without any effect, one
  would come out as decided.
- Settings are as typed on the command line. The JSON files beside this page have the full study and
  all figures, each with the folder of its run.
"""


def as_json(
    name: str, study: Study, cells: Sequence[Cell], tried: Sequence[Tried], about: dict[str, Any]
) -> str:
    """Returns the complete results of a study as JSON.

    Args:
        name: The study's name.
        study: The content of its file.
        cells: The results of its runs.
        tried: The results of its claims.
        about: How long and where it ran: minutes, device, commit.
    """
    claims = []
    for one in tried:
        numbers = list(one.numbers.values())
        found = verdicts.interval(numbers)._asdict() if len(numbers) > 1 else None
        claims.append({**asdict(one), "claim": one.claim.model_dump(), "interval": found})
    content = {
        "study": name,
        **about,
        "spec": study.model_dump(),
        "claims": claims,
        "cells": [asdict(cell) for cell in cells],
    }
    return json.dumps(content, indent=1) + "\n"


def text(tried: Sequence[Tried]) -> str:
    """Returns each claim with its numbers and its verdict, as lines of text."""
    lines = []
    for one in tried:
        lines += [one.claim.says, f"  {_numbers(one)}: {one.verdict}"]
        lines += [f"  not counted: {words}" for words in one.missing]
    return "\n".join(lines)


def _numbers(one: Tried) -> str:
    numbers = list(one.numbers.values())
    if len(numbers) < 2:
        return f"{one.claim.of}, {len(numbers)} seeds"
    mean, low, high = (format_value(value) for value in verdicts.interval(numbers))
    return f"{_compared(one)} {mean} [{low}, {high}], {len(numbers)} seeds"


def _compared(one: Tried) -> str:
    claim = one.claim
    if claim.less is not None and claim.than is not None:
        return f"{claim.of}: {_side(claim.less)} minus {_side(claim.than)}"
    key = claim.falls_with or claim.rises_with or ""
    sign = "" if claim.falls_with else "minus "
    what = (
        claim.of
        if claim.best is None
        else f"log2 of the {_last(claim.best)} with the least {claim.of}"
    )
    return f"{sign}slope of {what} over log2 {_last(key)}"


def _side(choice: plan.Choice) -> str:
    return in_words({key: plan.word(value) for key, value in choice.items()})


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def page(folder: Path) -> str:
    """Returns the page of all studies that have figures in a folder, in Markdown."""
    parts = [INTRO]
    found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]
    parts.append(_table(["study", "claim", "verdict"], _overview(found)))
    parts += [_part(one) for one in found]
    return "\n".join(parts)


def _wrapped(words: str) -> str:
    lines = textwrap.wrap(words, 100, break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines) + "\n"


def _overview(found: Sequence[dict[str, Any]]) -> list[list[str]]:
    return [
        [f"[{one['study']}](#{one['study']})", claim["claim"]["says"], f"*{claim['verdict']}*"]
        for one in found
        for claim in one["claims"]
    ]


def _part(one: dict[str, Any]) -> str:
    study, cells = Study.model_validate(one["spec"]), [Cell(**cell) for cell in one["cells"]]
    tried = [
        Tried(
            plan.Claim.model_validate(claim["claim"]),
            {int(seed): number for seed, number in claim["numbers"].items()},
            claim["missing"],
            claim["verdict"],
        )
        for claim in one["claims"]
    ]
    rows = [
        [claim.claim.says, claim.claim.source, _numbers(claim), f"*{claim.verdict}*"]
        for claim in tried
    ]
    missing = sorted({words for claim in tried for words in claim.missing})
    left_out = f"Not counted: {'; '.join(missing)}. " if missing else ""
    seeds, runs = (len({getattr(cell, name) for cell in cells}) for name in ("seed", "run"))
    return "\n".join(
        [
            f"## {one['study']}",
            _wrapped(f"{study.title}. {study.question}"),
            f"```bash\npython -m ddpm.study {one['study']}\n```\n",
            _wrapped(
                f"{seeds} seeds, {runs} runs; {one['minutes']:.0f} minutes on {one['device']}, "
                f"commit {one['commit']}."
            ),
            _table(["claim", "source", "here", "verdict"], rows),
            f"![The figures of each setting and seed]({one['study']}.png)\n",
            _table(*_means(study, cells)),
            _wrapped(f"{left_out}{_floors(cells)}{study.method}"),
        ]
    )


def _means(study: Study, cells: Sequence[Cell]) -> tuple[list[str], list[list[str]]]:
    """Mean and deviation over seeds, one row per setting.

    What was measured without a sampler stands in the row of the one sampler that there is.
    """
    keys, measures = varied(cells), list(dict.fromkeys(claim.of for claim in study.claims))
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(as_key([cell.settings.get(key) for key in keys]), []).append(cell)
    rows: list[dict[str, str]] = []
    for members in groups.values():
        values = {name: [c.values[name] for c in members if name in c.values] for name in measures}
        row = {key: members[0].settings[key] for key in keys if key in members[0].settings}
        rows.append(row | {n: _mean(some, len(members)) for n, some in values.items() if some})
    rows = _joined([row for row in rows if row.keys() & set(measures)], measures)
    shown = [key for key in keys if len({row.get(key) for row in rows}) > 1]
    table = [[row.get(name, "") for name in [*shown, *measures]] for row in rows]
    return [*map(_last, shown), *measures], table


def _joined(rows: list[dict[str, str]], measures: Sequence[str]) -> list[dict[str, str]]:
    """The rows, where one whose settings are among those of a single other row is in that one."""

    def settings(row: dict[str, str]) -> set[tuple[str, str]]:
        return {item for item in row.items() if item[0] not in measures}

    whole = [dict(row) for row in rows]
    for row in rows:
        others = [one for one in whole if settings(row) < settings(one)]
        if len(others) == 1 and not row.keys() & others[0].keys() & set(measures):
            others[0].update(row)
            whole.remove(row)
    return whole


def _floors(cells: Sequence[Cell]) -> str:
    """What no network beats: one half of the data against the other, or real pictures alone."""
    floors: dict[str, list[float]] = {}
    for cell in cells:
        for measure, floor in cell.floors.items():
            floors.setdefault(measure, []).append(floor)
    said = [f"{measure} {format_value(statistics.fmean(some))}" for measure, some in floors.items()]
    return f"Between real pictures: {', '.join(said)}. " if said else ""


def _mean(values: Sequence[float], count: int) -> str:
    if not values:
        return ""
    deviation = f" ± {format_value(statistics.stdev(values))}" if len(values) > 1 else ""
    fewer = f" ({len(values)} of {count})" if len(values) < count else ""
    return f"{format_value(statistics.fmean(values))}{deviation}{fewer}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def draw(path: Path, study: Study, cells: Sequence[Cell]) -> None:
    """Draws one panel per measure, with a point per seed and the mean of each setting.

    If a claim has a measure rise or fall with a setting, that setting is the panel's x-axis.
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
        key = over[measure]
        if key is None:
            _points(axes, measure, some)
        else:
            of_key = [cell for cell in some if key in cell.settings]
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

    `mark` rings the best point of a line and those that cannot be told from it: their means differ
    by no more than the larger of the two deviations over seeds.
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
            near = _near_best(of_places)
            look = {"markerfacecolor": "none", "markersize": 13, "color": colour}
            axes.plot([places[at] for at in near], [means[at] for at in near], "o", **look)
    axes.set_xscale("log", base=2)
    ticks = sorted({float(cell.settings[key]) for cell in cells})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set(xlabel=key, ylabel=measure)
    axes.grid(alpha=0.3)
    if len(groups) > 1:
        drawing.legend(axes, drawing.Legend(handles, list(groups)))


def _near_best(of_places: Sequence[Any]) -> list[int]:
    best = min(of_places, key=lambda values: values.mean())
    return [
        at
        for at, values in enumerate(of_places)
        if values.mean() - best.mean() <= max(values.std(), best.std())
    ]


def _groups(cells: Sequence[Cell], keys: Sequence[str]) -> dict[str, list[Cell]]:
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(in_words(cell.settings, keys) or "all", []).append(cell)
    return groups
