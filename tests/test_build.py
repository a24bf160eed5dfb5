import sys

import pytest
import torch

from ddpm.config import build
from ddpm.config.compose import compose
from ddpm.config.schema import training_config
from ddpm.runs.finding import locate
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


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The words that select a user's network that takes no classes."""
    (tmp_path / "own_net.py").write_text(
        "import torch\n\n\nclass Net(torch.nn.Module):\n"
        "    def __init__(self, resolution: int, in_channels: int, out_channels: int):\n"
        "        super().__init__()\n"
        "        self.conv = torch.nn.Conv2d(in_channels, out_channels, 3, padding=1)\n"
    )
    (tmp_path / "my" / "model").mkdir(parents=True)
    (tmp_path / "my" / "model" / "own.yaml").write_text(
        "# @package _global_\nmodel: {_target_: own_net.Net, resolution: 32, "
        "in_channels: '${data.channels}'}\noptimizer: {lr: 1e-3}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield lambda *words: training_config(
        compose(
            ["model=own", "runtime.trusted_modules=[own_net]", *words],
            config_dir=str(tmp_path / "my"),
        )
    )
    sys.modules.pop("own_net", None)


def test_a_network_of_ones_own_that_takes_no_classes_is_told_so_and_trains_without(own):
    build.check(own())
    with pytest.raises(
        ValueError,
        match=r"^training\.conditional=true: own_net\.Net takes no num_classes argument; "
        r"use another model, or training\.conditional=false to train",
    ):
        build.check(own("training.conditional=true"))


def test_a_run_of_a_network_of_ones_own_is_named_by_what_differs_from_the_papers_process(own):
    found = locate(own("schedule=cosine")).path.as_posix()
    assert found.startswith("outputs/Net-digits/cosine-")
    assert locate(own()).path.as_posix().startswith("outputs/Net-digits/recipe-")


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
