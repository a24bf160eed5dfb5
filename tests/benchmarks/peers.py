"""Times the same work in one process: ours, diffusers and denoising-diffusion-pytorch.

On a CPU:

    pip install diffusers denoising-diffusion-pytorch
    python tests/benchmarks/peers.py --to peers.json \\
        --work unet32 unet128 quickstart sampler feeding

On a GPU, in bf16, as people train there (tests/benchmarks/gpu.py runs this and the GPU tests):

    python tests/benchmarks/peers.py --device cuda --compiled --to peers_gpu.json

ours: the loop of ddpm.train.

diffusers: UNet2DModel with our weights, in the loop of its examples/unconditional_image_generation
(Accelerate, DataLoader, AdamW, EMAModel, the loss read at every step).

denoising-diffusion-pytorch: its Trainer with the Unet(64) of its README. That is another network,
so compare GFLOP/s.

Our command's process settings (glibc keeps freed memory) apply to the whole process, so they help
the others too. Before anything is timed, losses must agree on the same weights, batch and noise.
Rounds are interleaved, and ratios are ratios of medians. Where torchvision is missing, or built for
another torch, Pillow stand-ins replace the six transforms that denoising-diffusion-pytorch uses.
"""

import argparse
import copy
import json
import math
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from ddpm.config import build
from ddpm.config.compose import compose
from ddpm.config.schema import Config, training_config
from ddpm.data import sources
from ddpm.data.batches import Batches
from ddpm.data.decoding import Decoding
from ddpm.data.image_set import image_set
from ddpm.diffusion.samplers import step_noise
from ddpm.sample.drawing import Drawing
from ddpm.system.devices import wait_for
from ddpm.system.peak import matrix_products
from ddpm.system.precision import products
from ddpm.system.processes import accelerator_for
from ddpm.train.timed import TrainingStep, random_images
from ddpm.weights.unet_settings import unet_config

# not today's quickstart: the peers have no classes and predict the noise
QUICKSTART = [
    *("schedule=linear", "objective=epsilon", "training.conditional=false"),
    *("model.base_channels=32", "model.channel_multipliers=[1,2,2]"),
]
WORK = {  # name -> settings, batch
    "unet32": (["model=unet32", "data=cifar10"], 16),
    "unet128": (["model=unet128", "data=butterflies"], 4),
    "quickstart": (QUICKSTART, 32),
}
ON_A_GPU = {
    "unet32": (["model=unet32", "data=cifar10"], 128),
    "unet128": (["model=unet128", "data=butterflies"], 6),
    "unet128_64": (["model=unet128", "data=butterflies"], 64),
    "unet256": (["model=unet256", "data=butterflies"], 6),
}
CPU = torch.device("cpu")


class Times:
    """One contender and the seconds of its rounds.

    Args:
        name: The contender's name in the results.
        run: Does the work the given number of times.
        count: Repetitions per round.
        images: Images per repetition.
        flops: FLOPs per repetition.
    """

    def __init__(
        self, name: str, run: Callable[[int], Any], count: int, images: int, flops: int
    ) -> None:
        self.name, self.run, self.count, self.images, self.flops, self.seconds = (
            name,
            run,
            count,
            images,
            flops,
            [],
        )

    def round(self, clock: Callable[[], float]) -> None:
        start = clock()
        self.run(self.count)
        self.seconds.append((clock() - start) / self.count)

    def summary(self) -> dict[str, Any]:
        speeds = sorted(self.images / seconds for seconds in self.seconds)
        median = statistics.median(speeds)
        return {
            "images_per_second": round(median, 3),
            "lowest": round(speeds[0], 3),
            "highest": round(speeds[-1], 3),
            "gflop_per_second": round(median / self.images * self.flops / 1e9, 1),
        }


