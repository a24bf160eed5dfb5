"""python -m ddpm.study NAME: run a study's command lines, and say what came of its claims."""

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from ddpm.compare.drawing import require_matplotlib
from ddpm.config.compose import Composed, compose
from ddpm.config.schema import plain_config
from ddpm.config.validation import Count, Section, Text, validate
from ddpm.runs.folder import RunFolder, starts_of
from ddpm.study import figures, page, plan
from ddpm.study.plan import Job
from ddpm.system import relay, signals
from ddpm.system.files import write_text
from ddpm.system.signals import Preempted
from ddpm.train.which import which_run


class Which(Section):
    """See conf/study.yaml for each key."""

    name: Text | None
    seeds: Annotated[int, Field(ge=2)] | None
    jobs: Count | None
    to: Text | None
    show: bool


class Settings(Section):
    """See conf/study.yaml for each key."""

    study: Which
    outputs: Text


def run(composed: Composed) -> None:
    """Trains and measures what is missing of a study, and prints and writes what came of it.

    Raises:
        ValueError: If there is no such study, or a command line of it fails altogether.
        Preempted: When told to stop; the same command carries on.
    """
    settings = validate(Settings, plain_config(composed))
    which, outputs = settings.study, settings.outputs
    if which.name is None:
        for name in plan.names():
            print(f"{name:<24} {plan.load(name).title}")
        return
    require_matplotlib()
    study = plan.load(which.name)
    seeds = list(range(which.seeds or study.seeds))
    training = [_train_line(line, seeds, outputs, which.jobs) for line in study.train]
    if which.show:
        print("\n".join(map(shlex.join, training)))
        print("and for each seed, with its runs:")
        print(
            "\n".join(
                shlex.join(_evaluate_line(line, ["..."], 0, which.jobs)) for line in study.evaluate
            )
        )
        return
    to = Path(which.to or Path(outputs) / "results")
    spent = to / f".{which.name}.spent.jsonl"
    to.mkdir(parents=True, exist_ok=True)
    with signals.listening():
        for line in training:
            _do(line, spent)
        runs = {
            seed: [(job, _run_of(job, seed, outputs)) for job in plan.jobs(study.train)]
            for seed in seeds
        }
        for line in study.evaluate:
            for seed in seeds:
                whole = [str(one.path) for _, one in runs[seed] if one.status() == "complete"]
                if whole:
                    _do(_evaluate_line(line, whole, seed, which.jobs), spent)
    cells = [
        cell
        for seed in seeds
        for job, one in runs[seed]
        for cell in figures.cells(study, job, one, seed)
    ]
    found = [figures.tried(claim, cells) for claim in study.claims]
    about = _about(spent, [one for seed in seeds for _, one in runs[seed]])
    write_text(to / f"{which.name}.json", page.as_json(which.name, study, cells, found, about))
    page.draw(to / f"{which.name}.png", study, cells)
    print(f"\n{page.text(found)}")
    write_text(to / "README.md", page.page(to))
    print(f"page {to / 'README.md'}", flush=True)


def _train_line(
    line: Sequence[str], seeds: Sequence[int], outputs: str, jobs: int | None
) -> list[str]:
    seeded = f"seed={','.join(map(str, seeds))}"
    return ["ddpm.train", "-m", f"outputs={outputs}", *line, seeded, *_at_once(jobs)]


def _evaluate_line(
    line: Sequence[str], runs: Sequence[str], seed: int, jobs: int | None
) -> list[str]:
    return ["ddpm.evaluate", "-m", f"run={','.join(runs)}", *line, f"seed={seed}", *_at_once(jobs)]


def _at_once(jobs: int | None) -> list[str]:
    return ["hydra/launcher=joblib", *([] if jobs is None else [f"hydra.launcher.n_jobs={jobs}"])]


def _do(line: Sequence[str], spent: Path) -> None:
    """Runs a command line, and notes how long it took.

    Jobs of it that fail are told by the command, and stand in the page; nothing else ends it.
    """
    print(f"\npython -m {shlex.join(line)}", flush=True)
    began = time.monotonic()
    with relay.passing_on(relay.own_children):
        ended = subprocess.run([sys.executable, "-m", *line], check=False)
    signals.check()
    with spent.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"line": line, "seconds": time.monotonic() - began}) + "\n")
    if ended.returncode not in (0, 1):
        raise Preempted(f"{line[0]} ended with {ended.returncode}")


def _about(spent: Path, runs: Sequence[RunFolder]) -> dict[str, Any]:
    """Where, with which commit and for how long a study ran, over all its starts."""
    lines = spent.read_text(encoding="utf-8").splitlines()
    starts = [start for one in runs for start in starts_of(one.record())]
    return {
        "minutes": sum(json.loads(line)["seconds"] for line in lines) / 60,
        "device": " and ".join(sorted({start["device"] for start in starts})),
        "commit": ", ".join(sorted({str(start["git"]["commit"])[:7] for start in starts})),
    }


def _run_of(job: Job, seed: int, outputs: str) -> RunFolder:
    return which_run(compose([f"outputs={outputs}", *job.words, f"seed={seed}"])).folder
