"""python -m ddpm.recipes: print experiments/README.md, the page of the named runs."""

import textwrap
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from ddpm.config.compose import EXPERIMENTS, compose
from ddpm.config.schema import Recipe, training_config
from ddpm.runs.contents import read_record
from ddpm.runs.folder import starts_of
from ddpm.runs.results import PARTS, read_measurements

INTRO = """\
# Recipes

```bash
python -m ddpm.train experiment=cifar10
```

trains a named run, and `python -m ddpm.plan experiment=cifar10` says beforehand what it will be and
whether that is what its source describes. Each recipe is one file in this folder. It holds what
differs from its `model` and `data` options and, under `recipe`, what the run must come to:
parameters, steps per epoch, learning rates, and the published figures with a tolerance for a
repetition (0.2 for an FID of about 3 and 5% for larger ones; twice the printed deviation for IS, or
5% where none is printed; 0.02 for precision, recall and bits/dim, where the objectives compared
differ by 0.04 and more).

[Studies](studies/README.md) are small, and test the papers' claims with several seeds.

The first column of figures is the paper's, with a letter for its protocol
([explained below](#protocols)); a figure of ours stands in the last one. *Differs* lists what the
source's own code does in another way that can change a number, with the setting that restores it if
there is one.
"""

SWEEPS = """\
## The papers' tables as sweeps

A row that has a recipe is the same run in the same folder.

```bash
# Ho et al. 2020, Table 2
python -m ddpm.train -m model=unet32 data=cifar10 \\
    objective=epsilon_fixed_large,epsilon_bound,epsilon_bound_learned,mean,mean_bound,mean_bound_learned
# Nichol & Dhariwal 2021, Table 2: cosine; linear, 4000 timesteps; linear, 1000 timesteps
python -m ddpm.train -m experiment=cifar10_hybrid objective=epsilon_fixed_large,hybrid,vlb \\
    objective.rescale_timesteps=true
python -m ddpm.train -m experiment=cifar10_hybrid model.dropout=0.1 schedule=linear_rescaled \\
    objective=epsilon_fixed_large,hybrid objective.rescale_timesteps=true
python -m ddpm.train experiment=cifar10_hybrid model.dropout=0.1 schedule=linear \\
    schedule.num_timesteps=1000 objective=epsilon_fixed_large
```
"""

MEASURED = """\
## Measured here

Each run's `run.json` and `evaluation.json` are in `results/`. `500:train:efficientnet_lite0:ddim50`
means 500 samples compared with the training split on the features of EfficientNet-Lite, drawn by
`sampler=ddim50` (`dpm_solver_pp20` is `sampler=dpmpp20`); then come the weights (`ema`) and the
step. Distances on these features are not FIDs. The floor is the same measure between two halves of
the data; `named` is the share of samples that a classifier of digits recognizes with a probability
of at least 0.9, and its floor that share of real digits.
"""

WRITTEN = "`python -m ddpm.recipes > page && mv page experiments/README.md` writes this page.\n"


class Paper(NamedTuple):
    """Where recipes come from.

    Attributes:
        heading: Its name on the page.
        sources: What a recipe's `source` begins with.
        about: What its recipes have in common, in Markdown.
    """

    heading: str
    sources: tuple[str, ...]
    about: str = ""


PAPERS = (
    Paper(
        "Ho et al. 2020",
        ("Ho et al. 2020",),
        "The paper reports the step with the lowest FID. The bedroom and cat runs need "
        "`data.path=DIR`, the\nimages exported from "
        "[LSUN's databases](https://github.com/fyu/lsun).",
    ),
    Paper("Nichol & Dhariwal 2021 (improved-diffusion)", ("Nichol & Dhariwal 2021",)),
    Paper(
        "Dhariwal & Nichol 2021 (ADM, guided-diffusion)",
        ("Dhariwal & Nichol 2021",),
        "Figures without guidance, measured by `python -m ddpm.evaluate run=... evaluation=adm\n"
        "precision=fp16 sampler=ancestral250` (LSUN: `sampler=ancestral`, or with\n"
        "`sampler.spacing=[90,60,60,20,20]`). `sampler=ddim25` is their DDIM, for which they "
        "print figures\nwith guidance alone. Classifier guidance and the upsamplers are not "
        "supported. The LSUN runs need\n`data.path=DIR`, as above.",
    ),
    Paper(
        "The original README (mattroz/diffusion-ddpm), and variations on its butterflies",
        ("README of mattroz", "code of mattroz", "butterflies128 "),
    ),
    Paper(
        "This project, for one CPU core",
        ("this project",),
        "![faces32](results/faces32.png) ![faces64](results/faces64.png)\n\n"
        "![emoji32](results/emoji32.png) ![emoji64](results/emoji64.png)\n\n"
        "![The same noise at steps 1,000, 3,000, 5,000 and 7,000 of emoji64]"
        "(results/emoji64_over_training.png)",
    ),
)

