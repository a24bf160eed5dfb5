"""Reading many runs, in parallel or from the cache, gives the same as reading each one alone."""

import json
import os
import shutil

import pytest
import synthetic_runs

from ddpm.runs import many
from ddpm.runs.folder import RunFolder
from ddpm.runs.many import FEW, read_many
from ddpm.runs.reader import read

COUNT = 2 * FEW + 3


@pytest.fixture(scope="module")
def root(run_folder, tmp_path_factory):
    """Enough runs to use the cache and more processes; some are damaged, all are an hour old."""
    root = tmp_path_factory.mktemp("many")
    for index in range(COUNT):
        synthetic_runs.write_run(
            RunFolder(run_folder),
            root / f"{index:03d}",
            {"seed": index, "optimizer.lr": 1e-4 * (index % 3 + 1)},
            figures={20: 3.0 + index, 40: float("nan")} if index % 4 == 0 else None,
            costs=True,
            record={"status": ["complete", "failed", "running"][index % 3]},
            num_records=4,
        )
    shutil.copytree(run_folder / "checkpoints", root / "004" / "checkpoints")
    (root / "005" / "run.json").write_text("[]")
    (root / "006" / "config.yaml").write_text("a: &a [*a]")
    (root / "007" / "metrics.jsonl").write_text('{"step": 10, "train/loss": 1}\n{"st\n')
    (root / "008" / ".lock").touch()
    (root / "010" / "evaluation.json").write_text(json.dumps([{"metric": "fid", "value": 3, "deviation": 1, "protocol": {"step": 1, "count": 2}}]))  # fmt: skip
    for file in root.rglob("*"):
        os.utime(file, (file.stat().st_mtime - 3600,) * 2)
    return root


@pytest.fixture
def runs(root):
    return [RunFolder(root / f"{index:03d}") for index in range(COUNT)]


def shown(compared):
    """Everything known about each run, as text: NaN equals NaN, and 1 differs from 1.0."""
    return [repr(one).replace(str(one.run), one.run.path.name) for one in compared]


@pytest.fixture
def counted(monkeypatch):
    """The number of runs read from their files, one entry per call of read_many."""
    counts, really = [], many._read_all

    def read_all(places):
        counts.append(len(places))
        return really(places)

    monkeypatch.setattr(many, "_read_all", read_all)
    return counts


def test_they_are_read_as_each_alone_the_first_time_and_the_next(runs, tmp_path, counted):
    wanted = shown([read(run) for run in runs])
    assert shown(read_many(runs, tmp_path)) == wanted
    assert shown(read_many(runs, tmp_path)) == wanted
    assert shown(read_many(runs[::-1], tmp_path)) == wanted[::-1]
    assert counted == [COUNT, 0, 0]
    statuses = [one.status for one in read_many(runs, tmp_path)]
    assert statuses[8] == "cut off"
    assert statuses[5].startswith("unreadable (run.json: ")


def test_only_what_changed_is_read_again(root, runs, tmp_path, counted):
    place = tmp_path / "runs"
    shutil.copytree(root, place)
    here = [RunFolder(place / run.path.name) for run in runs]
    read_many(here, tmp_path)
    with (place / "000" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 50, "train/loss": 7}\n')
    os.utime(place / "001" / "run.json", (0, 0))
    (place / "002" / "evaluation.json").unlink()
    (place / "004" / "checkpoints" / "step_00000006" / "meta.json").write_text("[]")
    (place / "007" / "checkpoints").mkdir()
    assert shown(read_many(here, tmp_path)) == shown([read(run) for run in here])
    assert counted == [COUNT, 5]


def test_what_changed_a_moment_ago_may_do_so_again_unseen(root, runs, tmp_path, counted):
    place = tmp_path / "runs"
    shutil.copytree(root, place)
    here = [RunFolder(place / run.path.name) for run in runs]
    soon = 2**31 - 1  # in the future
    os.utime(place / "000" / "run.json", (soon, soon))
    for _ in range(2):
        read_many(here, tmp_path)
    assert counted == [COUNT, 1]


def test_what_a_running_run_says_is_asked_anew(root, runs, tmp_path):
    place = tmp_path / "runs"
    shutil.copytree(root, place)
    here = [RunFolder(place / run.path.name) for run in runs]
    assert read_many(here, tmp_path)[11].status == "running"
    (place / "011" / ".lock").touch()  # no process holds it
    assert read_many(here, tmp_path)[11].status == "cut off"


def flip(content):
    return content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 1]) + content[len(content) // 2 + 1 :]  # fmt: skip


@pytest.mark.parametrize(
    "damage",
    [lambda content: content[:-9], flip, lambda content: b"", lambda content: b"\x00\xff\n\xff", lambda content: content.replace(b"complete", b"failed  ")],
    ids=["cut", "flipped", "empty", "binary", "edited"],
)  # fmt: skip
def test_a_damaged_cache_is_passed_over_and_written_anew(runs, tmp_path, counted, damage):
    wanted = shown(read_many(runs, tmp_path))
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert shown(read_many(runs, tmp_path)) == wanted
    assert counted == [COUNT, COUNT]
    assert file.read_bytes() == whole


def test_a_cache_that_another_version_wrote_is_passed_over(runs, tmp_path, counted, monkeypatch):
    read_many(runs, tmp_path)
    monkeypatch.setattr(many, "_version", lambda: "0" * 64)
    read_many(runs, tmp_path)
    assert counted == [COUNT, COUNT]


def test_what_is_remembered_of_other_runs_stays_until_they_are_gone(root, runs, tmp_path, counted):
    place = tmp_path / "runs"
    shutil.copytree(root, place)
    here = [RunFolder(place / run.path.name) for run in runs]
    read_many(here[:FEW], tmp_path)
    shutil.rmtree(place / "000")
    read_many(here[FEW : 2 * FEW], tmp_path)
    read_many(here[1 : FEW + 1], tmp_path)
    assert counted == [FEW, FEW, 0]
    (file,) = tmp_path.glob("*.jsonl")
    assert str(place / "001") in file.read_text()
    assert str(place / "000") not in file.read_text()


def test_a_cache_that_cannot_be_written_is_done_without(runs, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert shown(read_many(runs, tmp_path / "file")) == shown([read(run) for run in runs])


def test_the_command_prints_the_same_from_the_cache(root, typed, tmp_path):
    asked = ("compare", f"runs={root}", f"outputs={tmp_path}")
    first, second = typed(*asked), typed(*asked)
    assert first == second
    assert first.code == 0, first.err
    assert first.out.count("unreadable (") == 2
    assert [file.name for file in (tmp_path / "cache").iterdir()] == ["compared.jsonl"]
    few = tmp_path / "few"
    assert typed("compare", f"runs={root}/00*", f"outputs={few}").code == 0
    assert not few.exists()
