"""python -m ddpm.compare: runs side by side."""

from ddpm.config.cli import command, lazily

main = command(
    "compare",
    lazily("ddpm.compare.run.run"),
    (
        "Compare runs: what differs between them and what they came to. With no runs= it lists "
        "all there are, newest first."
    ),
    [
        "python -m ddpm.compare",
        "python -m ddpm.compare runs='outputs/quickstart-digits/optimizer.lr*' plot=true grid=true",
        "python -m ddpm.compare runs='outputs/quickstart-digits/*' report=sweep.html",
        "python -m ddpm.compare runs=[DIR,DIR] to=tables sampler=ancestral",
    ],
)

if __name__ == "__main__":
    main()
