"""Reads pictures at a local path: image files, parquet files or a folder saved by `datasets`."""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from ddpm.data.decoding import HEIC_SUFFIXES, SUFFIXES, looks_like_a_picture
from ddpm.data.shards import Item, Source, in_shard, item_of, shard_counts, some
from ddpm.data.tables import NoImages, of_arrow, of_parquet
from ddpm.system.bounded import open_file, read_file

MOST_JSON = 50_000_000  # bytes, at most, of one JSON file in a saved folder
SPLITS = {  # name of a folder, or word in the name of a file -> split
    **{"train": "train", "training": "train", "test": "test", "testing": "test"},
    **{"val": "validation", "valid": "validation", "validation": "validation", "dev": "validation"},
}


def local(
    path: str, image_column: str | None, label_column: str | None, split: str = "train"
) -> Source:
    """Returns the source at a local path.

    The path holds a saved arrow folder, parquet files or image files. `split` selects one of its
    splits, or several as `a+b`: those of a saved folder, or parquet files and top-level folders
    named after splits. Columns not given are detected: the first one of images, and one of class
    labels.

    Raises:
        ValueError: If nothing can be read; the message names data.path.
    """
    root = Path(path).expanduser()
    if not root.exists():
        raise ValueError(f"data.path={path} does not exist")
    if not (root.is_file() or root.is_dir()):
        raise ValueError(f"data.path={path} is neither a file nor a folder")
    if (root / "state.json").is_file() or (root / "dataset_dict.json").is_file():
        return _saved(root, image_column, label_column, split, path)
    # strings, not Paths: creating a hundred thousand Paths takes seconds
    alone = root.is_file()
    root, names = (root.parent, [root.name]) if alone else (root, _below(root))
    parquet = {  # name -> the splits that it tells; ignored for a file that the user gave by name
        name: set() if alone else _splits_of_name(name)
        for name in names
        if _suffix(name) == ".parquet"
    }
    tops = _splits(names, parquet, split, path)
    chosen = [name for name in names if not tops or name.partition("/")[0] in tops]
    pictures, others = _told_apart(root, [name for name in chosen if _suffix(name) != ".parquet"])
    if parquet:
        try:
            return _of_parquet(root, parquet, image_column, label_column, split, pictures)
        except NoImages:
            if not pictures:
                raise
            others.setdefault("without pictures in them", []).extend(parquet)
    if not pictures:
        kinds = f" (found {_in_words(others)})" if others else ""
        raise ValueError(
            f"data.path={path} has no images{kinds}; give a folder with image files, "
            "parquet files, or a saved arrow folder"
        )
    return _files(root, pictures, tops, others)


def _saved(
    root: Path, image_column: str | None, label_column: str | None, split: str, path: str
) -> Source:
    """The source of a folder that `datasets` saved."""
    import datasets
    import pyarrow as pa

    try:
        _check_saved(root)
        saved = datasets.load_from_disk(str(root))
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise ValueError(
            f"data.path={path} is not a complete folder saved by datasets "
            f"({str(error).splitlines()[0]})"
        ) from error
    if isinstance(saved, datasets.DatasetDict):
        missing = [name for name in split.split("+") if name not in saved]
        if missing:
            raise ValueError(
                f"data.path={path} has no split {missing[0]}; it has {', '.join(saved)}"
            )
        saved = datasets.concatenate_datasets([saved[name] for name in split.split("+")])
    found = of_arrow(saved, image_column, label_column, [str(root)], where=path, stamp=split)
    tables = [file.relative_to(root).as_posix() for file in sorted(root.rglob("*.arrow"))]
    return replace(found, root=root, files=tables)


def _check_saved(root: Path) -> None:
    """Rejects files that `datasets` would wait on forever, or read whole whatever their size."""
    for file in root.rglob("*"):
        if file.suffix == ".json":
            read_file(file, MOST_JSON)
        elif not file.is_dir():
            open_file(file).close()


def _below(root: Path) -> list[str]:
    """Names of all files below root, following links to folders and skipping hidden ones."""
    found: list[str] = []

    def walk(folder: str, prefix: str, above: frozenset[tuple[int, int]]) -> None:
        status = Path(folder).stat()
        here = (status.st_dev, status.st_ino)
        if here in above:  # a link back to a parent folder
            return
        try:
            entries = list(os.scandir(folder))
        except PermissionError:
            raise ValueError(f"data.path: {folder} cannot be read (permission denied)") from None
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if _answers(entry.is_dir):
                walk(entry.path, f"{prefix}{entry.name}/", above | {here})
            elif _answers(entry.is_file) or _leads_nowhere(entry):  # skips pipes and links to them
                found.append(prefix + entry.name)

    walk(str(root), "", frozenset())
    return sorted(found, key=lambda name: name.split("/"))


