"""Hostile input cannot run code, overwrite files, hang a command or pass for valid input.

Each row of the table ends in one line that names the input.
"""

import contextlib
import hashlib
import os
import re
import resource
import shutil
import signal
import stat
import sys

import hostile
import pytest

from ddpm.config.schema import training_config

SECONDS = 30  # allowed per command; an idle machine needs one
MEMORY = 600_000  # kB that a process may grow by


@pytest.fixture
def place(run_folder, tmp_path, monkeypatch):
    """A folder with a copy of a run, a folder of canaries, and a module that leaves a trace."""
    canary = tmp_path / "canary"
    (canary / "folder").mkdir(parents=True)
    (canary / "file").write_text("whole")
    (canary / "folder" / ".step_1.1").write_text("whole")
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "stranger.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.chdir(tmp_path)
    yield hostile.Place(tmp_path, shutil.copytree(run_folder, tmp_path / "run"), canary)
    sys.modules.pop("stranger", None)


def digest(folder) -> dict[str, tuple]:
    """Returns kind, permissions, modification time and content of everything below a folder."""
    return {
        str(path): (
            stat.filemode(path.lstat().st_mode),
            path.lstat().st_mtime_ns,
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "",
        )
        for path in [folder, *sorted(folder.rglob("*"))]
    }


@contextlib.contextmanager
def ends():
    """Interrupts its body after SECONDS."""

    def late(*_):
        raise AssertionError(f"still running after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


HIDDEN = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


@pytest.mark.parametrize("name", hostile.ALL)
def test_it_ends_in_one_line_that_names_it_and_changes_nothing_else(typed, place, name):
    case = hostile.ALL[name](place)
    before, size = digest(place.canary), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with ends():
        done = typed(case.command, *case.words)
    assert done.code == 1
    told = [line for line in done.err.splitlines() if not line.startswith("note: ")]
    assert len(told) == 1, done.err
    assert told[0].startswith("error: ")
    assert re.search(case.says, told[0]), told[0]
    assert not HIDDEN.search(done.err + done.out), done.err
    assert not (place.tmp / "trace").exists()
    assert "stranger" not in sys.modules
    assert digest(place.canary) == before
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - size < MEMORY


def test_there_are_about_sixty():
    assert len(hostile.ALL) >= 60


def test_links_to_other_disks_above_a_run_are_followed(typed, place, tiny):
    (place.tmp / "disk" / "runs").mkdir(parents=True)
    (place.tmp / "outputs").symlink_to(place.tmp / "disk" / "runs")
    words = [*tiny, "training.steps=1", f"outputs={place.tmp / 'outputs'}"]
    assert typed("train", *words).code == 0
    (folder,) = {file.parent for file in place.tmp.glob("disk/runs/*/*/run.json")}
    moved = folder.rename(place.tmp / "disk" / "one")
    folder.symlink_to(moved)
    done = typed("train", f"resume={folder}", "training.steps=2")
    assert done.code == 0, done.err
    assert (moved / "checkpoints" / "step_00000002").is_dir()


def test_scratch_that_is_a_link_goes_and_what_it_leads_to_stays(place):
    from ddpm.system.files import clear_scratch, remove

    before = digest(place.canary)
    for name in (".x.1", ".folder.2"):
        (place.run / name).symlink_to(place.canary / ("file" if "x" in name else "folder"))
    clear_scratch(place.run)
    assert not list(place.run.glob(".*.[0-9]*"))
    (place.run / "old").mkdir()
    (place.run / "old" / "inner").symlink_to(place.canary / "folder")
    remove(place.run / "old")
    assert not (place.run / "old").exists()
    assert digest(place.canary) == before


@pytest.fixture
def composes(typed, monkeypatch):
    """Composes and checks a command line of ddpm.train. Returns the configurations."""
    found = []
    monkeypatch.setattr("ddpm.train.run.run", lambda cfg: found.append(training_config(cfg)))
    monkeypatch.setattr("ddpm.train.run.facts", lambda cfg: {})

    def call(*words: str) -> list:
        found.clear()
        done = typed("train", *words)
        assert done.code == 0 or not found, done.err
        return list(found)

    return call


def test_trust_that_is_typed_reaches_the_jobs_of_a_sweep(composes, place):
    (place.tmp / "modules" / "mylib.py").write_text(
        "import torch\n\n\ndef betas(num_timesteps: int):\n"
        "    return torch.full((num_timesteps,), 0.01, dtype=torch.float64)\n"
    )
    schedule = place.own("schedule/mine.yaml", "_target_: mylib.betas\nnum_timesteps: 10\n")
    words = [*schedule, "-m", "schedule=mine", "seed=0,1", "runtime.check_sweep=false"]
    assert composes(*words) == []
    jobs = composes(*words, "runtime.trusted_modules=[mylib]")
    assert [job.seed for job in jobs] == [0, 1]
    assert all(job.schedule["_target_"] == "mylib.betas" for job in jobs)


def test_a_recipe_of_the_project_asks_for_no_trust_either(complaint, recipe, place):
    line = complaint(recipe("runtime: {trusted_modules: [stranger]}\n"))
    assert "experiments/trial.yaml sets runtime.trusted_modules=[stranger]" in line


def test_what_a_file_takes_from_the_environment_is_said(typed, place, monkeypatch):
    monkeypatch.setenv("SECRET", "token")
    own = place.experiment("outputs: '/x/${oc.env:SECRET}'\n")
    done = typed("train", *own, "--cfg", "job", "--resolve", "-p", "outputs")
    assert done.err == "note: a file takes outputs from the environment, SECRET\n"
    done = typed("train", "outputs=${oc.env:SECRET}", "--cfg", "job", "--resolve", "-p", "outputs")
    assert (done.out, done.err) == ("token\n", "")


def test_a_set_of_values_in_a_file_still_sweeps(composes, place):
    own = place.experiment("hydra: {sweeper: {params: {seed: '3,1,2'}}}\n")
    assert [job.seed for job in composes(*own, "-m", "runtime.check_sweep=false")] == [3, 1, 2]


def test_closed_streams_are_opened_to_nowhere(tmp_path):
    program = (
        "import sys; from ddpm.system.text import keep_streams, say; keep_streams();"
        f"file = open({str(tmp_path / 'file')!r}, 'w'); say('lost', to_error=True);"
        "import os; os.write(2, b'lost too'); file.write('whole'); file.close()"
    )
    code = os.spawnv(
        os.P_WAIT, "/bin/sh", ["sh", "-c", f'"{sys.executable}" -c "$0" 2>&- <&- >&-', program]
    )
    assert code == 0
    assert (tmp_path / "file").read_text() == "whole"
