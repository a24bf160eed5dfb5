"""The options in conf/, and the runs that the README and the first paper name."""

import numpy as np
import pytest
import torch

from ddpm.config import build
from ddpm.config.compose import CONF, compose
from ddpm.config.schema import training_config
from ddpm.data.batches import Batches
from ddpm.runs.finding import locate

OPTIONS = [
    f"{group}={file.stem}"
    for group in compose([]).choices
    if group != "experiment"
    for file in sorted((CONF / group).glob("*.yaml"))
]
PLAIN = {
    "butterflies128": ["model=unet128", "data=butterflies"],
    "butterflies256": ["model=unet256", "data=butterflies"],
    "mtg128": ["model=unet128", "data=mtg"],
    "mtg256": ["model=unet256", "data=mtg"],
    "cifar10": ["model=unet32", "data=cifar10"],
}


def configured(*overrides: str):
    return training_config(compose(overrides))


def folder(*overrides: str) -> str:
    composed = compose(overrides)
    return str(locate(training_config(composed)).path)


@pytest.mark.parametrize("choice", OPTIONS)
def test_every_option_composes_to_what_can_be_built(choice):
    build.check(configured(choice))


@pytest.mark.parametrize("name", PLAIN)
def test_an_experiment_is_the_run_of_its_plain_command(name):
    assert folder(f"experiment={name}") == folder(*PLAIN[name])


@pytest.mark.parametrize(
    ("name", "images", "steps_per_epoch", "rate"),
    [
        ("butterflies128", 1000, 167, 2e-4),
        ("butterflies256", 1000, 167, 2e-5),
        ("mtg128", 1450, 242, 2e-4),
        ("mtg256", 1450, 242, 2e-5),
    ],
)
def test_the_readmes_runs_are_its_epochs_of_its_steps_at_its_rates(
    name, images, steps_per_epoch, rate
):
    config = configured(f"experiment={name}")
    training = config.training
    nothing = np.lib.stride_tricks.as_strided(
        np.zeros(1, dtype=np.uint8), (images, 3, *build.image_size(config.data)), (0, 0, 0, 0)
    )
    batches = Batches(
        nothing,
        training.batch_size,
        config.seed,
        torch.device("cpu"),
        training.drop_last,
        config.data.flip,
    )
    assert batches.steps_per_epoch == steps_per_epoch
    assert (training.batch_size, training.epochs, training.grad_clip) == (6, 300, 1.0)
    assert config.optimizer["lr"] == rate
    annealing = build.lr_schedule(config)
    assert annealing(0, 1000, rate) == rate
    assert annealing(1000, 1000, rate) == pytest.approx(1e-9)
    assert build.image_size(config.data) == ((128, 128) if "128" in name else (256, 256))
    assert config.data.crop == "none"


def test_the_papers_cifar10_run_is_that_of_its_appendix_b():
    config = configured("experiment=cifar10")
    training = config.training
    assert (
        training.batch_size,
        training.steps,
        training.ema_decay,
        training.ema_warmup,
        training.grad_clip,
    ) == (128, 800_000, 0.9999, False, 1.0)
    assert (config.model["dropout"], config.data.flip, config.data.resolution) == (0.1, True, 32)
    assert (config.objective["prediction"], config.objective["variance"]) == (
        "epsilon",
        "fixed_large",
    )
    sampler = build.sampler_settings(config.sampler, build.diffusion(config))
    assert sampler["function"]["variance"] == "fixed_large"
    rates = [
        build.lr_schedule(config)(step, 800_000, config.optimizer["lr"])
        for step in (0, 2500, 5000, 799_999)
    ]
    assert rates == pytest.approx([0, 1e-4, 2e-4, 2e-4])
    adam = build.optimizer(config, [torch.nn.Parameter(torch.zeros(1))])
    assert type(adam) is torch.optim.Adam
    assert {key: adam.defaults[key] for key in ("betas", "eps", "weight_decay")} == {
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0,
    }
    betas = build.diffusion(config).betas
    assert (len(betas), betas[0].item(), betas[-1].item()) == (
        1000,
        pytest.approx(1e-4),
        pytest.approx(0.02),
    )
