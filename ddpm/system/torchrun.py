"""Talks to torchrun, if it has started this process."""

import json
import os
import time
from pathlib import Path

import psutil


def leave_word(why: str) -> None:
    """Tells torchrun why this process ends, for torchrun's summary and its own parent.

    The format is that of an exception written by torch.distributed.elastic's `record`.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file is None or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    said = {"message": why, "extraInfo": {"timestamp": str(int(time.time()))}}
    try:
        Path(file).write_text(json.dumps({"message": said}), encoding="utf-8")
    except OSError:  # torchrun can do without it
        return


def seconds_to_stop() -> float | None:
    """Returns how many seconds after passing on a SIGTERM torchrun kills this process.

    Returns None if torchrun does not handle SIGTERM or has not started this process.
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
    """Returns the value of a command-line option, in any spelling that torchrun accepts."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        key, equals, value = word.partition("=")
        if key.replace("_", "-") == f"--{name}":
            return value if equals else following
    return None