class DiffusersStep:
    """The loop of diffusers' train_unconditional.py, with our weights, no trackers or checkpoints.

    The script lies in its examples/unconditional_image_generation.
    """

    def __init__(
        self,
        config: Config,
        weights: dict[str, Tensor],
        batch: int,
        compiled: bool = False,
        channels_last: bool = False,
    ) -> None:
        self.accelerator = Accelerator()
        model = their_network(config, weights).train()
        if channels_last:
            model = model.to(memory_format=torch.channels_last)
        self.scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
        self.ema = EMAModel(
            model.parameters(),
            decay=0.9999,
            use_ema_warmup=True,
            inv_gamma=1.0,
            power=0.75,
            model_cls=UNet2DModel,
            model_config=model.config,
        )
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8
        )
        # decoded, resized and normalized beforehand, which favors diffusers
        pictures = torch.from_numpy(random_images(config, batch)).float() / 127.5 - 1
        loader = DataLoader(_Repeated(pictures), batch_size=batch, shuffle=True, num_workers=0)
        lr_scheduler = get_scheduler(
            "cosine", optimizer=optimizer, num_warmup_steps=500, num_training_steps=1 << 30
        )
        self.model, self.optimizer, loader, self.lr_scheduler = self.accelerator.prepare(
            model, optimizer, loader, lr_scheduler
        )
        self.ema.to(self.accelerator.device)
        if compiled:
            self.model = torch.compile(self.model)
        self.batches = _endless(loader)
        self.bar = tqdm(disable=True)

    def run(self, count: int) -> None:
        for _ in range(count):
            clean_images = next(self.batches)["input"]
            noise = torch.randn(
                clean_images.shape, dtype=clean_images.dtype, device=clean_images.device
            )
            timesteps = torch.randint(
                0,
                self.scheduler.config.num_train_timesteps,
                (len(clean_images),),
                device=clean_images.device,
            ).long()
            noisy_images = self.scheduler.add_noise(clean_images, noise, timesteps)
            with self.accelerator.accumulate(self.model):
                loss = F.mse_loss(self.model(noisy_images, timesteps).sample.float(), noise.float())
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.lr_scheduler.step()
                self.optimizer.zero_grad()
            self.ema.step(self.model.parameters())
            self.bar.update(1)
            self.bar.set_postfix(
                loss=loss.detach().item(),
                lr=self.lr_scheduler.get_last_lr()[0],
                ema_decay=self.ema.cur_decay_value,
            )


class LucidrainsStep:
    """denoising-diffusion-pytorch's Trainer on pictures of the right size, no FID, no samples."""

    def __init__(self, size: int, batch: int, folder: Path) -> None:
        from denoising_diffusion_pytorch import GaussianDiffusion, Trainer, Unet

        for index in range(100):
            Image.fromarray(
                np.random.default_rng(index).integers(0, 256, (size, size, 3), dtype=np.uint8)
            ).save(folder / f"{index}.png")
        network = Unet(dim=64, dim_mults=(1, 2, 4, 8), flash_attn=True)
        self.diffusion = GaussianDiffusion(
            network, image_size=size, timesteps=1000, beta_schedule="linear", objective="pred_noise"
        )
        accumulate = max(1, 16 // batch)  # the Trainer requires an effective batch of 16
        self.trainer = Trainer(
            self.diffusion,
            str(folder),
            train_batch_size=batch,
            gradient_accumulate_every=accumulate,
            calculate_fid=False,
            save_and_sample_every=1 << 30,
            results_folder=str(folder / "results"),
        )
        self.trainer.train_num_steps = 0
        self.images = batch * accumulate

    def run(self, count: int) -> None:
        self.trainer.train_num_steps += count
        self.trainer.train()


class _Repeated(Dataset):
    """A few pictures, repeated to fill an epoch."""

    def __init__(self, pictures: Tensor) -> None:
        self.pictures = pictures

    def __len__(self) -> int:
        return 1 << 14

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input": self.pictures[index % len(self.pictures)]}


def _endless(loader: DataLoader) -> Iterator[Any]:
    while True:
        yield from loader


def their_network(config: Config, weights: dict[str, Tensor]) -> UNet2DModel:
    network = UNet2DModel.from_config(
        unet_config(config.model | {"out_channels": config.data.channels})
    )
    network.load_state_dict({name: tensor.clone() for name, tensor in weights.items()})
    return network


def losses_agree(config: Config, network: nn.Module, batch: int) -> float:
    """Returns the largest difference between our losses and diffusers'.

    Weights, batch and noise are the same.

    Raises:
        AssertionError: If two losses differ by more than 1e-4 of the loss.
    """
    diffusion = build.diffusion(config)
    x0 = torch.from_numpy(random_images(config, batch)).float() / 127.5 - 1
    noise, t = torch.randn(x0.shape), torch.randint(0, 1000, (batch,))
    network = copy.deepcopy(network).cpu().eval()
    with torch.no_grad():
        # the last convolution starts at zero, which would hide everything before it
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
        ours = diffusion.losses(network, x0, t, noise)
        scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
        model = their_network(config, network.state_dict()).eval()
        theirs = (
            (model(scheduler.add_noise(x0, noise, t), t).sample - noise)
            .square()
            .flatten(1)
            .mean(dim=1)
        )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=0)
    return float((ours - theirs).abs().max())


