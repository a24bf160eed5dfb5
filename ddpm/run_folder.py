"""The folder of a run: its name follows from the configuration, run.json tells how it stands."""

import functools
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml

from ddpm import diffusers_folder
from ddpm.cli import Composed, compose
from ddpm.config import Config, read_config, training_config
from ddpm.files import lock, write_whole

NOT_COMPUTED = {  # what never changes a result beyond rounding, and so is no part of the name
    "runtime": True,
    "sampler": True,
    "evaluation": True,
    "outputs": True,
    "resume": True,
    "recipe": True,
    "init_weights": True,  # stands where init_from does
    "data": {"path": True, "cache": True, "max_unreadable": True, "num_images": True, "source": {"path": True}},
}


class RunFolder:
    """A run on the disk. Reading its files is for anybody, writing them for the one process that leads the run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.samples = path / "samples"

    def config(self, trusted_modules: list[str], key: str = "run") -> Config:
        """The configuration that the run was started with, its classes checked against what the caller trusts, not against what the folder says.

        Raises ValueError, naming the folder and the command line's key for it, if this is no run.
        """
        file = self.path / "config.yaml"
        if not file.is_file():
            below = sorted({str(found.parent) for depth in ("*", "*/*") for found in self.path.glob(f"{depth}/config.yaml")})
            more = f"; below it are {', '.join(below[:5])}" if below else "" if self.path.is_dir() else f"; it is not there, seen from {Path.cwd()}"
            raise ValueError(f"{key}={self.path} is no run folder: it has no config.yaml{more}")
        try:
            plain = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{key}={self.path} is no run folder: its config.yaml cannot be read ({error})") from error
        if not isinstance(plain, dict) or not isinstance(plain.get("runtime"), dict):
            raise ValueError(f"{key}={self.path} is no run folder: its config.yaml is not one of ddpm.train")
        return read_config({**plain, "runtime": {**plain["runtime"], "trusted_modules": trusted_modules}})

    def record(self) -> dict[str, Any]:
        """run.json, empty before the first start."""
        file = self.path / "run.json"
        try:
            return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        except ValueError as error:
            raise ValueError(f"{file} cannot be read ({error}); remove it, and the run starts from its newest checkpoint") from error

    def classes(self) -> list[str]:
        """Names of the classes of the run's data.    Raises ValueError if the run was never started."""
        data = self.record().get("data")
        if not isinstance(data, dict) or "classes" not in data:
            raise ValueError(f"run={self.path} has no run.json that tells of its data; start its training once more")
        return data["classes"]

    def choices(self) -> dict[str, str]:
        """The option that was chosen in each group, empty before the first start."""
        file = self.path / ".hydra" / "choices.yaml"
        return yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}

    def settings(self, config: Config, num_steps: int) -> dict[str, float | str | None]:
        """What runs are told apart by, under the same keys whatever the run: the options chosen, the numbers tuned most, and `differs`, all that is not
        the model's and data's own, in the words of the folder's name."""
        chosen = self.choices()
        options = {
            group: chosen.get(group, "None").replace("None", "none")
            for group in ("experiment", "model", "data", "schedule", "objective", "optimizer", "lr_schedule")
        }
        half = flat(config.model_dump(mode="json"))
        numbers = {key: half.get(key) for key in ("optimizer.lr", "lr_schedule.warmup_steps", "data.holdout", "data.flip", "seed")}
        numbers |= {key: value for key, value in half.items() if key.startswith("training.") and key not in ("training.steps", "training.epochs")}
        name = self.path.name.rpartition("-")[0]
        return {**options, **numbers, "training.steps": num_steps, "resolution": str(config.data.resolution), "differs": name}

    def standing(self) -> str:
        """complete, failed, preempted, running; or cut off, where the process that trained it is gone and could not say so."""
        status = self.record().get("status", "not started")
        if status != "running" or not (self.path / ".lock").is_file():
            return status
        with (self.path / ".lock").open(encoding="utf-8") as file:
            return "cut off" if lock(file) else status

    def start(self, config: Config, composed: Composed) -> None:
        """Make the folder if need be, and write down what is being started."""
        (self.path / ".hydra").mkdir(parents=True, exist_ok=True)
        self.samples.mkdir(exist_ok=True)
        write_whole(self.path / "config.yaml", yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
        write_whole(self.path / ".hydra" / "overrides.yaml", yaml.safe_dump(composed.overrides))
        write_whole(self.path / ".hydra" / "choices.yaml", yaml.safe_dump(composed.choices))
        self.update(status="running", command=[Path(sys.argv[0]).name, *sys.argv[1:]], started=_now(), **_provenance())

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep every other process from training in this folder while this one does; the system lets go when the process ends, however it ends.

        Raises ValueError, naming the process that holds it, if one does.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("a+", encoding="utf-8") as file:
            enough = time.monotonic() + 0.5  # `standing` holds it for an instant, to see whether a run is alive
            while not lock(file):
                if time.monotonic() > enough:
                    file.seek(0)
                    raise ValueError(f"run {self.path} is being trained by {file.read().strip() or 'another process'}; wait for it, or stop it")
                time.sleep(0.05)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()} since {_now()}\n")
            file.flush()
            yield

    def update(self, **values: Any) -> None:
        """Change entries of run.json."""
        record = {"created": _now(), **self.record(), **values, "updated": _now()}
        write_whole(self.path / "run.json", json.dumps(record, indent=2) + "\n")


