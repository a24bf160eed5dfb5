"""python -m ddpm.export: write a trained network as a folder that diffusers loads."""

from ddpm.config.cli import command, lazily

main = command(
    "export",
    lazily("ddpm.export.run.run"),
    "Write a trained network as a folder that diffusers' DDPMPipeline loads.",
    [
        "python -m ddpm.export run=DIR to=exported",
        "python -m ddpm.export run=DIR to=exported weights=raw",
        "python -m ddpm.export run=DIR to=exported step=5000",
    ],
)

if __name__ == "__main__":
    main()
