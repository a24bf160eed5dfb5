"""python -m ddpm.sample run=DIR: draw images from a trained run: a grid, and one PNG an image."""

from ddpm.cli import Composed, command


def task(composed: Composed) -> None:
    from ddpm.sampling_run import SampleConfig, carry_out

    carry_out(SampleConfig.of(composed))


main = command("sample", task)

if __name__ == "__main__":
    main()
