"""What a run measures, written as it goes.

metrics.jsonl (the same bytes for the same run), costs.jsonl, and TensorBoard (also speed).
"""

import io
import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import api_pb2, metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import (
    HParamsPluginData,
    SessionEndInfo,
    SessionStartInfo,
)
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import scalar

from ddpm.runs.contents import read_lines
from ddpm.system.files import append_to, write_bytes, write_text
from ddpm.system.text import shown

log = logging.getLogger("ddpm")

Status = Literal["complete", "failed", "preempted", "running"]

_CURVE = r"(?!.*_(final|best)$)"
_SPLITS = r"(train|heldout|validation|test)$"
# TensorBoard's tab Custom Scalars: the curves worth comparing, each kind of all runs in one chart
LAYOUT = {
    "training": {
        "loss": ["Multiline", [r"^train/loss$"]],
        "loss by noise level (q0 the least noise)": ["Multiline", [r"^train/loss_q\d$"]],
        "gradient norm": ["Multiline", [r"^train/grad_norm$"]],
        "learning rate": ["Multiline", [r"^train/lr$"]],
        "images a second": ["Multiline", [r"^train/images_per_second$"]],
    },
    "evaluation": {
        "loss, held out and trained on": ["Multiline", [r"^eval/loss_total:" + _SPLITS]],
        "the same by noise level": ["Multiline", [r"^eval/loss_q\d:" + _SPLITS]],
        "distances": ["Multiline", [r"^eval/(fid|fd_|kid|kd_)" + _CURVE]],
        "precision and recall": ["Multiline", [r"^eval/(precision|recall)" + _CURVE]],
        "bits/dim": ["Multiline", [r"^eval/bits_per_dim" + _CURVE]],
    },
    "cost": {
        "images": ["Multiline", [r"^cost/images$"]],
        "seconds: in all, in updates, waiting for data": ["Multiline", [r"^cost/seconds"]],
        "share of the device's peak": ["Multiline", [r"^cost/share_of_peak$"]],
        "peak memory": ["Multiline", [r"^cost/peak_memory_bytes$"]],
    },
}


# after the newest file's name: TensorBoard reads a folder's files in the order of their names
_CONCLUSION = ".end"


PICTURES = 20  # at most of a run in its event files, which TensorBoard reads whole
SIDE = 1200  # pixels, at most of each: 64 pictures of 128 fit


