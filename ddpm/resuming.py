"""ddpm.train resume=DIR: carry a run on in its own folder with some settings changed, and keep a record of what changed."""

from pathlib import Path
from typing import Any, cast

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ddpm.cli import Composed
from ddpm.config import Config, settled
from ddpm.run_folder import RunFolder, computed, flat


def resumed(composed: Composed) -> tuple[Config, RunFolder, dict[str, list[Any]]]:
    """The run at `resume` with the values of the command line: (configuration, folder, what is computed otherwise than before: key -> [before, now]).

    Raises ValueError, one line, if there is no such run, or for a group on the command line, which would make it another run.
    """
    path = Path(str(composed.cfg.resume)).expanduser()
    given = [override for override in OverridesParser.create().parse_overrides(composed.overrides) if override.key_or_group != "resume"]
    for override in given:
        if override.key_or_group in composed.choices or override.is_delete():
            raise ValueError(f"{override.input_line}: resume= changes single values; a new run can start from its weights: init_from={path}")
    run = RunFolder(path)
    before = run.config(list(composed.cfg.runtime.trusted_modules))
    plain = OmegaConf.create(before.model_dump(mode="json"))
    for override in given:
        try:
            OmegaConf.update(plain, override.key_or_group, override.value(), force_add=override.is_add() or override.is_force_add())
        except OmegaConfBaseException as error:
            raise ValueError(f"{override.input_line}: {str(error).splitlines()[0]}") from error
    config = settled(cast(dict[str, Any], OmegaConf.to_container(plain)), composed.overrides)
    old, new = flat(computed(before)), flat(computed(config))
    return config, run, {key: [old.get(key), new.get(key)] for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)}
