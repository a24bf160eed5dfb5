"""A run's pictures: identifies them, and checks whether they are still the same."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ddpm.config import build
from ddpm.config.schema import Config
from ddpm.data.image_set import ImageSet
from ddpm.data.listing import differences, read_through
from ddpm.data.shards import Source
from ddpm.data.sources import without_network
from ddpm.runs.folder import RunFolder
from ddpm.system.devices import cores
from ddpm.system.files import write_text

FILE = "pictures.jsonl"


def with_pictures(config: Config) -> tuple[Config, Source | None]:
    """Adds the fingerprint of the pictures to the configuration if they are part of the identity.

    They are with data=folder.

    Returns:
        The configuration, and the pictures' source, to save another scan; None for other data.

    Raises:
        ValueError: If there are no pictures; the message names data.path.
    """
    if config.data.name != "folder":
        return config, None
    source = build.source(config)
    found = source.listing or read_through(source, cores())
    return config.model_copy(update={"pictures": found.fingerprint}), source


def moved(config: Config, path: str | None) -> Config:
    """Returns a run's configuration with a new location of its pictures.

    Args:
        config: The run's configuration.
        path: The new data.path; None keeps the old one.

    Raises:
        ValueError: If the run's data set has no data.path.
    """
    if path is None:
        return config
    if "path" not in config.data.source:
        raise ValueError(
            f"data.path={path}: data={config.data.name} brings its own pictures, leave it out"
        )
    changed = {"path": path, "source": {**config.data.source, "path": path}}
    return config.model_copy(update={"data": config.data.model_copy(update=changed)})


def check(
    run: RunFolder,
    fingerprint: str,
    source: Source | None,
    advice: str = "put them back, or start anew with another outputs=",
) -> None:
    """Refuses pictures that are not the run's.

    Args:
        run: The run's folder.
        fingerprint: The fingerprint of the pictures to check.
        source: Their source, if they are on this machine.
        advice: What the user can do, for the error message.

    Raises:
        ValueError: If they differ; the message says what was added, removed or changed, if known.
    """
    before = (run.record().get("data") or {}).get("fingerprint")
    if not before or before == fingerprint:
        return
    listing = None if source is None else source.listing
    where = "" if source is None or source.root is None else f" below {source.root}"
    more = ""
    if listing is not None and (run.path / FILE).is_file():
        kept = (run.path / FILE).read_text(encoding="utf-8")
        more = f"; {differences(kept, listing.as_lines())}"
    raise ValueError(
        f"the pictures{where} are not those of {run.path}{more} (fingerprint {fingerprint}, was "
        f"{before}): {advice}"
    )


def check_here(config: Config, run: RunFolder, source: Source | None) -> str | None:
    """Refuses pictures that are not the run's, if they are on this machine; downloads nothing.

    Args:
        config: The run's configuration.
        run: The run's folder.
        source: The pictures' source, if it was built already.

    Returns:
        Why the pictures could not be compared; None if they were.

    Raises:
        ValueError: If they differ.
    """
    path = config.data.path
    if path is not None and not Path(path).expanduser().exists():
        return f"data.path={path} is not here"
    hub = "repo" in config.data.source and path is None
    try:
        with without_network() if hub else nullcontext():
            source = source or build.source(config)
    except ValueError as error:
        if path is not None:
            raise
        return str(error)
    if (run.record().get("data") or {}).get("stamp") != source.stamp:
        listing = source.listing or read_through(source, cores())
        check(run, listing.fingerprint, source)
    return None


def of_run(run: RunFolder, config: Config) -> ImageSet:
    """Returns the pictures of an existing run.

    Args:
        run: The run's folder.
        config: The run's configuration, with the current data.path (see `moved`).

    Raises:
        ValueError: If they are missing, or are not the run's.
    """
    source = build.source(config)
    found = build.images(config, source, workers=1)
    check(run, found.fingerprint, source, "set data.path=DIR to the folder that has them")
    return found


def about(config: Config, source: Source) -> dict[str, Any]:
    """Returns the entries of run.json on the pictures' location and state."""
    path = config.data.path
    return {"path": None if path is None else place_of(path), "stamp": source.stamp}


def place_of(path: str) -> str:
    """Returns the absolute path that data.path stands for on this machine."""
    return str(Path(path).expanduser().resolve())


def write_down(run: RunFolder, source: Source) -> None:
    """Writes the list of a run's pictures to its folder, if they are on this machine."""
    if source.listing is not None:
        write_text(run.path / FILE, source.listing.as_lines())
