"""The papers' figures, each a labeled picture and the arrays behind it, and animations."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ddpm.diffusion.samplers import step_noise
from ddpm.sample import images
from ddpm.sample.drawing import Drawing
from ddpm.system.devices import memory_format
from ddpm.system.files import whole, write_arrays
from ddpm.system.text import shown

FRAMES = 20  # per image, in Fig. 6
SHARES = (1.0, 0.75, 0.5, 0.25)  # where the samples of Fig. 7 split, as shares of T


class Figure(NamedTuple):
    """Labeled rows of images.

    Attributes:
        rows: The images of each row, (B, H, W, C) uint8.
        labels: One label per row.
        columns: Column heads.
        arrays: The arrays behind the figure, by name; in [-1, 1] unless the name says otherwise.
    """

    rows: list[np.ndarray]
    labels: list[str]
    columns: list[str]
    arrays: dict[str, np.ndarray]


def progressive(drawing: Drawing, count: int, classes: Sequence[int] | None) -> Figure:
    """Shows x0_hat over the reverse process (Ho et al. 2020, Fig. 6).

    The chain is cut into FRAMES equal windows of steps, fewer if it has fewer steps. Each frame
    shows the last step of its window; the last frame is the sample itself.

    Args:
        drawing: The network and sampler to draw with.
        count: Number of images, one row each.
        classes: One class per image; None for a network without classes.
    """
    visited, frames = drawing.timesteps, FRAMES
    kept = (
        {
            visited[(index + 1) * len(visited) // frames - 1]
            for index in range(min(frames, len(visited)))
        }
        if len(visited) >= frames
        else set(visited)
    )
    chains, sample = drawing.chains(range(count), classes, kept)
    found = {t: x0_hat for t, (_, x0_hat) in chains.items()}
    found[min(found)] = sample
    order = sorted(found, reverse=True)
    stacked = torch.stack([found[t] for t in order], dim=1)  # (image, frame, C, H, W)
    arrays = {"x0_hat": stacked.cpu().numpy(), "timesteps": np.array(order)}
    return Figure(
        [images.to_uint8(row) for row in stacked],
        [f"image {index}" for index in range(count)],
        [f"t={t + 1}" for t in order],
        arrays,
    )


def shared_latents(drawing: Drawing, count: int, classes: Sequence[int] | None) -> Figure:
    """Shows samples that share the first part of their chain (Ho et al. 2020, Fig. 7).

    There is one row per timestep where they split: the visited ones nearest to SHARES of T. A row
    has x_t first, then `count` samples.

    Args:
        drawing: The network and sampler to draw with.
        count: Samples per row.
        classes: Classes, of which all images take the first; None for a network without classes.
    """
    visited, num_timesteps = drawing.timesteps, drawing.diffusion.num_timesteps
    splits = [_nearest(visited, round(share * num_timesteps) - 1) for share in SHARES]
    one = None if classes is None else classes[:1]
    chains, _ = drawing.chains([0], one, set(splits))
    found = {t: x_t for t, (x_t, _) in chains.items()}
    branches = range(count)
    rows, samples = [], []
    for split in splits:
        # each branch gets its own noise from here on
        noise = step_noise(drawing.shape, branches, drawing.seed + 1, drawing.device)
        x = found[split].expand(count, -1, -1, -1)
        x = x.contiguous(memory_format=memory_format(drawing.device))
        drawn = drawing.walk(
            x, [t for t in visited if t <= split], noise, None if one is None else [one[0]] * count
        )
        samples.append(drawn.cpu().numpy())
        rows.append(images.to_uint8(torch.cat([found[split], drawn])))
    arrays = {
        "x_t": np.stack([found[split].cpu().numpy()[0] for split in splits]),
        "samples": np.stack(samples),
        "timesteps": np.array(splits),
    }
    return Figure(
        rows,
        [f"split at t={split + 1}" for split in splits],
        ["x_t", *(f"{branch}" for branch in branches)],
        arrays,
    )


def interpolate(drawing: Drawing, pair: Tensor, classes: Sequence[int] | None, t: int) -> Figure:
    """Interpolates between two images (Ho et al. 2020, Fig. 8).

    Both are noised to x_t, mixed linearly, and denoised with the same noise for every lambda.
    Lambda 0 and 1 are the two reconstructions.

    Args:
        drawing: The network and sampler to draw with.
        pair: (2, C, H, W) in [-1, 1].
        classes: Classes of the two images; None for a network without classes.
        t: Diffusion steps in [1, T]; the nearest visited timestep is used.
    """
    shares = [index / 10 for index in range(11)]
    decoded, used = _mixed(drawing, pair, classes, t, shares)
    row = torch.cat([pair[:1], decoded, pair[1:]])
    arrays = {
        "sources": pair.cpu().numpy(),
        "decoded": decoded.cpu().numpy(),
        "lambdas": np.array(shares),
    }
    return Figure(
        [images.to_uint8(row)],
        [f"t={used}"],
        ["source", *(f"{share:.1f}" for share in shares), "source"],
        arrays,
    )


def interpolate_coarse(drawing: Drawing, pair: Tensor, classes: Sequence[int] | None) -> Figure:
    """Interpolates from coarse to fine (Ho et al. 2020, Fig. 9); see `interpolate`.

    There is one row for each of nine numbers of diffusion steps, from T down to 0. At 0 the pixels
    themselves are mixed.
    """
    shares = [index / 10 for index in range(11)]
    rows, decoded, steps = [], [], []
    for part in range(8, -1, -1):
        t = part * drawing.diffusion.num_timesteps // 8
        mixed, used = (
            _mixed(drawing, pair, classes, t, shares)
            if t
            else (torch.cat([(1 - share) * pair[:1] + share * pair[1:] for share in shares]), 0)
        )
        rows.append(images.to_uint8(torch.cat([pair[:1], mixed, pair[1:]])))
        decoded.append(mixed.cpu().numpy())
        steps.append(used)
    arrays = {
        "sources": pair.cpu().numpy(),
        "decoded": np.stack(decoded),
        "lambdas": np.array(shares),
        "steps": np.array(steps),
    }
    return Figure(
        rows,
        [f"{step} steps" for step in steps],
        ["source", *(f"{share:.1f}" for share in shares), "source"],
        arrays,
    )


def _mixed(
    drawing: Drawing, pair: Tensor, classes: Sequence[int] | None, t: int, shares: Sequence[float]
) -> tuple[Tensor, int]:
    """Returns images decoded from mixtures of the pair at t steps, and the steps really taken."""
    index = _nearest(drawing.timesteps, t - 1)
    pair = pair.to(drawing.device)
    x_t = drawing.diffusion.q_sample(
        pair, torch.full((2,), index, device=drawing.device), drawing.latents(range(2))
    )
    x = torch.cat([(1 - share) * x_t[:1] + share * x_t[1:] for share in shares])
    x = x.contiguous(memory_format=memory_format(drawing.device))
    one = step_noise(drawing.shape, [0], drawing.seed, drawing.device)

    def same(t: int) -> Tensor:
        return one(t).expand(len(shares), -1, -1, -1)

    chosen = (
        None
        if classes is None
        else [classes[0 if share < 0.5 else 1 % len(classes)] for share in shares]
    )
    return drawing.walk(
        x, [visited for visited in drawing.timesteps if visited <= index], same, chosen
    ), index + 1


def _nearest(timesteps: Sequence[int], wanted: int) -> int:
    return min(timesteps, key=lambda t: abs(t - wanted))


def denoising(
    drawing: Drawing, count: int, classes: Sequence[int] | None, frames: int
) -> list[np.ndarray]:
    """Draws grids of x_t at evenly spaced timesteps of the chain, and then of the samples.

    Args:
        drawing: The network and sampler to draw with.
        count: Number of images.
        classes: One class per image; None for a network without classes.
        frames: Number of grids, including the samples; fewer if the chain is shorter.

    Returns:
        The grids, each (H, W, C) uint8.
    """
    visited = drawing.timesteps
    wanted = min(frames - 1, len(visited))
    kept = {visited[index * len(visited) // wanted] for index in range(wanted)}
    chains, sample = drawing.chains(range(count), classes, kept)
    shown = [*(chains[t][0] for t in visited if t in chains), sample]
    # smaller than still pictures, since noise does not compress
    return [images.grid(images.to_uint8(x), least_width=256) for x in shown]


def save_gif(path: Path, frames: Sequence[np.ndarray], seconds: float, hold: float) -> None:
    """Writes a looping GIF of (H, W, C) uint8 frames.

    Args:
        path: The file to write.
        frames: The frames.
        seconds: Duration of all frames together.
        hold: Extra seconds for the last frame.
    """
    each = max(20, round(1000 * seconds / len(frames)))
    pictures = [images.to_picture(frame) for frame in frames]
    durations = [each] * (len(frames) - 1) + [each + round(1000 * hold)]
    with whole(path) as scratch:
        pictures[0].save(
            scratch,
            format="GIF",
            save_all=True,
            append_images=pictures[1:],
            duration=durations,
            loop=0,
        )


def save_figure(path: Path, figure: Figure) -> None:
    """Writes the figure as a labeled PNG, and its arrays as an .npz next to it."""
    images.save_png(path, draw_labels(figure))
    write_arrays(path.with_suffix(".npz"), **figure.arrays)


LONGEST = 120  # characters per label


def draw_labels(figure: Figure) -> np.ndarray:
    """Returns the rows below one another with labels and column heads, (H, W, C) uint8."""
    labels = [shown(label)[:LONGEST] for label in figure.labels]
    sheets = [images.grid(row, columns=len(row), least_width=64 * len(row)) for row in figure.rows]
    top, (height, width, channels) = 18, sheets[0].shape
    left = max(110, *(round(ImageFont.load_default().getlength(label)) + 12 for label in labels))
    sheet = Image.new(
        "L" if channels == 1 else "RGB", (left + width, top + height * len(sheets)), "white"
    )
    draw = ImageDraw.Draw(sheet)
    for column, head in enumerate(figure.columns):
        draw.text(
            (left + (column + 0.5) * width / len(figure.columns), top / 2),
            shown(head)[:LONGEST],
            fill="black",
            anchor="mm",
        )
    for row, (label, picture) in enumerate(zip(labels, sheets, strict=True)):
        sheet.paste(images.to_picture(picture), (left, top + row * height))
        draw.text((left / 2, top + (row + 0.5) * height), label, fill="black", anchor="mm")
    pixels = np.asarray(sheet)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def over_training(previews: Sequence[Path], frames: int) -> tuple[list[np.ndarray], Figure]:
    """Shows how samples from the same noise change in training, from a run's preview grids.

    Args:
        previews: The preview files in order, such as step_00000900.png.
        frames: Maximum number of frames of the GIF.

    Returns:
        The frames of a GIF, and a strip of up to four previews.

    Raises:
        ValueError: If there are no previews.
    """
    if not previews:
        raise ValueError(
            "figure=grid_over_training needs the run's samples/step_*.png, but there are none"
        )
    chosen = (
        [
            previews[index * (len(previews) - 1) // max(frames - 1, 1)]
            for index in range(min(frames, len(previews)))
        ]
        if len(previews) > frames
        else list(previews)
    )
    shown = (
        [previews[index * (len(previews) - 1) // 3] for index in range(4)]
        if len(previews) > 4
        else list(previews)
    )
    grids = {path: images.read_png(path) for path in {*chosen, *shown}}
    strip = np.stack([grids[path] for path in shown])
    heads = [f"step {int(path.stem.removeprefix('step_')):,}" for path in shown]
    return [grids[path] for path in chosen], Figure(
        [strip], ["same noise"], heads, {"grids_uint8": strip}
    )
