"""Reads many runs in several processes, and caches those that have not changed.

The cache file has one line per run: the folder, the times and sizes of the files that were read,
and their content. It is written atomically, and ignored if it is damaged or another version wrote
it.
"""

import hashlib
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from ddpm.config.compose import CONF, PACKAGE
from ddpm.config.validation import public_names
from ddpm.runs.folder import RunFolder
from ddpm.runs.reader import Compared, read
from ddpm.runs.results import Result
from ddpm.system.files import write_bytes

FEW = 50  # runs: below this, neither a cache nor more processes pay off
SETTLED = 2 * 10**9  # nanoseconds: a file changed more recently may change again unnoticed
FILES = (
    *("run.json", "config.yaml", ".hydra/choices.yaml"),
    *("metrics.jsonl", "costs.jsonl", "evaluation.json", "checkpoints"),
)


@dataclass
class _Told:
    """A Compared without its run folder."""

    identity: dict[str, Any]
    settings: dict[str, Any]
    choices: dict[str, str]
    record: dict[str, Any]
    results: list[Result]
    status: str
    weights: str | None
    damaged: list[int]


_TOLD = TypeAdapter(_Told)


def read_many(runs: Sequence[RunFolder], cache: Path) -> list[Compared]:
    """Reads each run as `read` does.

    Args:
        runs: The run folders.
        cache: The folder for the cache file, used if there are many runs. It need not be writable.
    """
    if len(runs) < FEW:
        return [read(run) for run in runs]
    file, now = cache / "compared.jsonl", time.time_ns()
    version = _version()
    known = _load(file, version)
    places = [str(run.path.absolute()) for run in runs]
    states = dict(zip(places, map(_state, places), strict=True))
    told: dict[str, bytes] = {
        place: known[place][1]
        for place, (state, _) in states.items()
        if place in known and known[place][0] == state
    }
    new = [place for place in states if place not in told]
    told.update(zip(new, _read_all(new), strict=True))
    kept = {
        place: (state, told[place])
        for place, (state, newest) in states.items()
        if newest < now - SETTLED
    }
    if kept.keys() & set(new):
        others = {
            place: entry
            for place, entry in known.items()
            if place not in states and os.path.isdir(place)  # noqa: PTH112
        }
        _save(file, version, {**others, **kept})
    return [_compared(run, told[place]) for run, place in zip(runs, places, strict=True)]


def _read_all(places: Sequence[str]) -> list[bytes]:
    workers = min(len(os.sched_getaffinity(0)), len(places) // FEW) if _FORKS else 1
    if workers < 2:
        return [_read_one(place) for place in places]
    public_names()  # import before the fork what every process needs
    with ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("fork"), initializer=_deaf
    ) as pool:
        return list(pool.map(_read_one, places, chunksize=FEW // 2))


_FORKS = sys.platform == "linux"  # elsewhere each process would import torch anew


def _deaf() -> None:
    """Ignores Ctrl-C, which a terminal sends to workers too; the parent handles it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _read_one(place: str) -> bytes:
    """Reads a run, and returns it as one line of JSON."""
    one = read(RunFolder(Path(place)))
    content = {field.name: getattr(one, field.name) for field in fields(_Told)}
    return json.dumps(content, default=_as_table).encode()


def _as_table(result: Result) -> dict[str, Any]:
    return {field.name: getattr(result, field.name) for field in fields(result)}


def _compared(run: RunFolder, told: bytes) -> Compared:
    found = _TOLD.validate_json(told)
    if found.record.get("status") == "running":  # its process may have died since
        found.status = run.status_of(found.record)
    return Compared(run, **vars(found))


def _state(place: str) -> tuple[str, int]:
    """Returns times, sizes and permissions of a run's files as text, and the newest time.

    It works on strings: with thousands of runs, Paths take seconds.
    """
    names = list(FILES)
    try:
        there = os.listdir(f"{place}/checkpoints")  # noqa: PTH208
        names += sorted(f"checkpoints/{name}/meta.json" for name in there if name[:5] == "step_")
    except OSError:
        pass
    words, newest = [], 0
    for name in names:
        try:
            about = os.stat(f"{place}/{name}")  # noqa: PTH116
        except OSError:
            continue
        words.append(f"{name} {about.st_mtime_ns} {about.st_size} {about.st_mode}")
        newest = max(newest, about.st_mtime_ns)
    return json.dumps(words), newest


def _version() -> str:
    """Returns a digest of what else decides the result: the code, and the options in conf/."""
    digest = hashlib.sha256(sys.version.encode())
    for root, pattern in ((PACKAGE, "**/*.py"), (CONF, "**/*.yaml")):
        for file in sorted(root.glob(pattern)):
            about = file.stat()
            digest.update(f"{file} {about.st_mtime_ns} {about.st_size}\n".encode())
    return digest.hexdigest()


def _load(file: Path, version: str) -> dict[str, tuple[str, bytes]]:
    """Returns state and content by folder; empty if the file is damaged or another version's."""
    try:
        head, _, body = file.read_bytes().partition(b"\n")
        if head.decode() != f"{version} {hashlib.sha256(body).hexdigest()}":
            return {}
        lines = [line.split(b"\t") for line in body.splitlines()]
        return {json.loads(place): (state.decode(), told) for place, state, told in lines}
    except (OSError, ValueError):
        return {}


def _save(file: Path, version: str, entries: dict[str, tuple[str, bytes]]) -> None:
    body = b"".join(
        b"%s\t%s\t%s\n" % (json.dumps(place).encode(), state.encode(), told)
        for place, (state, told) in entries.items()
    )
    head = f"{version} {hashlib.sha256(body).hexdigest()}\n".encode()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(file, head + body)
    except OSError:  # another user's outputs or a full disk: the next call is just as slow
        return