def lucidrains_losses_agree(diffusion: Any, config: Config) -> float:
    """Returns the difference between denoising-diffusion-pytorch's loss and ours.

    Both use its network, since our weights do not fit it.
    """
    x0 = torch.rand(4, 3, *build.image_size(config.data)) * 2 - 1
    noise, t = torch.randn(x0.shape), torch.randint(0, 1000, (4,))
    with torch.no_grad():
        ours = build.diffusion(config).losses(diffusion.model, x0, t, noise).mean()
        theirs = diffusion.p_losses(x0, t, noise)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=0)
    return float((ours - theirs).abs())


def training(
    name: str,
    rounds: int,
    compiled: bool,
    lucidrains: bool,
    clock: Callable[[], float],
    device: torch.device = CPU,
) -> dict[str, Any]:
    gpu = device.type == "cuda"
    settings, batch = (ON_A_GPU if gpu else WORK)[name]
    precision = "bf16" if gpu else "tf32"
    # Each work compiles as in a fresh process: at a second resolution torch would recompile
    # diffusers' network for any resolution, which fails on a CPU.
    torch._dynamo.reset()
    config = training_config(
        compose([*settings, f"runtime.device={device.type}", f"training.precision={precision}"])
    )
    with (
        accelerator_for(config.runtime.device, precision) as accelerator,
        tempfile.TemporaryDirectory() as folder,
    ):
        ours = TrainingStep(config, accelerator, random_images(config, batch), batch)
        found = {
            "batch": batch,
            "precision": precision,
            "loss_difference": losses_agree(config, ours.network, 4 if gpu else batch),
        }
        weights = {
            key: tensor.detach().cpu().contiguous()
            for key, tensor in ours.network.state_dict().items()
        }
        flops = 3 * forward_flops(ours.network, config) * batch
        # diffusers' upsampling takes 9/4 as many multiplications
        more = 3 * forward_flops(their_network(config, weights), config) * batch
        count = 10 if name == "quickstart" or gpu else 1
        contenders = [
            Times("ours", ours.run, count, batch, flops),
            Times("diffusers", DiffusersStep(config, weights, batch).run, count, batch, more),
        ]
        if not gpu:
            contenders.append(
                Times(
                    "diffusers channels_last",
                    DiffusersStep(config, weights, batch, channels_last=True).run,
                    count,
                    batch,
                    more,
                )
            )
        if compiled:
            contenders.append(
                Times(
                    "ours compiled",
                    TrainingStep(
                        config, accelerator, random_images(config, batch), batch, "compiled"
                    ).run,
                    count,
                    batch,
                    flops,
                )
            )
            contenders.append(
                Times(
                    "diffusers compiled",
                    DiffusersStep(config, weights, batch, compiled=True, channels_last=True).run,
                    count,
                    batch,
                    more,
                )
            )
        if lucidrains:
            size = build.image_size(config.data)[0]
            theirs = LucidrainsStep(size, batch, Path(folder))
            found["lucidrains_loss_difference"] = lucidrains_losses_agree(theirs.diffusion, config)
            their_flops = (
                3
                * flops_of(
                    lambda: theirs.diffusion.model(
                        torch.zeros(1, 3, size, size), torch.zeros(1, dtype=torch.int64)
                    )
                )
                * theirs.images
            )
            contenders.append(
                Times(
                    "denoising-diffusion-pytorch Unet(64)",
                    theirs.run,
                    1,
                    theirs.images,
                    their_flops,
                )
            )
        return found | timed(contenders, rounds, clock, device=device)


