"""python -m ddpm.evaluate: measure a trained network, each figure with its protocol."""

from ddpm.config.cli import command, lazily

main = command(
    "evaluate",
    lazily("ddpm.evaluate.run.run"),
    (
        "Measure a trained network: distances, bits/dim, losses, nearest training pictures. Each "
        "figure is recorded with its protocol."
    ),
    [
        "python -m ddpm.evaluate run=outputs/quickstart-digits/recipe-ec05d29c",
        (
            "python -m ddpm.evaluate run=DIR evaluation=paper "
            "evaluation.weights_path=pt_inception-2015-12-05-6726825d.pth"
        ),
        "python -m ddpm.evaluate -m run=DIR sampler=ddim sampler.num_steps=10,50,250 seed=0,1,2",
    ],
    heeds=True,
)

if __name__ == "__main__":
    main()
