"""Records a run's metrics as it trains.

They go to metrics.jsonl (the same bytes for the same run), costs.jsonl, and TensorBoard, which also
gets the speed.
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
# TensorBoard's tab Custom Scalars: one chart per kind of curve, with all runs in it
LAYOUT = {
    "training": {
        "loss": ["Multiline", [r"^train/loss$"]],
        "loss by noise level (q0 the least noise)": ["Multiline", [r"^train/loss_q\d$"]],
        "gradient norm": ["Multiline", [r"^train/grad_norm$"]],
        "learning rate": ["Multiline", [r"^train/lr$"]],
        "images per second": ["Multiline", [r"^train/images_per_second$"]],
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


# appended to the newest file's name: TensorBoard reads a folder's files in alphabetical order
_CONCLUSION = ".end"


PICTURES = 20  # most previews in a run's event files, which TensorBoard loads completely
SIDE = 1200  # most pixels per side of a preview: 64 pictures of 128x128 fit


def shows_picture(step: int, every: int, num_steps: int) -> bool:
    """Returns whether TensorBoard gets a step's preview: the last one and evenly spaced others.

    Args:
        step: The preview's step, a multiple of `every` or the last step.
        every: Steps between previews.
        num_steps: Steps of the whole run.
    """
    previews = -(-num_steps // every)
    apart = -(-previews // PICTURES)
    return step == num_steps or (previews - step // every) % apart == 0


class Recorder:
    """Writes a run's scalars and pictures; only the main process has one.

    Args:
        folder: The run's folder.
        first_step: Updates done before this start. Later records, from a start that was cut off,
            are dropped, since their steps run again. Damaged lines are dropped with a warning.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        self._metrics = _Lines(folder / "metrics.jsonl", first_step)
        self._costs = _Lines(folder / "costs.jsonl", first_step, gaps=True)
        _forget_conclusion(folder)
        self._board = SummaryWriter(str(folder), purge_step=first_step + 1)

    def has(self, prefix: str) -> bool:
        """Returns whether the last step before this start recorded a scalar with this prefix."""
        return any(name.startswith(prefix) for name in self._metrics.last)

    def settings(self, values: Mapping[str, float | str]) -> None:
        """Writes the run's row in TensorBoard's tab HPARAMS, and the layout of Custom Scalars.

        Every run must have the same keys, and a key's values must be all numbers or all text.
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
        """Records scalars that the configuration decides, such as losses, after `step` updates."""
        self._metrics.add(step, values)
        self.speed(step, values)

    def costs(self, step: int, values: Mapping[str, float | None]) -> None:
        """Records the run's costs after `step` updates in costs.jsonl; None means unknown."""
        self._costs.add(step, values)
        known = {f"cost/{name}": value for name, value in values.items() if value is not None}
        self.speed(step, known)

    def speed(self, step: int, values: dict[str, float]) -> None:
        """Writes scalars that differ between machines, to TensorBoard only."""
        for tag, value in values.items():
            self._board.add_scalar(tag, value, step)

    def picture(self, step: int, tag: str, image: np.ndarray) -> None:
        """Writes a picture, (H, W, C) uint8, to TensorBoard, scaled down if larger than SIDE."""
        shrink = -(-max(image.shape[:2]) // SIDE)
        if shrink > 1:
            grey = image.shape[2] == 1
            small = Image.fromarray(image[..., 0] if grey else image).reduce(shrink)
            image = np.asarray(small).reshape(small.height, small.width, -1)
        self._board.add_image(tag, image, step, dataformats="HWC")

    def text(self, tag: str, text: str, language: str = "") -> None:
        """Writes text to TensorBoard as a code block, so that Markdown in it has no effect."""
        lines = [shown(line) for line in text.rstrip("\n").split("\n")]
        said = "\n".join(lines).replace("```", "'''")  # must not end the block
        self._board.add_text(tag, f"```{language}\n{said}\n```", 0)

    def flush(self) -> None:
        """Flushes TensorBoard's event file."""
        self._board.flush()

    def close(self) -> None:
        """Closes all files."""
        self._metrics.close()
        self._costs.close()
        self._board.close()


class _Lines:
    """A JSON Lines file that a run appends to.

    Attributes:
        last: The record of the last step before this start.
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
    """Writes the run's end and final scalars to TensorBoard.

    They get a small event file of their own, which replaces the previous one and is removed on
    resume. TensorBoard keeps the first end that it reads for a run, so an end in the other event
    files would outlive a resume.

    Args:
        folder: The run's folder.
        status: How the run ended.
        step: Optimizer updates done.
        values: Scalars at `step`.
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
    # the pattern also matches files that a crash left half written
    for file in folder.glob(f"*events.out.tfevents.*{_CONCLUSION}*"):
        file.unlink()


def _hparams(tag: str, content: HParamsPluginData) -> Summary:
    about = metadata.create_summary_metadata(content)
    return Summary(value=[Summary.Value(tag=tag, metadata=about, tensor=metadata.NULL_TENSOR)])
