"""python -m ddpm.train: train a run, carry it on where it stopped, or say that it is complete."""

from ddpm.cli import Composed, command


def task(composed: Composed) -> None:
    from ddpm import build
    from ddpm.config import training_config
    from ddpm.resuming import resumed
    from ddpm.run_folder import locate
    from ddpm.training_run import carry_out

    if composed.cfg.resume is not None:
        config, run, changes = resumed(composed)
    else:
        config, changes = training_config(composed), None
        run = locate(config, composed)
    build.check(config)
    carry_out(config, run, composed, changes)


main = command(
    "config",
    task,
    "Train a denoising diffusion model; typed again, carry the same run on.",
    [
        "python -m ddpm.train model=unet128 data=butterflies",
        "python -m ddpm.train -m optimizer.lr=1e-4,2e-4,4e-4",
        "python -m ddpm.train data=folder data.path=~/pictures model=unet64 training.steps=20000",
    ],
)

if __name__ == "__main__":
    main()
