"""python -m ddpm.train: train a run, carry it on where it stopped, or say that it is complete."""

from ddpm.config.cli import command
from ddpm.config.compose import Composed


def task(composed: Composed) -> None:
    from ddpm.config import build
    from ddpm.train.run import carry_out
    from ddpm.train.start import _meant

    config, run, changes = _meant(composed)
    build.check(config)
    carry_out(config, run, composed, changes)


def facts(composed: Composed) -> dict[str, str]:
    """What the table at the end of a sweep shows of a run."""
    from ddpm.runs.results import read, summary
    from ddpm.train.start import _meant

    return summary(read(_meant(composed)[1]))


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
