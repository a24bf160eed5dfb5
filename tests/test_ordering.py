"""Ordering runs: a metric's protocols never mix, and best= prints one folder and nothing else."""

import itertools
import json
import shutil
from datetime import datetime

import pytest
from made_runs import PROTOCOL, made

from ddpm.compare import order, tables
from ddpm.runs import reader, results
from ddpm.runs.costs import read_costs
from ddpm.runs.folder import RunFolder
from ddpm.runs.progress import progress
from ddpm.runs.results import Measurement

FD = "fd_efficientnet_lite0"


@pytest.fixture(scope="module")
def template(run_folder):
    return reader.read(RunFolder(run_folder))


@pytest.fixture
def runs(template, tmp_path):
    """Makes runs a, b, ... with the given figures and statuses."""

    count = itertools.count()

    def make(*figures, statuses=()):
        place = tmp_path / str(next(count))
        return [
            made(template, place / name, status=status, figures=[(FD, PROTOCOL, value)] if isinstance(value, float) else value)
            for name, value, status in zip("abcdef", figures, [*statuses, *["complete"] * 6], strict=False)
        ]  # fmt: skip

    return make


def names(ordered):
    return "".join(one.run.path.name for one in ordered.compared)


def test_the_better_comes_first_then_runs_without_the_figure_then_failed_ones(runs):
    given = runs(9.0, [], 7.0, 1.0, statuses=["complete", "complete", "running", "failed"])
    ordered = order.by(given, f"eval/{FD}", "order_by")
    assert (names(ordered), ordered.values, ordered.ranked) == ("cabd", [7.0, 9.0, None, 1.0], 2)
    assert ordered.note == (
        f"order_by=eval/{FD}: 2 of 4 runs are sorted by it; after them 1 without it, then 1 failed"
    )
    more = runs(
        [("recall", PROTOCOL, 0.2)], [("recall", PROTOCOL, 0.6)], [("recall", PROTOCOL, 0.4)]
    )
    assert names(order.by(more, "eval/recall", "order_by")) == "bca"


def test_nan_is_never_best_wherever_it_stands(runs):
    for values in ([float("nan"), 2.0, 3.0], [2.0, float("nan"), 3.0], [float("inf"), 3.0, 2.0]):
        given = runs(*values)
        ordered = order.best(given, f"eval/{FD}")
        assert ordered.values[0] == 2.0
        assert ordered.ranked == 2


OTHERS = [
    {"count": 50_000},
    {"seed": 5},
    {"weights": "raw"},
    {"data": "other"},
    {"quantize": "none"},
    {"sampler_settings": {"num_steps": 10, "spacing": [10, 15, 20]}},
]


@pytest.mark.parametrize("other", OTHERS)
def test_figures_of_unlike_protocol_are_never_ordered_together(runs, other):
    given = runs(9.0, [(FD, {**PROTOCOL, **other}, 1.0)], 8.0)
    with pytest.raises(ValueError, match="of 2 protocols, which do not compare") as error:
        order.by(given, f"eval/{FD}", "order_by")
    assert "\n" not in str(error.value)
    offered = str(error.value).partition("give one of ")[2].partition(", or words")[0].split(", ")
    assert len(offered) == 2
    firsts = [names(order.by(given, name, "order_by"))[0] for name in offered]
    assert sorted(firsts) == ["b", "c"]  # each name on offer selects one protocol


def test_the_words_of_one_protocol_alone_choose_it(runs):
    given = runs(9.0, [(FD, {**PROTOCOL, "weights": "raw", "seed": 5}, 1.0)])
    assert names(order.by(given, f"eval/{FD}:ema", "order_by"))[0] == "a"
    assert names(order.by(given, f"eval/{FD}:raw", "order_by"))[0] == "b"
    assert names(order.by(given, f"eval/{FD}:seed-5", "order_by"))[0] == "b"
    with pytest.raises(ValueError, match=rf"no run has such a figure; .*did you mean eval/{FD}"):
        order.by(given, "eval/fd_efficientnet_lite1", "order_by")


def test_best_stands_for_the_best_value_on_the_way(runs):
    """The run with the worst last value may have had the best value along the way."""
    given = runs(9.0, 5.0)
    result = given[0].results[0]
    given[0].results[0] = tables.Result(FD, result.protocol, result.final, (1.0, 3))
    assert order.best(given, f"eval/{FD}").compared[0] is given[1]
    ordered = order.best(given, f"eval/{FD}:best")
    assert (ordered.compared[0], ordered.values[0]) == (given[0], reader.At(1.0, 3))


def test_a_setting_orders_by_its_number_but_is_no_best(template, tmp_path):
    given = [
        made(template, tmp_path / str(lr), losses=[(6, 1.0)], lr=lr) for lr in (1e-3, 1e-2, 2e-4)
    ]
    ordered = order.by(given, "lr", "order_by")
    assert (ordered.column, ordered.values) == ("optimizer.lr", [2e-4, 1e-3, 1e-2])
    with pytest.raises(ValueError, match="is no figure, and settings are neither better nor worse"):
        order.best(given, "lr")
    with pytest.raises(
        ValueError, match=r"order_by=bach_size is not .* did you mean training.batch_size"
    ):
        order.by(given, "bach_size", "order_by")


def test_colours_follow_only_what_differs(template, tmp_path):
    given = [
        made(template, tmp_path / str(lr), losses=[(6, 1.0)], lr=lr, seed=int(lr * 1e4))
        for lr in (1e-3, 1e-2)
    ]
    assert order.differing(given, "lr", "colour_by") == "optimizer.lr"
    for name in ("seed", "batch_size"):
        with pytest.raises(
            ValueError,
            match=rf"colour_by={name} is not a setting, other than the seed, that differs in these runs; there are optimizer.lr",
        ):
            order.differing(given, name, "colour_by")


