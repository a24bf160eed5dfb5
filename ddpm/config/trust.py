"""What only the command line may set: whom to trust, and how Hydra is set up.

Files of options and recipes may come from other people, so they hold values only. Whatever Hydra
would call, import or hand to a shell must be typed.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, Node, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

from ddpm.config.rules import RUNS_FOLDER
from ddpm.system.text import say, shown

TRUST = ("runtime.trusted_modules", "trusted_modules")
PLAIN = (  # values that nothing calls; keep_runs_folder rejects those of RUNS_FOLDER
    *("hydra.sweeper.direction", "hydra.sweeper.n_trials"),
    *RUNS_FOLDER,
)
SECTIONS = {key.split(".")[1] for key in PLAIN}
HYDRAS = ("pkg://hydra.", "pkg://hydra_plugins.")
_typed: list[str] = []  # overrides of the last composed command line
_told: set[str] = set()  # keys already reported as taken from the environment


def is_shipped(place: str, provider: str, conf: Path) -> bool:
    """Whether a file of options ships with the project or Hydra, and is no recipe.

    Args:
        place: Its folder as Hydra names it, such as file:///conf or pkg://hydra.conf.
        provider: The provider of that folder, as Hydra names it.
        conf: The project's folder of options.
    """
    if place.startswith("structured://"):  # registered by code
        return not provider.startswith("experiments/")
    scheme, _, path = place.partition("://")
    return place.startswith(HYDRAS) or (scheme == "file" and Path(path).resolve() == conf)


def refuse_code(file: str, config: DictConfig) -> None:
    """Rejects a file that sets what only the command line may set.

    Args:
        file: The file's name, for messages.
        config: The file's content, at its place in the whole configuration.

    Raises:
        ValueError: If it does; the message says which key, and what to type.
    """
    plain: Any = OmegaConf.to_container(config, resolve=False)
    runtime = plain.get("runtime", {})
    if not isinstance(runtime, dict | type(None)):
        raise ValueError(f"{file} sets runtime={shown(runtime)}, which must be a table of keys")
    for key in TRUST:
        value = _at(plain, key)
        if value not in (None, []):
            raise ValueError(f"{file} sets {_is_typed(key, value)}")
    beyond = next(_beyond_values(plain["hydra"]), None) if "hydra" in plain else None
    if beyond is not None:
        raise ValueError(
            f"{file} sets {beyond}, which only the command line may set: type {beyond}=..., or the "
            "option that sets it, there"
        )


def check_trust(cfg: DictConfig) -> None:
    """Checks that all trusted modules of a composed configuration were typed.

    Raises:
        ValueError: If any came from elsewhere.
    """
    words: Any = OmegaConf.to_container(cfg.hydra.overrides.task, resolve=False)
    _typed[:] = words
    for key in TRUST:
        try:
            value = OmegaConf.select(cfg, key)
        except OmegaConfBaseException:
            continue  # plain_config reports it
        if value and not any(re.match(rf"\+*{re.escape(key)}=", word) for word in _typed):
            raise ValueError(f"a file sets {_is_typed(key, value)}")


def say_environment() -> None:
    """Makes commands report each key that a file, not the command line, takes from the environment.

    Such values go into folder names and records, which others may read.
    """

    def environment(*arguments: Any, _node_: Node) -> Any:
        key = str(_node_._get_full_key(None))
        if key.startswith("hydra."):  # Hydra's record of what was typed
            return oc.env(*arguments)
        typed = any(
            "oc.env" in word and f"{key}.".startswith(f"{word.lstrip('+').partition('=')[0]}.")
            for word in _typed
        )
        if not typed and key not in _told:
            _told.add(key)
            names = ", ".join(map(str, arguments[:1]))
            say(f"note: a file takes {key} from the environment, {names}", to_error=True)
        return oc.env(*arguments)

    OmegaConf.register_new_resolver("oc.env", environment, replace=True)


def _beyond_values(hydra: Any) -> Iterator[str]:
    """Yields the keys of a file's hydra section that are not plain values of a sweep."""
    if not isinstance(hydra, dict):
        yield "hydra"
        return
    for section, inner in hydra.items():
        if section not in SECTIONS or not isinstance(inner, dict):
            yield f"hydra.{shown(section)}"
            continue
        for key, value in inner.items():
            full = f"hydra.{section}.{shown(key)}"
            if full == "hydra.sweeper.params" and isinstance(value, dict):
                yield from (
                    f"{full}.{shown(name)}"
                    for name in value
                    if not re.fullmatch(r"\+{0,2}(?!hydra\b)[\w./]+", str(name))
                    or str(name).endswith("trusted_modules")
                )
            elif full not in PLAIN:
                yield full


def _is_typed(key: str, value: Any) -> str:
    """Returns the end of the message about trust that a file claims."""
    plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    words = plain if isinstance(plain, list) else [plain]
    listed = ",".join(word if isinstance(word, str) else json.dumps(word) for word in words)
    return (
        f"{key}=[{shown(listed)}], and only the command line may grant trust: type "
        f"'{key}=[{shown(listed)}]' there if you trust this code"
    )


def _at(plain: Any, key: str) -> Any:
    for name in key.split("."):
        plain = plain.get(name) if isinstance(plain, dict) else None
    return plain
