"""One call of ddpm.compare: find the runs, print the table, and write what is asked for."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from omegaconf import OmegaConf
from pydantic import Field

from ddpm.compare import plots, tables
from ddpm.config import build
from ddpm.config.compose import Composed
from ddpm.config.schema import plain_config
from ddpm.config.validation import Count, Section, check_node, validated
from ddpm.runs import checkpoint, results
from ddpm.runs.results import Compared
from ddpm.sample import figures, images
from ddpm.sample.drawing import Drawing
from ddpm.system import devices
from ddpm.system.files import write_whole


class CompareConfig(Section):
    """What to compare. See conf/compare.yaml for each key."""

    runs: str | list[str] | None
    to: str | None
    plot: bool
    grid: bool
    weights: Literal["ema", "raw"]
    num_samples: Count
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    device: Literal["auto", "cpu", "cuda", "mps"]
    outputs: str
    trusted_modules: list[str]

    @classmethod
    def of(cls, composed: Composed) -> "CompareConfig":
        """The settings of one call, checked.    Raises ValueError, one line."""
        cfg = OmegaConf.masked_copy(composed.cfg, [str(key) for key in composed.cfg if key != "sampler"])
        return validated(cls, plain_config(Composed(cfg, composed.choices, composed.overrides)))


def carry_out(config: CompareConfig, composed: Composed, width: int) -> None:
    """Print the table, for a terminal of so many columns; write it and the pictures into a folder, and print where.

    composed: its group `sampler` draws the grid, with each run's own variance.    Raises ValueError, one line, if there is no run at all.
    """
    runs, empty = tables.find(config.runs, config.outputs)
    for given in empty:
        print(f"warning: {given}: no run there", file=sys.stderr, flush=True)
    compared = [results.read(run) for run in runs]
    if isinstance(config.runs, str):  # a list keeps its order
        compared = tables.ordered(compared)
    table = tables.listing(compared) if config.runs is None else tables.rows(compared)
    print(tables.text(table, width))
    if config.runs is not None:
        seeds = tables.over_seeds(compared)
        if seeds:
            print(f"\nover seeds\n{tables.text(seeds, width)}")
        for one in compared:
            if one.status in ("failed", "preempted"):
                print(f"\n{one.run.path} {one.status}: {one.record.get('error')}")
    folder = Path(config.to) if config.to is not None else Path(config.outputs) / "comparison"
    if config.to is not None:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "table.csv", tables.as_csv(table))
        write_whole(folder / "table.json", tables.as_json(compared))
        print(f"table {folder / 'table.csv'}", flush=True)
    if config.grid:
        path = folder / "grid.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        images.save_png(path, draw(config, composed, compared))
        print(f"grid {path}", flush=True)
    if config.plot:
        plots.plot(folder / "loss.png", compared)
        print(f"plot {folder / 'loss.png'}", flush=True)


def draw(config: CompareConfig, composed: Composed, compared: Sequence[Compared]) -> np.ndarray:
    """A row of samples for each run, a column for each noise: (H, W, 3) uint8. Networks of the same image size start from the same noise.

    A run that cannot be drawn from is left out, and named with the reason.    Raises ValueError, one line, if none can.
    """
    device = devices.device(config.device)
    drawn: list[np.ndarray] = []
    labels: list[str] = []
    for one, settings in zip(compared, tables.differences(compared), strict=True):
        try:
            drawn.append(_samples(config, composed, one, device))
            labels.append(tables.label(settings))
        except ValueError as error:
            print(f"warning: {one.run.path} has no row in the grid: {error}", file=sys.stderr, flush=True)
    if not drawn:
        raise ValueError("grid=true: none of these runs can be drawn from")
    height, width = (max(row.shape[side] for row in drawn) for side in (1, 2))
    rows = [np.stack([_resized(image, height, width) for image in row]) for row in drawn]
    heads = [f"noise {index}" for index in range(config.num_samples)]
    return figures.labelled(figures.Figure(rows, labels, heads, {}))


def _samples(config: CompareConfig, composed: Composed, one: Compared, device: torch.device) -> np.ndarray:
    trained = one.run.config(config.trusted_modules)
    found = checkpoint.find(one.run.checkpoints)
    node: dict[str, Any] = plain_config(Composed(OmegaConf.create({"sampler": composed.cfg.sampler, "objective": trained.objective}), {}, []))["sampler"]
    check_node("sampler", node, config.trusted_modules)
    diffusion, names = build.diffusion(trained), one.run.classes()
    network = build.network(trained, device, len(names))
    weights = {name: tensor.to(device) for name, tensor in found.weights(config.weights).items()}
    shape = (trained.data.channels, *build.image_size(trained.data))
    drawing = Drawing(network, weights, diffusion, build.sampler(node, diffusion), shape, config.seed, build.any_class(trained, len(names)))
    indices = range(config.num_samples)
    return images.to_uint8(drawing.images(indices, [index % len(names) for index in indices] if trained.training.conditional else None))


def _resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W, C) uint8 as (height, width, 3), each pixel as it is."""
    picture = images.to_picture(image).convert("RGB").resize((width, height), resample=0)
    return np.asarray(picture)
