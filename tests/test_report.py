"""The page of ddpm.compare report= shows what the runs' files say, and none of it can run."""

import base64
import hashlib
import io
import json
import re
import shutil

import pytest
from PIL import Image
from synthetic_runs import write_run

from ddpm.compare import report, strips, tables
from ddpm.runs.folder import RunFolder
from ddpm.runs.reader import read

pytest.importorskip("plotly")
BREAKS_OUT = "</script><script>document.title = 'ran'</script><!--<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def template(run_folder):
    return RunFolder(run_folder)


@pytest.fixture(scope="module")
def sweep(template, tmp_path_factory):
    """Two learning rates x two seeds with figures, plus a failed, a running and two damaged runs.

    All tests share it, so none may change it.
    """
    tmp_path = tmp_path_factory.mktemp("sweep")
    for lr in (1e-4, 1e-3):
        for seed in (0, 1):
            write_run(
                template,
                tmp_path / f"lr{lr}_seed{seed}",
                {"optimizer.lr": lr, "seed": seed},
                level=1 + lr * 100 + seed / 7,
                figures={200: 90.0 + seed, 400: 50 + seed * 3 + lr * 1000},
                previews={200: 4, 400: 4},
                costs=True,
            )
    failed = {"status": "failed", "step": 20, "error": f"loss is nan at step 21 {BREAKS_OUT}"}
    write_run(template, tmp_path / "failed", {"optimizer.lr": 1.0}, record=failed, num_records=2)
    write_run(template, tmp_path / "running", {"optimizer.lr": 0.01}, record={"status": "running", "step": 100, "num_steps": 400}, num_records=10)  # fmt: skip
    damaged = write_run(template, tmp_path / "damaged", {"optimizer.lr": 0.02}, figures={400: 60.0})
    file = damaged / "metrics.jsonl"
    file.write_text(file.read_text().replace("\n", '\n{"step": 3, "tr\n', 1))
    (damaged / "samples" / "step_00000400.png").write_bytes(b"\x89PNG, cut short")
    (damaged / "costs.jsonl").write_text('{"step": 10\n[]\n')
    half = write_run(template, tmp_path / "half", {"optimizer.lr": 0.03})
    (half / "run.json").write_text('{"status": "comp')
    return tmp_path


@pytest.fixture(scope="module")
def told(sweep):
    """The content of the sweep's page."""
    return report.contents(compared(sweep), "")


def page_of(typed, runs, to, *more):
    done = typed("compare", f"runs='{runs}'", f"report={to / 'r.html'}", f"to={to}", *more)
    assert done.code == 0, done.err
    return (to / "r.html").read_text(encoding="utf-8")


def data_of(page):
    """The page's JSON as a browser finds it: up to the first end of a script."""
    (block,) = re.findall(r'<script type="application/json" id="data">(.*?)</script', page, re.S)
    return json.loads(block)


def compared(folder):
    return [read(run) for run in tables.find(str(folder), "outputs")[0]]


def test_the_numbers_of_the_page_are_those_of_the_tables(sweep, typed, tmp_path):
    data = data_of(page_of(typed, sweep, tmp_path / "to"))
    entries = {
        entry["run"]: entry for entry in json.loads((tmp_path / "to/table.json").read_text())
    }
    assert [run["path"] for run in data["runs"]] == list(entries)
    told = 0
    for run in data["runs"]:
        entry = entries[run["path"]]
        assert (run["status"], run["row"].get("images/s"), run["row"].get("hours")) == (
            entry["status"], entry["images_per_second"], entry["hours"],
        )  # fmt: skip
        assert run["error"] == entry["error"]
        for column in data["columns"]:
            value = run["row"][column["key"]]
            if column["kind"] == "setting":
                assert value == entry["differs"][column["key"]]
            elif column["kind"] == "figure" and column["of"] == "final" and value is not None:
                (figure,) = [
                    one for one in entry["figures"] if one["protocol"] == column["protocol"]
                ]
                final = value if isinstance(value, list) else [value, entry["step"]]
                assert final == figure["final"]
                best = run["row"].get(f"{column['key']} best") or figure["final"]
                assert best == figure["best"]
                told += 1
    # loss and FID of four runs, losses of the failed and the running one, both of a damaged one
    assert told == 4 * 2 + 1 + 1 + 2
    groups = {tuple(group["members"]): group["figures"] for group in data["groups"]}
    assert [data["runs"][member]["row"]["seed"] for members in groups for member in members] == [
        0,
        1,
        0,
        1,
    ]
    figures = next(iter(groups.values()))
    assert figures["fid@1k:train:inception:ddim50:ema"] == [pytest.approx(51.6), pytest.approx(4.5**0.5), None]  # fmt: skip


