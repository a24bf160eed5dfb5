"""python -m ddpm.benchmark: how fast this machine trains and samples.

It also reports how close that is to the machine's peak.
"""

from ddpm.config.cli import command, lazily

main = command(
    "benchmark",
    lazily("ddpm.benchmark.run.run"),
    (
        "Time a run's training step and sampler step: images/s, share of the machine's peak in "
        "matrix products, memory, waits."
    ),
    [
        "python -m ddpm.benchmark",
        (
            "python -m ddpm.benchmark model=unet32 data=cifar10 training.batch_size=16 "
            "sample_batch=64 to=benchmark.json"
        ),
        (
            "python -m ddpm.benchmark model=unet128 data=butterflies training.precision=bf16 "
            "runtime.device=cuda runtime.tune=compiled"
        ),
    ],
)

if __name__ == "__main__":
    main()
