"""The pictures of a run: what they are, whether they are still the same, what differs."""

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
    """Returns the configuration with the fingerprint of its pictures, where they name the run.

    That is for data=folder. Their source comes with it, so that nobody has to look again.

    Raises:
        ValueError: If there are none, naming data.path.
    """
    if config.data.name != "folder":
        return config, None
    source = build.source(config)
    found = source.listing or read_through(source, cores())
    return config.model_copy(update={"pictures": found.fingerprint}), source


def moved(config: Config, path: str | None) -> Config:
    """Returns the configuration of a run whose pictures lie elsewhere now; None for the same place.

    Raises:
        ValueError: If its data set has no place.
    """
    if path is None:
        return config
    if "path" not in config.data.source:
        raise ValueError(f"data.path={path}: data={config.data.name} has pictures of its own")
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
        run: Its folder.
        fingerprint: Of the pictures that are here.
        source: Where they are from, if they lie on this machine.
        advice: What a user can do.

    Raises:
        ValueError: If they are others; it names what was added, removed or changed, where that is
            known.
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
    """Refuses pictures that are not a run's, as far as they are on this machine.

    Nothing is downloaded.

    Args:
        config: The run's configuration.
        run: Its folder.
        source: The pictures, if they were looked at already.

    Returns:
        Why nothing could be compared, None if it was.

    Raises:
        ValueError: If they are others.
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
    """Returns the pictures of a run that was started before.

    Args:
        run: Its folder.
        config: Its configuration, with data.path where they lie now (`moved`).

    Raises:
        ValueError: If they are not here, or are not the run's.
    """
    source = build.source(config)
    found = build.images(config, source, workers=1)
    check(run, found.fingerprint, source, "give data.path=DIR, where they lie")
    return found


def about(config: Config, source: Source) -> dict[str, Any]:
    """Returns what run.json says of where the pictures lie, and what they are there."""
    path = config.data.path
    return {"path": None if path is None else place_of(path), "stamp": source.stamp}


def place_of(path: str) -> str:
    """Returns where data.path leads on this machine, whatever was typed."""
    return str(Path(path).expanduser().resolve())


def write_down(run: RunFolder, source: Source) -> None:
    """Keeps in a run's folder which pictures it has, where they lie on this machine."""
    if source.listing is not None:
        write_text(run.path / FILE, source.listing.as_lines())
