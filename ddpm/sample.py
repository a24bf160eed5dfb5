"""python -m ddpm.sample run=DIR: draw images from a trained run: a grid, and one PNG an image."""

from ddpm.cli import Composed, command


def task(composed: Composed) -> None:
    from ddpm.sampling_run import SampleConfig, carry_out

    carry_out(SampleConfig.of(composed))


main = command(
    "sample",
    task,
    "Draw images from a trained run: a grid, and one PNG an image.",
    [
        "python -m ddpm.sample run=outputs/quickstart-digits/recipe-23bb77a2",
        "python -m ddpm.sample run=DIR sampler=ddim sampler.num_steps=50 num_samples=16",
        "python -m ddpm.sample from=google/ddpm-cifar10-32",
    ],
)

if __name__ == "__main__":
    main()
