"""python -m ddpm.export run=DIR to=DIR: write a trained network as a folder that diffusers loads."""

from ddpm.config.cli import command
from ddpm.config.compose import Composed
from ddpm.export.run import ExportConfig, carry_out


def task(composed: Composed) -> None:
    carry_out(ExportConfig.of(composed))


main = command(
    "export",
    task,
    "Write a trained network as a folder that diffusers' DDPMPipeline loads.",
    [
        "python -m ddpm.export run=DIR to=exported",
        "python -m ddpm.export run=DIR to=exported weights=raw",
        "python -m ddpm.export run=DIR to=exported step=5000",
    ],
)

if __name__ == "__main__":
    main()
