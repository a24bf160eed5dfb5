"""The folder of a run: run.json tells how it stands."""

import json
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import Timeout

from ddpm.config.compose import Composed
from ddpm.config.schema import Config, read_config
from ddpm.system.files import lock, write_text


class RunFolder:
    """A run on the disk.

    Anybody may read its files; only the one process that leads the run writes them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.samples = path / "samples"

    def config(self, trusted_modules: list[str], key: str = "run") -> Config:
        """Returns the configuration that the run was started with.

        Its classes are checked against what the caller trusts, not against what the folder says.

        Args:
            trusted_modules: Modules whose classes the caller trusts.
            key: The command line's key for the folder.

        Raises:
            ValueError: If this is no run, naming the folder and the key.
        """
        file = self.path / "config.yaml"
        if not file.is_file():
            below = sorted(
                {
                    str(found.parent)
                    for depth in ("*", "*/*")
                    for found in self.path.glob(f"{depth}/config.yaml")
                }
            )
            more = (
                f"; below it are {', '.join(below[:5])}"
                if below
                else ""
                if self.path.is_dir()
                else f"; it is not there, seen from {Path.cwd()}"
            )
            raise ValueError(f"{key}={self.path} is no run folder: it has no config.yaml{more}")
        try:
            plain = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{key}={self.path} is no run folder: its config.yaml cannot be read ({error})"
            ) from error
        if not isinstance(plain, dict) or not isinstance(plain.get("runtime"), dict):
            raise ValueError(
                f"{key}={self.path} is no run folder: its config.yaml is not one of ddpm.train"
            )
        return read_config(
            {**plain, "runtime": {**plain["runtime"], "trusted_modules": trusted_modules}}
        )

    def record(self) -> dict[str, Any]:
        """Returns the content of run.json, empty before the first start.

        Raises:
            ValueError: If it cannot be read.
        """
        file = self.path / "run.json"
        try:
            return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        except ValueError as error:
            raise ValueError(
                f"{file} cannot be read ({error}); "
                f"remove it, and the run starts from its newest checkpoint"
            ) from error

    def classes(self) -> list[str]:
        """Returns the names of the classes of the run's data.

        Raises:
            ValueError: If the run was never started.
        """
        data = self.record().get("data")
        if not isinstance(data, dict) or "classes" not in data:
            raise ValueError(
                f"run={self.path} has no run.json that tells of its data; "
                f"start its training once more"
            )
        return data["classes"]

    def choices(self) -> dict[str, str]:
        """Returns the option that was chosen in each group, empty before the first start."""
        file = self.path / ".hydra" / "choices.yaml"
        return yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}

    def status(self) -> str:
        """Returns how the run stands: complete, failed, preempted, running, cut off or not started.

        It is cut off if the process that trained it is gone and could not say so.
        """
        status = self.record().get("status", "not started")
        if status != "running" or not (self.path / ".lock").is_file():
            return status
        try:
            with lock(self.path / ".lock", wait=0):
                return "cut off"
        except (Timeout, PermissionError):  # the last where the run is somebody else's
            return status

    def start(self, config: Config, composed: Composed) -> None:
        """Makes the folder if need be, and writes down what is being started."""
        (self.path / ".hydra").mkdir(parents=True, exist_ok=True)
        self.samples.mkdir(exist_ok=True)
        write_text(
            self.path / "config.yaml",
            yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False),
        )
        write_text(self.path / ".hydra" / "overrides.yaml", yaml.safe_dump(composed.overrides))
        write_text(self.path / ".hydra" / "choices.yaml", yaml.safe_dump(composed.choices))
        self.update(
            status="running",
            command=_command(composed),
            started=_now(),
            **_provenance(),
        )

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps every other process from training in this folder while this one does.

        The system lets go when the process ends, however it ends.

        Raises:
            ValueError: If another process holds it, naming that process.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        file = self.path / ".lock"
        try:
            # `status` holds it for an instant, to see whether a run is alive
            with lock(file, wait=0.5):
                file.write_text(
                    f"process {os.getpid()} on {platform.node()} since {_now()}\n", encoding="utf-8"
                )
                yield
        except Timeout:
            holder = file.read_text(encoding="utf-8").strip() or "another process"
            raise ValueError(
                f"run {self.path} is being trained by {holder}; wait for it, or stop it"
            ) from None

    def update(self, **values: Any) -> None:
        """Changes entries of run.json."""
        record = {"created": _now(), **self.record(), **values, "updated": _now()}
        write_text(self.path / "run.json", json.dumps(record, indent=2) + "\n")


def _command(composed: Composed) -> list[str]:
    """The words that start this very run, also where it was a job of a sweep or of a notebook."""
    own = [] if composed.config_dir is None else ["--config-dir", composed.config_dir]
    return ["python", "-m", "ddpm.train", *own, *composed.overrides]


def _provenance() -> dict[str, Any]:
    packages = (
        "accelerate",
        "hydra-core",
        "omegaconf",
        "datasets",
        "numpy",
        "pillow",
        "safetensors",
    )
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: metadata.version(name) for name in packages},
    }
    return {"git": _git(), "versions": versions, "platform": platform.platform()}


def _git() -> dict[str, Any] | None:
    """Commit of the code that runs, and whether it was changed since; None if it is no checkout."""

    def ask(*words: str) -> str:
        folder = Path(__file__).resolve().parent
        return subprocess.run(
            ["git", "-C", str(folder), *words],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()

    try:
        return {
            "commit": ask("rev-parse", "HEAD"),
            "dirty": bool(ask("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.SubprocessError):
        return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
