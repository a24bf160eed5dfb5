"""ddpm.compare on all kinds of runs: differing settings, results by protocol, and pictures.

Tables are right, and nothing ends in a traceback.
"""

import csv
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import yaml
from PIL import Image

from ddpm.compare import curves, tables
from ddpm.runs import reader, results
from ddpm.runs.folder import RunFolder
from ddpm.runs.reader import At
from ddpm.runs.results import Measurement, window_means

PROTOCOL = {
    "count": 1000,
    "split": "train",
    "extractor": "efficientnet_lite0",
    "sampler": "ddim50",
    "weights": "ema",
    "data": "abc",
    "seed": 0,
}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory, typed, tiny):
    """Two seeds, a shorter run, and a failed run.

    Both seeds are evaluated twice by one protocol, the first one also by another.
    """
    outputs = tmp_path_factory.mktemp("outputs")
    settings = [*tiny, f"outputs={outputs}", "runtime.log_every=2"]
    assert typed("train", "-m", *settings, "seed=0,1").code == 0
    assert typed("train", *settings, "training.steps=4").code == 0
    assert (
        typed(
            "train",
            *settings,
            "optimizer.lr=1e30",
            "lr_schedule=constant",
            "lr_schedule.warmup_steps=0",
        ).code
        == 1
    )
    for seed, values in ((0, (9.0, 8.0)), (1, (7.0, 7.5))):
        for step, value in zip((4, 6), values, strict=True):
            results.record(
                path(outputs, seed=seed, steps=6) / "evaluation.json",
                [Measurement("fd_efficientnet_lite0", value, {**PROTOCOL, "step": step})],
            )
    other = {**PROTOCOL, "seed": 5, "step": 6}
    results.record(
        path(outputs, seed=0, steps=6) / "evaluation.json",
        [Measurement("fd_efficientnet_lite0", 50.0, other), Measurement("recall", 0.5, other)],
    )
    return outputs


def path(outputs, seed, steps, lr=1e-3):
    for file in outputs.glob("*/*/config.yaml"):
        config = yaml.safe_load(file.read_text())
        if (config["seed"], config["training"]["steps"], config["optimizer"]["lr"]) == (
            seed,
            steps,
            lr,
        ):
            return file.parent
    raise LookupError


@pytest.fixture(scope="module")
def compared(outputs):
    wanted = [
        path(outputs, 0, 6),
        path(outputs, 1, 6),
        path(outputs, 0, 4),
        path(outputs, 0, 6, 1e30),
    ]
    return [reader.read(RunFolder(folder)) for folder in wanted]


def swept(num_steps, seed, value, scale=1.0, metric="fid", **more):
    """Returns one figure of a sweep over sampler steps, guidance scales and seeds."""
    settings = {
        "function": {"_target_": "ddpm.diffusion.samplers.ddim"},
        "num_steps": num_steps,
        "guidance_scale": scale,
    }
    protocol = {**PROTOCOL, "sampler": f"ddim{num_steps or 1000}", "sampler_settings": settings, "seed": seed, "step": 6}  # fmt: skip
    return Measurement(metric, value, {**protocol, **more})


def curves_of(folder, figures, over_seeds="mean"):
    results.record(folder / "evaluation.json", figures)
    return curves.find_curves([reader.read(RunFolder(folder))], over_seeds)


@pytest.fixture
def measured(outputs, tmp_path):
    """A run without figures, for tests that add some."""
    copy = shutil.copytree(path(outputs, 0, 6), tmp_path / "run")
    (copy / "evaluation.json").unlink()
    return copy