def sampling(rounds: int, clock: Callable[[], float], device: torch.device = CPU) -> dict[str, Any]:
    """Times reverse steps of unet32 at batch 64: Sampler.walk and DDPMPipeline's two-line loop.

    Two steps on a CPU; on a GPU 50, in TF32 and in bf16.
    """
    gpu = device.type == "cuda"
    config = training_config(compose([*WORK["unet32"][0], f"runtime.device={device.type}"]))
    network = build.network(config, device, 1).eval()
    weights = {name: tensor.detach() for name, tensor in network.state_dict().items()}
    diffusion, batch, count = build.diffusion(config), 64, 50 if gpu else 2
    sampler = build.sampler(config.sampler, diffusion)
    their_weights = {name: tensor.cpu().contiguous() for name, tensor in weights.items()}
    contenders = []
    for precision in ("tf32", "bf16") if gpu else ("tf32",):
        drawing = Drawing(network, diffusion, sampler, (3, 32, 32), seed=0, precision=precision)
        pipeline = DDPMPipeline(
            their_network(config, their_weights).eval(), DDPMScheduler(beta_schedule="linear")
        ).to(device)
        if precision == "bf16":
            pipeline.unet.to(torch.bfloat16)
        words = f" {precision}" if gpu else ""
        flops = forward_flops(network, config) * batch
        if precision == "tf32":
            more = forward_flops(pipeline.unet, config) * batch
        contenders += [
            Times(f"ours{words}", _our_steps(drawing, batch), count, batch, flops),
            Times(f"diffusers{words}", _their_steps(pipeline, drawing, batch), count, batch, more),
        ]
    with products("tf32"):
        against = contenders[1].name
        return {"batch": batch} | timed(contenders, rounds, clock, against, device)


def _our_steps(drawing: Drawing, batch: int) -> Callable[[int], None]:
    noise = drawing.latents(range(batch))
    each = step_noise(drawing.shape, range(batch), 0, drawing.device)

    def run(count: int) -> None:
        drawing.walk(noise, drawing.timesteps[:count], each)
        wait_for(drawing.device)

    return run


def _their_steps(pipeline: DDPMPipeline, drawing: Drawing, batch: int) -> Callable[[int], None]:
    noise = drawing.latents(range(batch)).contiguous().to(pipeline.unet.dtype)
    generator = torch.Generator(drawing.device).manual_seed(0)

    @torch.no_grad()
    def run(count: int) -> None:
        image = noise
        for t in pipeline.scheduler.timesteps[:count]:
            image = pipeline.scheduler.step(
                pipeline.unet(image, t).sample, t, image, generator=generator
            ).prev_sample
        wait_for(drawing.device)

    return run


class _Decoded(Dataset):
    """Files as the peers load them: decoded, resized and mirrored each time, in [-1, 1]."""

    def __init__(self, files: list[Path], size: int) -> None:
        self.files, self.size = files, size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        image = ImageOps.fit(
            Image.open(self.files[index]).convert("RGB"),
            (self.size, self.size),
            Image.Resampling.BILINEAR,
        )
        image = ImageOps.mirror(image) if random.random() < 0.5 else image
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div(127.5).sub(1)


