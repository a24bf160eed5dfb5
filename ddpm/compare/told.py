"""Details of a run from its own files: configuration against its recipe, starts, data, warnings."""

import functools
import json
from collections.abc import Sequence
from typing import Any

import yaml
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from ddpm.config.compose import compose
from ddpm.config.schema import training_config
from ddpm.runs.folder import starts_of
from ddpm.runs.format import upgraded
from ddpm.runs.identity import flat
from ddpm.runs.reader import Compared

WARNINGS = 20  # last warning lines kept of a train.log
LOG_BYTES = 200_000  # bytes at the end of a train.log that are searched
Told = dict[str, Any]


def told_of(
    compared: Sequence[Compared], settings: Sequence[dict[str, str]]
) -> tuple[dict[str, str], list[Told]]:
    """Returns the details of runs, with the settings that all of them share listed once.

    Args:
        compared: The runs.
        settings: Each run's settings, as whole_configuration returns them.

    Returns:
        The settings, as text, that all readable runs share; and, for each run, its other settings,
        those that its recipe has otherwise, and its starts, data, warnings and error.
    """
    readable = [some for some in settings if some]
    common = (
        {
            key: value
            for key, value in readable[0].items()
            if all(some.get(key) == value for some in readable[1:])
        }
        if readable
        else {}
    )
    return common, [
        {
            "readable": bool(some),
            "config": {key: value for key, value in some.items() if common.get(key) != value},
            "recipe": _recipe_of(one, some),
            "starts": [_start(start) for start in starts_of(one.record)],
            "data": _data(one),
            "warnings": _warnings(one),
            "error": one.record.get("error"),
        }
        for one, some in zip(compared, settings, strict=True)
    ]


def whole_configuration(one: Compared) -> dict[str, str]:
    """Returns config.yaml as dotted keys and text; empty if it cannot be read."""
    if not one.settings:
        return {}
    return _as_text(upgraded(one.run.plain(), one.record))


def _as_text(plain: dict[str, Any]) -> dict[str, str]:
    return {
        key: value if isinstance(value, str) else json.dumps(value, default=str)
        for key, value in flat(plain).items()
    }


def _recipe_of(one: Compared, settings: dict[str, str]) -> dict[str, Any]:
    """Returns the recipe's name and its values that the run does not share (None: no such key)."""
    choices = one.choices
    named = choices.get("experiment") not in (None, "None", "null")
    overrides = tuple(
        f"{group}={choices[group]}"
        for group in (("experiment",) if named else ("model", "data"))
        if group in choices
    )
    own = _composed(overrides) if overrides and settings else None
    if own is None:
        return {"name": " ".join(overrides), "known": False, "differs": {}}
    differs = {
        key: own.get(key)
        for key in {**settings, **own}
        if settings.get(key) != own.get(key) and key not in ("format", "pictures")
    }
    return {"name": " ".join(overrides), "known": True, "differs": differs}


@functools.cache
def _composed(overrides: tuple[str, ...]) -> dict[str, str] | None:
    """Returns what a recipe composes to; None if it is not ours or needs more than its name."""
    try:
        return _as_text(training_config(compose(list(overrides))).model_dump(mode="json"))
    except (ValueError, HydraException, OmegaConfBaseException, yaml.YAMLError):
        return None


def _start(start: dict[str, Any]) -> dict[str, Any]:
    git, versions = start.get("git") or {}, start.get("versions") or {}
    commit = f"{git['commit'][:10]}{' (changed)' if git.get('dirty') else ''}" if git else None
    changed = "; ".join(
        f"{key}: {old} to {new}" for key, (old, new) in (start.get("changed") or {}).items()
    )
    return {
        "started": start.get("started"),
        "steps": f"{start.get('from_step')} to {start.get('to_step')}",
        "device": _words(start.get("device")),
        "command": " ".join(map(str, start.get("command") or [])),
        "commit": commit,
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "platform": start.get("platform"),
        "changed": changed or None,
    }


def _words(value: Any) -> str | None:
    if isinstance(value, dict):
        return ", ".join(f"{key} {inner}" for key, inner in value.items() if inner is not None)
    return None if value is None else str(value)


def _data(one: Compared) -> dict[str, str]:
    found = one.record.get("data")
    if not isinstance(found, dict):
        return {}
    return {key: str(_words(value))[:300] for key, value in found.items()}


def _warnings(one: Compared) -> list[str]:
    """Returns notes on damaged lines, and the last warnings and errors of train.log."""
    said = [f"metrics.jsonl, line {number}: damaged and left out" for number in one.damaged]
    file = one.run.path / "train.log"
    try:
        with file.open("rb") as opened:
            opened.seek(max(0, file.stat().st_size - LOG_BYTES))
            lines = opened.read().decode(errors="replace").splitlines()
    except OSError:
        return said
    logged = [line for line in lines if " WARNING " in line or " ERROR " in line]
    return said + [line[:500] for line in logged[-WARNINGS:]]
