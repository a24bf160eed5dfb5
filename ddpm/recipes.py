"""python -m ddpm.recipes: prints experiments/README.md from the files beside it.

The page is the table of the named runs.
"""

from functools import cache
from itertools import groupby
from pathlib import Path

from ddpm.config.compose import EXPERIMENTS, Composed, compose
from ddpm.config.schema import Config, Recipe, training_config
from ddpm.runs.contents import read_record
from ddpm.runs.folder import starts_of
from ddpm.runs.results import PARTS, read_measurements

INTRO = """\
# Recipes

One file a run: `python -m ddpm.train experiment=NAME` trains it, `python -m ddpm.plan \
experiment=NAME` says beforehand what it will be, and whether that
is what its source describes. A file holds only what differs from its `model` and `data` options \
and, under `recipe`, what the run must come to. The LSUN
bedroom, cat and horse runs need `data.path=DIR`: the images exported from [LSUN's own \
databases](https://github.com/fyu/lsun).

A published figure stands with its protocol (floats, truncated: what became of samples before \
Inception; 10k pictures: of the data, where not all);
Ho et al. report the step of lowest FID. What is done otherwise than in the source's code, and \
can change a number, is told below the table, and with a source
the setting that would be as there, if there is one. The recipe keeps its own: folders of runs \
are named by it.

Each file also says how near a repetition should come: 0.2 for an FID of about 3 and 5% for \
larger ones, twice the deviation printed for IS (5% where
there is none), and 0.02 for precision, recall and bits/dim, where the objectives compared lie \
0.04 and more apart. A measured figure stands with its
id, which says how (`ddim50`: by `python -m ddpm.evaluate run=... sampler=ddim50`); its `run.json` \
and `evaluation.json` lie in `results/`. Distances that
are called `efficientnet_lite0` are on its features, and no FID.

Dhariwal & Nichol's figures are those without guidance, by `python -m ddpm.evaluate run=... \
evaluation=adm precision=fp16 sampler=ancestral250` (LSUN: `sampler=ancestral`,
or `sampler=ancestral sampler.spacing=[90,60,60,20,20]`). Their DDIM of 25 steps is \
`sampler=ddim25`, for which they print figures with guidance alone.
Classifier guidance and the upsamplers are left out.

The papers' tables of objectives and schedules are sweeps; where a row has a recipe, it is the \
same run, in the same folder:

```bash
# Ho et al. 2020, Table 2
python -m ddpm.train -m model=unet32 data=cifar10 \
objective=epsilon_fixed_large,epsilon_bound,epsilon_bound_learned,mean,mean_bound,mean_bound_learned
# Nichol & Dhariwal 2021, Table 2: cosine; linear, 4000 timesteps; linear, 1000 timesteps
python -m ddpm.train -m experiment=cifar10_hybrid objective=epsilon_fixed_large,hybrid,vlb \
objective.rescale_timesteps=true
python -m ddpm.train -m experiment=cifar10_hybrid model.dropout=0.1 schedule=linear_rescaled \\
    objective=epsilon_fixed_large,hybrid objective.rescale_timesteps=true
python -m ddpm.train experiment=cifar10_hybrid model.dropout=0.1 schedule=linear \
schedule.num_timesteps=1000 objective=epsilon_fixed_large
```

`python -m ddpm.recipes > experiments/README.md` writes this page.
"""

OTHERS = """\
Measured, and no recipe: the quick start of before (32 channels, linear, epsilon, no classes).
"""

RESULTS = EXPERIMENTS / "results"
METRICS = {
    "fid": "FID",
    "inception_score": "IS",
    "bits_per_dim": "bits/dim",
    "precision": "precision",
    "recall": "recall",
}


