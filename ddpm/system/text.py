"""Text of others, made safe to print: it can hide nothing, move no cursor and fake no line."""

import logging
import os
import re
import sys
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

# controls, line separators, marks that turn the direction of writing, halves of characters
_HIDDEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)
_SHORT = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}
_FORMULA = re.compile(r"\s*[=+\-@\t\r].", re.S)


def shown(text: object) -> str:
    """Returns text with what would not be seen, or would act, as its escape in Python's notation.

    A byte of a file's name that is no UTF-8 is shown as that byte.
    """
    return _HIDDEN.sub(_escape, str(text))


def say(line: str, to_error: bool = False) -> None:
    """Prints one line, as `shown`, at once.

    Args:
        line: What to print; a line's end in it is shown as one.
        to_error: Print on standard error.
    """
    with suppress(OSError) if to_error else nullcontext():  # nobody reads, and the work goes on
        print(shown(line), file=sys.stderr if to_error else sys.stdout, flush=True)


def cell(value: Any) -> Any:
    """Returns a value of a CSV file so that no spreadsheet takes text for a formula.

    Text that starts as a formula does is put behind an apostrophe; numbers stay as they are.
    """
    if not isinstance(value, str):
        return value
    said = shown(value)
    return f"'{said}" if _FORMULA.match(value) and not is_number(value) else said


def is_number(text: str) -> bool:
    """Whether text can be read as a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def unmarked(text: object) -> str:
    """Returns one line of text that means nothing in Markdown, nor in the HTML in it."""
    line = shown(" ".join(str(text).split()))
    return re.sub(r"([\\`*\[\]<>&#|~!$]|_(?!\w)|(?<!\w)_)", r"\\\1", line)


def keep_streams() -> None:
    """Opens the streams that this process was started without, to nowhere.

    Else the next file that is opened takes the place of standard error, and gets its text.
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
    """Has what the package logs be one line a record, as `shown`, wherever it goes."""
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
    if 0xDC80 <= code <= 0xDCFF:  # how Python keeps a byte that is no UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
