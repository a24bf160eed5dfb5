"""Reads plain values from untrusted JSON and YAML, in bounded time and memory.

The result holds only null, booleans, numbers, text, lists, and mappings with text keys. Depth and
size are limited to what our own files need.
"""

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

import yaml

from ddpm.system.text import shown

DEEPEST = 32  # nested lists and mappings; a run's config.yaml has 4 levels
MOST = 1_000_000  # values per file; with aliases, a kilobyte of YAML can stand for more
LARGEST = 2**128  # the longest training takes about 2**90 FLOPs
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the C loader is ten times as fast
_KINDS = {f"tag:yaml.org,2002:{name}": name for name in ("null", "bool", "int", "float", "str")}
_DECIMAL = re.compile(r"[-+]?[0-9_]{1,50}")
_OTHERS = re.compile(r"[-+]?0(b[01_]{1,50}|x[0-9a-fA-F_]{1,50})")
_FLOAT = re.compile(r"[-+]?[0-9_.]{1,400}([eE][-+]?[0-9]{1,9})?")
_NAMED = {".inf": float("inf"), "-.inf": float("-inf"), "+.inf": float("inf"), ".nan": float("nan")}


class Unreadable(ValueError):
    """A file that cannot be read, or does not hold what it should.

    Attributes:
        file: The file's path.
        why: What is wrong with it, with control characters escaped.
    """

    def __init__(self, file: Path, why: str) -> None:
        self.file, self.why = file, shown(" ".join(why.split()))
        super().__init__(f"{file} cannot be read ({self.why})")

    def __reduce__(self) -> tuple[Any, ...]:
        return Unreadable, (self.file, self.why)


def is_there(file: Path, most: int) -> bool:
    """Returns whether a file exists.

    Args:
        file: The file.
        most: The most bytes that it may have.

    Raises:
        Unreadable: If it is larger, not a regular file, or not readable by this user.
    """
    try:
        about = os.stat(file)  # noqa: PTH116
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise Unreadable(file, error.strerror or str(error)) from error
    if not stat.S_ISREG(about.st_mode):
        raise Unreadable(file, "not a regular file")
    if about.st_size > most:
        raise Unreadable(file, f"{about.st_size} bytes, more than the limit of {most}")
    if not os.access(file, os.R_OK):
        raise Unreadable(file, "permission denied")
    return True


def read_bytes(file: Path, most: int) -> bytes | None:
    """Returns the content of a file of at most `most` bytes, or None if it does not exist.

    Raises:
        Unreadable: If it is larger, not a regular file, or cannot be read.
    """
    if not is_there(file, most):
        return None
    try:
        with file.open("rb") as opened:
            return opened.read(most)
    except OSError as error:
        raise Unreadable(file, error.strerror or str(error)) from error


def read_json(file: Path, most: int) -> Any:
    """Returns the plain values of a JSON file, or None if it does not exist.

    Args:
        file: The file.
        most: The most bytes that it may have.

    Raises:
        Unreadable: If it cannot be read, is nested too deep or holds too large a number.
    """
    content = read_bytes(file, most)
    if content is None:
        return None
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise Unreadable(file, _first_line(error)) from error
    try:
        check(found)
    except ValueError as error:
        raise Unreadable(file, str(error)) from error
    return found


def read_yaml(file: Path, most: int) -> Any:
    """Returns the plain values of a YAML file, or None if it does not exist.

    Dates, base-60 numbers, merge keys, tags and self-references are refused.

    Args:
        file: The file.
        most: The most bytes that it may have.

    Raises:
        Unreadable: If it cannot be read, or holds anything but plain values.
    """
    content = read_bytes(file, most)
    if content is None:
        return None
    try:
        node = yaml.compose(content.decode(), _Loader)
        return None if node is None else _Values().of(node, 0)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise Unreadable(file, _first_line(error)) from error


def check(value: Any, depth: int = 0) -> None:
    """Refuses JSON values that are nested too deep, and integers too large to compute with.

    Raises:
        ValueError: If it finds either.
    """
    if isinstance(value, dict):
        _check_depth(depth)
        for inner in value.values():
            check(inner, depth + 1)
    elif isinstance(value, list):
        _check_depth(depth)
        for inner in value:
            check(inner, depth + 1)
    elif type(value) is int and not -LARGEST < value < LARGEST:
        raise ValueError("a number is out of range")


def _check_depth(depth: int) -> None:
    if depth >= DEEPEST:
        raise ValueError(f"nested more than {DEEPEST} deep")


class _Values:
    """Converts YAML nodes to plain values and counts them, since aliases can repeat a node."""

    def __init__(self) -> None:
        self._count = 0

    def of(self, node: yaml.Node, depth: int) -> Any:
        self._count += 1
        if self._count > MOST:
            raise ValueError(f"more than {MOST} values")
        if isinstance(node, yaml.ScalarNode):
            return _scalar(node)
        _check_depth(depth)  # also stops self-references
        if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
            return [self.of(inner, depth + 1) for inner in node.value]
        if not isinstance(node, yaml.MappingNode) or node.tag != "tag:yaml.org,2002:map":
            raise ValueError(f"{_place(node)}: tags are not allowed")
        found = {}
        for key, inner in node.value:
            name = self.of(key, depth + 1)
            if not isinstance(name, str):
                raise ValueError(f"{_place(key)}: a key must be text")
            found[name] = self.of(inner, depth + 1)
        return found


def _scalar(node: yaml.ScalarNode) -> Any:
    """Converts a YAML 1.1 scalar, except for kinds that our files never hold."""
    kind, text = _KINDS.get(node.tag), node.value
    if kind == "str":
        return text
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() in ("true", "yes", "on")
    if kind == "int" and _DECIMAL.fullmatch(text):
        digits = text.replace("_", "")
        octal = len(digits.lstrip("+-")) > 1 and digits.lstrip("+-").startswith("0")
        number = int(digits, 8 if octal else 10)
    elif kind == "int" and _OTHERS.fullmatch(text):
        number = int(text.replace("_", ""), 0)
    elif kind == "float" and text.lower() in _NAMED:
        return _NAMED[text.lower()]
    elif kind == "float" and _FLOAT.fullmatch(text):
        return float(text.replace("_", ""))
    else:
        raise ValueError(f"{_place(node)}: must be text, a plain number, true, false or null")
    check(number)
    return number


def _place(node: yaml.Node) -> str:
    return f"line {node.start_mark.line + 1}"


def _first_line(error: Exception) -> str:
    """Returns an error's message in one line, with the place; YAML's parser uses several."""
    if isinstance(error, RecursionError):
        return f"nested more than {DEEPEST} deep"
    mark = getattr(error, "problem_mark", None)
    if isinstance(error, yaml.MarkedYAMLError) and mark is not None:
        return f"line {mark.line + 1}: {error.problem}"
    return str(error).partition("\n")[0]