def test_a_curve_has_the_mean_over_seeds_or_the_minimum_of_three_and_says_which(measured):
    values = {10: [5.0, 6.0, 7.0], 50: [3.0, 2.0, 4.0, 0.5], None: [1.0, 2.0]}
    figures = [
        swept(step, seed, value)
        for step, of_seeds in values.items()
        for seed, value in enumerate(of_seeds)
    ]
    (mean,), scales = curves_of(measured, figures)
    assert scales == []
    assert [(point.at, point.values[0].value) for point in mean.points] == [
        (10, 6.0), (50, pytest.approx(2.375)), (1000, 1.5),
    ]  # fmt: skip
    assert mean.points[0].values[0].deviation == pytest.approx(1.0)
    assert curves.how(mean, "mean") == "mean of 2 to 4 seeds"
    (least,), _ = curves_of(measured, figures, "min_of_3")
    assert [(point.at, point.values[0].value, point.values[0].seeds) for point in least.points] == [
        (10, 5.0, [0, 1, 2]), (50, 2.0, [0, 1, 2]),
    ]  # fmt: skip
    assert curves.how(least, "min_of_3") == "minimum of 3 seeds"


def test_precision_and_recall_of_the_same_samples_are_a_point(measured):
    figures = [
        swept(10, seed, value + seed / 10, scale, metric)
        for scale, both in ((1.0, (0.5, 0.6)), (2.0, (0.7, 0.4)))
        for metric, value in zip(("precision", "recall"), both, strict=True)
        for seed in (0, 1)
    ]
    lone = swept(10, 2, 0.9, 1.0, "precision")  # has no recall
    steps, (curve,) = curves_of(measured, [*figures, lone])
    assert steps == []
    assert [(point.at, *(round(one.value, 9) for one in point.values)) for point in curve.points] == [
        (1.0, 0.55, 0.65), (2.0, 0.75, 0.45),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "other",
    [{"count": 50_000}, {"data": "other"}, {"weights": "raw"}, {"a_later_field": 1}, {"scale": 2.0}],
)  # fmt: skip
def test_figures_of_unlike_protocol_are_never_on_one_curve(measured, other):
    steps, _ = curves_of(measured, [swept(10, 0, 5.0), swept(50, 0, 3.0, **other)])
    assert steps == []
    more = [swept(50, 0, 4.0), swept(10, 0, 6.0, **other)]
    steps, _ = curves_of(measured, more)
    assert sorted([point.values[0].value for point in curve.points] for curve in steps) == [
        [5.0, 4.0], [6.0, 3.0],
    ]  # fmt: skip
    assert len({(curve.panel, curve.label) for curve in steps}) == 2


def test_networks_of_several_steps_are_never_on_one_curve(measured):
    assert curves_of(measured, [swept(10, 0, 5.0, step=4), swept(50, 0, 3.0)]) == ([], [])


def test_a_sweeps_curves_are_printed_written_and_drawn(measured, typed, tmp_path):
    figures = [
        swept(steps, seed, value, scale, metric)
        for steps in (10, 50)
        for seed in (0, 1)
        for scale in (1.0, 2.0)
        for metric, value in (("fid", 3 + 20 / steps), ("precision", 0.5 + scale / 10), ("recall", 0.7 - scale / 10))
    ]  # fmt: skip
    results.record(measured / "evaluation.json", figures)
    done = typed("compare", f"runs={measured}", f"to={tmp_path}", "plot=true")
    assert done.code == 0, done.err
    assert "fid@1k:train:efficientnet_lite0 over num_steps; guidance_scale 1; mean of 2 seeds\n  10: 5 +- 0   50: 3.4 +- 0" in done.out  # fmt: skip
    written = list(csv.DictReader((tmp_path / "curves.csv").open()))
    assert len(written) == 2 * 2 + 2 * 2 * 2
    assert {row["of"] for row in written} == {"mean of 2 seeds"}
    assert json.loads(written[0]["protocol"])["extractor"] == "efficientnet_lite0"
    (table,) = csv.DictReader((tmp_path / "table.csv").open())
    assert sum(column.startswith("fid@") for column in table) == 8  # one column each, as before
    for name in ("steps.png", "scales.png"):
        assert Image.open(tmp_path / name).size[0] > 500


