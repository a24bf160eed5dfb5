"""python -m ddpm.compare: runs side by side."""

from ddpm.config.cli import command, lazily

main = command(
    "compare",
    lazily("ddpm.compare.run.run"),
    (
        "Compare runs: what differs between them and what they came to. With no runs= it lists "
        "all there are, newest first.\n\n"
        "METRIC is loss, a figure as eval/fid, or (but for best= and plot_of=) a setting as lr. Of "
        "a figure it is the final value,\nwith :best the best one. Words of its column's name, "
        "apart by colons, choose a protocol: eval/fid@50k:train:ddim50:ema.\nFigures of several "
        "protocols are never ordered together."
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