def shows_picture(step: int, every: int, num_steps: int) -> bool:
    """Whether TensorBoard gets the preview of a step: the last, and others evenly before it.

    Args:
        step: Of a preview, a multiple of `every` or the last step.
        every: Steps between previews.
        num_steps: Of the whole run.
    """
    previews = -(-num_steps // every)
    apart = -(-previews // PICTURES)
    return step == num_steps or (previews - step // every) % apart == 0


class Recorder:
    """Scalars and pictures of one run folder; one process of a run has it.

    Args:
        folder: The run's.
        first_step: Updates done before this start. Records past it, of an earlier start that was
            cut off, are dropped: their steps are done again. So are damaged lines, which are said.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        self._metrics = _Lines(folder / "metrics.jsonl", first_step)
        self._costs = _Lines(folder / "costs.jsonl", first_step, gaps=True)
        _forget_conclusion(folder)
        self._board = SummaryWriter(str(folder), purge_step=first_step + 1)

    def has(self, prefix: str) -> bool:
        """Returns whether the step before this start has records of such names."""
        return any(name.startswith(prefix) for name in self._metrics.last)

    def settings(self, values: Mapping[str, float | str]) -> None:
        """Writes the run's row in TensorBoard's tab HPARAMS.

        Every run must give the same keys, and a key's values must be all numbers or all text.
        """
        start = SessionStartInfo(start_time_secs=time.time())
        for key, value in values.items():
            if isinstance(value, int | float):  # also bool, as 0 and 1
                start.hparams[key].number_value = value
            else:
                start.hparams[key].string_value = shown(value)
        self._board._get_file_writer().add_summary(
            _hparams(metadata.SESSION_START_INFO_TAG, HParamsPluginData(session_start_info=start))
        )
        self._board.add_custom_scalars(LAYOUT)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Records values that the configuration decides, such as losses, after `step` updates."""
        self._metrics.add(step, values)
        self.speed(step, values)

    def costs(self, step: int, values: Mapping[str, float | None]) -> None:
        """Records what the run has cost after `step` updates, in costs.jsonl; None: not known."""
        self._costs.add(step, values)
        known = {f"cost/{name}": value for name, value in values.items() if value is not None}
        self.speed(step, known)

    def speed(self, step: int, values: dict[str, float]) -> None:
        """Shows values that differ from one machine to the next, in TensorBoard only."""
        for tag, value in values.items():
            self._board.add_scalar(tag, value, step)

    def picture(self, step: int, tag: str, image: np.ndarray) -> None:
        """Shows a picture, (H, W, C) uint8, in TensorBoard; one larger than SIDE smaller."""
        shrink = -(-max(image.shape[:2]) // SIDE)
        if shrink > 1:
            grey = image.shape[2] == 1
            small = Image.fromarray(image[..., 0] if grey else image).reduce(shrink)
            image = np.asarray(small).reshape(small.height, small.width, -1)
        self._board.add_image(tag, image, step, dataformats="HWC")

    def text(self, tag: str, text: str, language: str = "") -> None:
        """Shows text in TensorBoard as it is, whatever it would mean in Markdown."""
        lines = [shown(line) for line in text.rstrip("\n").split("\n")]
        said = "\n".join(lines).replace("```", "'''")  # nothing ends the block
        self._board.add_text(tag, f"```{language}\n{said}\n```", 0)

    def flush(self) -> None:
        """Sends all that was recorded so far on its way to the disk."""
        self._board.flush()

    def close(self) -> None:
        self._metrics.close()
        self._costs.close()
        self._board.close()


class _Lines:
    """A file of records, one a line, that a run adds to.

    Attributes:
        last: What it says of the step before this start.
    """

    def __init__(self, path: Path, first_step: int, gaps: bool = False) -> None:
        self.last: dict[str, float | None] = {}
        kept = []
        for line in read_lines(path, gaps):
            if line.record is None:
                where = f"{path}, line {line.number}"
                log.warning("%s: damaged and left out: %.100r", where, line.text)
            elif line.record["step"] <= first_step:
                kept.append(line.text)
                if line.record["step"] == first_step:
                    self.last.update(line.record)
        write_text(path, "".join(text + "\n" for text in kept))
        self._file = append_to(path)

    def add(self, step: int, values: Mapping[str, float | None]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def conclude(folder: Path, status: Status, step: int, values: Mapping[str, float]) -> None:
    """Tells TensorBoard how the run ended, and with what.

    It writes one small event file, which takes the place of the one before, and goes when the run
    goes on. TensorBoard keeps the first end that it reads of a run, so an end inside the files that
    stay would outlive a resume.

    Args:
        folder: The run's.
        status: How it ended.
        step: Optimizer updates done.
        values: Scalars, at `step`.
    """
    _forget_conclusion(folder)
    files = sorted(folder.glob("events.out.tfevents.*"))
    if not files:
        return
    ended = {
        "complete": api_pb2.STATUS_SUCCESS,
        "failed": api_pb2.STATUS_FAILURE,
        "preempted": api_pb2.STATUS_UNKNOWN,
        "running": api_pb2.STATUS_UNKNOWN,
    }[status]
    end = SessionEndInfo(status=ended, end_time_secs=time.time())
    now = time.time()
    events = [Event(wall_time=now, file_version="brain.Event:2")]
    events += [
        Event(wall_time=now, step=step, summary=scalar(tag, value)) for tag, value in values.items()
    ]
    events.append(
        Event(
            wall_time=now,
            summary=_hparams(
                metadata.SESSION_END_INFO_TAG, HParamsPluginData(session_end_info=end)
            ),
        )
    )
    content = io.BytesIO()
    for event in events:
        RecordWriter(content).write(event.SerializeToString())
    write_bytes(files[-1].with_name(files[-1].name + _CONCLUSION), content.getvalue())


def _forget_conclusion(folder: Path) -> None:
    # also what a crash left half written
    for file in folder.glob(f"*events.out.tfevents.*{_CONCLUSION}*"):
        file.unlink()


def _hparams(tag: str, content: HParamsPluginData) -> Summary:
    about = metadata.create_summary_metadata(content)
    return Summary(value=[Summary.Value(tag=tag, metadata=about, tensor=metadata.NULL_TENSOR)])
