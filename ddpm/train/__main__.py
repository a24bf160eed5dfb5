"""python -m ddpm.train: train a run, resume it where it stopped, or report it complete."""

from ddpm.config.cli import command, lazily

main = command(
    "train",
    lazily("ddpm.train.run.run"),
    "Train a denoising diffusion model. Run the same command again to resume.",
    [
        "python -m ddpm.train model=unet128 data=butterflies",
        "python -m ddpm.train -m optimizer.lr=1e-4,2e-4,4e-4",
        "python -m ddpm.train data=folder data.path=~/pictures model=small32 training.steps=5000",
    ],
    config_name="config",
    facts=lazily("ddpm.train.run.facts"),
    check=lazily("ddpm.train.which.check_job"),
    heeds=True,
    scored=lazily("ddpm.train.run.score"),
)

if __name__ == "__main__":
    main()