RESULTS = EXPERIMENTS / "results"
METRICS = {
    "fid": "FID",
    "inception_score": "IS",
    "bits_per_dim": "bits/dim",
    "precision": "precision",
    "recall": "recall",
}


class Named(NamedTuple):
    """A recipe by its file's name, with the options and the epochs that it chooses."""

    name: str
    model: str
    data: str
    recipe: Recipe
    epochs: int | None


def page() -> str:
    """Returns experiments/README.md, whole.

    Raises:
        ValueError: For a file that does not say where it comes from; it names the file.
    """
    letters = _letters()
    of_papers = [_section(paper, letters) for paper in PAPERS]
    links = "".join(f"[{one.name}]: {one.name}.yaml\n" for one in _recipes())
    protocols = "".join(_item(f"{letter}: {protocol}") for protocol, letter in letters.items())
    parts = [
        INTRO,
        *of_papers,
        "## Protocols\n\nThe letters of the published figures. *Floats* or *truncated* is how "
        "samples reached the\nInception network; *10k pictures* is how many of the data were used, "
        f"where it was not all.\n\n{protocols}",
        SWEEPS,
        f"{MEASURED}\n{measured()}",
        WRITTEN,
        links,
    ]
    return "\n".join(parts)


def _section(paper: Paper, letters: dict[str, str]) -> str:
    """A paper's recipes: a table of them, one of their published figures, and notes."""
    mine = [one for one in _recipes() if _paper_of(one) is paper]
    rows = [
        [f"[{one.name}]", one.model, one.data, _first_figure(one, letters), _first_measured(one)]
        for one in mine
    ]
    parts = [
        f"## {paper.heading}\n",
        _table(["recipe", "model", "data", "published", "here"], rows),
    ]
    if paper.about:
        parts.append(f"{paper.about}\n")
    figures = _figures(mine, letters)
    if figures:
        parts.append(figures)
    items = [f"{one.name}: {_note(one)}" for one in mine]
    together: dict[str, list[str]] = {}
    for one in mine:
        if one.recipe.differs is not None:
            together.setdefault(one.recipe.differs, []).append(one.name)
    for words, names in together.items():
        whose = "" if len(names) == len(mine) else f" ({', '.join(names)})"
        items.append(f"*Differs*{whose}: {words}")
    return "\n".join([*parts, "".join(map(_item, items))])


def _item(words: str) -> str:
    """An item of a list, in lines of at most 100 columns."""
    lines = textwrap.wrap(
        words, 98, break_long_words=False, break_on_hyphens=False, subsequent_indent="  "
    )
    return "- " + "\n".join(lines) + "\n"


def _paper_of(one: Named) -> Paper:
    found = [paper for paper in PAPERS if one.recipe.source.startswith(paper.sources)]
    if not found:
        raise ValueError(
            f"experiments/{one.name}.yaml has recipe.source={one.recipe.source!r}, which names no "
            f"paper of ddpm/recipes.py: {', '.join(paper.heading for paper in PAPERS)}"
        )
    return found[0]


@cache
def _recipes() -> list[Named]:
    found = []
    for file in sorted(EXPERIMENTS.glob("*.yaml")):
        composed = compose([f"experiment={file.stem}"])
        config = training_config(composed)
        if config.recipe is None:
            raise ValueError(f"experiments/{file.name} has no recipe")
        choices = composed.choices
        model, data = choices["model"], choices["data"]
        found.append(Named(file.stem, model, data, config.recipe, config.training.epochs))
    return found


