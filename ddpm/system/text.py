"""Makes untrusted text safe to print: it cannot hide characters, move the cursor or fake a line."""

import logging
import os
import re
import sys
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

# control characters, line separators, bidirectional marks, byte order mark, lone surrogates
_HIDDEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)
_SHORT = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}
_FORMULA = re.compile(r"\s*[=+\-@\t\r].", re.S)


def shown(text: object) -> str:
    """Returns text with invisible and control characters as Python escapes.

    A byte of a file name that is not UTF-8 becomes the escape of that byte.
    """
    return _HIDDEN.sub(_escape, str(text))


def say(line: str, to_error: bool = False) -> None:
    """Prints one line, escaped with `shown`, and flushes.

    Args:
        line: The text; line breaks in it are escaped.
        to_error: Print to standard error.
    """
    with suppress(OSError) if to_error else nullcontext():  # a closed stderr must not end a run
        print(shown(line), file=sys.stderr if to_error else sys.stdout, flush=True)


def cell(value: Any) -> Any:
    """Returns a value for a CSV file that no spreadsheet takes for a formula.

    Text that starts like a formula gets a leading apostrophe; numbers stay as they are.
    """
    if not isinstance(value, str):
        return value
    said = shown(value)
    return f"'{said}" if _FORMULA.match(value) and not is_number(value) else said


def is_number(text: str) -> bool:
    """Returns whether `float` accepts the text."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def unmarked(text: object) -> str:
    """Returns text as one line, with the special characters of Markdown and HTML escaped."""
    line = shown(" ".join(str(text).split()))
    return re.sub(r"([\\`*\[\]<>&#|~!$]|_(?!\w)|(?<!\w)_)", r"\\\1", line)


def keep_streams() -> None:
    """Opens os.devnull for each standard stream that this process was started without.

    Otherwise the next opened file would take descriptor 2 and receive what goes to standard error.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is not None:
            continue
        try:
            os.fstat(number)
        except OSError:
            handle = os.open(os.devnull, os.O_RDWR)
            if handle != number:
                os.dup2(handle, number)
                os.close(handle)
            os.set_inheritable(number, True)
        mode = "w" if number else "r"
        nowhere = Path(os.devnull).open(mode, encoding="utf-8")  # noqa: SIM115
        setattr(sys, name, nowhere)


def guard_logs() -> None:
    """Makes each log record of this package one line, escaped with `shown`, for all handlers."""
    logging.setLogRecordFactory(_record)


def _record(name: str, *arguments: Any, **named: Any) -> logging.LogRecord:
    ours = name.partition(".")[0] == "ddpm"
    return (_Record if ours else logging.LogRecord)(name, *arguments, **named)


class _Record(logging.LogRecord):
    def getMessage(self) -> str:
        return shown(super().getMessage())


def _escape(found: re.Match[str]) -> str:
    character = found[0]
    if character in _SHORT:
        return _SHORT[character]
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # surrogateescape: a byte that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
