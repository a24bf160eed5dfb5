"""A run's identity includes its pictures: others make another run, moved ones the same run."""

import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpm import run
from ddpm.config.compose import compose
from ddpm.data import listing
from ddpm.data.decoding import Decoding
from ddpm.data.image_set import image_set
from ddpm.data.listing import listed
from ddpm.data.sources import folder
from ddpm.runs.folder import RunFolder
from ddpm.train import which

NAMES = ["a/1.png", "a/2.png", "b/1.png", "b/2.png"]


@pytest.fixture
def words(tmp_path, tiny):
    """The settings of a one-step run on a folder of pictures."""

    def make(place, *more):
        return [
            *(*tiny, "data=folder", f"data.path={place}", "data.resolution=16"),
            *("model.resolution=16", "training.steps=1", "training.batch_size=4"),
            *("runtime.num_previews=1", f"outputs={tmp_path / 'outputs'}", *more),
        ]

    return make


def files_of(path: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def repaint(file: Path, level: int) -> None:
    """Changes a file's pixels but not its size and times."""
    before = file.stat()
    size = before.st_size
    Image.new("RGB", (12, 10), (level, level, level)).save(file, compress_level=0)
    assert file.stat().st_size == size
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.fixture
def plain(tmp_path):
    """Makes a folder of files that all have the same size."""

    def make(place, level=0):
        for number, name in enumerate(NAMES):
            file = tmp_path / place / name
            file.parent.mkdir(parents=True, exist_ok=True)
            pixels = (level + number,) * 3
            Image.new("RGB", (12, 10), pixels).save(file, compress_level=0)
        return tmp_path / place

    return make


def test_two_folders_of_one_name_are_two_runs_also_in_a_sweep(typed, plain, words, tmp_path):
    plain("cats/train")
    plain("dogs/train", level=100)
    two = f"data.path={tmp_path / 'cats/train'},{tmp_path / 'dogs/train'}"
    done = typed("train", "-m", *words(tmp_path), two)
    assert done.code == 0, done.err
    folders = sorted(file.parent for file in (tmp_path / "outputs").glob("*/*/run.json"))
    assert [one.parent.name for one in folders] == ["quickstart-train"] * 2
    records = [RunFolder(one).record() for one in folders]
    assert len({record["data"]["fingerprint"] for record in records}) == 2
    assert {record["status"] for record in records} == {"complete"}
    assert all(
        record["identity"]["data"]["pictures"] == record["data"]["fingerprint"]
        for record in records
    )


def test_the_same_pictures_moved_are_the_same_run_decoded_once(plain, words, tmp_path, capsys):
    first = run(words(plain("here")))
    cached = files_of(tmp_path / "outputs" / "cache")
    (tmp_path / "here").rename(tmp_path / "there")
    before = files_of(first.path)
    assert run(words(tmp_path / "there")).path == first.path
    assert "is complete: 1 steps" in capsys.readouterr().out
    assert files_of(first.path) == before
    decoded = {name for name in cached if name.name == "images.npy"}
    assert {
        name for name in files_of(tmp_path / "outputs" / "cache") if name.name == "images.npy"
    } == decoded


def test_an_unfinished_run_refuses_other_pictures_and_names_them(plain, words, tmp_path):
    place = plain("set")
    unfinished = run(words(place))
    unfinished.update(status="preempted")
    before = files_of(unfinished.path)
    for change, said in (
        (lambda: shutil.copy(place / "a/1.png", place / "a/stray.png"), "added: a/stray.png"),
        (lambda: (place / "b/2.png").unlink(), "removed: b/2.png"),
        (lambda: repaint(place / "a/2.png", 77), "changed: a/2.png"),
    ):
        kept = shutil.copytree(place, tmp_path / "kept")
        change()
        with pytest.raises(ValueError, match=f"{said} .*put them back, or start anew"):
            run(words(place))
        assert files_of(unfinished.path) == before
        shutil.rmtree(place)
        kept.rename(place)
    assert run(words(place)).path == unfinished.path


def test_beside_a_complete_run_others_are_a_new_run_that_says_so(plain, words, tmp_path):
    place = plain("set")
    complete = run(words(place))
    shutil.copy(place / "a/1.png", place / "a/more.png")
    other = run(words(place))
    assert other.path != complete.path
    assert (
        f"a new run beside {complete.path}, which had other pictures at the same path"
        in (other.record()["data"]["notes"])
    )
    assert complete.record()["status"] == "complete"


def test_a_named_set_compares_the_pictures_also_of_a_complete_run(plain, words):
    place = plain("copy")
    named = [
        word
        for word in words(place, "data.num_images=4")
        if word not in ("data=folder", "data=digits")
    ]
    first = run(["data=lsun_cat256", *named])
    before = files_of(first.path)
    repaint(place / "a/1.png", 99)
    with pytest.raises(ValueError, match=r"not those of .*changed: a/1\.png"):
        run(["data=lsun_cat256", *named])
    assert files_of(first.path) == before


def test_a_complete_run_whose_pictures_are_not_here_says_so_and_stays(
    plain, words, tmp_path, capsys
):
    place = plain("copy")
    named = [word for word in words(place) if word not in ("data=folder", "data=digits")]
    first = run(["data=cifar10", "training.conditional=false", *named])
    before = files_of(first.path)
    shutil.rmtree(place)
    run(["data=cifar10", "training.conditional=false", *named])
    said = capsys.readouterr().out
    assert "pictures not compared: data.path=" in said
    assert "is complete: 1 steps" in said
    elsewhere = [word for word in named if not word.startswith("data.path=")]
    assert run(["data=cifar10", "training.conditional=false", *elsewhere]).path == first.path
    assert "pictures not compared: cannot load uoft-cs/cifar10" in capsys.readouterr().out
    assert files_of(first.path) == before


def test_a_complete_run_of_a_folder_that_is_gone_stays_complete(plain, words, tmp_path, capsys):
    place = plain("set")
    first = run(words(place))
    before = files_of(first.path)
    shutil.rmtree(place)
    assert run(words(place)).path == first.path
    said = capsys.readouterr().out
    assert f"pictures not compared: data.path={place} is not here" in said
    assert files_of(first.path) == before
    with pytest.raises(ValueError, match="does not exist"):
        run(words(place, "seed=1"))
    first.update(status="preempted")
    with pytest.raises(ValueError, match="does not exist"):
        run(words(place))


def test_what_only_shows_a_configuration_reads_no_picture(typed, plain, words, tmp_path):
    place = plain("set")
    for flags in (["--help"], ["--cfg", "job"], ["--cfg", "job", "--resolve"]):
        assert typed("train", *words(place), *flags).code == 0
    assert not (tmp_path / "outputs").exists()


def aged(place: Path) -> None:
    """Waits until the files are old enough for their digests to be cached."""
    newest = max(file.stat().st_ctime_ns for file in place.rglob("*"))
    time.sleep(max(0.0, (newest + listing.SETTLED - time.time_ns()) / 1e9) + 0.05)


def test_digests_are_kept_until_a_file_changes(plain, tmp_path, monkeypatch):
    place, cache, read = plain("set"), tmp_path / "cache", []
    really = listing._digest
    monkeypatch.setattr(
        listing, "_digest", lambda root, name: read.append(name) or really(root, name)
    )

    def fingerprint():
        read.clear()
        found = listed(folder(str(place)), cache, workers=2).listing
        return found.fingerprint, sorted(read)

    first, names = fingerprint()
    assert names == NAMES
    assert fingerprint() == (first, NAMES)  # too recently changed to trust the cache
    aged(place)
    assert fingerprint() == (first, NAMES)
    assert fingerprint() == (first, [])
    repaint(place / "b/1.png", 50)  # same size and mtime
    second, names = fingerprint()
    assert (second != first, names) == (True, ["b/1.png"])
    aged(place)
    fingerprint()
    assert fingerprint() == (second, [])
    (place / "a/1.png").unlink()
    assert fingerprint()[1] == []
    assert fingerprint()[0] != second


def test_rows_of_a_table_are_read_again_only_if_it_changed(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    def write(level):
        contents = []
        for number in range(3):
            file = tmp_path / "scratch.png"
            Image.new("RGB", (4, 4), (level + number, 0, 0)).save(file)
            contents.append(file.read_bytes())
        place = tmp_path / "set"
        place.mkdir(exist_ok=True)
        table = pa.table({"image": contents, "label": [0, 1, 0]})
        pq.write_table(table, place / "train.parquet")
        return place

    def fingerprint():
        return listed(folder(str(place)), tmp_path / "cache", 1).listing.fingerprint

    place = write(10)
    aged(place)
    first = fingerprint()
    kept = next((tmp_path / "cache" / "digests").glob("*.json"))
    known = json.loads(kept.read_text())
    assert len(known["digests"]) == 3 * 64
    known["labels"] = [1, 1, 1]  # shows whether the cache is used
    kept.write_text(json.dumps(known))
    assert fingerprint() != first
    write(20)
    second = fingerprint()
    assert second != first
    assert second == fingerprint()


def test_sets_of_equal_names_sizes_and_times_do_not_share_what_was_decoded(plain, tmp_path):
    decoding = Decoding(8, 8, 3, "none", "white")
    place = plain("set")

    def decoded():
        return image_set(folder(str(place)), decoding, tmp_path / "cache", 1, 0.0).images.copy()

    first = decoded()
    for name in NAMES:
        repaint(place / name, 200)
    second = decoded()
    assert (first < 10).all()
    assert (second == 200).all()
    other = plain("other", level=50)
    for name in NAMES:
        os.utime(other / name, ns=(0, 0))
        os.utime(place / name, ns=(0, 0))
    found = image_set(folder(str(other)), decoding, tmp_path / "cache", 1, 0.0)
    assert not np.array_equal(found.images, second)


def test_pictures_that_change_while_they_are_read_are_not_trained_on(plain, tmp_path):
    place = plain("set")
    source = listed(folder(str(place)), tmp_path / "cache", 1)
    repaint(place / "a/1.png", 33)
    with pytest.raises(ValueError, match="changed while they were being read"):
        image_set(source, Decoding(8, 8, 3, "none", "white"), tmp_path / "cache", 1, 0.0)


def test_a_run_whose_pictures_moved_is_carried_on_measured_and_shown(typed, plain, words, tmp_path):
    first = run(words(plain("old"), "data.holdout=0.5", "training.batch_size=1"))
    (tmp_path / "old").rename(tmp_path / "new")
    moved = f"data.path={tmp_path / 'new'}"
    asked = ["evaluation.metrics=[losses]", "evaluation.num_images=2", "evaluation.num_samples=2"]
    lost = typed("evaluate", f"run={first.path}", *asked)
    assert lost.code == 1
    assert "does not exist" in lost.err
    assert typed("evaluate", f"run={first.path}", *asked, moved).code == 0
    figure = ["figure=interpolate", "sampler=ddim", "sampler.num_steps=2", "num_samples=1"]
    drawn = typed("sample", f"run={first.path}", *figure, f"to={tmp_path / 'figure'}", moved)
    assert drawn.code == 0, drawn.err
    resumed = [f"resume={first.path}", "training.steps=2"]
    assert run([*resumed, moved]).record()["step"] == 2
    repaint(tmp_path / "new" / "a/1.png", 111)
    for command, words_ in (
        ("evaluate", [f"run={first.path}", *asked]),
        ("sample", [f"run={first.path}", *figure, f"to={tmp_path / 'other'}"]),
        ("train", [f"resume={first.path}", "training.steps=3"]),
    ):
        before = files_of(first.path)
        refused = typed(command, *words_, moved)
        assert (refused.code, refused.err.count("\n")) == (1, 1), refused.err
        assert "not those of" in refused.err
        assert files_of(first.path) == before


def test_a_run_is_found_by_its_hash_whatever_its_folder_was_renamed_to(plain, words, capsys):
    first = run(words(plain("set")))
    digest = first.path.name.rpartition("-")[2]
    renamed = first.path.parent.parent / "the best" / f"of all-{digest}"
    renamed.parent.mkdir()
    first.path.rename(renamed)
    assert run(words(plain("set"))).path == renamed
    record = RunFolder(renamed).record()
    (renamed / "run.json").write_text(json.dumps({**record, "identity": {"another": "run"}}))
    assert run(words(plain("set"))).path == first.path  # the hash alone is not enough


def test_no_command_that_did_not_train_a_run_changes_its_files(typed, run_folder, tiny, tmp_path):
    outputs = run_folder.parent.parent
    before = files_of(run_folder)
    for command, *typed_words in (
        ("plan", *tiny, f"outputs={outputs}", "probe=0"),
        ("train", *tiny, f"outputs={outputs}"),
        ("sample", f"run={run_folder}", f"to={tmp_path / 'to'}", "num_samples=2", "sampler=ddim10"),
        ("compare", f"runs={outputs}", f"to={tmp_path / 'table'}"),
        ("export", f"run={run_folder}", f"to={tmp_path / 'exported'}"),
    ):
        done = typed(command, *typed_words)
        assert done.code == 0, done.err
        assert files_of(run_folder) == before, command
    for override in ("seed=7", "data.holdout=0.5", "objective.prediction=v", "model.dropout=0.5"):
        assert typed("train", f"resume={run_folder}", override).code == 1
        assert files_of(run_folder) == before, override


def test_the_source_that_named_a_run_is_the_one_that_it_trains_on(plain, words, monkeypatch):
    looked = []
    really = listing._of_files
    monkeypatch.setattr(
        listing, "_of_files", lambda *given: looked.append(given[0]) or really(*given)
    )
    begun = which.which_run(compose(words(plain("set"))))
    assert begun.source is not None
    assert begun.config.pictures == begun.source.listing.fingerprint
    looked.clear()
    run(words(plain("set")))
    assert len(looked) == 1  # one look per start
    run(words(plain("set")))
    assert len(looked) == 2  # also for a complete run
