"""python -m ddpm.sample run=DIR: draw images from a trained run: a grid, and one PNG an image."""

from ddpm.config.cli import command
from ddpm.config.compose import Composed


def task(composed: Composed) -> None:
    from ddpm.sample.run import SampleConfig, carry_out

    carry_out(SampleConfig.of(composed))


main = command(
    "sample",
    task,
    "Draw images from a trained run: a grid, and one PNG an image.",
    [
        "python -m ddpm.sample run=outputs/quickstart-digits/recipe-ba7ead0c",
        "python -m ddpm.sample run=DIR sampler=ddim sampler.num_steps=50 num_samples=16",
        "python -m ddpm.sample from=google/ddpm-cifar10-32",
    ],
)

if __name__ == "__main__":
    main()
