"""What a run's training has cost so far, read from its folder: images, operations, time."""

import json
from pathlib import Path
from typing import Any


def read_costs(folder: Path) -> list[dict[str, Any]]:
    """Returns the lines of costs.jsonl by step, none if it is not there.

    Lines that are damaged or that a crash cut short are left out. Of two lines of one step the
    later one counts.

    Args:
        folder: The run's.

    Returns:
        Of each report `step`, `images`, `flops`, `seconds`, `seconds_in_steps`, and what else its
        line says.
    """
    file = folder / "costs.jsonl"
    lines = file.read_bytes().split(b"\n")[:-1] if file.is_file() else []
    by_step = {line["step"]: line for line in map(_parse, lines) if line is not None}
    return [by_step[step] for step in sorted(by_step)]


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    sound = isinstance(found, dict) and all(
        isinstance(found.get(key), int | float)
        for key in ("step", "images", "flops", "seconds", "seconds_in_steps")
    )
    return found if sound else None