def page() -> str:
    """Returns experiments/README.md, whole."""
    runs = sorted(
        folder.name
        for folder in RESULTS.iterdir()
        if folder.is_dir() and not (EXPERIMENTS / f"{folder.name}.yaml").is_file()
    )
    measured = "".join(f"| {name} | {summarize_results(name)} |\n" for name in runs)
    return (
        f"{INTRO}\n{recipe_table()}\n{differing()}\n"
        f"{OTHERS}\n| run | measured |\n| --- | --- |\n{measured}"
    )


def differing() -> str:
    """Returns what is done otherwise than in the sources' code, in Markdown, with its recipes."""
    together: dict[str, list[str]] = {}
    for name, _, _, recipe in _recipes():
        if recipe.differs is not None:
            together.setdefault(recipe.differs, []).append(name)
    return "What is done otherwise than in the sources' code:\n\n" + "".join(
        f"- {', '.join(names)}: {words}\n" for words, names in together.items()
    )


def recipe_table() -> str:
    """Returns one row per recipe, in Markdown.

    Raises:
        ValueError: For a file that says nothing about where it comes from; it names the file.
    """
    head = ["recipe", "source", "model, data", "parameters", "steps", "published", "measured"]
    rows = [head, ["---"] * 3 + ["---:"] * 2 + ["---"] * 2]
    for name, composed, config, recipe in _recipes():
        rows.append(
            [
                f"[{name}]({name}.yaml)",
                _source(recipe),
                *_run(composed, config, recipe),
                _published(recipe),
                summarize_results(name),
            ]
        )
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


@cache
def _recipes() -> list[tuple[str, Composed, Config, Recipe]]:
    found = []
    for file in sorted(EXPERIMENTS.glob("*.yaml")):
        composed = compose([f"experiment={file.stem}"])
        config = training_config(composed)
        if config.recipe is None:
            raise ValueError(f"experiments/{file.name} has no recipe")
        found.append((file.stem, composed, config, config.recipe))
    return found


def summarize_results(name: str, results: Path = RESULTS) -> str:
    """Returns what a run came to: figures with their protocols, steps, device and commit.

    They are read from its run.json and evaluation.json, kept in a folder of its name.
    """
    folder = results / name
    figures = read_measurements(folder / "evaluation.json")
    if not figures:
        return "not measured"
    run = read_record(folder)
    last = starts_of(run)[-1]
    shown = [
        f"{entry['id']} {entry['value']:.4g}"
        + (f" (floor {entry['floor']:.4g})" if entry["floor"] is not None else "")
        for entry in figures
        if not entry["metric"].startswith(PARTS)
    ]
    return "<br>".join(
        [
            *(f"`{words}`" for words in shown),
            f"{run['step']:,} steps, {last['device']}, commit {last['git']['commit'][:7]}",
        ]
    )


def _source(recipe: Recipe) -> str:
    takes = f"takes {recipe.takes}" if recipe.takes else None
    departs = " ".join(f"`{key}={value}`" for key, value in recipe.departs.items())
    as_there = f"As in the source: {departs}" if departs else None
    parts = (recipe.source, takes, recipe.note, as_there)
    return "<br>".join(part for part in parts if part)


def _run(composed: Composed, config: Config, recipe: Recipe) -> list[str]:
    """Options, parameters and steps."""
    expect = recipe.expect
    parameters, steps = (
        f"{number:,}" if number else ""
        for number in (expect.parameters, expect.last_step and expect.last_step + 1)
    )
    epochs = f" ({config.training.epochs} epochs)" if config.training.epochs else ""
    return [
        f"`{composed.choices['model']}`, `{composed.choices['data']}`",
        parameters,
        steps + epochs,
    ]


def _published(recipe: Recipe) -> str:
    """The figures, those of one protocol together."""
    lines = []
    for protocol, metrics in groupby(recipe.expect.metrics, key=lambda metric: metric.protocol):
        figures = ", ".join(
            f"{METRICS.get(metric.name, metric.name)} {metric.value:g}" for metric in metrics
        )
        lines.append(f"{figures} ({protocol})")
    return "<br>".join(lines) or "none"


def main() -> None:
    print(page(), end="")


if __name__ == "__main__":
    main()