def test_only_what_differs_has_a_column(compared):
    table = tables.rows(compared[:2])
    assert [column for column in table[0] if "." in column.partition("@")[0]] == []
    assert [row["seed"] for row in table] == [0, 1]
    assert {"optimizer.lr", "training.steps", "seed"} <= tables.rows(compared)[0].keys()


def test_runs_stand_as_they_ended_with_their_steps_speed_and_hours(compared):
    table = tables.rows(compared)
    assert [(row["status"], row["steps"]) for row in table] == [
        ("complete", "6"),
        ("complete", "6"),
        ("complete", "4"),
        ("failed", "0/6"),
    ]
    assert all(row["images/s"] > 0 and row["hours"] > 0 for row in table[:3])
    assert table[3]["images/s"] is table[3]["hours"] is None


def test_a_protocol_has_a_column_of_its_own_and_a_run_that_was_not_measured_has_none_in_it(
    compared,
):
    table = tables.rows(compared)
    first, second = (
        column for column in table[0] if column.startswith("fd_") and not column.endswith(" best")
    )
    assert {first.split()[-1], second.split()[-1]} == {"seed=0", "seed=5"}
    assert [[row[first], row[second]] for row in table] == [
        [8.0, 50.0],
        [7.5, None],
        [None, None],
        [None, None],
    ]
    # None where the final value is the best
    assert [row[f"{first} best"] for row in table] == [None, At(7.0, 4), None, None]


def test_a_loss_of_another_objective_is_not_in_the_same_column(compared):
    other = reader.Compared(
        compared[1].run,
        compared[1].identity,
        {**compared[1].settings, "objective.prediction": "v"},
        compared[1].choices,
        compared[1].record,
        [
            tables.Result(
                "loss",
                {**compared[1].results[0].protocol, "objective.prediction": "v"},
                (0.5, 6),
                (0.5, 6),
            )
        ],
        "complete",
    )
    table = tables.rows([compared[0], other])
    assert [
        (row["loss prediction=epsilon"] is None, row["loss prediction=v"]) for row in table
    ] == [(False, None), (True, 0.5)]


def test_seeds_give_mean_and_deviation_and_only_of_complete_runs_that_are_otherwise_the_same(
    compared,
):
    (row,) = tables.over_seeds(compared)
    assert row["seeds"] == "0 1"
    column = next(name for name in row if name.startswith("fd_") and "seed=0" in name).removesuffix(
        " mean"
    )
    assert row[f"{column} mean"] == pytest.approx(7.75)
    assert row[f"{column} deviation"] == pytest.approx(np.std([8.0, 7.5], ddof=1))
    assert tables.over_seeds([compared[0], compared[2], compared[3]]) == []


def test_runs_are_in_the_order_of_what_differs(compared):
    for numbers in ([2, 0, 1], [1, 2, 0]):
        assert [
            one.settings["training.steps"] * 10 + one.settings["seed"]
            for one in tables.sort_runs([compared[index] for index in numbers])
        ] == [
            40,
            60,
            61,
        ]


def test_a_loss_is_averaged_over_the_same_share_of_steps_whatever_the_log_interval():
    loss = np.random.default_rng(0).normal(size=200)
    every_5, every_10 = (
        [(step, float(loss[step - every : step].mean())) for step in range(every, 201, every)]
        for every in (5, 10)
    )
    assert window_means(every_5)[-1] == (200, pytest.approx(loss[-20:].mean()))
    assert window_means(every_10)[-1] == (200, pytest.approx(loss[-20:].mean()))
    assert window_means([(3, 1.0), (200, 2.0)]) == [(3, 1.0), (200, 2.0)]
    assert window_means([]) == []


