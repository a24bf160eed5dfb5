"""Finds the run of a configuration, and the related runs that a user should know about."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ddpm.config.schema import Config
from ddpm.runs.folder import RunFolder
from ddpm.runs.format import FORMAT, upgraded
from ddpm.runs.identity import identity, identity_of, without
from ddpm.runs.naming import name_of
from ddpm.runs.pictures import place_of
from ddpm.system.files import short_hash


def locate(config: Config) -> RunFolder:
    """Returns the folder of this configuration's run, which may not exist yet.

    It searches the folders below `outputs` for the hash of the run's identity, so the rest of a
    folder's name may change. The full identity in run.json must match. A new run is called
    outputs/<model>-<data>/<what differs from that pair's own settings>-<hash>.

    Raises:
        ValueError: If another run has that folder, or several folders hold this run.
    """
    mine = identity(config)
    digest = short_hash(mine)
    named = name_of(config, mine)
    own = Path(config.outputs) / named.with_name(f"{named.name}-{digest}")
    found = [
        folder
        for folder, record in _runs(config.outputs, f"*-{digest}")
        if record.get("identity") == mine
    ]
    record = RunFolder(own).record()
    if record.get("identity", mine) != mine:
        raise ValueError(
            f"{own} holds the run of another configuration (see identity in run.json): move it away"
        )
    if record or not found:
        return RunFolder(own)
    if len(found) > 1:
        raise ValueError(
            f"{', '.join(str(one.path) for one in found)} all hold this run: keep one below "
            f"{config.outputs}, or choose one with resume="
        )
    return found[0]


def earlier(config: Config) -> RunFolder | None:
    """Returns this configuration's run by an earlier version of the program, or None."""
    mine = identity(config)
    for folder, record in _runs(config.outputs):
        if record.get("format", 1) >= FORMAT:
            continue
        try:
            theirs = identity_of(upgraded(folder.plain(), record))
        except (ValueError, KeyError, TypeError, AttributeError):  # cannot be compared
            continue
        if theirs == mine:
            return folder
    return None


def with_other_pictures(config: Config) -> RunFolder | None:
    """Returns a run with the same settings and data.path but other pictures there, or None.

    If the pictures of `config` are unknown, any pictures count as other ones. Incomplete runs come
    first.
    """
    if config.data.path is None:
        return None
    mine, found = identity_of(config.model_dump(mode="json")), []
    for folder, record in _runs(config.outputs):
        theirs = record.get("identity")
        here = (record.get("data") or {}).get("path") == place_of(config.data.path)
        if theirs and here and theirs != mine and _but_pictures(theirs) == _but_pictures(mine):
            found.append(folder)
    return min(found, key=lambda one: one.status() == "complete", default=None)


def _but_pictures(one: Mapping[str, Any]) -> dict[str, Any]:
    return without(one, {"data": {"pictures": True}})


def _runs(outputs: str, name: str = "*") -> Iterator[tuple[RunFolder, dict[str, Any]]]:
    """Yields the runs one or two folders below outputs, with the content of run.json.

    Unreadable runs are skipped, since they must not keep others from starting.
    """
    for pattern in (f"{name}/run.json", f"*/{name}/run.json"):
        for file in sorted(Path(outputs).glob(pattern)):
            folder = RunFolder(file.parent)
            try:
                record = folder.record()
            except (OSError, ValueError):
                continue
            if isinstance(record, dict):
                yield folder, record
