"""Run folders and diffusers folders with random weights, for tests of export and import."""

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor, nn

from ddpm.config import build
from ddpm.config.compose import compose
from ddpm.config.schema import training_config
from ddpm.diffusion.process import GaussianDiffusion
from ddpm.diffusion.samplers import ancestral
from ddpm.diffusion.spacing import spaced_timesteps
from ddpm.export.run import run as export
from ddpm.models.unet import UNet
from ddpm.runs import checkpoint
from ddpm.runs.finding import locate
from ddpm.runs.folder import RunFolder
from ddpm.runs.identity import identity

CPU = torch.device("cpu")
SMALL = [
    *("schedule=linear", "objective=epsilon", "training.conditional=false"),
    "data=digits",
    "model.base_channels=8",
    "model.norm_groups=4",
    "model.channel_multipliers=[1,2]",
    "model.attention_resolutions=[8]",
]


def randomized(network: nn.Module, seed: int = 0, scale: float = 0.02) -> nn.Module:
    """Moves every parameter away from the 0 or 1 that an initializer may leave."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=scale)
    return network


def finished(outputs: Path, *overrides: str) -> RunFolder:
    """Writes a run folder as it is after three steps, with random weights."""
    composed = compose([f"outputs={outputs}", *overrides])
    config = training_config(composed)
    run = locate(config)
    run.start(config, composed, identity(config))
    classes = [f"class {number}" for number in range(config.data.num_classes or 0)]
    run.update(
        status="complete",
        step=3,
        data={"classes": classes, "fingerprint": "", "images": 1, "unreadable": []},
    )
    raw, ema = (randomized(build.network(config, CPU, len(classes)), seed) for seed in (1, 2))
    checkpoint.save(
        run.checkpoints, {"step": 3, "model": raw.state_dict(), "ema": ema.state_dict()}, keep=1
    )
    return run


def exported(run: RunFolder, outputs: Path, *overrides: str) -> Path:
    export(compose([f"run={run.path}", f"to={outputs / 'exported'}", *overrides], "export"))
    return outputs / "exported"


def network_of(run: RunFolder, weights: str = "ema") -> UNet:
    config = run.config([])
    network = build.network(config, CPU, len(run.record()["data"]["classes"]))
    network.load_state_dict(checkpoint.find(run.checkpoints).weights(weights))
    return network.eval()


def theirs(folder: Path) -> UNet2DModel:
    network, report = UNet2DModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return network.eval()


def assert_same(ours: nn.Module, other: UNet2DModel, *classes: Tensor) -> None:
    size = other.config.sample_size
    shape = (2, other.config.in_channels, *((size, size) if isinstance(size, int) else size))
    x_t, t = torch.randn(shape, generator=torch.Generator().manual_seed(3)), torch.tensor([0, 731])
    with torch.inference_mode():
        expected, output = other(x_t, t, *classes).sample, ours(x_t, t, *classes)
    assert (output - expected).abs().max() < 1e-4 * expected.abs().max()


def assert_same_chain(
    scheduler: DDPMScheduler, diffusion: GaussianDiffusion, network: Callable[..., Tensor]
) -> None:
    """Asserts that diffusers' five-step chain equals our ancestral one for the same noise."""
    shape = (2, 1, 16, 16)
    start = torch.randn(shape, generator=torch.Generator().manual_seed(7))

    def generator(t: int) -> torch.Generator:
        return torch.Generator().manual_seed(int(t))

    scheduler.set_timesteps(5)
    x = start
    with torch.inference_mode():
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t), t, x, generator=generator(t)).prev_sample
        timesteps = spaced_timesteps(diffusion.alphas_cumprod, 5, "respaced")
        found = ancestral(
            diffusion.denoiser(network),
            start,
            diffusion.alphas_cumprod,
            timesteps,
            lambda t: torch.randn(shape, generator=generator(t)),
            diffusion.variance,
        )
    assert scheduler.timesteps.tolist() == timesteps
    assert (found - x).abs().max() < 2e-3
