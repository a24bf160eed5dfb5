"""Curves of several runs in one picture: losses, and figures over a sampler's settings."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ddpm.compare.curves import Curve, OverSeeds, how
from ddpm.compare.tables import differences, label, metric_columns, protocol_of
from ddpm.runs.reader import Compared
from ddpm.runs.results import loss_curve, window_means
from ddpm.system.files import whole


def plot(path: Path, compared: Sequence[Compared]) -> None:
    """Draws every run's training loss over its steps, on a log axis.

    The curves are averaged over a twentieth of a run's steps. Losses of other objectives have a
    panel of their own.

    Args:
        path: Of the PNG.
        compared: The runs.

    Raises:
        ValueError: If matplotlib is missing or no run has reported a loss.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("plot=true draws with matplotlib: pip install -e '.[plots]'") from error
    columns = [
        (name, protocol)
        for name, protocol in metric_columns(compared).items()
        if protocol[0] == "loss"
    ]
    if not columns:
        raise ValueError("plot=true: none of these runs has reported a loss yet")
    labels = [label(settings) for settings in differences(compared)]
    figure = Figure(figsize=(8, 4.5 * len(columns)), layout="constrained")
    panels = figure.subplots(len(columns), squeeze=False)[:, 0]
    for axes, (name, protocol) in zip(panels, columns, strict=True):
        for index, one in enumerate(compared):
            if any(protocol_of(found) == protocol for found in one.results):
                records = loss_curve(one.run.path)
                colour = f"C{index % 10}"
                axes.plot(
                    *zip(*records, strict=True),
                    color=colour,
                    alpha=0.2,
                    linewidth=0.8,
                    marker="." if len(records) == 1 else None,
                )
                smooth = window_means(records, share=0.05)
                axes.plot(
                    *zip(*smooth, strict=True),
                    color=colour,
                    label=labels[index],
                    linestyle=("-", "--", ":")[index // 10 % 3],
                )
        axes.set(xlabel="step (optimizer updates)", ylabel=name, yscale="log")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as scratch:
        figure.savefig(scratch, dpi=120, format="png")


def draw_steps(path: Path, curves: Sequence[Curve], over_seeds: OverSeeds) -> None:
    """Draws distances over sampler steps, a panel for each metric and protocol.

    Args:
        path: Of the PNG.
        curves: One or more.
        over_seeds: What their values are of.
    """

    def draw(axes: Any, curve: Curve, style: dict[str, Any]) -> None:
        values = [point.values[0] for point in curve.points]
        axes.errorbar(
            [point.at for point in curve.points],
            [one.value for one in values],
            yerr=[one.deviation or 0 for one in values],
            capsize=3,
            **style,
        )
        axes.set(xlabel="sampler steps", ylabel=curve.panel, xscale="log")
        steps = sorted({point.at for other in curves for point in other.points})
        axes.set_xticks(steps, [f"{step:g}" for step in steps])
        axes.minorticks_off()

    _draw(path, curves, over_seeds, draw)


def draw_scales(path: Path, curves: Sequence[Curve]) -> None:
    """Draws precision against recall, each point with its guidance scale.

    Args:
        path: Of the PNG.
        curves: One or more.
    """

    def draw(axes: Any, curve: Curve, style: dict[str, Any]) -> None:
        precision, recall = (
            [point.values[which].value for point in curve.points] for which in (0, 1)
        )
        axes.plot(recall, precision, **style)
        for point, x, y in zip(curve.points, recall, precision, strict=True):
            place = {"textcoords": "offset points", "xytext": (5, 4), "fontsize": "x-small"}
            axes.annotate(f"{point.at:g}", (x, y), color=style["color"], **place)
        axes.set(xlabel="recall", ylabel="precision", title=f"{curve.panel}, by guidance scale")

    _draw(path, curves, "mean", draw)


def _draw(
    path: Path,
    curves: Sequence[Curve],
    over_seeds: OverSeeds,
    draw: Callable[[Any, Curve, dict[str, Any]], None],
) -> None:
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys(curve.panel for curve in curves))
    figure = Figure(figsize=(11, 4.5 * len(panels)), layout="constrained")
    for axes, panel in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        for index, curve in enumerate(curve for curve in curves if curve.panel == panel):
            said = [] if curve.label == "-" else [curve.label]
            style = {
                "color": f"C{index % 10}",
                "linestyle": ("-", "--", ":")[index // 10 % 3],
                "marker": "o",
                "markersize": 4,
                "label": ", ".join([*said, how(curve, over_seeds)]),
            }
            draw(axes, curve, style)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as scratch:
        figure.savefig(scratch, dpi=120, format="png")
