"""Where the run of a configuration lies, and which runs beside it a user should know of."""

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
    """Returns the folder that this configuration has.

    A run is found by the hash of its identity among the folders below `outputs`, whatever they were
    renamed to; its whole identity in run.json must agree. A new one is called
    outputs/<model>-<data>/<what differs from that pair's own settings>-<hash>.

    Raises:
        ValueError: If another run has that folder, or several folders are this run.
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
            f"{own} is the run of another configuration (run.json, identity); move it away"
        )
    if record or not found:
        return RunFolder(own)
    if len(found) > 1:
        raise ValueError(
            f"{', '.join(str(one.path) for one in found)} are all this run: keep one below "
            f"{config.outputs}, or name it with resume="
        )
    return found[0]


def earlier(config: Config) -> RunFolder | None:
    """Returns the run of this configuration that an earlier version trained, if there is one."""
    mine = identity(config)
    for folder, record in _runs(config.outputs):
        if record.get("format", 1) >= FORMAT:
            continue
        try:
            theirs = identity_of(upgraded(folder.plain(), record))
        except (ValueError, KeyError, TypeError, AttributeError):  # not one that can be compared
            continue
        if theirs == mine:
            return folder
    return None


def with_other_pictures(config: Config) -> RunFolder | None:
    """Returns the run of the same settings on other pictures in the same place, if there is one.

    Where the pictures of `config` are not known, that is on any. One that is not complete is
    returned first.
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
    """The runs below outputs, one or two folders deep, with what run.json says.

    One that cannot be read is passed over: it must not keep others from starting.
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
