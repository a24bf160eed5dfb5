"""An image depends only on the run, its number and its class."""

import pytest
import torch
from torch import nn

from ddpm.diffusion.process import GaussianDiffusion
from ddpm.diffusion.samplers import Sampler, ddim
from ddpm.diffusion.schedules import linear
from ddpm.sample.drawing import Drawing


class Net(nn.Module):
    """A network that runs out of memory with more than `room` images."""

    def __init__(self, room):
        super().__init__()
        self.scale, self.room = nn.Parameter(torch.tensor(0.5)), room

    def forward(self, x, t, classes):
        if len(x) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.scale * x + classes[:, None, None, None]


def drawing(room):
    net, diffusion = (
        Net(room),
        GaussianDiffusion(
            linear(1000, 1e-4, 0.02), prediction="epsilon", variance="fixed_small", loss="simple"
        ),
    )
    return Drawing(net, diffusion, Sampler(ddim, num_steps=3), (1, 4, 4), seed=0)


@torch.no_grad()
def test_images_that_do_not_fit_the_memory_together_are_drawn_in_parts():
    indices, classes = range(2, 13), list(range(11))
    assert torch.equal(
        drawing(room=3).images(indices, classes), drawing(room=11).images(indices, classes)
    )


def test_one_image_too_many_is_an_error():
    with pytest.raises(torch.OutOfMemoryError):
        drawing(room=0).images([0], [0])
