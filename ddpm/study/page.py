"""The results of studies: figures as JSON and as a picture, and one page for all studies."""

import json
import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ddpm.compare import verdicts
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

lists studies: claims of the papers, tested at a small scale, with networks trained for minutes,
real pictures and several seeds. The command above each table (after `pip install -e '.[plots]'`)
trains, measures and computes the verdicts; run again, it resumes. `study.jobs=2` trains two runs at
a time (`'.[sweep]'`). `study.seeds=N` uses the seeds 0 to N-1. Results go to
`outputs/studies/results`; `study.to=experiments/studies` writes them and this page here.

- *holds*: the whole 95% interval (Student's t, one number per seed) lies on the claim's side;
  *does not hold here*: it lies on the other side; *undecided at these seeds*: it contains zero.
- Each number comes from one seed, which its runs and their samples share. A difference is between
  two runs of one seed; a slope is of the measure over log2 of the setting.
- The intervals are not corrected for the number of claims: of twenty claims without any effect,
  one would come out as decided.
- The distance `fd_digits` was chosen because it is cheap. Between 400 and 800 steps of training
  (cosine, epsilon, four seeds, differences paired by seed) it differs by 3.8 deviations over seeds,
  a distance on EfficientNet's features by 3.5; between 200 and 800 steps by 3.2, the other by 7.0,
  but EfficientNet takes many times as long. Measured by `python -m ddpm.evaluate -m run=...
  sampler=dpmpp20 step=200,400,800 evaluation.extractor=digits,efficientnet_lite0
  'evaluation.metrics=[fd]' evaluation.num_samples=500`. Its floor and its deviation over seeds are
  in each study.
- Settings are as typed on the command line. The JSON files beside this page have the full study
  and all figures, each with the folder of its run.
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
    found = verdicts.interval(numbers)
    if one.claim.rises_with:  # the numbers are below 0 where the claim holds
        found = verdicts.Interval(0 - found.mean, 0 - found.high, 0 - found.low)
    mean, low, high = map(format_value, found)
    return f"{_compared(one)} {mean} [{low}, {high}], {len(numbers)} seeds"


def _compared(one: Tried) -> str:
    claim = one.claim
    if claim.less is not None and claim.than is not None:
        return f"{claim.of}: {_side(claim.less)} minus {_side(claim.than)}"
    key = claim.falls_with or claim.rises_with or ""
    what = (
        claim.of
        if claim.best is None
        else f"log2 of the {_last(claim.best)} with the least {claim.of}"
    )
    return f"slope of {what} over log2 {_last(key)}"


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
            _table(*means(study, cells)),
            _wrapped(f"{left_out}{_floors(cells)}{study.method}"),
        ]
    )


def means(study: Study, cells: Sequence[Cell]) -> tuple[list[str], list[list[str]]]:
    """Returns the head and rows of a table: mean and deviation over seeds, one row per setting.

    Figures that need no sampler are in the row of the sampler, if there is only one.
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
    of_measuring = {key for way in plan.jobs(study.evaluate) for key in way.settings}
    rows = _joined([row for row in rows if row.keys() & set(measures)], measures, of_measuring)
    shown = [key for key in keys if len({row.get(key) for row in rows}) > 1]
    table = [[row.get(name, "") for name in [*shown, *measures]] for row in rows]
    return [*map(_last, shown), *measures], table


def _joined(
    rows: list[dict[str, str]], measures: Sequence[str], of_measuring: set[str]
) -> list[dict[str, str]]:
    """The rows, with a row in another one if that alone adds settings, and only of measuring."""
    whole = [dict(row) for row in rows]
    for row in rows:
        said = {item for item in row.items() if item[0] not in measures}
        others = []
        for one in whole:
            more = one.keys() - row.keys() - set(measures)
            if more and more <= of_measuring and said <= one.items():
                others.append(one)
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
