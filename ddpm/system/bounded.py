"""Reads files from others in bounded time and memory: raw bytes, YAML, safetensors."""

import os
import stat
import struct
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from torch import Tensor

MOST_YAML = 500_000  # bytes; a run's config.yaml has about 5,000
MOST_VALUES = 50_000  # per YAML file, aliases expanded
MOST_DEPTH = 50
MOST_DIGITS = 100  # per number
MOST_HEADER = 20_000_000  # bytes of names and shapes in a safetensors file; the largest have 1 MB


def read_file(path: Path, most: int) -> bytes:
    """Returns the content of a regular file of at most `most` bytes.

    Raises:
        ValueError: If the file is larger, or is a pipe or a device, which may never end.
        OSError: If it cannot be read.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise ValueError(f"{_size(size)}, more than the limit of {_size(most)}")
        return file.read(most)


def open_file(path: Path) -> IO[bytes]:
    """Opens a regular file for reading.

    Raises:
        ValueError: If it is a folder, or a pipe or a device, which may never end.
        OSError: If it cannot be read.
    """
    if not stat.S_ISREG(path.stat().st_mode):  # check first: opening a device can have effects
        raise ValueError("not a regular file but a folder, a pipe or a device")
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    return os.fdopen(os.open(path, flags), "rb")


class Bounded:
    """Mixin that makes a YAML loader refuse input without bounds; put it before the loader."""

    def __init__(self, stream: Any) -> None:
        self._file = f"{stream.name}: " if hasattr(stream, "fileno") else ""
        if self._file and os.fstat(stream.fileno()).st_size > MOST_YAML:
            raise ValueError(f"{self._file}larger than {_size(MOST_YAML)}")
        super().__init__(stream)  # type: ignore[call-arg]

    def get_single_node(self) -> Any:
        """Returns the document's root node, or None if the document is empty.

        Raises:
            ValueError: If the document is nested too deep or stands for too many values.
        """
        try:
            node = super().get_single_node()  # type: ignore[misc]
            _count(node, {}, ())
        except RecursionError as error:
            raise ValueError(f"{self._file}nested more than {MOST_DEPTH} deep") from error
        except yaml.MarkedYAMLError as error:
            if "nesting depth" not in str(error):  # libyaml's own bound
                raise
            raise ValueError(f"{self._file}nested more than {MOST_DEPTH} deep") from error
        except ValueError as error:
            raise ValueError(f"{self._file}{error}") from error
        return node


def load_tensors(path: Path) -> "dict[str, Tensor]":
    """Returns the tensors of a safetensors file by name, on the CPU.

    Raises:
        ValueError: If it is not a regular file, or its header claims more than MOST_HEADER bytes.
        SafetensorError, OSError: If it is damaged or cannot be read.
    """
    from safetensors.torch import load_file

    with open_file(path) as file:
        first = file.read(8)
    if len(first) == 8 and struct.unpack("<Q", first)[0] > MOST_HEADER:
        raise ValueError(f"the header claims to be larger than {_size(MOST_HEADER)}")
    return load_file(path)


def _count(node: Any, sizes: dict[int, int], above: tuple[int, ...]) -> int:
    """Counts the values in a YAML node with aliases expanded; ValueError if there is no bound."""
    if node is None:
        return 0
    if isinstance(node, yaml.ScalarNode):
        if node.tag.endswith((":int", ":float")) and len(node.value) > MOST_DIGITS:
            raise ValueError(f"a number of {len(node.value)} digits{_place(node)}")
        return 1
    if id(node) in above:
        raise ValueError(f"it contains itself{_place(node)}")
    if len(above) > MOST_DEPTH:
        raise ValueError(f"nested more than {MOST_DEPTH} deep{_place(node)}")
    if id(node) not in sizes:
        mapping = isinstance(node, yaml.MappingNode)
        inner = [one for pair in node.value for one in pair] if mapping else node.value
        sizes[id(node)] = 1 + sum(_count(one, sizes, (*above, id(node))) for one in inner)
    if sizes[id(node)] > MOST_VALUES:
        raise ValueError(f"aliases that stand for more than {MOST_VALUES:,} values{_place(node)}")
    return sizes[id(node)]


def _place(node: Any) -> str:
    return f" (line {node.start_mark.line + 1})"


def _size(count: int) -> str:
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count} bytes"
