"""What makes a run that run.

The half of its configuration that is computed, and the folder's name that follows from it.
"""

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ddpm.config.compose import Composed, compose
from ddpm.config.schema import Config, training_config
from ddpm.runs.folder import RunFolder
from ddpm.system.files import short_hash

LONGEST = 120  # characters of a folder's name that say what differs
NOT_COMPUTED = {  # what never changes a result beyond rounding, and so is no part of the name
    "runtime": True,
    "sampler": True,
    "evaluation": True,
    "outputs": True,
    "resume": True,
    "recipe": True,
    "init_weights": True,  # stands where init_from does
    "data": {
        "path": True,
        "cache": True,
        "max_unreadable": True,
        "num_images": True,
        "source": {"path": True},
    },
}


def locate(config: Config, composed: Composed) -> RunFolder:
    """Returns the folder that this configuration has.

    It is outputs/<model>-<data>/<what differs from that pair's own settings>-<hash>. The same
    configuration has the same folder, however it was typed.
    """
    mine, path = identity(config), config.data.path if config.data.name == "folder" else None
    shown = flat(mine)
    if config.init_from is not None:
        shown["init_from"] = Path(config.init_from).expanduser().resolve().name[-60:]
    digest = short_hash(mine)
    name = f"{composed.choices['model']}-{_typable(mine['data']['name'])}"
    own = _own_settings(
        composed.choices["model"],
        composed.choices["data"],
        path,
        composed.config_dir,
        tuple(config.runtime.trusted_modules),
    )
    return RunFolder(Path(config.outputs) / name / f"{_difference(shown, own)}-{digest}")


@functools.cache
def _own_settings(
    model: str, data: str, path: str | None, config_dir: str | None, trusted: tuple[str, ...]
) -> dict[str, Any]:
    """What a model and a data set are computed with if nothing else is said."""
    pair = [f"model={model}", f"data={data}", f"runtime.trusted_modules=[{','.join(trusted)}]"]
    return flat(
        identity(
            training_config(
                compose(
                    [*pair, *([f"data.path={_quoted(path)}"] if path else [])],
                    config_dir=config_dir,
                )
            )
        )
    )


def identity(config: Config) -> dict[str, Any]:
    """Returns the half of a configuration that decides the numbers of a run.

    For data=folder it has the folder's own name, for init_from its content.
    """
    half = without(config.model_dump(mode="json"), NOT_COMPUTED)
    if config.init_from is None:
        del half["init_from"]
    else:
        assert config.init_weights is not None, "weights.folders.with_initial_weights comes first"
        half["init_from"] = config.init_weights
    # the unit not used
    del half["training"]["steps" if config.training.steps is None else "epochs"]
    if config.data.name == "folder" and config.data.path:
        half["data"]["name"] = Path(config.data.path).expanduser().resolve().name
    return half


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested settings as dotted keys."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves.update(
            flat(value, f"{prefix}{key}.")
            if isinstance(value, Mapping)
            else {f"{prefix}{key}": value}
        )
    return leaves


def hparams(run: RunFolder, config: Config, num_steps: int) -> dict[str, float | str]:
    """Returns what runs are told apart by, under the same keys and of the same types for all.

    TensorBoard cannot sort a column of text and numbers. So what may be null is text, as
    `grad_clip`: not under the key's own name, where runs of before have numbers.

    Returns:
        The options chosen, the numbers tuned most, and `differs`: all that is not the model's and
        data's own, in the words of the folder's name.
    """
    chosen = run.choices()
    options = {
        group: chosen.get(group, "None").replace("None", "none")
        for group in (
            "experiment",
            "model",
            "data",
            "schedule",
            "objective",
            "optimizer",
            "lr_schedule",
        )
    }
    half = flat(config.model_dump(mode="json"))
    numbers = {key: half[key] for key in ("optimizer.lr", "data.holdout", "data.flip", "seed")}
    elsewhere = ("training.steps", "training.epochs", "training.grad_clip")
    numbers |= {
        key: value
        for key, value in half.items()
        if key.startswith("training.") and key not in elsewhere
    }
    grad_clip = config.training.grad_clip
    name = run.path.name.rpartition("-")[0]
    return {
        **options,
        **numbers,
        "lr_schedule.warmup_steps": half.get("lr_schedule.warmup_steps") or 0,
        "training.steps": num_steps,
        "grad_clip": "none" if grad_clip is None else str(grad_clip),
        "resolution": str(config.data.resolution),
        "differs": name,
    }


def _difference(mine: dict[str, Any], recipe: dict[str, Any]) -> str:
    parts = []
    for key, value in mine.items():
        if key not in recipe or recipe[key] != value:
            short = str(value).rpartition(".")[2] if key.endswith("._target_") else value
            parts.append(
                _typable(
                    f"{key.removesuffix('._target_')}-"
                    f"{'x'.join(map(str, short)) if isinstance(short, list) else short}"
                )
            )
    while parts and len("_".join(parts)) > LONGEST:  # the hash still tells such runs apart
        parts.pop()
    return "_".join(parts) or "recipe"


def _quoted(text: str) -> str:
    """Any text for Hydra's command line: backslashes count only before a quote or at the end."""
    return (
        "'"
        + re.sub(
            r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), text, count=0
        )
        + "'"
    )


def _typable(text: str) -> str:
    """Text that Hydra's command line takes as it is."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", text).strip("-") or "unnamed"


def without(tree: Mapping[str, Any], left_out: Mapping[str, Any]) -> dict[str, Any]:
    """Returns nested settings less those that are True in left_out."""
    kept = {}
    for key, value in tree.items():
        if left_out.get(key) is True:
            continue
        kept[key] = without(value, left_out.get(key, {})) if isinstance(value, Mapping) else value
    return kept
