"""Untrained runs: the files of a trained one, with other settings and figures."""

import json
from dataclasses import replace

from ddpm.compare.tables import Result
from ddpm.runs.folder import RunFolder

PROTOCOL = {
    "count": 1000,
    "split": "train",
    "extractor": "efficientnet_lite0",
    "sampler": "ddim50",
    "weights": "ema",
    "data": "abc",
    "seed": 0,
}


def made(template, folder, status="complete", losses=(), costs=None, figures=(), **settings):
    """Returns a run like `template`, in the form that `reader.read` returns.

    Args:
        template: A run from `reader.read`, which lends the protocol of its loss.
        folder: The new run's folder, which gets a metrics.jsonl and a costs.jsonl.
        status: The new run's status.
        losses: (step, loss) of each report.
        costs: Seconds at each of these steps; None for a run from before costs were recorded.
        figures: (metric, protocol, value) or (metric, protocol, {step: value}).
        settings: Changed settings by the last word of their key: lr, batch_size, seed, name.
    """
    folder.mkdir(parents=True)
    lines = [json.dumps({"step": step, "train/loss": loss}) for step, loss in losses]
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    if costs is not None:
        lines = [
            json.dumps({"step": step, "images": 8 * step, "flops": 1e9 * step, "seconds": seconds, "device_seconds": 2 * seconds, "seconds_in_steps": seconds})
            for (step, _), seconds in zip(losses, costs, strict=True)
        ]  # fmt: skip
        (folder / "costs.jsonl").write_text("".join(f"{line}\n" for line in lines))
    keys = {key.rpartition(".")[2]: key for key in template.settings}
    changed = {keys[word]: value for word, value in settings.items()}
    results = [replace(template.results[0], final=(losses[-1][1], 6))] if losses else []
    for metric, protocol, values in figures:
        by_step = sorted((values if isinstance(values, dict) else {6: values}).items())
        final = by_step[-1][::-1]
        results.append(Result(metric, protocol, final, final, measured=tuple(by_step)))
    return replace(
        template,
        run=RunFolder(folder),
        status=status,
        identity={**template.identity, **changed, "seed": settings.get("seed", 0)},
        settings={**template.settings, **changed},
        results=results,
        record={**template.record, "status": status, "step": 6},
    )
