"""Reads pictures from table rows: parquet files, and tables that `datasets` loads or saved."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpm.data.shards import SHARD_SIZE, Item, Source, item_of, shard_counts

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

MOST_CLASSES = 100_000
IMAGE_NAMES = ("image", "img", "jpg", "png", "webp")  # common names of columns
LABEL_NAMES = ("label", "labels", "cls", "class")


class NoImages(ValueError):
    """Raised for a table without a column of images, if the user gave no column."""


def of_parquet(
    root: Path, names: Sequence[str], image_column: str | None, label_column: str | None
) -> Source:
    """Returns the source of the rows of these parquet files below root.

    Raises:
        NoImages: If there is no column of images.
        ValueError: If the files cannot be read for another reason; the message names the file, the
            columns or the label.
    """
    files = [root / name for name in names]
    groups: list[tuple[str, int]] = []
    counts: list[int] = []
    for file in files:
        found = _opened(file)
        groups += [(str(file), group) for group in range(found.num_row_groups)]
        counts += [
            found.metadata.row_group(group).num_rows for group in range(found.num_row_groups)
        ]
    schema = _opened(files[0]).schema_arrow
    features = _features(files[0], schema.metadata or {})
    kinds = {field.name: "Image" for field in schema if _holds_files(field.type)} | {
        name: feature.get("_type") for name, feature in features.items()
    }
    image_column, label_column = _columns(
        str(files[0]), schema.names, kinds, image_column, label_column
    )
    for file in files:
        columns = _opened(file).schema_arrow.names
        missing = [name for name in (image_column, label_column) if name and name not in columns]
        if missing:
            raise ValueError(
                f"{file} has no column {missing[0]}, unlike {files[0].name} next to it; "
                f"it has {', '.join(columns)}"
            )
    classes: list[str] = []
    if label_column is not None:
        classes = features.get(label_column, {}).get("names") or _label_names(
            (str(file), _column(file, label_column)) for file in files
        )
    return Source(
        counts,
        partial(_read_parquet, str(root), groups, image_column, label_column, classes),
        classes,
        stamp=f"{image_column} {label_column}",
        root=root,
        files=list(names),
    )


def _read_parquet(
    root: str,
    groups: Sequence[tuple[str, int]],
    image_column: str,
    label_column: str | None,
    classes: list[str],
    shard: int,
) -> Iterator[Item]:
    import pyarrow as pa

    file, group = groups[shard]
    columns = [image_column] + ([label_column] if label_column else [])
    try:
        table = _opened(Path(file)).read_row_group(group, columns=columns)
        rows = table.to_pylist()
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise ValueError(f"{file} is damaged in row group {group} ({_reason(error)})") from error
    for row, values in enumerate(rows):
        label = values[label_column] if label_column else None
        name = f"{Path(file).name} group {group} row {row}"
        number = _label(name, label, classes)
        yield _item(name, values[image_column], number, Path(file).parent, [root])


def _opened(file: Path) -> Any:
    """Opens a parquet file; a ValueError names a file that is incomplete."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(file)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{file} is not a complete parquet file ({_reason(error)})") from error


def _features(file: Path, about: dict[bytes, bytes]) -> dict[str, dict[str, Any]]:
    """What `datasets` wrote into a parquet file about its columns; empty if it wrote nothing."""
    try:
        said: Any = json.loads(about.get(b"huggingface", b"{}"))
        features = said.get("info", {}).get("features", {})
        found = {name: one for name, one in features.items() if isinstance(one, dict)}
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} has invalid metadata of datasets ({_reason(error)})") from error
    for name, one in found.items():
        classes = one.get("names")
        if classes is not None and not (
            isinstance(classes, list) and all(isinstance(word, str) for word in classes)
        ):
            raise ValueError(f"{file} has class names in column {name} that are not strings")
    return found


def _column(file: Path, name: str) -> Any:
    import pyarrow as pa

    try:
        return _opened(file).read([name])
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file} is damaged in column {name} ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def of_arrow(
    data: "datasets.Dataset",
    image_column: str | None,
    label_column: str | None,
    folders: list[str],
    where: str,
    stamp: str,
) -> Source:
    """Returns the source of the rows of a `datasets` table.

    Args:
        data: The table.
        image_column: The column of images; None to detect it.
        label_column: The column of labels, if any.
        folders: The folders in which rows may refer to files.
        where: The table's origin, for messages.
        stamp: A string that changes whenever the table may have changed.

    Raises:
        ValueError: As for of_parquet.
    """
    import datasets

    data = data.with_format(None)  # rows as plain values, whatever format was saved
    kinds = {name: type(feature).__name__ for name, feature in data.features.items()}
    image_column, label_column = _columns(
        where, data.column_names, kinds, image_column, label_column
    )
    classes: list[str] = []
    if label_column is not None:
        feature = data.features[label_column]
        classes = (
            feature.names
            if isinstance(feature, datasets.ClassLabel)
            else _label_names([(where, data.select_columns([label_column]).data.table)])
        )
    data = data.select_columns([image_column] + ([label_column] if label_column else []))
    data = data.cast_column(image_column, datasets.Image(decode=False))
    read = partial(_read_arrow, data, folders, image_column, label_column, classes)
    return Source(shard_counts(len(data)), read, classes, f"{image_column} {label_column} {stamp}")


