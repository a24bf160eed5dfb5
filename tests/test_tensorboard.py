"""What TensorBoard's own server says over HTTP about the folder of a sweep.

It includes a run that failed and was continued.
"""

import json
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from urllib.parse import urlencode

import pytest
import yaml

pytestmark = pytest.mark.slow
RATES = {0.001, 0.002}


@pytest.fixture(scope="module")
def board(tmp_path_factory, typed, tiny):
    """Asks TensorBoard's server about a folder with two states of a sweep of two learning rates.

    One is the complete sweep, the other the sweep after one of its two runs had failed.
    """
    folder = tmp_path_factory.mktemp("board")
    sweep = [
        "-m",
        *tiny,
        f"outputs={folder / 'whole'}",
        "optimizer.lr=0.001,0.002",
        "runtime.checkpoint_every=4",
        "runtime.log_every=2",
    ]
    unhindered = typed("train", *sweep)
    assert unhindered.code == 0, unhindered.err
    second = next(
        file.parent
        for file in folder.glob("whole/*/*/config.yaml")
        if yaml.safe_load(file.read_text())["optimizer"]["lr"] == 0.002
    )
    shutil.rmtree(second)
    # a folder where the last step's picture belongs makes the run fail
    (second / "samples" / "step_00000006.png").mkdir(parents=True)
    assert typed("train", *sweep).code == 1
    shutil.copytree(folder / "whole", folder / "failed")
    (second / "samples" / "step_00000006.png").rmdir()
    again = typed("train", *sweep)
    assert again.code == 0, again.err
    assert again.out.count("carrying on from step 6") == 1

    words = [
        sys.executable,
        "-m",
        "tensorboard.main",
        "--logdir",
        str(folder),
        "--host",
        "127.0.0.1",
        "--port",
        "0",
    ]
    server = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    try:
        address = next(
            found[0] for line in server.stderr if (found := re.search(r"http://[\d.:]+", line))
        )

        def ask(path, body=None, **query):
            url = f"{address}/data/{path}?{urlencode(query)}"
            request = urllib.request.Request(
                url,
                None if body is None else json.dumps(body).encode(),
                {"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.loads(answer.read())

        until = time.monotonic() + 100
        # the server starts before it reads the files
        while len(rows(ask, "")) < 4 and time.monotonic() < until:
            time.sleep(0.2)
        yield ask
    finally:
        server.kill()
        server.wait(timeout=60)


def rows(ask, folder):
    statuses = ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"]
    body = {
        "experimentName": "",
        "allowedStatuses": statuses,
        "colParams": [],
        "startIndex": 0,
        "sliceSize": 100,
    }
    return [
        row
        for row in ask("plugin/hparams/session_groups", body).get("sessionGroups", [])
        if row["name"].startswith(folder)
    ]


def values(row):
    return {value["name"]["tag"]: value["value"] for value in row["metricValues"]}


def test_there_is_one_run_a_job_and_each_scalar_once_a_step(board):
    runs = [run for run in board("runs") if run.startswith("whole/")]
    assert len(runs) == 2
    tags = {run: shown for run, shown in board("plugin/scalars/tags").items() if run in runs}
    assert len(tags) == 2
    wanted = {
        "train/loss",
        "train/lr",
        "train/grad_norm",
        "train/images_per_second",
        "train/loss_q0",
        "train/loss_q3",
    }
    for run, shown in tags.items():
        assert shown.keys() >= wanted
        for tag in shown:
            steps = [step for _, step, _ in board("plugin/scalars/scalars", run=run, tag=tag)]
            assert steps == ([2, 4, 6] if tag in wanted else sorted(set(steps)))


def test_each_run_is_one_row_with_its_settings_final_loss_and_status(board):
    found = rows(board, "whole/")
    assert {row["hparams"]["optimizer.lr"] for row in found} == RATES
    assert len({frozenset(row["hparams"]) for row in found}) == 1
    for row in found:
        assert len(row["sessions"]) == 1
        assert row["sessions"][0]["status"] == "STATUS_SUCCESS"
        # the last report covers more than the last tenth of the 6 steps
        assert values(row)["train/loss_final"] == pytest.approx(values(row)["train/loss"])
        assert values(row)["train/loss_best"] <= values(row)["train/loss_final"]


def test_a_failed_run_is_a_row_too_and_says_so(board):
    found = {row["hparams"]["optimizer.lr"]: row for row in rows(board, "failed/")}
    assert {rate: row["sessions"][0]["status"] for rate, row in found.items()} == {
        0.001: "STATUS_SUCCESS",
        0.002: "STATUS_FAILURE",
    }
    assert "train/loss_final" in values(found[0.002])


def test_samples_configuration_command_and_the_charts_are_there(board):
    assert (
        sum(
            "samples" in tags
            for run, tags in board("plugin/images/tags").items()
            if run.startswith("whole/")
        )
        == 2
    )
    texts = {
        run: tags for run, tags in board("plugin/text/tags").items() if run.startswith("whole/")
    }
    assert len(texts) == 2
    for run, tags in texts.items():
        assert {tag.partition("/")[0] for tag in tags} == {"config", "command"}
        command = next(tag for tag in tags if tag.startswith("command"))
        assert (
            "python -m ddpm.train schedule=linear"
            in board("plugin/text/text", run=run, tag=command)[0]["text"]
        )
    charts = [
        chart["title"]
        for category in board("plugin/custom_scalars/layout")["category"]
        for chart in category["chart"]
    ]
    assert "loss" in charts
    assert len(charts) == len(set(charts))
