"""python -m ddpm.sample: draw images from a trained run, or a folder of weights."""

from ddpm.config.cli import command, lazily

main = command(
    "sample",
    lazily("ddpm.sample.run.run"),
    "Draw images from a trained run: a grid, and one PNG per image.",
    [
        "python -m ddpm.sample run=outputs/quickstart-digits/recipe-ec05d29c",
        "python -m ddpm.sample run=DIR sampler=ddim sampler.num_steps=50 num_samples=16",
        "python -m ddpm.sample from=google/ddpm-cifar10-32",
    ],
    heeds=True,
)

if __name__ == "__main__":
    main()
