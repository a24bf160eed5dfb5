"""A run's folder, with its record in run.json."""

import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from filelock import Timeout

from ddpm.config.compose import Composed
from ddpm.config.schema import Config, read_config
from ddpm.runs import contents
from ddpm.runs.format import COMPUTATION, FORMAT, upgraded
from ddpm.system.files import InUse, lock, open_known, refuse_links, write_text
from ddpm.system.plain import Unreadable

WRITTEN = ("checkpoints", "samples", "evaluation", "profile", ".hydra")  # subfolders
# what the first format recorded for the last start only
OF_A_START = ("command", "started", "device", "git", "versions", "platform")


class RunFolder:
    """A run on disk.

    Any process may read its files; only the run's main process writes them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.samples = path / "samples"

    def config(self, trusted_modules: list[str], key: str = "run") -> Config:
        """Returns the configuration that the run was started with.

        Its classes must be in modules that the caller trusts; what the folder itself trusts does
        not count.

        Args:
            trusted_modules: Modules whose classes the caller trusts.
            key: The command-line key that named this folder, for error messages.

        Raises:
            ValueError: If this is not a run's folder; the message names the folder and the key.
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
                f"; run folders below it: {', '.join(below[:5])}"
                if below
                else ""
                if self.path.is_dir()
                else f"; there is no such folder, seen from {Path.cwd()}"
            )
            raise ValueError(f"{key}={self.path} is not a run folder: it has no config.yaml{more}")
        plain, record = self.plain(key), self.record()
        trusts = {**(plain.get("runtime") or {}), "trusted_modules": trusted_modules}
        try:
            return read_config(upgraded({**plain, "runtime": trusts}, record))
        except ValueError as error:
            if plain.get("format", 1) == FORMAT:
                raise
            last = (starts_of(record) or [{}])[-1]
            commit = (last.get("git") or {}).get("commit", "unknown")[:8]
            raise ValueError(
                f"{file} was written by another version (format {plain.get('format', 1)}, commit "
                f"{commit}): {error}"
            ) from error

    def plain(self, key: str = "run") -> dict[str, Any]:
        """Returns the content of config.yaml, unchanged except that its types are checked.

        Args:
            key: The command-line key that named this folder, for error messages.

        Raises:
            ValueError: If the file cannot be read or does not have the expected content; the
                message names the folder and the key.
        """
        try:
            return contents.read_settings(self.path)
        except Unreadable as error:
            raise ValueError(
                f"{key}={self.path} is not a run folder: its config.yaml cannot be read "
                f"({error.why})"
            ) from error

    def record(self) -> dict[str, Any]:
        """Returns the content of run.json, empty before the first start.

        Raises:
            ValueError: If the file cannot be read.
        """
        try:
            return contents.read_record(self.path)
        except Unreadable as error:
            raise ValueError(
                f"{error}: remove it, and the run resumes from its newest checkpoint"
            ) from error

    def classes(self) -> list[str]:
        """Returns the names of the classes of the run's data.

        Raises:
            ValueError: If the run was never started.
        """
        data = self.record().get("data")
        if not isinstance(data, dict) or "classes" not in data:
            raise ValueError(
                f"run={self.path} has no class names in run.json: start its training again"
            )
        return data["classes"]

    def choices(self) -> dict[str, str]:
        """Returns the option chosen in each config group, empty before the first start."""
        return contents.read_choices(self.path)

    def status(self) -> str:
        """Returns the status: complete, failed, preempted, running, cut off or not started.

        "cut off" means that run.json says "running" but the process is gone.
        """
        return self.status_of(self.record())

    def status_of(self, record: Mapping[str, Any]) -> str:
        """Returns the status that this content of run.json stands for."""
        status, file = str(record.get("status", "not started")), self.path / ".lock"
        if status != "running" or not file.is_file() or file.is_symlink():
            return status
        try:
            with lock(file, wait=0):
                return "cut off"
        except (Timeout, PermissionError, ValueError):  # held, another user's, or no locks here
            return status

    def start(
        self, config: Config, composed: Composed, identity: dict[str, Any], **about: Any
    ) -> None:
        """Creates the folder if needed, and records this start.

        Args:
            config: The configuration of this start.
            composed: The command line that it was composed from.
            identity: The run's identity; a later start keeps the one of the first.
            about: Further entries on this start, for the history.
        """
        (self.path / ".hydra").mkdir(parents=True, exist_ok=True)
        self.samples.mkdir(exist_ok=True)
        settings = {"format": FORMAT, **config.model_dump(mode="json")}
        write_text(self.path / "config.yaml", yaml.safe_dump(settings, sort_keys=False))
        write_text(self.path / ".hydra" / "overrides.yaml", yaml.safe_dump(composed.overrides))
        write_text(self.path / ".hydra" / "choices.yaml", yaml.safe_dump(composed.choices))
        record = self.record()
        starts, step = starts_of(record), record.get("step", 0)
        start = {
            "command": _command(composed),
            "started": _now(),
            "from_step": step,
            "to_step": step,
            "computation": COMPUTATION,
            **about,
            **_provenance(),
        }
        kept = {key: value for key, value in record.items() if key not in OF_A_START}
        self._write(
            {
                "created": _now(),
                "identity": identity,
                **kept,
                "format": FORMAT,
                "status": "running",
                "starts": [*starts, start],
            }
        )

    def saved(self, step: int, **values: Any) -> None:
        """Records that the run has a checkpoint at this step."""
        *before, last = self.record()["starts"]
        self.update(step=step, starts=[*before, {**last, "to_step": step}], **values)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps other processes from training in this folder inside the block.

        The system releases the lock when the process ends, for any reason.

        Raises:
            InUse: If another process holds the lock; the message names that process.
            ValueError: If the folder contains a link that a run would write through.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self.refuse_links()
        file = self.path / ".lock"
        try:
            # wait: `status` holds the lock for an instant to see whether a run is alive
            with lock(file, wait=0.5):
                with os.fdopen(open_known(file, os.O_WRONLY | os.O_TRUNC), "w") as held:
                    held.write(f"process {os.getpid()} on {platform.node()} since {_now()}\n")
                yield
        except Timeout:
            holder = file.read_text(encoding="utf-8").strip() or "another process"
            raise InUse(
                f"run {self.path} is being trained by {holder}: wait for it, or stop it"
            ) from None

    def refuse_links(self) -> None:
        """Refuses links in the folder, which could lead writes elsewhere; it may be one itself.

        Raises:
            ValueError: If there is a link; the message names it.
        """
        refuse_links(self.path, *WRITTEN)

    def update(self, **values: Any) -> None:
        """Changes entries of run.json."""
        self._write({"created": _now(), **self.record(), **values})

    def _write(self, record: dict[str, Any]) -> None:
        text = json.dumps({**record, "updated": _now()}, indent=2)
        write_text(self.path / "run.json", text + "\n")


def starts_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the starts recorded in run.json.

    The first format recorded only the last start, at the top level.
    """
    if "starts" in record or "command" not in record:
        return record.get("starts", [])
    first = {key: record[key] for key in OF_A_START if key in record}
    return [{**first, "from_step": 0, "to_step": record.get("step", 0)}]


def steps_of_before(record: dict[str, Any], computation: int) -> int:
    """Returns the last step made by a version with an earlier `computation` number, or 0."""
    earlier = [
        start["to_step"]
        for start in starts_of(record)
        if start.get("computation", 1) < computation and start["to_step"] > start["from_step"]
    ]
    return max(earlier, default=0)


def _command(composed: Composed) -> list[str]:
    """Returns the command that starts this run, even if it was a sweep's job or a notebook's."""
    own = [] if composed.config_dir is None else ["--config-dir", composed.config_dir]
    return ["python", "-m", "ddpm.train", *own, *composed.overrides]


def _provenance() -> dict[str, Any]:
    import torch  # not at the top: ddpm.compare should not wait for it

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
    """Returns the running code's commit and whether it is dirty; None outside of a checkout."""

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
