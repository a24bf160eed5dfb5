"""A sweep told to stop saves every job, leaves no process behind, and prints its table.

The same command then completes it. The suite runs a short form; DDPM_TORTURE_KILLS=20 selects a
long one.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from ddpm.runs import checkpoint
from ddpm.runs.folder import RunFolder

ROOT = Path(__file__).resolve().parent.parent
STOPS = int(os.environ.get("DDPM_TORTURE_KILLS", "1"))
STEPS = 20
THREE = ["-m", "seed=0,1,2"]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def settings(tiny):
    changed = [f"training.steps={STEPS}", "runtime.log_every=1", "runtime.sample_every=1000"]
    return [*(one for one in tiny if one != "training.steps=6"), *changed]


class Sweep:
    """A sweep in its own process group, as a terminal starts it."""

    def __init__(self, log, *words):
        self.log, self.seen = log, set()
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "ddpm.train", *words],
                cwd=ROOT,
                env={**os.environ, "HYDRA_FULL_ERROR": "0"},
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    def wait(self, ready, limit=120):
        """Waits for `ready()` or the end of the sweep, and notes the processes it sees."""
        until = time.monotonic() + limit
        while time.monotonic() < until and self.process.poll() is None and not ready():
            try:
                self.seen |= set(psutil.Process(self.process.pid).children(recursive=True))
            except psutil.NoSuchProcess:
                break
            time.sleep(0.1)

    def press_ctrl_c(self):
        os.killpg(self.process.pid, signal.SIGINT)

    def end(self):
        """Waits for the end, checks that no process is left, and returns the exit code."""
        self.wait(lambda: False)
        code = self.process.poll()
        left = [one for one in self.seen if one.is_running() and one.status() != "zombie"]
        # Python starts a process that cleans up after the others and ends after them
        _, left = psutil.wait_procs(left, timeout=2)
        for one in [self.process, *left]:
            one.kill()
        assert not left, (left, self.log.read_text())
        return code

    def table(self):
        return self.log.read_text().split("\n\n")[-1].splitlines()[1:]


def check_saved(outputs):
    """Checks that no started job has lost a step that it took."""
    for file in outputs.glob("*/*/run.json"):
        run = RunFolder(file.parent)
        assert run.status() in ("preempted", "complete")
        logged = run.path / "metrics.jsonl"
        lines = logged.read_text().splitlines() if logged.is_file() else []
        steps = [json.loads(line)["step"] for line in lines]
        found = checkpoint.newest_whole(run.checkpoints)
        assert (found.step if found else 0) == run.record().get("step", 0) == max(steps, default=0)


def test_told_at_any_instant_a_parallel_sweep_saves_leaves_no_process_and_is_completed(
    typed, settings, tmp_path
):
    outputs, chance = tmp_path / "outputs", random.Random(0)
    words = [*settings, f"outputs={outputs}", *THREE]
    at_once = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    for turn in range(STOPS):
        sweep = Sweep(tmp_path / f"log_{turn}", *words, *at_once)
        if turn % 4 < 2:
            sweep.wait(lambda at=sweep: "run " in at.log.read_text())
        until = time.monotonic() + chance.uniform(0, 2 if turn % 4 < 2 else 8)
        sweep.wait(lambda end=until: time.monotonic() > end)
        if turn % 2:
            sweep.process.terminate()
        else:
            sweep.press_ctrl_c()
        code = sweep.end()
        said = sweep.log.read_text()
        if code in (130, -signal.SIGINT, -signal.SIGTERM):  # before the first job
            assert "run " not in said
            continue
        assert code in (0, 75), said
        assert len(sweep.table()) == 3, said
        if code == 75:
            assert said.count("stopping, run the same command to resume") == 1
        check_saved(outputs)
    done = typed("train", *words)
    assert done.code == 0, done.err
    whole = typed("train", *settings, f"outputs={tmp_path / 'whole'}", "-m", "seed=0,2")
    assert whole.code == 0
    for run in (tmp_path / "whole").glob("*/*/run.json"):
        ours = outputs / run.parent.relative_to(tmp_path / "whole")
        for name in ("model.safetensors", "ema.safetensors"):
            found, expected = (
                checkpoint.find(one / "checkpoints", STEPS).folder / name
                for one in (ours, run.parent)
            )
            assert found.read_bytes() == expected.read_bytes()
        assert (ours / "metrics.jsonl").read_bytes() == (run.parent / "metrics.jsonl").read_bytes()