def _letters() -> dict[str, str]:
    """A letter for each protocol of a published figure, in the order of the page."""
    in_order = [one for paper in PAPERS for one in _recipes() if _paper_of(one) is paper]
    protocols = dict.fromkeys(
        metric.protocol for one in in_order for metric in one.recipe.expect.metrics
    )
    return {protocol: chr(ord("A") + number) for number, protocol in enumerate(protocols)}


def _first_figure(one: Named, letters: dict[str, str]) -> str:
    metrics = one.recipe.expect.metrics
    if not metrics:
        return "none"
    first = metrics[0]
    return f"{METRICS.get(first.name, first.name)} {first.value:g} ({letters[first.protocol]})"


def _first_measured(one: Named) -> str:
    figures = _measurements(one.name)
    return f"{figures[0]['metric']} {figures[0]['value']:.4g}" if figures else ""


def _figures(recipes: Sequence[Named], letters: dict[str, str]) -> str:
    """All published figures of some recipes, one row per protocol; empty if there are none."""
    found = [metric for one in recipes for metric in one.recipe.expect.metrics]
    names = [name for name in METRICS if any(metric.name == name for metric in found)]
    rows = []
    for one in recipes:
        for protocol, metrics in groupby(one.recipe.expect.metrics, lambda one: one.protocol):
            values = {metric.name: f"{metric.value:g}" for metric in metrics}
            rows.append([one.name, letters[protocol], *(values.get(name, "") for name in names)])
    return _table(["published", "protocol", *map(METRICS.__getitem__, names)], rows) if rows else ""


def _note(one: Named) -> str:
    """What is to be said of a recipe, in sentences."""
    recipe, expect = one.recipe, one.recipe.expect
    paper = next(start for start in _paper_of(one).sources if recipe.source.startswith(start))
    source = recipe.source.removeprefix(f"{paper}, ")
    size = f"{expect.parameters:,} parameters" if expect.parameters else ""
    steps = f"{expect.last_step + 1:,} steps" if expect.last_step else ""
    steps += f" ({one.epochs} epochs)" if one.epochs else ""
    departs = ", ".join(f"`{key}={value}`" for key, value in recipe.departs.items())
    parts = (
        source[0].upper() + source[1:] if source[0].islower() and " " in source else source,
        ", ".join(part for part in (size, steps) if part),
        recipe.takes and f"Takes {recipe.takes}",
        recipe.note,
        departs and f"As in the source: {departs}",
    )
    return " ".join(f"{part.rstrip('.')}." for part in parts if part)


def measured() -> str:
    """Returns the figures of all runs that have some in results/, in Markdown."""
    rows, runs = [], []
    for folder in sorted(folder for folder in RESULTS.iterdir() if folder.is_dir()):
        rows += measured_rows(folder.name)
        runs.append(f"- {folder.name}: {_run_of(folder)}\n")
    return f"{_table(['run', 'metric', 'value', 'floor', 'protocol'], rows)}\n{''.join(runs)}"


def measured_rows(name: str, results: Path = RESULTS) -> list[list[str]]:
    """Returns what a run came to, one row per figure: run, metric, value, floor, protocol."""
    rows = []
    for entry in _measurements(name, results):
        metric, _, protocol = entry["id"].partition("@")
        floor = "" if entry["floor"] is None else f"{entry['floor']:.4g}"
        rows.append([name, metric, f"{entry['value']:.4g}", floor, protocol])
    return rows


def _measurements(name: str, results: Path = RESULTS) -> list[dict[str, Any]]:
    figures = read_measurements(results / name / "evaluation.json")
    return [entry for entry in figures if not entry["metric"].startswith(PARTS)]


def _run_of(folder: Path) -> str:
    run = read_record(folder)
    last = starts_of(run)[-1]
    git = last["git"]
    commit = f"{git['commit'][:7]}{' (changed)' if git.get('dirty') else ''}"
    return f"{run['step']:,} steps, {last['device']}, commit {commit}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    """Prints the page."""
    print(page(), end="")


if __name__ == "__main__":
    main()
