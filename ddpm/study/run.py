"""python -m ddpm.study NAME: run a study's command lines and judge its claims."""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from ddpm.compare.drawing import require_matplotlib
from ddpm.config.compose import Composed, compose
from ddpm.config.schema import plain_config
from ddpm.config.sweeps import visible_devices
from ddpm.config.validation import Count, Section, Text, validate
from ddpm.runs.folder import RunFolder, starts_of
from ddpm.study import figures, page, picture, plan
from ddpm.study.figures import StudyRun
from ddpm.study.plan import Study
from ddpm.system import relay, signals
from ddpm.system.files import write_text
from ddpm.system.signals import Preempted
from ddpm.system.text import say
from ddpm.train.which import which_run


class Which(Section):
    """The keys of `study`. See conf/study.yaml for each."""

    name: Text | None
    seeds: Annotated[int, Field(ge=2)] | None
    jobs: Count | None
    to: Text | None
    show: bool


class Settings(Section):
    """The keys of ddpm.study. See conf/study.yaml for each."""

    study: Which
    outputs: Text


def run(composed: Composed) -> None:
    """Trains and measures what a study still lacks, then prints and writes its results.

    Raises:
        ValueError: If there is no such study, one of its lines is invalid, or no run was measured.
        Preempted: If told to stop; the same command resumes.
    """
    settings = validate(Settings, plain_config(composed))
    which, outputs = settings.study, settings.outputs
    if which.name is None:
        for name in plan.names():
            print(f"{name:<16} {plan.load(name).title}")
        return
    require_matplotlib()
    study, name = plan.load(which.name), Path(which.name).stem
    seeds = range(which.seeds or study.seeds)
    if which.show:
        _show(study, seeds, settings)
        return
    to = Path(which.to or Path(outputs) / "results").expanduser()
    to.mkdir(parents=True, exist_ok=True)
    spent = Path(outputs) / f".{name}.spent.jsonl"
    spent.parent.mkdir(parents=True, exist_ok=True)
    with signals.listening():
        for line in _training(study, seeds, settings):
            _do(line, spent)
        runs = _runs(study, seeds, outputs)
        for line in _measuring(study, runs, which.jobs):
            _do(line, spent)
    cells = [cell for one in runs for cell in figures.cells(study, one)]
    if not any(cell.values for cell in cells):
        raise ValueError(f"study {name}: no run was trained and measured; the errors above say why")
    tried = [figures.tried(claim, cells) for claim in study.claims]
    about = _about(spent, [one.run for one in runs])
    write_text(to / f"{name}.json", page.as_json(name, study, cells, tried, about))
    picture.draw(to / f"{name}.png", study, cells)
    print(f"\n{page.text(tried)}")
    write_text(to / "README.md", page.page(to))
    say(f"page {to / 'README.md'}")


def _show(study: Study, seeds: Sequence[int], settings: Settings) -> None:
    for line in study.train:
        say(_typed(_train(line, seeds, settings)))
    print("then for each seed, with its runs:")
    for line in study.evaluate:
        say(_typed(_evaluate(line, ["DIR", "..."], 0, settings.study.jobs)))


def _runs(study: Study, seeds: Sequence[int], outputs: str) -> list[StudyRun]:
    found = []
    for seed in seeds:
        for job in plan.jobs(study.train):
            begun = which_run(compose([f"outputs={outputs}", *job.words, f"seed={seed}"]))
            found.append(StudyRun(job, seed, begun.folder))
    return found


def _training(study: Study, seeds: Sequence[int], settings: Settings) -> Iterator[list[str]]:
    """The command lines that train incomplete runs, each with the seeds that it lacks."""
    for line in study.train:
        of_line = _runs(study.model_copy(update={"train": [line]}), seeds, settings.outputs)
        left = sorted({one.seed for one in of_line if one.run.status() != "complete"})
        if left:
            yield _train(line, left, settings)


def _measuring(study: Study, runs: Sequence[StudyRun], jobs: int | None) -> Iterator[list[str]]:
    """The command lines that measure complete runs without figures, by each run's seed."""
    for line in study.evaluate:
        for seed in dict.fromkeys(one.seed for one in runs):
            left = [
                str(one.run.path)
                for one in runs
                if one.seed == seed
                and one.run.status() == "complete"
                and not all(figures.is_measured(one, way) for way in plan.jobs([line]))
            ]
            if left:
                yield _evaluate(line, left, seed, jobs)


def _train(line: Sequence[str], seeds: Sequence[int], settings: Settings) -> list[str]:
    seeded = f"seed={','.join(map(str, seeds))}"
    outputs = f"outputs={settings.outputs}"
    return ["ddpm.train", "-m", outputs, *line, seeded, *_at_once(settings.study.jobs)]


def _evaluate(line: Sequence[str], runs: Sequence[str], seed: int, jobs: int | None) -> list[str]:
    return ["ddpm.evaluate", "-m", f"run={','.join(runs)}", *line, f"seed={seed}", *_at_once(jobs)]


def _at_once(jobs: int | None) -> list[str]:
    """Starts several jobs at once, by default one per GPU."""
    jobs = jobs or max(1, len(visible_devices()))
    return [] if jobs == 1 else ["hydra/launcher=joblib", f"hydra.launcher.n_jobs={jobs}"]


def _typed(line: Sequence[str]) -> str:
    return f"python -m {shlex.join(line)}"


def _do(line: Sequence[str], spent: Path) -> None:
    """Runs a command line and records how long it took, also if it is cut off.

    The command and the page report jobs that fail.

    Raises:
        Preempted: If told to stop.
    """
    print(flush=True)
    say(_typed(line))
    began = time.monotonic()
    # the variable is set for Hydra in this process, and would have the command print tracebacks
    env = {key: value for key, value in os.environ.items() if key != "HYDRA_FULL_ERROR"}
    with relay.passing_on(relay.own_children):
        code = subprocess.run([sys.executable, "-m", *line], check=False, env=env).returncode
    with spent.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"line": line, "seconds": time.monotonic() - began}) + "\n")
    signals.check()
    if code not in (0, 1):
        raise Preempted(f"{line[0]} was told to stop")


def _about(spent: Path, runs: Sequence[RunFolder]) -> dict[str, Any]:
    """Where, at which commit and for how long a study ran, over all its starts."""
    lines = spent.read_text(encoding="utf-8").splitlines() if spent.is_file() else []
    starts = [start for one in runs for start in starts_of(one.record())]
    commits = {str((start.get("git") or {}).get("commit"))[:7] for start in starts}
    return {
        "minutes": sum(json.loads(line)["seconds"] for line in lines) / 60,
        "device": " and ".join(sorted({start["device"] for start in starts})),
        "commit": ", ".join(sorted(commits)),
    }
