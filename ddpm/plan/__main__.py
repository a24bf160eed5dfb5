"""python -m ddpm.plan: what a run needs, before anything is downloaded or trained."""

from ddpm.config.cli import command, lazily

main = command(
    "plan",
    lazily("ddpm.plan.run.run"),
    (
        "Print what a run needs and how long it takes, before anything is downloaded or trained, "
        "and check what its recipe expects."
    ),
    [
        "python -m ddpm.plan experiment=cifar10",
        "python -m ddpm.plan experiment=celebahq256 runtime.device=cuda runtime.device_batch=16",
        "python -m ddpm.plan experiment=cifar10 'devices=[1,8,64]' bandwidth=50",
    ],
)

if __name__ == "__main__":
    main()
