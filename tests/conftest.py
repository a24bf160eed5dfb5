"""Shared fixtures: tiny runs, small picture folders and commands in their own process.

Nothing here needs the internet.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
# For tiny tensors one thread is as fast, and several processes do not fight over the cores.
os.environ["OMP_NUM_THREADS"] = "1"

import contextlib
import functools
import importlib
import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import forked
import numpy as np
import pytest
import torch
from decoded import DIGITS
from hydra.core.config_store import ConfigStore
from PIL import Image

from ddpm import run
from ddpm.config import build
from ddpm.config.cli import command
from ddpm.config.compose import Composed, register_experiments
from ddpm.config.schema import training_config
from ddpm.runs.folder import RunFolder

ROOT = Path(__file__).resolve().parent.parent

TINY = [
    *("schedule=linear", "objective=epsilon", "training.conditional=false"),
    *(
        *DIGITS,
        "model.base_channels=8",
        "model.norm_groups=4",
        "model.channel_multipliers=[1,2]",
        "model.attention_resolutions=[8]",
    ),
    *(
        "training.steps=6",
        "training.batch_size=8",
        "runtime.num_previews=4",
        "sampler=ddim",
        "sampler.num_steps=2",
    ),
]


class Done(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def run(self) -> Path:
        """The run's folder, read from the first "run " line.

        Under torchrun, some versions of gloo print lines of their own before it.
        """
        return Path(
            next(line for line in self.out.splitlines() if line.startswith("run ")).removeprefix(
                "run "
            )
        )


def pytest_xdist_auto_num_workers() -> int:
    """One more than the cores, since tests of stopping and lost processes mostly wait."""
    return len(os.sched_getaffinity(0)) + 1 if hasattr(os, "sched_getaffinity") else 2


# Slow files, slowest first: started last, one of them would keep a single process busy at the end.
LONG = (
    *("test_torture", "test_tune", "test_processes", "test_readme", "test_sweep", "test_stopping"),
    "test_studies",
    *("test_evaluation", "test_stopped_sweep", "test_resume", "test_report_browser", "test_export"),
    *("test_search", "test_features", "test_tensorboard", "test_property", "test_dropout"),
)


def pytest_configure(config: pytest.Config) -> None:
    """Hands the files to the worker processes in the order of collection."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts slow files first, and skips tests marked gpu where there is no CUDA device.

    The skip holds whatever -m selects.
    """
    place = {name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


@pytest.fixture(scope="session")
def tiny() -> list[str]:
    """Settings of a run that takes one second."""
    return TINY


@pytest.fixture(scope="session")
def ddpm() -> Callable[..., Done]:
    """Runs `python -m ddpm.<name> <overrides>` in one process or in several that cooperate."""

    def call(name: str, *overrides: str, processes: int = 1, **environment: str) -> Done:
        if processes == 1:
            started = [forked.command(name, *overrides, **environment)]
        else:
            started = forked.group(name, *overrides, processes=processes, **environment)
        codes = [one.wait(200) for one in started]
        return Done(max(codes), started[0].out, "".join(one.err for one in started))

    return call


@pytest.fixture(scope="session")
def typed() -> Callable[..., Done]:
    """Runs `python -m ddpm.<name> <overrides>` in this process, which saves the imports."""

    def call(name: str, *overrides: str) -> Done:
        out, err = io.StringIO(), io.StringIO()
        code: int | str | None = 0
        with (
            pytest.MonkeyPatch.context() as patch,
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            patch.setattr(sys, "argv", [f"ddpm.{name}", *overrides])
            patch.setenv("HYDRA_FULL_ERROR", "0")
            try:
                importlib.import_module(f"ddpm.{name}.__main__").main()
            except SystemExit as stopped:
                code = stopped.code
        # the interpreter prints a string passed to sys.exit, and exits with 1
        if isinstance(code, str):
            return Done(1, out.getvalue(), f"{err.getvalue()}{code}\n")
        return Done(code or 0, out.getvalue(), err.getvalue())

    return call


@pytest.fixture(scope="session")
def train(typed: Callable[..., Done]) -> Callable[..., Done]:
    """Trains a tiny network; its run lies below a given folder, and it must succeed."""

    def call(outputs: Path, *overrides: str) -> Done:
        done = typed("train", *TINY, f"outputs={outputs}", *overrides)
        assert done.code == 0, done.err
        return done

    return call


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny run of 6 steps, trained in this process. Only read or copy it."""
    return run([*TINY, f"outputs={tmp_path_factory.mktemp('outputs')}"]).path


@pytest.fixture
def refusal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Returns the one line on standard error with which a command exits with code 1."""

    def call(main: Callable[[], None], *overrides: str) -> str:
        monkeypatch.setattr(sys, "argv", ["ddpm", *overrides])
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        with pytest.raises(SystemExit) as stopped:
            main()
        printed = capsys.readouterr().err
        # the interpreter prints a string passed to sys.exit, and exits with 1
        if isinstance(stopped.value.code, str):
            printed += stopped.value.code + "\n"
        else:
            assert stopped.value.code == 1
        assert printed.startswith("error: "), printed
        assert printed.count("\n") == 1, printed
        return printed

    return call


@pytest.fixture
def complaint(refusal: Callable[..., str]) -> Callable[..., str]:
    """Returns the error that ddpm.train prints for a command line, before any data is read."""

    def check(composed: Composed) -> None:
        build.check(training_config(composed))

    return functools.partial(refusal, command("train", check, "Check.", [], config_name="config"))


@pytest.fixture
def recipe(tmp_path: Path) -> Iterator[Callable[[str], str]]:
    """Registers a YAML text as a recipe for one test. Returns the override that selects it."""

    def make(text: str) -> str:
        (tmp_path / "recipes").mkdir()
        (tmp_path / "recipes" / "trial.yaml").write_text(text)
        register_experiments(tmp_path / "recipes")
        return "experiment=trial"

    yield make
    ConfigStore.instance().repo["experiment"].pop("trial.yaml", None)


@pytest.fixture
def pictures(tmp_path: Path) -> Callable[..., Path]:
    """Writes PNG files of 12x10 random pixels into a folder below tmp_path."""

    def make(folder: str, names: list[str]) -> Path:
        for seed, name in enumerate(names):
            file = tmp_path / folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(
                np.random.default_rng(seed).integers(0, 256, (10, 12, 3), dtype=np.uint8)
            ).save(file)
        return tmp_path / folder

    return make


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Small networks are slower on two threads, and much slower on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> RunFolder:
    """A finished run of a small network with random weights. Read-only."""
    # imported here, because importing diffusers takes seconds and most tests do without it
    from weight_folders import SMALL, finished

    return finished(tmp_path_factory.mktemp("small"), *SMALL)


@pytest.fixture(scope="session")
def small_exported(small, tmp_path_factory) -> Path:
    """The export of `small`. Read-only."""
    from weight_folders import exported

    return exported(small, tmp_path_factory.mktemp("small"))
