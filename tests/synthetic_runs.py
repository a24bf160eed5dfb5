"""Folders of untrained runs, modeled on a trained one. Hundreds take one second."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ddpm.runs.folder import RunFolder
from ddpm.sample.images import grid, save_png


def write_run(
    template: RunFolder,
    folder: Path,
    changes: Mapping[str, Any],
    *,
    level: float = 1.0,
    figures: Mapping[int, float] | None = None,
    previews: Mapping[int, int] | None = None,
    costs: bool = False,
    record: Mapping[str, Any] | None = None,
    num_records: int = 40,
) -> Path:
    """Writes a run's folder.

    Args:
        template: A run that lends all settings but `changes`.
        folder: The new run's folder.
        changes: The new run's own settings, by dotted key.
        level: A factor on the loss.
        figures: FIDs of one protocol, by step.
        previews: The number of pictures per preview, by step.
        costs: Whether to write a costs.jsonl.
        record: The new run's own entries in run.json.
        num_records: The number of lines in metrics.jsonl, ten steps apart.
    """
    config = template.plain()
    for key, value in changes.items():
        *groups, last = key.split(".")
        section = config
        for group in groups:
            section = section[group]
        section[last] = value
    (folder / "samples").mkdir(parents=True)
    (folder / ".hydra").mkdir()
    (folder / "config.yaml").write_text(
        yaml.dump(config, Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper), sort_keys=False)
    )
    (folder / ".hydra" / "choices.yaml").write_text(json.dumps(template.choices()))
    last = 10 * num_records
    (folder / "run.json").write_text(
        json.dumps({**template.record(), "step": last, "num_steps": last, **(record or {})})
    )
    lines = []
    for step in range(10, last + 1, 10):
        loss = level * (0.05 + math.exp(-step / 80))
        quartiles = {f"train/loss_q{index}": loss / (1 + index) for index in range(4)}
        lines.append({"step": step, "train/loss": loss, **quartiles, "train/grad_norm": 3 * loss})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    protocol = {"count": 1000, "split": "train", "extractor": "inception", "sampler": "ddim50", "weights": "ema", "data": "abc", "seed": 0}  # fmt: skip
    entries = [
        {"id": f"fid:step{step}", "metric": "fid", "value": value, "protocol": {**protocol, "step": step}, "deviation": None, "floor": None, "network": "x"}
        for step, value in (figures or {}).items()
    ]  # fmt: skip
    (folder / "evaluation.json").write_text(json.dumps(entries))
    for step, count in (previews or {}).items():
        side = config["model"]["resolution"]
        noise = np.random.default_rng(step).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
        save_png(folder / "samples" / f"step_{step:08d}.png", grid(noise), {"drawn by": "a test"})
    if costs:
        (folder / "costs.jsonl").write_text(
            "".join(
                json.dumps({"step": step, "images": 32 * step, "flops": 1e9 * step, "seconds": 36.0 * step, "seconds_in_steps": 30.0 * step}) + "\n"
                for step in range(10, last + 1, 10)
            )
        )  # fmt: skip
    return folder
