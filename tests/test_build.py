import pytest
import torch

from ddpm.config import build
from ddpm.config.compose import compose
from ddpm.config.schema import training_config
from ddpm.system import devices

CPU = torch.device("cpu")


def weights(*overrides: str) -> torch.Tensor:
    network = build.network(training_config(compose(overrides)), CPU, num_classes=10)
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


def test_the_first_weights_are_a_function_of_the_seed_alone():
    first = weights("seed=5")
    torch.manual_seed(123)
    assert torch.equal(weights("seed=5"), first)
    assert not torch.equal(weights("seed=6"), first)


def test_a_sampler_that_does_not_fit_the_schedule_is_refused_by_its_key():
    config = training_config(compose(["sampler.num_steps=60", "schedule.num_timesteps=50"]))
    with pytest.raises(ValueError, match=r"sampler\.num_steps=60 .*50"):
        build.check(config)


def test_a_device_that_is_not_here_is_refused_with_those_that_are():
    assert devices.device("auto").type in ("cpu", "cuda", "mps")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"device=cuda .* cpu"):
            devices.device("cuda")


def test_the_image_size_is_height_then_width():
    config = training_config(
        compose(["model.resolution=[16,24]", "model.attention_resolutions=[]"])
    )
    assert build.image_size(config.data) == (16, 24)
