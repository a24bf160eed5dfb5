"""Upgrades the settings in run folders of earlier versions to the current format."""

import functools
from collections.abc import Mapping
from typing import Any

from ddpm.config.compose import compose
from ddpm.config.schema import Config, EvaluationSettings, Runtime, plain_config
from ddpm.config.validation import Section, own_arguments, public_names
from ddpm.runs.identity import ADDED

# 1: commit b7d7171 and later, without a number. 2: identity and history in run.json, public names.
FORMAT = 2
# Changes when an unchanged configuration computes something else. Each start in run.json records
# it, except those of 1. Since 2, dropout masks depend on the image's place in the global batch.
COMPUTATION = DROPOUT_BY_PLACE = 2
MOVED = {  # old module -> the package that exports its names now
    "ddpm.models.unet.": "ddpm.models.",
    "ddpm.models.unet_readme.": "ddpm.models.",
    "ddpm.diffusion.process.": "ddpm.diffusion.",
    "ddpm.schedules.": "ddpm.diffusion.schedules.",
    "ddpm.samplers.": "ddpm.diffusion.samplers.",
    "ddpm.lr_schedules.": "ddpm.train.lr_schedules.",
}
CARRIED_OUT: dict[str, type[Section]] = {"runtime": Runtime, "evaluation": EvaluationSettings}


def upgraded(plain: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values of a run's config.yaml as the current version would have written them.

    In the sections of CARRIED_OUT, missing settings get today's defaults and removed settings are
    dropped. Settings that decide numbers stay as they are, under today's names.

    Args:
        plain: The content of config.yaml.
        record: The content of run.json.

    Raises:
        ValueError: If the format is newer than this version, or run.json lacks the pictures'
            fingerprint.
    """
    plain = dict(plain)
    number = plain.pop("format", 1)
    if not isinstance(number, int) or number > FORMAT:
        raise ValueError(f"format {number} is newer than this version reads (up to {FORMAT})")
    if number == 1:
        plain = _of_first_format(plain, record)
    if any(
        (plain.get(group) or {}).keys() != kind.model_fields.keys()
        for group, kind in CARRIED_OUT.items()
    ):
        today = _today()
        for group, kind in CARRIED_OUT.items():
            given = dict(plain.get(group) or {})
            if "compile" in given:  # the old name of runtime.tune
                given.setdefault(
                    "tune", "compiled" if given["compile"] is True else given["compile"]
                )
            plain[group] = {**today[group], **given}
            plain[group] = {key: plain[group][key] for key in kind.model_fields}
    return {key: value for key, value in plain.items() if key in Config.model_fields}


@functools.cache
def _today() -> dict[str, Any]:
    """Returns the default configuration, cached since composing is slow; do not modify it."""
    return plain_config(compose([]))


def _of_first_format(plain: dict[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    """Updates moved names, adds keys that are new since, and renames the default precision."""
    plain = _renamed(plain)
    for section in ("data", "training"):
        came = {
            key.partition(".")[2]: value
            for key, value in ADDED.items()
            if key.startswith(f"{section}.")
        }
        plain[section] = {**came, **(plain.get(section) or {})}
    if plain["training"].get("precision") == "fp32":  # which left products to torch's defaults
        plain["training"]["precision"] = "tf32"
    if plain["data"].get("name") == "folder":
        plain["pictures"] = (record.get("data") or {}).get("fingerprint")
        if plain["pictures"] is None:
            raise ValueError("run.json does not record the run's pictures (data.fingerprint)")
    plain["sampler"] = _known_arguments(plain.get("sampler") or {})
    if "_target_" not in plain["sampler"]:
        plain["sampler"] = _today()["sampler"]
    return {"resume": None, "init_from": None, "init_weights": None, "recipe": None, **plain}


def _renamed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _renamed(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_renamed(inner) for inner in value]
    for old, new in MOVED.items():
        if isinstance(value, str) and value.startswith(old):
            return new + value.removeprefix(old)
    return value


def _known_arguments(node: Mapping[str, Any]) -> dict[str, Any]:
    """Drops the arguments that a node's target no longer has."""
    target = node.get("_target_")
    known = own_arguments(target) if target in public_names() else node
    return {
        key: _known_arguments(value) if isinstance(value, Mapping) else value
        for key, value in node.items()
        if key in known or str(key).startswith("_")
    }