def _read_arrow(
    data: "datasets.Dataset",
    folders: list[str],
    image_column: str,
    label_column: str | None,
    classes: list[str],
    shard: int,
) -> Iterator[Item]:
    for row in range(shard * SHARD_SIZE, min((shard + 1) * SHARD_SIZE, len(data))):
        values = data[row]
        label = values[label_column] if label_column else None
        number = _label(f"row {row}", label, classes)
        yield _item(f"row {row}", values[image_column], number, Path(folders[0]), folders)


def _columns(
    where: str, names: Sequence[str], kinds: dict[str, Any], image: str | None, label: str | None
) -> tuple[str, str | None]:
    """The columns of images and labels: those given, else the first that fits by type or name."""
    if image is None:
        image = next((name for name in IMAGE_NAMES if kinds.get(name) == "Image"), None) or next(
            (name for name in names if kinds.get(name) == "Image"), None
        )
        if image is None:
            raise NoImages(
                f"{where} has no column of encoded images; it has {', '.join(names)}: "
                f"give data.source.image_column=NAME"
            )
        label = (
            label
            or next((name for name in names if kinds.get(name) == "ClassLabel"), None)
            or next((name for name in LABEL_NAMES if name in names), None)
        )
    for column in (image, label):
        if column is not None and column not in names:
            raise ValueError(
                f"{where} has no column {column}; it has {', '.join(names)}: "
                f"check data.source.image_column and data.source.label_column"
            )
    return image, label


def _holds_files(kind: "pa.DataType") -> bool:
    """Whether a column can hold encoded pictures: bytes, or datasets' {bytes, path}."""
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return any(kind.field(place).name in ("bytes", "path") for place in range(kind.num_fields))
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _label_names(tables: Iterable[tuple[str, Any]]) -> list[str]:
    """Label names of a file that has none: the sorted strings, or numbers from 0 to the largest.

    Raises a ValueError if the values cannot be classes.
    """
    values: set[Any] = set()
    for where, table in tables:
        try:
            values |= set(table.column(0).unique().to_pylist()) - {None}
        except (TypeError, ValueError, NotImplementedError) as error:  # lists, say
            raise ValueError(
                f"{where}: data.source.label_column has no classes ({_reason(error)})"
            ) from error
    if all(isinstance(value, str) for value in values):
        return sorted(values)
    if not all(isinstance(value, int) and -1 <= value < MOST_CLASSES for value in values):
        strange = next(
            value for value in values if not (isinstance(value, int) and -1 <= value < MOST_CLASSES)
        )
        raise ValueError(
            f"{where}: data.source.label_column has {strange!r}: classes must be strings, "
            f"or integers from 0 to {MOST_CLASSES - 1} (-1 for none)"
        )
    return [str(number) for number in range(max(values) + 1)]


def _label(name: str, value: Any, classes: list[str]) -> int | None:
    """A row's class number, or None; a ValueError names a row with an unknown class."""
    if value is None or value == -1:
        return None
    number = classes.index(value) if value in classes else value
    if not isinstance(number, int) or not 0 <= number < len(classes):
        raise ValueError(
            f"{name} has the label {value!r}, but the classes are {', '.join(classes[:24])}"
        )
    return int(number)


def _item(name: str, value: Any, label: int | None, beside: Path, folders: Sequence[str]) -> Item:
    """Turns a row into an item; its value is bytes, or datasets' {bytes, path}.

    Raises a ValueError for a path outside of `folders`.
    """
    if isinstance(value, bytes):
        return Item(name, value, label)
    if isinstance(value, dict) and value.get("bytes") is not None:
        return Item(name, value["bytes"], label)
    if isinstance(value, dict) and value.get("path"):
        path = Path(os.path.normpath(beside.absolute() / value["path"]))
        if not any(
            path.is_relative_to(os.path.normpath(Path(folder).absolute())) for folder in folders
        ):
            raise ValueError(
                f"{name} refers to the file {value['path']}, "
                f"which is outside of the data set and is not read"
            )
        return item_of(name, path, label)._replace(beside=True)
    empty = value is None or isinstance(value, dict)
    return Item(
        name, b"", label, "no image" if empty else f"not an image but {type(value).__name__}"
    )
