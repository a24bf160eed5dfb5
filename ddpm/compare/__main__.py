"""python -m ddpm.compare: compare runs."""

from ddpm.config.cli import command, lazily

main = command(
    "compare",
    lazily("ddpm.compare.run.run"),
    (
        "Compare runs: their settings and results. Without runs= it lists all runs, newest "
        "first.\n\n"
        "METRIC is loss, a figure such as eval/fid, or (except for best= and plot_of=) a setting "
        "such as lr. A figure means its final value,\nor its best with :best. Add words of the "
        "column's name with colons to choose a protocol: eval/fid@50k:train:ddim50:ema.\nFigures "
        "of different protocols are never ranked together."
    ),
    [
        "python -m ddpm.compare",
        "python -m ddpm.compare runs='outputs/quickstart-digits/optimizer.lr*' plot=true grid=true",
        "python -m ddpm.compare runs='outputs/quickstart-digits/*' report=sweep.html",
        "python -m ddpm.compare runs=[DIR,DIR] to=tables sampler=ancestral",
        "python -m ddpm.compare order_by=eval/fid:ddim50 top=10",
        "python -m ddpm.sample run=$(python -m ddpm.compare best=loss)",
        "python -m ddpm.compare runs=DIR plot=true plot_of=eval/fid plot_over=hours colour_by=lr",
    ],
    recipes=False,
)

if __name__ == "__main__":
    main()
