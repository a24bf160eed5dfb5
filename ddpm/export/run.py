"""python -m ddpm.export run=DIR to=DIR: write a trained network as a folder that diffusers loads."""

from pathlib import Path
from typing import Annotated, Literal

from omegaconf import OmegaConf
from pydantic import Field

from ddpm.config.compose import Composed
from ddpm.config.schema import plain_config
from ddpm.config.validation import Section, Text, validated


class ExportConfig(Section):
    """What to write, and where. See conf/export.yaml for each key."""

    run: Text
    to: Text
    step: Annotated[int, Field(ge=1)] | None
    weights: Literal["ema", "raw"]
    outputs: Text
    trusted_modules: list[str]

    @classmethod
    def of(cls, composed: Composed) -> "ExportConfig":
        """The settings of one call, checked.    Raises ValueError, one line."""
        for key, wanted in (("run", "a folder that ddpm.train made"), ("to", "the folder to write")):
            if OmegaConf.is_missing(composed.cfg, key):
                raise ValueError(f"{key} is missing: give {key}=DIR, {wanted}")
        return validated(cls, plain_config(composed))


def carry_out(config: ExportConfig) -> None:
    """Write the folder, and print where it is.    Raises ValueError, one line, if there is no such run or checkpoint, or diffusers cannot express it."""
    from ddpm.config import build
    from ddpm.runs import checkpoint
    from ddpm.runs.folder import RunFolder
    from ddpm.weights import folders

    run = RunFolder(Path(config.run))
    trained = run.config(config.trusted_modules)
    found = checkpoint.find(run.checkpoints, config.step)
    diffusion, weights = build.diffusion(trained), found.weights(config.weights)
    built_with = {"out_channels": trained.data.channels * (2 if diffusion.learns_variance else 1)}
    if trained.training.conditional:
        built_with["num_classes"] = len(weights["class_embedding.weight"])
    folder = Path(config.to).expanduser()
    folders.write(folder, {**trained.model, **built_with}, weights, diffusion)
    if trained.training.conditional:
        print("the network has classes, and DDPMPipeline gives it none when called: use its unet with class_labels=", flush=True)
    print(f"exported {folder}", flush=True)