def test_curves_figures_and_costs_are_those_of_the_runs_files(sweep, told):
    run = next(run for run in told["runs"] if run["path"].endswith("lr0.001_seed1"))
    curves = {name: (steps, values) for steps, of in run["series"] for name, values in of.items()}
    lines = [json.loads(line) for line in (sweep / "lr0.001_seed1/metrics.jsonl").read_text().splitlines()]  # fmt: skip
    assert list(curves["loss"][0]) == [line["step"] for line in lines]
    assert curves["loss_q2"][1] == pytest.approx(
        [line["train/loss_q2"] for line in lines], rel=1e-4
    )
    assert curves["fid@1k:train:inception:ddim50:ema"] == ((200, 400), [91.0, 54.0])
    assert run["costs"]["seconds"][-1] == 36.0 * 400
    assert {name: len(values) for name, values in run["costs"].items()} == dict.fromkeys(["step", "images", "seconds", "flops"], 40)  # fmt: skip


def test_a_long_curve_becomes_means_that_keep_its_average_and_its_end(template, tmp_path):
    write_run(template, tmp_path / "long", {}, num_records=2500)
    (run,) = report.contents(compared(tmp_path), "")["runs"]
    (steps, curves), *_ = run["series"]
    assert len(steps) <= report.MOST_POINTS
    assert steps[-1] == 25_000
    lines = [
        json.loads(line) for line in (tmp_path / "long/metrics.jsonl").read_text().splitlines()
    ]
    first = [line["train/loss"] for line in lines[: len(lines) // len(steps) + 1]]
    assert curves["loss"][0] == pytest.approx(sum(first) / len(first), rel=1e-4)


def test_losses_of_other_objectives_are_other_curves(template, tmp_path):
    write_run(template, tmp_path / "a", {})
    write_run(template, tmp_path / "b", {"objective.prediction": "v"})
    data = report.contents(compared(tmp_path), "")
    names = [{name for _, of in run["series"] for name in of if name.startswith("loss")} for run in data["runs"]]  # fmt: skip
    assert names[0].isdisjoint(names[1])
    assert {"loss prediction=v", "loss_q0 prediction=v"} <= names[1]


def test_nothing_in_a_run_folder_can_end_the_block_that_it_stands_in(template, typed, tmp_path):
    """A run is called <script>, and its settings and error try to close the JSON block.

    The page's policy allows only the page's own scripts.
    """
    folder = tmp_path / "runs"
    for seed, name in enumerate(("<script>alert(1)<", "a")):
        run = {"training.precision": f"{BREAKS_OUT}{seed}"}
        write_run(template, folder / name, run, record={"error": BREAKS_OUT, "status": "failed"})
    page = page_of(typed, folder, tmp_path / "to")
    data = data_of(page)
    assert any("<script>alert(1)<" in run["path"] for run in data["runs"])
    assert data["runs"][0]["row"]["training.precision"] == f"{BREAKS_OUT}0"
    assert data["runs"][0]["error"] == BREAKS_OUT
    assert page.count("document.title = 'ran'") == page.count(r"\u003c/script\u003e\u003cscript\u003edocument.title = 'ran'")  # fmt: skip
    scripts = re.findall(r"<script>(.*?)</script>", page, re.S)
    policy = re.search(r"script-src ([^;]*);", page)[1].split()
    assert policy == [f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" for script in scripts]  # fmt: skip
    assert re.search(r'content="default-src \'none\';', page)


def test_a_value_that_is_no_number_does_not_spoil_the_block():
    text = report.embedded(
        {"a": [float("nan"), float("inf"), 1.5, None], "b\udcff": "\u2028</script>"}
    )
    expected = {"a": ["NaN", "Infinity", 1.5, None], r"b\xff": r"\u2028</script>"}
    assert json.loads(text) == expected
    assert text.isascii()
    assert "<" not in text


def test_failed_running_and_half_damaged_runs_are_told_with_what_is_wrong(told):
    runs = {run["path"].rpartition("/")[2]: run for run in told["runs"]}
    assert len(runs) == 8
    assert runs["failed"]["error"].startswith("loss is nan")
    assert runs["running"]["row"]["steps"] == "100/400"
    assert runs["half"]["status"].startswith("unreadable")
    assert (runs["half"]["readable"], runs["half"]["series"], runs["half"]["label"]) == (
        False,
        [],
        "half",
    )
    assert runs["damaged"]["warnings"] == ["metrics.jsonl, line 2: damaged and left out"]
    assert (runs["damaged"]["samples"], runs["damaged"]["costs"]) == (None, None)
    assert runs["damaged"]["series"]


def test_each_run_stands_beside_its_recipe(told):
    run = next(run for run in told["runs"] if run["path"].endswith("lr0.0001_seed1"))
    assert run["recipe"]["known"]
    assert run["recipe"]["differs"]["optimizer.lr"] == "0.001"  # the quick start's value
    assert ({**told["common"], **run["config"]}["optimizer.lr"], run["config"]["seed"]) == (
        "0.0001",
        "1",
    )
    assert "schedule.num_timesteps" not in run["recipe"]["differs"]
    (start,) = run["starts"]
    assert "ddpm.train" in start["command"]
    assert start["device"]
    assert "torch" in start["versions"]
    assert run["data"]["fingerprint"]


def test_pictures_are_cut_from_the_grids_with_the_same_noise_in_a_column(template, tmp_path):
    write_run(template, tmp_path / "a", {"seed": 3}, previews={10: 4, 400: 4})
    (run,) = report.contents(compared(tmp_path), "")["runs"]
    side = template.plain()["model"]["resolution"]
    assert (run["samples"]["columns"], run["samples"]["size"]) == (4, (side, side))
    assert [step for step, _ in run["samples"]["steps"]] == [10, 400]
    assert run["samples"]["noise"] == f"seed 3, {side} x {side}"
    sent = run["samples"]["steps"][0][1]
    assert sent.startswith("data:image/png;base64,")
    row = Image.open(io.BytesIO(base64.b64decode(sent.partition(",")[2])))
    sheet = Image.open(tmp_path / "a/samples/step_00000010.png")
    times = (sheet.width - 2) // 2 // side  # four pictures: two columns
    for index in range(4):
        down, across = divmod(index, 2)
        drawn = sheet.getpixel((2 + across * (side * times + 2), 2 + down * (side * times + 2)))
        assert row.getpixel((index * side, 0)) == drawn


@pytest.mark.parametrize(("runs", "most"), [(2, 60_000), (6, 30_000)])
def test_pictures_of_all_runs_together_stay_below_a_bound(template, tmp_path, runs, most):
    first = write_run(template, tmp_path / "0", {"model.resolution": 64}, previews=dict.fromkeys((100, 200, 300, 400), 4))  # fmt: skip
    for index in range(1, runs):
        shutil.copytree(first, tmp_path / str(index))
    found = strips.strips_of(compared(tmp_path), [{}] * runs, most)
    sizes = [sum(len(one.content) for one in strip.pictures) for strip in found.of_run.values()]
    assert len(sizes) == runs
    assert sum(sizes) <= most
    assert all(strip.pictures[-1].step == 400 for strip in found.of_run.values())
    assert found.reduced  # the page says that pictures are missing


def test_one_run_is_a_page_too(template, typed, tmp_path):
    data = data_of(page_of(typed, template.path, tmp_path))
    assert [run["label"] for run in data["runs"]] == [template.path.name]
    assert data["groups"] == []


def test_without_plotly_one_line_says_what_to_install(typed, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "plotly.offline", None)
    done = typed("compare", "runs=/nowhere", f"report={tmp_path / 'r.html'}")
    assert (done.code, done.err) == (
        1,
        "error: report= needs Plotly: pip install -e '.[report]'\n",
    )


@pytest.mark.parametrize("path", [".", "sweep", "sweep.pdf"])
def test_a_report_is_an_html_file(typed, path):
    done = typed("compare", "runs=/nowhere", f"report={path}")
    assert (done.code, done.err) == (1, f"error: report={path}: give the page's file, such as report=sweep.html\n")  # fmt: skip
