"""The papers' figures and animations, for a network that needs no training."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ddpm.diffusion import schedules
from ddpm.diffusion.process import GaussianDiffusion
from ddpm.diffusion.samplers import Sampler, ancestral
from ddpm.sample import figures, images
from ddpm.sample.drawing import Drawing

SHAPE = (3, 4, 4)


class Mean(nn.Module):
    """Predicts x0 as a scaled neighboring pixel, so different noise gives different images."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x_t, t):
        return self.scale * x_t.roll(1, -1)


@pytest.fixture
def drawing():
    network = Mean()
    diffusion = GaussianDiffusion(schedules.linear(200, 1e-4, 0.1), prediction="x0")
    sampler = Sampler(lambda *walk: ancestral(*walk, "fixed_small"))
    return Drawing(network, diffusion, sampler, SHAPE, seed=0)


@pytest.fixture
def pair():
    return torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_progressive_shows_20_frames_of_which_the_last_is_the_sample(drawing):
    figure = figures.progressive(drawing, 3, None)
    assert figure.arrays["x0_hat"].shape == (3, 20, *SHAPE)
    # the last step of each window of ten
    assert figure.arrays["timesteps"].tolist() == list(range(190, -1, -10))
    np.testing.assert_array_equal(figure.arrays["x0_hat"][:, -1], drawing.images(range(3)).numpy())


def test_samples_that_share_a_latent_part_where_they_should(drawing):
    figure = figures.shared_latents(drawing, 3, None)
    assert figure.arrays["timesteps"].tolist() == [199, 149, 99, 49]
    assert figure.arrays["samples"].shape == (4, 3, *SHAPE)
    np.testing.assert_array_equal(figure.arrays["x_t"][0], drawing.latents([0]).numpy()[0])
    spread = figure.arrays["samples"].std(axis=1).mean(axis=(1, 2, 3))
    assert spread[-1] < spread[0]  # images that part later are more alike
    assert (spread > 0).all()


def test_interpolation_ends_at_the_two_reconstructions(drawing, pair):
    both = figures.interpolate(drawing, pair, None, 100).arrays["decoded"]
    assert both.shape == (11, *SHAPE)
    for end, source in ((0, pair[:1]), (-1, pair[1:])):
        alone = figures.interpolate(drawing, torch.cat([source, source]), None, 100)
        noise_of = {0: 0, -1: 1}[end]  # each source keeps its noise
        expected = alone.arrays["decoded"][0 if noise_of == 0 else -1]
        np.testing.assert_allclose(both[end], expected, atol=1e-6)
    assert np.abs(both[0] - both[-1]).max() > 0.05


def test_coarse_interpolation_goes_from_pixels_to_noise(drawing, pair):
    figure = figures.interpolate_coarse(drawing, pair, None)
    assert figure.arrays["steps"].tolist() == [200, 175, 150, 125, 100, 75, 50, 25, 0]
    np.testing.assert_allclose(
        figure.arrays["decoded"][-1][5], pair.numpy().mean(axis=0), atol=1e-6
    )
    assert (
        np.abs(figure.arrays["decoded"][-2][0] - pair[0].numpy()).max()
        < np.abs(figure.arrays["decoded"][0][0] - pair[0].numpy()).max()
    )


def test_a_gif_has_the_frames_and_the_time_it_was_asked_for(drawing, tmp_path):
    frames = figures.denoising(drawing, 4, None, frames=11)
    assert len(frames) == 11
    np.testing.assert_array_equal(
        frames[-1], images.grid(images.to_uint8(drawing.images(range(4))), least_width=256)
    )
    figures.save_gif(tmp_path / "a.gif", frames, seconds=2.2, hold=1.0)
    with Image.open(tmp_path / "a.gif") as gif:
        durations = []
        for index in range(gif.n_frames):
            gif.seek(index)
            durations.append(gif.info["duration"])
    assert sum(durations) == 3200
    assert durations[-1] == 1200
    assert [file.name for file in tmp_path.iterdir()] == ["a.gif"]


def test_a_figure_is_a_labelled_picture_with_its_arrays_beside_it(drawing, tmp_path):
    figure = figures.progressive(drawing, 2, None)
    figures.save_figure(tmp_path / "f.png", figure)
    sheet = images.read_png(tmp_path / "f.png")
    bare = images.grid(figure.rows[0], columns=20, least_width=64 * 20)
    assert sheet.shape[0] > 2 * bare.shape[0]
    assert sheet.shape[1] > bare.shape[1]
    np.testing.assert_array_equal(
        np.load(tmp_path / "f.npz")["timesteps"], figure.arrays["timesteps"]
    )


def test_training_progress_takes_previews_from_the_first_to_the_last(tmp_path):
    for step in range(100, 1100, 100):
        images.save_png(tmp_path / f"step_{step:08d}.png", np.full((4, 4, 1), step // 10, np.uint8))
    frames, figure = figures.over_training(sorted(tmp_path.glob("step_*.png")), frames=5)
    assert [int(frame[0, 0, 0]) for frame in frames] == [10, 30, 50, 70, 100]
    assert figure.columns == ["step 100", "step 400", "step 700", "step 1,000"]
    with pytest.raises(ValueError, match="grid_over_training"):
        figures.over_training([], 5)
