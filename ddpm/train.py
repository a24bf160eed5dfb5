"""python -m ddpm.train: train a run, carry it on where it stopped, or say that it is complete."""

from typing import TYPE_CHECKING, Any

from ddpm.cli import Composed, command

if TYPE_CHECKING:  # they bring torch, which --help does without
    from ddpm.config import Config
    from ddpm.run_folder import RunFolder


def task(composed: Composed) -> None:
    from ddpm import build
    from ddpm.training_run import carry_out

    config, run, changes = _meant(composed)
    build.check(config)
    carry_out(config, run, composed, changes)


def facts(composed: Composed) -> dict[str, str]:
    """What the table at the end of a sweep shows of a run."""
    from ddpm.comparison import read, summary

    return summary(read(_meant(composed)[1]))


def _meant(composed: Composed) -> "tuple[Config, RunFolder, dict[str, list[Any]] | None]":
    """The run of this command line: its configuration, its folder, and with resume= what is computed otherwise than before."""
    from ddpm.config import training_config
    from ddpm.resuming import resumed
    from ddpm.run_folder import locate

    if composed.cfg.resume is not None:
        return resumed(composed)
    config = training_config(composed)
    return config, locate(config, composed), None


main = command(
    "config",
    task,
    "Train a denoising diffusion model; typed again, carry the same run on.",
    [
        "python -m ddpm.train model=unet128 data=butterflies",
        "python -m ddpm.train -m optimizer.lr=1e-4,2e-4,4e-4",
        "python -m ddpm.train data=folder data.path=~/pictures model=small32 objective=v training.steps=5000",
    ],
    facts,
)

if __name__ == "__main__":
    main()
