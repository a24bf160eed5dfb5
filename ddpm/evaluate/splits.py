"""The splits of a run's data that its figures are measured on."""

import functools
import hashlib
from pathlib import Path

from ddpm.config import build
from ddpm.config.schema import Config, Split
from ddpm.data.image_set import ImageSet
from ddpm.evaluate import reference
from ddpm.evaluate.features import Extractor
from ddpm.evaluate.reference import Reference
from ddpm.runs import pictures
from ddpm.runs.folder import RunFolder
from ddpm.sample.subject import Trained
from ddpm.system.files import short_hash


class Splits:
    """The splits of a run's data, read on demand."""

    def __init__(self, trained: Trained, data: ImageSet | None) -> None:
        self.config = trained.config
        self._run, self._data = trained.run, data
        self._found: dict[str, ImageSet] = {}

    @functools.cached_property
    def fingerprint(self) -> str:
        """The fingerprint of the run's pictures, read from its record if that has one."""
        known = (self._run.record().get("data") or {}).get("fingerprint")
        return known or self.of("train").fingerprint

    def of(self, split: Split) -> ImageSet:
        """Returns the pictures of a split.

        Raises:
            ValueError: If the data has no such split.
        """
        if split not in self._found:
            if split in ("validation", "test"):
                config = _of_source_split(self.config, split)
                found = build.images(config, build.source(config), workers=1)
                self._found[split] = _with_the_classes(self._run, config, found, split)
                return self._found[split]
            self._data = self._data or pictures.of_run(self._run, self.config)
            train, held_out = self._data.split(self.config.data.holdout)
            if split == "heldout" and not len(held_out):
                raise ValueError(
                    "this run has no split heldout: "
                    "train with data.holdout=0.1 to hold pictures out"
                )
            self._found[split] = held_out if split == "heldout" else train
        return self._found[split]

    def reference(self, split: Split, extractor: Extractor) -> Reference:
        """Returns the reference of a split, cached by content, decoding and extractor."""
        images, data = self.of(split), self.config.data
        about = [data.holdout, data.resolution, data.channels, data.crop, data.background]
        about += [] if data.resize == "bicubic" else [data.resize]  # older files have no resize
        chosen = hashlib.sha256(images.digests.tobytes()).hexdigest()
        layout = ["moments", reference.KEPT]  # what the file holds
        digest = short_hash(
            [images.fingerprint, chosen, split, extractor.version, data.white, *about, *layout]
        )
        cache = self.folder / f"{extractor.name}-{digest}.npz"
        return reference.of_pictures(reference.blocks_of(images), len(images), extractor, cache)

    @property
    def folder(self) -> Path:
        """The folder that caches references."""
        return Path(self.config.data.cache) / "features"


def _of_source_split(config: Config, split: Split) -> Config:
    if "split" not in config.data.source:
        raise ValueError(
            f"data={config.data.name} has no {split} split; "
            "train with data.holdout=0.1 and use the split heldout"
        )
    source = {**config.data.source, "split": split}
    return config.model_copy(update={"data": config.data.model_copy(update={"source": source})})


def _with_the_classes(run: RunFolder, config: Config, found: ImageSet, split: str) -> ImageSet:
    """The pictures of another split; a ValueError if a conditional network has other classes."""
    if config.training.conditional and found.classes != run.classes():
        raise ValueError(
            f"the split {split} has {len(found.classes)} classes, not the {len(run.classes())} "
            "that the network was trained with: its folders or columns must name the same classes"
        )
    return found
