"""What a run measures, written as it goes: metrics.jsonl (the same bytes for the same run) and TensorBoard (also speed)."""

import json
from pathlib import Path

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from ddpm.files import write_whole


class Recorder:
    """Scalars and pictures of one run folder; one process of a run has it.

    first_step: updates done before this start. Records past it, of an earlier start that was cut off, are dropped: their steps are done again.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        self._path = folder / "metrics.jsonl"
        kept = [line for line in _lines(self._path) if json.loads(line)["step"] <= first_step]
        write_whole(self._path, "".join(line + "\n" for line in kept))
        self._file = self._path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder), purge_step=first_step + 1)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Record values that the configuration decides, such as losses, after `step` updates."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        self.speed(step, values)

    def speed(self, step: int, values: dict[str, float]) -> None:
        """Show values that differ from one machine to the next, in TensorBoard only."""
        for tag, value in values.items():
            self._board.add_scalar(tag, value, step)

    def picture(self, step: int, tag: str, image: np.ndarray) -> None:
        """Show a picture, (H, W, C) uint8, in TensorBoard."""
        self._board.add_image(tag, image, step, dataformats="HWC")

    def text(self, tag: str, text: str) -> None:
        """Show text (Markdown) in TensorBoard."""
        self._board.add_text(tag, text, 0)

    def flush(self) -> None:
        """Have all that was recorded so far on its way to the disk."""
        self._board.flush()

    def close(self) -> None:
        self._file.close()
        self._board.close()


def _lines(path: Path) -> list[str]:
    """The whole lines of a file that a crash may have cut short."""
    if not path.is_file():
        return []
    return [line for line in path.read_text(encoding="utf-8").split("\n")[:-1] if line]