def _answers(question: Callable[[], bool]) -> bool:
    """The answer; False for a circular link."""
    try:
        return question()
    except OSError:
        return False


def _leads_nowhere(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_symlink() and not Path(entry.path).exists()
    except OSError:  # a circular link
        return True


def _suffix(name: str) -> str:
    last = name.rpartition("/")[2]
    dot = last.rfind(".")
    return last[dot:].lower() if 0 < dot < len(last) - 1 else ""


def _splits(
    names: Sequence[str], parquet: Mapping[str, set[str]], split: str, path: str
) -> list[str]:
    """The top-level folders of a split, if all top-level folders are named after splits."""
    wanted = {SPLITS.get(name, name) for name in split.split("+")}
    tops = sorted({name.partition("/")[0] for name in names if "/" in name})
    if not tops or not all(top.lower() in SPLITS for top in tops):
        if "train" not in wanted and not any(parquet.values()):
            raise ValueError(f"data.path={path} has no split {split}: it is one set without splits")
        return []
    chosen = [top for top in tops if SPLITS[top.lower()] in wanted]
    if not chosen:
        raise ValueError(f"data.path={path} has no split {split}; it has {', '.join(tops)}")
    return chosen


def _splits_of_name(name: str) -> set[str]:
    """The splits that a parquet file's name mentions."""
    words = re.split(r"[^A-Za-z0-9]+", name.lower())
    return {SPLITS[word] for word in words if word in SPLITS}


def _told_apart(root: Path, names: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """The picture files, judged by suffix or content, and all other files by kind."""
    pictures: list[str] = []
    others: dict[str, list[str]] = {}
    for name in names:
        suffix = _suffix(name)
        if (
            suffix in SUFFIXES
            or suffix in HEIC_SUFFIXES
            or looks_like_a_picture(_start(root, name))
        ):
            pictures.append(name)
        else:
            others.setdefault(f"{suffix or 'without a suffix'}, not pictures", []).append(name)
    return pictures, others


def _start(root: Path, name: str) -> bytes:
    """A file's first 64 bytes; empty if it cannot be read."""
    try:
        with open_file(root / name) as content:
            return content.read(64)
    except (OSError, ValueError):
        return b""


def _in_words(others: dict[str, list[str]]) -> str:
    return ", ".join(f"{len(names)} {kind}" for kind, names in others.items())


def _of_parquet(
    root: Path,
    parquet: Mapping[str, set[str]],
    image_column: str | None,
    label_column: str | None,
    split: str,
    pictures: list[str],
) -> Source:
    """The rows of the parquet files of a split, judging by the files' names."""
    wanted = {SPLITS.get(name, name) for name in split.split("+")}
    chosen = [name for name, told in parquet.items() if wanted & told]
    if not chosen and "train" in wanted:
        chosen = [name for name, told in parquet.items() if not told]
    if not chosen:
        raise ValueError(f"data.path={root} has no split {split}; it has {', '.join(parquet)}")
    found = of_parquet(root, chosen, image_column, label_column)
    if not pictures:
        return found
    return replace(found, others={"beside parquet files, which are used instead": pictures})


def _files(root: Path, names: list[str], splits: list[str], others: dict[str, list[str]]) -> Source:
    """The source of picture files; top-level folders, or those right below a split, are classes."""
    parts = [name.split("/")[1 if splits else 0 :] for name in names]
    tops = [part[0] if len(part) > 1 else None for part in parts]
    classes = sorted({top for top in tops if top is not None})
    numbers = {name: number for number, name in enumerate(classes)}
    labels = [None if top is None else numbers[top] for top in tops]
    notes = []
    if splits:
        notes.append(f"the folders in {root} are splits, not classes; using {', '.join(splits)}")
    stray = [name for name, top in zip(names, tops, strict=True) if top is None]
    if classes and stray:
        notes.append(f"outside of the class folders {some(classes)}, so no class: {some(stray)}")
    empty = {
        entry.name
        for top in splits or ["."]
        for entry in os.scandir(root / top)
        if entry.name[0] != "." and _answers(entry.is_dir)
    } - set(classes)
    if classes and empty:
        notes.append(f"no pictures in {some(sorted(empty))}")
    return Source(
        shard_counts(len(names)),
        partial(_read_files, str(root), names, labels),
        classes,
        stamp="",
        notes=notes,
        others=others,
        root=root,
        files=names,
        labels=labels,
    )


def _read_files(
    root: str, names: Sequence[str], labels: Sequence[int | None], shard: int
) -> Iterator[Item]:
    for name, label in zip(in_shard(names, shard), in_shard(labels, shard), strict=True):
        yield item_of(name, Path(root) / name, label)