def test_means_over_seeds_are_in_the_same_order(template, tmp_path):
    given = [
        made(template, tmp_path / f"{lr}-{seed}", losses=[(6, loss + seed)], lr=lr, seed=seed)
        for lr, loss in ((1e-3, 4.0), (1e-2, 2.0), (1e-4, 3.0))
        for seed in (0, 1)
    ]
    rows = order.by_mean(tables.over_seeds(given), order.by(given, "loss", "order_by"))
    assert [row["loss mean"] for row in rows] == [2.5, 3.5, 4.5]


@pytest.fixture
def measured(run_folder, tmp_path):
    """Two real runs on different pictures; the second has the better figure."""
    for name, value in (("first", 9.0), ("second", 7.0)):
        copy = RunFolder(shutil.copytree(run_folder, tmp_path / "outputs" / name))
        copy.update(data={**copy.record()["data"], "fingerprint": name})
        figures = [Measurement(FD, value, {**PROTOCOL, "step": 6})]
        results.record(copy.path / "evaluation.json", figures)
    return tmp_path / "outputs"


def test_best_prints_the_folder_that_sample_takes(measured, typed, tmp_path):
    done = typed("compare", f"runs={measured}", f"best=eval/{FD}")
    assert (done.code, done.out, done.err) == (0, f"{measured / 'second'}\n", "")
    drawn = typed(
        "sample",
        f"run={done.out.strip()}",
        f"to={tmp_path / 'drawn'}",
        *("num_samples=1", "sampler=ddim", "sampler.num_steps=1"),
    )
    assert drawn.code == 0, drawn.err
    refused = typed("compare", f"runs={measured}", "best=eval/nothing")
    assert (refused.code, refused.out, refused.err.count("\n")) == (1, "", 1)


def test_top_leaves_the_first_in_the_table_and_the_files(measured, typed, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    done = typed(
        "compare", f"runs={measured}", f"order_by=eval/{FD}", "top=1", f"to={tmp_path / 'to'}"
    )
    assert done.code == 0, done.err
    (entry,) = json.loads((tmp_path / "to" / "table.json").read_text())
    assert entry["run"] == str(measured / "second")
    assert str(measured / "first") not in done.out
    listed = typed("compare", f"outputs={measured}", f"order_by=eval/{FD}")
    assert [line.split()[0] for line in listed.out.splitlines()[1:]] == ["7", "9"]
    shown = typed("compare", f"runs={measured}", f"order_by=eval/{FD}:best")
    assert [line.split()[0] for line in shown.out.splitlines()[1:3]] == ["7", "9"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["top=3"], "top=3 needs order_by=METRIC"),
        (["best=loss", "plot=true"], "best=loss only prints a folder: leave out plot="),
        (["best=loss", "order_by=lr"], "leave out order_by="),
    ],
)
def test_what_does_not_go_together_is_refused_before_a_run_is_read(typed, words, said):
    done = typed("compare", "runs=/nowhere", *words)
    assert (done.code, done.out) == (1, "")
    assert said in done.err


def test_damaged_lines_of_costs_are_left_out(tmp_path):
    assert read_costs(tmp_path) == []
    good = {"step": 2, "images": 16, "flops": 1e9, "seconds": 2.0, "seconds_in_steps": 1.0}
    good |= {"share_of_peak": None}
    own = {**good, "step": 7, "flops": None}  # this network's FLOPs cannot be counted
    lines = [good, {**good, "step": 8, "seconds": "2"}, [3], {**good, "step": 6}, {"step": 4}, own]
    text = "\n".join([*map(json.dumps, lines), '{"step": 3, "im{', "", json.dumps(good)])
    # the last line has no newline: it was cut short
    (tmp_path / "costs.jsonl").write_text(text)
    assert read_costs(tmp_path) == [good, {**good, "step": 6}, own]


def test_a_run_that_trains_shows_its_speed_and_end_and_others_nothing(template, tmp_path):
    """With 2 of 6 steps done at 10 s each, a run ends 40 s after 12:00:00."""
    standing = made(template, tmp_path / "stands", losses=[(6, 1.0)])
    assert not {"images/s", "expected end (UTC)"} & tables.list_runs([standing])[0].keys()
    trains = made(template, tmp_path / "trains", "running", [(2, 1.0)], costs=[20.0])
    start = {"started": "2100-01-01T12:00:00+00:00", "from_step": 0, "to_step": 0}
    record = {"status": "running", "num_steps": 6, "starts": [start], "step": 0}
    found = progress(trains.run, record)
    assert (found.step, found.images_per_second) == (2, 0.8)
    assert found.ends == datetime.fromisoformat("2100-01-01T12:00:40+00:00")
    told = progress(trains.run, {**record, "expected_end": "2100-01-02T00:00:00+01:00"})
    assert told.ends == datetime.fromisoformat("2100-01-01T23:00:00+00:00")
    (trains.run.path / "costs.jsonl").unlink()
    timed = {"seconds": 3.0, "images": 8, "seconds_in_steps": 2.0}
    before = progress(trains.run, {**record, "step": 1, "timed": timed})
    assert before.images_per_second == 4
    assert before.ends == datetime.fromisoformat("2100-01-01T12:00:12+00:00")
    unknown = progress(trains.run, {**record, "starts": []})
    assert (unknown.images_per_second, unknown.ends) == (None, None)
    rows = tables.list_runs([standing, made(template, tmp_path / "b", "running")])
    assert rows[0]["expected end (UTC)"] is None
