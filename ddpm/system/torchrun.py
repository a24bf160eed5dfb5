"""What torchrun is told, and what it does, where it has started this process."""

import json
import os
import time
from pathlib import Path

import psutil


def leave_word(why: str) -> None:
    """Leaves torchrun the reason why this process ends, for its summary and its own parent.

    It is written as torch.distributed.elastic's `record` writes an exception.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file is None or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    said = {"message": why, "extraInfo": {"timestamp": str(int(time.time()))}}
    try:
        Path(file).write_text(json.dumps({"message": said}), encoding="utf-8")
    except OSError:  # it can do without
        return


def seconds_to_stop() -> float | None:
    """Returns the seconds after which torchrun kills this process once it has passed on a signal.

    None where it does not, or where torchrun has not started this process.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    try:
        words = psutil.Process().parent().cmdline()
    except (psutil.Error, AttributeError):
        words = []
    heeded = _option(words, "signals-to-handle")
    if heeded is not None and "SIGTERM" not in heeded:
        return None
    from torch.distributed.launcher.api import LaunchConfig

    said = _option(words, "shutdown-timeout") or os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT")
    if said is None or not hasattr(LaunchConfig, "shutdown_timeout"):  # before torch 2.12
        return 30.0
    return float(said)


def _option(words: list[str], name: str) -> str | None:
    """The value of an option, spelt in any way that argparse takes."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        key, equals, value = word.partition("=")
        if key.replace("_", "-") == f"--{name}":
            return value if equals else following
    return None
