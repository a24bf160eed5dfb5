"""Reads what a run's training has cost so far: images, FLOPs, time."""

from pathlib import Path
from typing import Any

from ddpm.runs.contents import read_lines

KNOWN = ("images", "seconds", "seconds_in_steps")  # in each complete line; flops may be null


def read_costs(folder: Path) -> list[dict[str, Any]]:
    """Returns the lines of costs.jsonl by step, empty if there is none.

    Damaged lines and lines that a crash cut short are left out. Of two lines for the same step, the
    later one counts.

    Args:
        folder: The run's folder.

    Returns:
        One dictionary per report with `step`, `images`, `flops` (None if the network's operations
        cannot be counted), `seconds`, `seconds_in_steps`, and the line's other values.
    """
    records = [line.record for line in read_lines(folder / "costs.jsonl", gaps=True)]
    whole = [one for one in records if one and all(one.get(key) is not None for key in KNOWN)]
    by_step = {one["step"]: {"flops": None, **one} for one in whole}
    return [by_step[step] for step in sorted(by_step)]
