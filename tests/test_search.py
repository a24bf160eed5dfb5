"""Learned searches (hydra/sweeper=optuna).

A diverging job does not end the search, a search typed again trains nothing twice, and the search
goes by the right figure.
"""

import json
import signal
import sys

import pytest
import yaml

from ddpm.config.cli import command
from ddpm.config.search import Score
from ddpm.system import signals

pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
OPTUNA = ["-m", "hydra/sweeper=optuna"]


def runs_of(outputs):
    """Maps each run's learning rate to its run.json."""
    return {
        yaml.safe_load((file.parent / "config.yaml").read_text())["optimizer"]["lr"]: json.loads(
            file.read_text()
        )
        for file in outputs.glob("*/*/run.json")
    }


def rows(done):
    """The table's rows without its header, and the line below the table."""
    *table, best = done.out.split("\n\n")[-1].splitlines()[1:]
    return table, best


def test_a_diverging_job_ends_no_search_and_typed_again_it_goes_on_from_its_runs(
    typed, tiny, tmp_path
):
    words = [*OPTUNA, *tiny, f"outputs={tmp_path}", "optimizer.lr=tag(log,interval(1e-16,1e14))"]
    done = typed("train", *words, "hydra.sweeper.n_trials=2")
    assert done.code == 1
    first = runs_of(tmp_path)
    assert len(first) == 2
    assert {run["status"] for run in first.values()} == {"complete", "failed"}
    assert done.err.count("error: NotFinite") == sum(
        run["status"] == "failed" for run in first.values()
    )
    table, best = rows(done)
    assert len(table) == 2
    losses = {
        index: float(row.split()[4]) for index, row in enumerate(table) if "failed" not in row
    }
    number = min(losses, key=losses.get)
    assert best.startswith(f"best: job {number}, loss ")
    assert float(best.split()[-1]) == pytest.approx(losses[number], rel=1e-3)

    again = typed("train", *words, "hydra.sweeper.n_trials=3")

    after = runs_of(tmp_path)
    assert len(after) == 3
    assert [row.split()[1] for row in rows(again)[0][:2]] == [row.split()[1] for row in table]
    starts = {rate: len(after[rate]["starts"]) for rate in first}
    assert starts == {rate: 1 if run["status"] == "complete" else 2 for rate, run in first.items()}


def test_the_first_jobs_of_a_search_may_be_one_run(typed, tiny, tmp_path):
    """A grid would refuse them."""
    words = [*OPTUNA, *tiny, f"outputs={tmp_path}", "training.steps=1", "seed=choice(3)"]
    done = typed("train", *words, "hydra.sweeper.n_trials=2", "hydra.sweeper.n_jobs=2")
    assert done.code == 0, done.err
    assert len(rows(done)[0]) == 2
    assert len(runs_of(tmp_path)) == 1


@pytest.fixture
def search(tmp_path, monkeypatch, capsys):
    """Searches over the seed with a custom job; returns exit code, output and seeds in order."""

    def call(*words, stops_at=None, direction="maximize", scored=True):
        seeds = []

        def task(composed):
            seeds.append(composed.cfg.seed)
            if len(seeds) == stops_at:
                signal.raise_signal(signal.SIGTERM)
            signals.check()

        def score(composed):
            return Score("precision@1k", composed.cfg.seed, direction)

        monkeypatch.setattr(
            sys,
            "argv",
            ["ddpm", *OPTUNA, "seed=range(0,1000)", f"outputs={tmp_path}", *words],
        )
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        main = command(
            *("train", task, "Search.", []),
            config_name="config",
            heeds=True,
            scored=score if scored else None,
        )
        code = 0
        try:
            main()
        except SystemExit as stopped:
            code = stopped.code
        return code, capsys.readouterr().out, seeds

    return call


def test_a_search_finds_more_where_more_is_better(search):
    code, out, seeds = search("hydra.sweeper.direction=maximize", "hydra.sweeper.n_trials=5")
    assert (code, len(seeds)) == (0, 5)
    assert out.splitlines()[-1] == (
        f"best: job {seeds.index(max(seeds))}, precision@1k {max(seeds)}"
    )


def test_a_search_with_a_storage_goes_on_from_it(search, tmp_path):
    words = [
        f"hydra.sweeper.storage=sqlite:///{tmp_path / 'study.db'}",
        *("hydra.sweeper.study_name=one", "hydra.sweeper.direction=maximize"),
    ]
    _, _, first = search(*words, "hydra.sweeper.n_trials=3")
    _, _, second = search(*words, "hydra.sweeper.n_trials=3")
    assert len(first) == len(second) == 3
    assert first != second  # without a storage, both would be the same
    found = yaml.safe_load((tmp_path / "optimization_results.yaml").read_text())
    assert found["best_value"] == max(first + second)


def test_a_search_that_is_told_to_stop_starts_no_other_job(search):
    code, out, seeds = search("hydra.sweeper.n_trials=5", stops_at=2, direction="minimize")
    assert (code, len(seeds)) == (75, 2)
    assert [row.split()[-1] for row in out.splitlines()[2:4]] == [
        "done",
        "preempted",
    ]


@pytest.mark.parametrize(
    ("words", "scored", "named"),
    [
        (["hydra.sweeper.n_trials=2"], True, "type hydra.sweeper.direction=maximize"),
        (["hydra.sweeper.direction=[minimize,maximize]"], True, "hydra.sweeper.direction="),
        (["optimizer.lrr=1"], True, "did you mean lr"),
        ([], False, "hydra/sweeper"),
    ],
    ids=["direction", "two directions", "key", "no score"],
)
def test_a_search_that_cannot_be_says_why(search, words, scored, named):
    code, _, seeds = search(*words, scored=scored)
    assert code.startswith("error: ")
    assert named in code
    assert "\n" not in code
    assert len(seeds) == (1 if "type" in named else 0)