def test_the_command_writes_the_table_in_whole_digits_and_the_pictures(outputs, typed, tmp_path):
    done = typed(
        "compare",
        f"runs={outputs}",
        f"to={tmp_path}",
        "plot=true",
        "grid=true",
        "num_samples=3",
        "sampler=ddim",
        "sampler.num_steps=2",
    )
    assert done.code == 0, done.err
    rows = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert sorted(row["status"] for row in rows) == ["complete", "complete", "complete", "failed"]
    entries = {entry["run"]: entry for entry in json.loads((tmp_path / "table.json").read_text())}
    assert entries.keys() == {row["run"] for row in rows}
    measured = entries[str(path(outputs, 0, 6))]["figures"]
    assert (measured[-1]["metric"], measured[-1]["final"], measured[-1]["protocol"]["seed"]) == (
        "recall",
        [0.5, 6],
        5,
    )
    assert "gradient norm" in done.out  # why the failed run failed
    assert done.err.count("has no row in the grid") == 1
    assert Image.open(tmp_path / "loss.png").size[0] > 500


def test_the_grid_has_the_same_noise_in_each_column_and_a_row_a_run(outputs, typed, tmp_path):
    """Equal weights draw equal images; the network of another seed draws others."""
    copy = RunFolder(shutil.copytree(path(outputs, 0, 6), tmp_path / "copy"))
    copy.update(data={**copy.record()["data"], "fingerprint": "another"})  # no longer a mere copy
    runs = f"[{path(outputs, 0, 6)},{tmp_path / 'copy'},{path(outputs, 1, 6)}]"
    done = typed(
        "compare",
        f"runs={runs}",
        f"to={tmp_path}",
        "grid=true",
        "num_samples=3",
        "sampler=ddim",
        "sampler.num_steps=2",
        "weights=raw",
    )
    assert done.code == 0, done.err
    sheet = np.asarray(Image.open(tmp_path / "grid.png"), dtype=int)[18:, 110:]
    rows = np.split(sheet, 3)
    assert (rows[0] == rows[1]).all()
    assert (rows[0] != rows[2]).any()
    first, second, _ = np.array_split(rows[0], 3, axis=1)
    assert (first != second[:, : first.shape[1]]).any()


def test_without_runs_everything_is_listed_newest_first(outputs, typed):
    done = typed("compare", f"outputs={outputs}")
    assert done.code == 0, done.err
    head, *lines = done.out.splitlines()
    assert head.startswith("updated")
    assert len(lines) == 4, done.out
    assert lines[0].split()[-1] == str(path(outputs, 0, 6, 1e30))


def test_folders_that_are_no_runs_or_damaged_spoil_nothing(outputs, typed, tmp_path):
    (tmp_path / "empty").mkdir()
    for name, file, content in (
        ("half", "run.json", '{"status": "comp'),
        ("no_yaml", "config.yaml", "a: [1"),
        ("odd", "evaluation.json", "[3]"),
        ("cut", "metrics.jsonl", '{"step": 2, "tr'),
    ):
        shutil.copytree(
            path(outputs, 0, 6), tmp_path / name, ignore=shutil.ignore_patterns("checkpoints")
        )
        (tmp_path / name / file).write_text(content)
    running = tmp_path / "killed"
    shutil.copytree(path(outputs, 1, 6), running, ignore=shutil.ignore_patterns("checkpoints"))
    (running / "run.json").write_text(
        (running / "run.json").read_text().replace('"complete"', '"running"')
    )
    good = path(outputs, 1, 6)
    done = typed(
        "compare",
        f"runs=[{good},{tmp_path}/[a-z]*,{tmp_path / 'empty'},/nowhere]".replace("[a-z]", "?"),
    )
    assert done.code == 0, done.err
    assert done.err.splitlines() == [
        f"warning: {tmp_path / 'empty'}: no run there",
        "warning: /nowhere: no run there",
    ]
    for name, said in (
        ("half", "unreadable"),
        ("no_yaml", "unreadable"),
        ("odd", "unreadable"),
        ("cut", "complete"),
        ("killed", "cut off"),
        (good.name, "complete"),
    ):
        (line,) = [line for line in done.out.splitlines() if line.endswith(f"/{name}")]
        assert said in line