def locate(config: Config, composed: Composed) -> RunFolder:
    """The folder that this configuration has: outputs/<model>-<data>/<what differs from that pair's own settings>-<hash>.

    The same configuration has the same folder, however it was typed.
    """
    mine, path = computed(config), config.data.path if config.data.name == "folder" else None
    shown = flat(mine)
    if config.init_from is not None:
        shown["init_from"] = Path(config.init_from).expanduser().resolve().name[-60:]
    digest = hashlib.sha256(json.dumps(mine, sort_keys=True).encode()).hexdigest()[:8]
    name = f"{composed.choices['model']}-{_typable(mine['data']['name'])}"
    own = _own_settings(composed.choices["model"], composed.choices["data"], path, composed.config_dir, tuple(config.runtime.trusted_modules))
    return RunFolder(Path(config.outputs) / name / f"{_difference(shown, own)}-{digest}")


@functools.cache
def _own_settings(model: str, data: str, path: str | None, config_dir: str | None, trusted: tuple[str, ...]) -> dict[str, Any]:
    """What a model and a data set are computed with if nothing else is said."""
    pair = [f"model={model}", f"data={data}", f"runtime.trusted_modules=[{','.join(trusted)}]"]
    return flat(computed(training_config(compose([*pair, *([f"data.path={_quoted(path)}"] if path else [])], config_dir=config_dir))))


def with_content(config: Config) -> Config:
    """The configuration, with the digest of what lies at init_from unless it has one.    Raises ValueError, one line, if nothing of use lies there."""
    if config.init_from is None or config.init_weights is not None:
        return config
    return config.model_copy(update={"init_weights": diffusers_folder.find(config.init_from, "init_from").digest()})


def computed(config: Config) -> dict[str, Any]:
    """The half of a configuration that decides the numbers of a run (for data=folder with the folder's own name, for init_from its content)."""
    half = without(config.model_dump(mode="json"), NOT_COMPUTED)
    half["init_from"] = with_content(config).init_weights
    if config.init_from is None:
        del half["init_from"]
    del half["training"]["steps" if config.training.steps is None else "epochs"]  # the unit not used
    if config.data.name == "folder" and config.data.path:
        half["data"]["name"] = Path(config.data.path).expanduser().resolve().name
    return half


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted keys."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves.update(flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return leaves


def _difference(mine: dict[str, Any], recipe: dict[str, Any], longest: int = 120) -> str:
    parts = []
    for key, value in mine.items():
        if key not in recipe or recipe[key] != value:
            short = str(value).rpartition(".")[2] if key.endswith("._target_") else value
            parts.append(_typable(f"{key.removesuffix('._target_')}-{'x'.join(map(str, short)) if isinstance(short, list) else short}"))
    while parts and len("_".join(parts)) > longest:  # the hash still tells such runs apart
        parts.pop()
    return "_".join(parts) or "recipe"


def _quoted(text: str) -> str:
    """Text as Hydra's command line takes it whatever is in it: backslashes count only before a quote or at the end."""
    return "'" + re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), text, count=0) + "'"


def _typable(text: str) -> str:
    """Text that Hydra's command line takes as it is."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", text).strip("-") or "unnamed"


def without(tree: Mapping[str, Any], left_out: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings less those that are True in left_out."""
    kept = {}
    for key, value in tree.items():
        if left_out.get(key) is True:
            continue
        kept[key] = without(value, left_out.get(key, {})) if isinstance(value, Mapping) else value
    return kept


def _provenance() -> dict[str, Any]:
    packages = ("accelerate", "hydra-core", "omegaconf", "datasets", "numpy", "pillow", "safetensors")
    versions = {"python": platform.python_version(), "torch": torch.__version__, **{name: metadata.version(name) for name in packages}}
    return {"git": _git(), "versions": versions, "platform": platform.platform()}


def _git() -> dict[str, Any] | None:
    """Commit of the code that runs, and whether it was changed since; None where it is no checkout."""

    def ask(*words: str) -> str:
        folder = Path(__file__).resolve().parent
        return subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return {"commit": ask("rev-parse", "HEAD"), "dirty": bool(ask("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
