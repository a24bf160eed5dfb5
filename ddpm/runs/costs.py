"""What a run's training has cost so far, read from its folder: images, operations, time."""

from pathlib import Path
from typing import Any

from ddpm.runs.contents import read_lines

KNOWN = ("images", "seconds", "seconds_in_steps")  # that each whole line has; flops may be null


def read_costs(folder: Path) -> list[dict[str, Any]]:
    """Returns the lines of costs.jsonl by step, none if it is not there.

    Lines that are damaged or that a crash cut short are left out. Of two lines of one step the
    later one counts.

    Args:
        folder: The run's.

    Returns:
        Of each report `step`, `images`, `flops` (None for a network whose operations cannot be
        counted), `seconds`, `seconds_in_steps`, and what else its line says.
    """
    records = [line.record for line in read_lines(folder / "costs.jsonl", gaps=True)]
    whole = [one for one in records if one and all(one.get(key) is not None for key in KNOWN)]
    by_step = {one["step"]: {"flops": None, **one} for one in whole}
    return [by_step[step] for step in sorted(by_step)]
