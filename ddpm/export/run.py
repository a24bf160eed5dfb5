"""python -m ddpm.export: write a run's network as a folder that diffusers loads."""

from pathlib import Path
from typing import Annotated, Literal

from omegaconf import OmegaConf
from pydantic import Field

from ddpm.config.compose import Composed
from ddpm.config.schema import plain_config
from ddpm.config.validation import Section, Text, validate
from ddpm.export.card import model_card
from ddpm.runs.folder import RunFolder
from ddpm.sample.subject import of_run
from ddpm.system.text import say
from ddpm.weights import folders


class Settings(Section):
    """What to write, and where. See conf/export.yaml for each key."""

    run: Text
    to: Text
    step: Annotated[int, Field(ge=1)] | None
    weights: Literal["ema", "raw"]
    license: Text | None
    outputs: Text
    trusted_modules: list[str]


def run(composed: Composed) -> Path:
    """Writes the folder and prints its path.

    Raises:
        ValueError: If there is no such run or checkpoint, or diffusers cannot express the network.
    """
    for key, wanted in (("run", "a folder that ddpm.train made"), ("to", "the folder to write")):
        if OmegaConf.is_missing(composed.cfg, key):
            raise ValueError(f"{key} is missing: give {key}=DIR, {wanted}")
    settings = validate(Settings, plain_config(composed))
    trained = of_run(
        RunFolder(Path(settings.run)), settings.step, settings.weights, settings.trusted_modules
    )
    subject, folder = trained.subject, Path(settings.to).expanduser()
    card = model_card(trained, settings.license)
    folders.write(
        folder, subject.model, subject.weights(), subject.diffusion, subject.classes, card
    )
    if subject.classes is not None:
        say(
            "the network needs classes, but DDPMPipeline passes none: call its unet with "
            "class_labels=, the indices into classes.json"
        )
    say(f"exported {folder}")
    return folder