def test_a_damaged_line_of_metrics_is_named_and_the_rest_is_compared(outputs, typed, tmp_path):
    good, copy = path(outputs, 0, 6), tmp_path / "damaged"
    shutil.copytree(good, copy, ignore=shutil.ignore_patterns("checkpoints"))
    file = copy / "metrics.jsonl"
    first, _, *rest = file.read_text().splitlines(keepends=True)
    file.write_text("".join([first, '{"step": 4, "tr{"step"\n', *rest]))
    done = typed("compare", f"runs=[{good},{copy}]", f"to={tmp_path}", "plot=true")
    assert done.code == 0, done.err
    assert done.err == f"warning: {file}, line 2: damaged and left out\n"
    rows = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert [row["status"] for row in rows] == ["complete", "complete"]


def test_no_run_at_all_is_one_line(typed, tmp_path):
    done = typed("compare", f"runs={tmp_path}")
    assert (done.code, done.out) == (1, "")
    assert (
        done.err
        == f"error: runs={tmp_path}: no run there; give a folder that ddpm.train made, a folder above it, a list of these, or a quoted glob\n"
    )


def test_a_table_too_wide_for_the_terminal_is_turned(compared):
    table = tables.rows(compared[:2])
    across, down = tables.text(table, 10_000), tables.text(table, 60)
    assert len(across.splitlines()) == 3
    assert len(down.splitlines()) == len(table[0])


def test_a_copy_of_a_run_counts_once_and_is_named(outputs, typed, tmp_path):
    copies = tmp_path / "copies"
    for seed in (0, 1):
        shutil.copytree(path(outputs, seed, 6), copies / f"seed{seed}")
    done = typed("compare", f"runs=[{outputs},{copies}]")
    assert done.code == 0, done.err
    for seed in (0, 1):
        assert (
            f"note: {copies / f'seed{seed}'} is left out: a copy of {path(outputs, seed, 6)}"
            in done.err
        )
    alone = typed("compare", f"runs=[{outputs}]")
    assert done.out == alone.out  # mean and deviation over seeds included
    assert "0 1" in done.out


def test_a_copy_that_was_carried_on_is_a_run_of_its_own(outputs, typed, tmp_path):
    longer = tmp_path / "longer"
    shutil.copytree(path(outputs, 0, 6), longer)
    assert typed("train", f"resume={longer}", "training.steps=8", "optimizer.lr=5e-4").code == 0
    read = [reader.read(RunFolder(one)) for one in (path(outputs, 0, 6), longer)]
    kept, left_out = tables.once(read)
    assert (len(kept), left_out) == (2, [])
    assert tables.rows(read)[1]["changed"] == (
        "optimizer.lr 0.001 to 0.0005 after step 6; training.steps 6 to 8 after step 6"
    )


def test_a_run_that_was_changed_on_the_way_is_not_averaged_with_those_that_were_not(compared):
    first, second = compared[:2]
    changed = {**second.identity, "changes": [{"step": 3, "changed": {"optimizer.lr": [1, 2]}}]}
    assert len(tables.over_seeds([first, second])) == 1
    assert tables.over_seeds([first, replace(second, identity=changed)]) == []


def test_runs_of_one_configuration_on_other_pictures_are_never_averaged(compared):
    first, second = compared[:2]
    data = {**second.record["data"], "fingerprint": "another"}
    other = replace(second, record={**second.record, "data": data})
    assert tables.over_seeds([first, other]) == []


def test_the_same_values_typed_otherwise_do_not_differ(compared):
    first = compared[0]
    assert first.settings["model.dropout"] == 0
    assert type(first.settings["model.dropout"]) is int  # 0 and 0.0 are one value
