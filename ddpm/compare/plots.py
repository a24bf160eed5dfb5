"""Loss curves of several runs in one picture."""

from collections.abc import Sequence
from pathlib import Path

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