def feeding(rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Times an epoch of 1,000 JPEGs, 512 pixels wide, at resolution 128, without the network.

    Compares our batches, decoded once beforehand, with a DataLoader that decodes each time.
    """
    size, batch = 128, 16
    with tempfile.TemporaryDirectory() as folder, accelerator_for("cpu", "fp32"):
        files = [Path(folder) / f"{index:04d}.jpg" for index in range(1000)]
        for index, file in enumerate(files):
            small = np.random.default_rng(index).integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(small).resize((512, 512), Image.Resampling.BICUBIC).save(
                file, quality=90
            )
        cache, cores = Path(folder) / "cache", len(os.sched_getaffinity(0))
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        data = image_set(
            sources.folder(folder), Decoding(size, size, 3, "center", "white"), cache, cores, 0.0
        )
        seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        worked = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        batches = Batches(data.stored, batch, 0, torch.device("cpu"), drop_last=True, flip=True)

        def ours(epochs: int) -> None:
            for step in range(epochs * batches.steps_per_epoch):
                batches.images(step, 0, batch)

        def theirs(loader: DataLoader) -> Callable[[int], None]:
            return lambda epochs: [None for _ in range(epochs) for _ in loader] and None

        loaders = {
            workers: DataLoader(
                _Decoded(files, size), batch, shuffle=True, drop_last=True, num_workers=workers
            )
            for workers in (0, cores)
        }
        images = batches.steps_per_epoch * batch
        contenders = [Times("ours", ours, 1, images, 0)]
        contenders += [
            Times(f"DataLoader, {workers} workers", theirs(loader), 1, images, 0)
            for workers, loader in loaders.items()
        ]
        found = timed(contenders, rounds, clock, against=contenders[-1].name)
        return {
            "first_decoding_s": round(seconds, 2),
            "cores_busy": round(worked / seconds / cores, 2),
        } | found


def timed(
    contenders: list[Times],
    rounds: int,
    clock: Callable[[], float],
    against: str = "diffusers",
    device: torch.device = CPU,
) -> dict[str, Any]:
    """Times interleaved rounds of all contenders, after one uncounted warm-up each."""
    first = {}
    for contender in contenders:
        start = time.perf_counter()
        contender.run(1)
        first[contender.name] = round(time.perf_counter() - start, 2)
    peak = 0.0
    for _ in range(rounds):
        peak = max(peak, matrix_product(clock) if device == CPU else _peak_of_gpu(device))
        for contender in contenders:
            contender.round(clock)
    results = {
        contender.name: contender.summary() | {"first_s": first[contender.name]}
        for contender in contenders
    }
    base = results[against]["images_per_second"]
    for result in results.values():
        result[f"against_{against}"] = round(result["images_per_second"] / base, 3)
        result["share_of_peak"] = round(result["gflop_per_second"] / peak, 3)
    return {"matrix_product_gflop_per_second": round(peak, 1), "rounds": rounds, "results": results}


def _peak_of_gpu(device: torch.device) -> float:
    """Returns the GFLOP/s of the best of ten bf16 matrix products."""
    return matrix_products(device, torch.bfloat16, 8192)["torch.mm"] / 1e9


def matrix_product(clock: Callable[[], float], size: int = 2048) -> float:
    """Returns the GFLOP/s of the best of five float32 matrix products."""
    a, b = torch.randn(2, size, size)
    best = math.inf
    for _ in range(5):
        start = clock()
        a @ b
        best = min(best, clock() - start)
    return 2 * size**3 / best / 1e9


def flops_of(call: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops()


def forward_flops(network: nn.Module, config: Config) -> int:
    """Returns the FLOPs of a forward pass of one image."""
    device = next(network.parameters()).device
    shape = (1, config.data.channels, *build.image_size(config.data))
    x, t = torch.zeros(shape, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    return flops_of(lambda: network(x, t))


def peak_memory(contender: str, name: str) -> int:
    """Returns the most bytes that three training steps of one contender add to a process.

    That is the resident peak less what the imports take.
    """
    settings, batch = WORK[name]
    config = training_config(compose([*settings, "runtime.device=cpu"]))
    before = resident("VmRSS")
    with accelerator_for(config.runtime.device, config.training.precision) as accelerator:
        if contender == "ours":
            step: Any = TrainingStep(config, accelerator, random_images(config, batch), batch)
        else:
            step = DiffusersStep(
                config, build.network(config, torch.device("cpu"), 1).state_dict(), batch
            )
        step.run(3)
    return resident("VmHWM") - before


def resident(which: str) -> int:
    """Returns resident bytes on Linux: VmRSS now, or VmHWM, the peak so far."""
    (line,) = [
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(which)
    ]
    return int(line.split()[1]) * 1024


def memory(name: str) -> dict[str, Any]:
    """Measures peak memory of training, each contender in its own process."""
    found = {}
    for contender in ("ours", "diffusers"):
        done = subprocess.run(
            [sys.executable, __file__, "--peak-memory", contender, name],
            capture_output=True,
            text=True,
            check=True,
        )
        found[contender] = int(done.stdout.split()[-1])
    return {"bytes": found, "against_diffusers": round(found["ours"] / found["diffusers"], 3)}


def stand_in_for_torchvision() -> str:
    """Replaces a torchvision that does not import. Returns which transforms are in use."""
    try:
        import torchvision

        return f"torchvision {torchvision.__version__}"
    except (ImportError, RuntimeError):  # RuntimeError: built for another torch
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]

    def resize(size: tuple[int, int]) -> Callable[[Image.Image], Image.Image]:
        return lambda image: image.resize(size[::-1], Image.Resampling.BILINEAR)

    def compose_all(steps: list[Callable[[Any], Any]]) -> Callable[[Any], Any]:
        def apply(image: Any) -> Any:
            for step in steps:
                image = step(image)
            return image

        return apply

    def to_tensor(image: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)

    transforms = types.ModuleType("torchvision.transforms")
    vars(transforms).update(
        Compose=compose_all,
        Lambda=lambda function: function,
        Resize=resize,
        CenterCrop=lambda size: (
            lambda image: ImageOps.fit(image, size[::-1], Image.Resampling.BILINEAR)
        ),
        RandomHorizontalFlip=lambda: (
            lambda image: ImageOps.mirror(image) if random.random() < 0.5 else image
        ),
        ToTensor=lambda: to_tensor,
    )
    torchvision, utils = types.ModuleType("torchvision"), types.ModuleType("torchvision.utils")
    vars(utils).update(save_image=None, make_grid=None)
    vars(torchvision).update(transforms=transforms, utils=utils)
    sys.modules.update(
        {
            "torchvision": torchvision,
            "torchvision.transforms": transforms,
            "torchvision.utils": utils,
        }
    )
    return "stand-ins made of Pillow"


def machine() -> dict[str, Any]:
    names = ["torch", "diffusers", "accelerate", "denoising-diffusion-pytorch"]
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    model = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    gpu = {"gpu": torch.cuda.get_device_name(0)} if torch.cuda.is_available() else {}
    return {
        **gpu,
        "cpu": model[0],
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **versions,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work",
        nargs="+",
        choices=[*dict.fromkeys([*WORK, *ON_A_GPU]), "sampler", "feeding"],
        help="all that there is for the device, if not given",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--compiled",
        nargs="*",
        metavar="WORK",
        help="also both compiled, which takes minutes: for these, or all",
    )
    parser.add_argument(
        "--lucidrains", action="store_true", help="also denoising-diffusion-pytorch, in training"
    )
    parser.add_argument(
        "--memory",
        action="store_true",
        help="also peak memory of a training step, in processes of their own",
    )
    parser.add_argument(
        "--busy",
        action="store_true",
        help="one thread and its processor time, for a machine that others use too",
    )
    parser.add_argument("--to", type=Path, help="a JSON file for all that was measured")
    parser.add_argument("--peak-memory", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak_memory:
        print(peak_memory(*arguments.peak_memory))
        return
    clock = time.process_time if arguments.busy else time.perf_counter
    if arguments.busy:
        torch.set_num_threads(1)
    report: dict[str, Any] = {
        "machine": machine() | {"clock": "processor time" if arguments.busy else "wall time"}
    }
    if arguments.lucidrains:
        report["machine"]["transforms"] = stand_in_for_torchvision()
    device = torch.device(arguments.device)
    everything = (
        [*ON_A_GPU, "sampler"] if arguments.device == "cuda" else [*WORK, "sampler", "feeding"]
    )
    for name in arguments.work or everything:
        if name == "sampler":
            report[name] = sampling(arguments.rounds, clock, device)
        elif name == "feeding":
            report[name] = feeding(arguments.rounds, clock)
        else:
            compiled = arguments.compiled is not None and name in (arguments.compiled or everything)
            report[name] = training(
                name, arguments.rounds, compiled, arguments.lucidrains, clock, device
            )
        if arguments.memory and name in WORK:
            report[name]["peak_memory"] = memory(name)
        print(json.dumps({name: report[name]}, indent=1), flush=True)
        if arguments.to:
            arguments.to.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
