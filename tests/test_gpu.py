"""A GPU computes the same numbers as a CPU, and some properties show only on a GPU.

`python -m pytest -m gpu` runs the tests that need a GPU. The CPU halves of tests always run.

Tolerances are relative errors in norm against float64 on a CPU. They reflect float32 sums of some
thousand terms, 10 bits of mantissa (TF32, fp16) and 7 bits (bf16).
"""

import gc
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ddpm import run
from ddpm.config import build
from ddpm.config.compose import compose
from ddpm.config.schema import training_config
from ddpm.data.batches import Batches
from ddpm.models.layers import takes_dropout_keys
from ddpm.plan.sizes import sizes
from ddpm.runs import checkpoint
from ddpm.runs.results import loss_curve
from ddpm.sample.subject import of_config
from ddpm.system import randomness, ways
from ddpm.system.precision import autocast, products
from ddpm.system.processes import accelerator_for
from ddpm.train import device_batch
from ddpm.train.device_batch import largest_fitting
from ddpm.train.timed import TrainingStep, random_images

ROOT = Path(__file__).resolve().parent.parent
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TOLERANCE = {"fp32": 3e-5, "tf32": 5e-3, "fp16": 2e-2, "bf16": 1.5e-1}
DROPPING = ["model.dropout=0.2", "objective=hybrid", "training.precision=bf16"]
MODELS = sorted(file.stem for file in (ROOT / "conf" / "model").glob("*.yaml"))
BIG = ["data=cifar10", "model=unet32", "runtime.device=cuda"]


def twin(model):
    """Returns the configuration of a small network that keeps a model option's choices."""
    published = training_config(compose([f"model={model}", "data=cifar10"])).model
    settings = [f"model={model}", "data=cifar10", "training.conditional=true"]
    if "channel_multipliers" not in published:
        return training_config(compose([*settings[:2], "model.resolution=32"]))
    side = 2 * 2 ** (len(published["channel_multipliers"]) - 1)
    attention = [at * side // published["resolution"] for at in published["attention_resolutions"]]
    heads = ["model.head_channels=32"] if published.get("head_channels") else []
    settings += ["model.base_channels=32", "model.num_res_blocks=1", *heads]
    return training_config(
        compose([*settings, f"model.resolution={side}", f"model.attention_resolutions={attention}"])
    )


def network_of(config, device, dtype=torch.float32):
    net = build.network(config, CPU, 10).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():  # the last layers start at zero, which hides the rest
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator).to(dtype)
    return net.to(device).train()


def output_and_gradients(config, device, precision, dtype=torch.float32, compiled=False):
    net = network_of(config, device, dtype)
    if compiled:
        ways.put(net, "compiled")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, config.data.channels, *build.image_size(config.data), generator=generator)
    given = {"classes": torch.tensor([3, 10])} if config.training.conditional else {}
    if takes_dropout_keys(net):
        given["dropout_keys"] = torch.tensor([-5, 2**61])
    moved = {name: tensor.to(device) for name, tensor in given.items()}
    t = torch.tensor([10, 900], device=device)
    with products(precision):
        with autocast(torch.device(device), precision):
            out = net(x.to(device, dtype), t, **moved)
        out.double().square().mean().backward()
    flat = torch.cat(
        [p.grad.flatten().double().cpu() for p in net.parameters() if p.grad is not None]
    )
    return out.detach().double().cpu(), flat


def error(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(
    ("model", "device"),
    [
        *(pytest.param(model, "cuda", marks=pytest.mark.gpu) for model in MODELS),
        *((model, "cpu") for model in ("unet32", "improved_unet64", "adm64")),
    ],
)
def test_every_network_computes_what_it_does_in_float64(model, device):
    config = twin(model)
    wanted = output_and_gradients(config, "cpu", "fp32", torch.float64)
    for precision in ("fp32",) if device == "cpu" else TOLERANCE:
        found = output_and_gradients(config, device, precision)
        errors = [error(*pair) for pair in zip(found, wanted, strict=True)]
        assert max(errors) < TOLERANCE[precision], (precision, errors)


@pytest.mark.parametrize("device", DEVICES)
def test_random_numbers_are_the_same_on_every_device(device):
    keys = torch.tensor([0, 1, -1, 2**62, -(2**63)])
    there = keys.to(device)
    bits = randomness.random_bits(keys, 100, start=2**41)
    assert torch.equal(randomness.random_bits(there, 100, start=2**41).cpu(), bits)
    assert torch.equal(randomness.uniform(there, 64).cpu(), randomness.uniform(keys, 64))
    normal = randomness.normal(there, (3, 5)).cpu()
    torch.testing.assert_close(normal, randomness.normal(keys, (3, 5)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sampler", ["ancestral", "ddim", "dpmpp20", "heun18"])
def test_images_are_those_that_float64_draws(sampler, device):
    """All devices draw the same noise, so the images agree."""
    steps = [] if sampler in ("dpmpp20", "heun18") else ["sampler.num_steps=20"]
    config = training_config(
        compose(
            [
                *("schedule=linear", "objective=epsilon", "training.conditional=false"),
                "data=digits",
                "model.base_channels=8",
                "model.norm_groups=4",
                f"sampler={sampler}",
                *steps,
            ]
        )
    )

    def drawn(device, dtype):
        net = network_of(config, device, dtype)
        subject = of_config(config, [], lambda device: net, net.state_dict)
        built = build.sampler(config.sampler, subject.diffusion)
        drawing = subject.drawing(built, 0, torch.device(device), "fp32")
        noise = drawing._noise(range(3))
        x = drawing.latents(range(3)).to(dtype)
        return drawing.walk(x, drawing.timesteps, lambda t: noise(t).to(dtype)).double().cpu()

    assert error(drawn(device, torch.float32), drawn("cpu", torch.float64)) < 1e-3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("feed", ["device", "file", "decode"])
def test_a_run_trains_with_every_feed_and_its_losses_are_a_cpus(
    feed, device, tiny, run_folder, tmp_path
):
    done = run([*tiny, f"outputs={tmp_path}", f"runtime.device={device}", f"runtime.feed={feed}"])
    wanted = loss_curve(run_folder)
    assert loss_curve(done.path) == [(step, pytest.approx(loss, rel=2e-3)) for step, loss in wanted]


def weights_of(path):
    return (checkpoint.find(path / "checkpoints").folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("device", "settings"),
    [
        ("cpu", DROPPING),
        pytest.param("cuda", DROPPING, marks=pytest.mark.gpu),
        pytest.param("cuda", ["objective=vlb", "schedule=cosine"], marks=pytest.mark.gpu),
    ],
)
def test_a_deterministic_run_gives_the_same_bytes_also_when_it_was_stopped(
    device, settings, tiny, tmp_path
):
    settings = [*tiny, *settings, f"runtime.device={device}", "runtime.deterministic=true"]
    whole = run([*settings, f"outputs={tmp_path / 'whole'}"]).path
    part = run([*settings, f"outputs={tmp_path / 'part'}", "training.steps=3"]).path
    run(
        [
            f"resume={part}",
            "training.steps=6",
            f"runtime.device={device}",
            "runtime.deterministic=true",
        ]
    )
    assert weights_of(part) == weights_of(whole)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16", "tf32"])
def test_a_precisions_curve_lies_on_float32s(precision, tmp_path):
    """On the digits, mean losses over each third of 300 steps agree within 3%."""
    settings = [
        "training.steps=300",
        "runtime.log_every=10",
        "runtime.sample_every=300",
        "runtime.num_previews=4",
        "sampler=ddim50",
    ]
    curves = []
    for chosen in ("fp32", precision):
        done = run(
            [
                *settings,
                f"outputs={tmp_path}",
                "runtime.device=cuda",
                f"training.precision={chosen}",
            ]
        )
        curves.append(
            np.array([loss for _, loss in loss_curve(done.path)]).reshape(3, -1).mean(axis=1)
        )
    np.testing.assert_allclose(curves[1], curves[0], rtol=0.03)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "tf32", "fp16"])
def test_neither_step_nor_sampler_waits_for_the_device(precision):
    config = training_config(compose([*BIG, f"training.precision={precision}", "data.flip=true"]))
    with accelerator_for("cuda", precision) as accelerator:
        step = TrainingStep(config, accelerator, random_images(config, 64), 16)
        step.run(2)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                next(step._updates)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        subject = of_config(config, [], lambda device: step.network, step.network.state_dict)
        for name in ("ancestral250", "ddim50", "dpmpp20", "heun18"):
            sampler = build.sampler(
                training_config(compose([f"sampler={name}"])).sampler, subject.diffusion
            )
            drawing = subject.drawing(sampler, 0, CUDA, precision)
            x, noise, timesteps = (
                drawing.latents(range(4)),
                drawing._noise(range(4)),
                drawing.timesteps[-4:],
            )
            drawing.walk(x, timesteps, noise)
            torch.cuda.set_sync_debug_mode("error")
            try:
                drawing.walk(x, timesteps, noise)
            finally:
                torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def little_memory():
    """A device with 3 GB of memory left."""
    gc.collect()
    torch.cuda.empty_cache()
    whole = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 3e9) / whole)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.gpu
def test_a_batch_too_large_for_the_memory_is_halved_and_the_losses_stay(little_memory, monkeypatch):
    config = training_config(compose([*BIG, "training.precision=fp32", "model.dropout=0.1"]))
    with accelerator_for("cuda", "fp32") as accelerator:
        step = TrainingStep(config, accelerator, random_images(config, 256), 256)
        diffusion = build.diffusion(config)
        size = largest_fitting(step.state, diffusion, step.batches, config.seed)
        assert size in (8, 16, 32, 64)
        losses = [
            device_batch.backward(step.state, diffusion, step.batches, 0, 0, start, start + size)[1]
            for start in (0, size)
        ]
        step.state.optimizer.zero_grad()
        _, half = device_batch.backward(step.state, diffusion, step.batches, 0, 0, size // 2, size)
        torch.testing.assert_close(losses[0][size // 2 :], half, rtol=1e-4, atol=1e-5)
        with pytest.raises(torch.OutOfMemoryError):
            device_batch.backward(step.state, diffusion, step.batches, 0, 0, 0, 256)


@pytest.mark.gpu
def test_images_too_many_for_the_memory_are_drawn_in_halves(little_memory):
    config = training_config(compose([*BIG, "sampler=ddim", "sampler.num_steps=2"]))
    net = build.network(config, CUDA, 10)
    subject = of_config(config, [], lambda device: net, net.state_dict)
    drawing = subject.drawing(build.sampler(config.sampler, subject.diffusion), 0, CUDA, "fp32")
    many = drawing.images(range(4096))
    few = drawing.images([0, 4095])
    torch.testing.assert_close(many[[0, -1]], few, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize(("model", "batch"), [("unet32", 128), ("unet128", 48)])
def test_a_step_takes_the_memory_that_the_plan_says(model, batch):
    settings = [f"model={model}", "data=cifar10", "training.precision=tf32", "runtime.device=cuda"]
    config = training_config(compose(settings))
    needs = sizes(config, CUDA)
    predicted = 20 * needs.parameters + batch * needs.activation_bytes
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    with accelerator_for("cuda", "tf32") as accelerator:
        step = TrainingStep(config, accelerator, random_images(config, batch), batch)
        torch.cuda.reset_peak_memory_stats()
        step.run(3)
        peak = torch.cuda.max_memory_allocated() - before
    print(f"{model} batch {batch}: predicted {predicted / 1e9:.2f} GB, found {peak / 1e9:.2f} GB")
    assert peak == pytest.approx(predicted, rel=0.15)


@pytest.mark.gpu
def test_compiled_group_norm_has_the_gradients_of_the_plain_one():
    """Some torch versions silently miscompile it in bf16 and channels_last.

    That happens for 128 channels in 32 groups at 64x64.
    """
    generator = torch.Generator().manual_seed(0)
    x = (
        torch.randn(8, 128, 64, 64, generator=generator)
        .cuda()
        .contiguous(memory_format=torch.channels_last)
    )
    target = torch.randn(8, 128, 64, 64, generator=generator).cuda()

    def gradients(compiled, dtype):
        norm = torch.nn.GroupNorm(32, 128).cuda()
        layer = torch.nn.Sequential(norm, torch.nn.SiLU())
        if compiled:
            layer.compile(dynamic=False)
        given = x.detach().clone().requires_grad_()
        with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
            (layer(given.to(dtype)).float() * target).sum().backward()
        return [given.grad, norm.weight.grad, norm.bias.grad]

    wanted = gradients(False, torch.float32)
    for compiled in (False, True):
        for found, right in zip(gradients(compiled, torch.bfloat16), wanted, strict=True):
            assert error(found, right) < 2e-2, compiled


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "largest"), [("fp32", 1e-4), ("bf16", 5e-2)])
def test_a_compiled_network_with_dropout_computes_what_the_plain_one_does(precision, largest):
    torch._dynamo.reset()
    small = ["model.base_channels=32", "model.channel_multipliers=[1,2]", "model.num_res_blocks=1"]
    config = training_config(
        compose(
            ["model=unet32", "data=cifar10", *small, "model.resolution=16", "model.dropout=0.1"]
        )
    )
    plain = output_and_gradients(config, "cuda", precision)
    compiled = output_and_gradients(config, "cuda", precision, compiled=True)
    for found, wanted in zip(compiled, plain, strict=True):
        assert error(found, wanted) < largest


@pytest.mark.gpu
def test_all_gpus_together_have_the_losses_of_one(tiny, tmp_path):
    """Uses NCCL, even on a single GPU."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    count = torch.cuda.device_count()
    settings = [
        *tiny,
        "runtime.device=cuda",
        "runtime.log_every=1",
        f"training.batch_size={8 * count}",
    ]
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc-per-node={count}",
        f"--master-port={port}",
    ]
    command = [*launch, "-m", "ddpm.train", *settings, f"outputs={tmp_path / 'all'}"]
    environment = {**os.environ, "NCCL_DEBUG": "VERSION"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=200, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    together = Path(re.search(r"^run (\S+)$", done.stdout, re.MULTILINE)[1])
    alone = run([*settings, f"outputs={tmp_path / 'one'}"]).path
    wanted = [(step, pytest.approx(loss, rel=1e-3)) for step, loss in loss_curve(alone)]
    assert loss_curve(together) == wanted
    (start,) = json.loads((together / "run.json").read_text())["starts"]
    assert start["device"].startswith(f"{count} x cuda")


@pytest.mark.gpu
def test_pictures_on_the_device_are_those_from_the_host():
    images = np.random.default_rng(0).integers(0, 256, (32, 3, 8, 8), dtype=np.uint8)
    for device in (CUDA, torch.device("cuda", 0)):
        settings = {"batch_size": 8, "seed": 0, "device": device, "drop_last": True, "flip": True}
        there, here = (Batches(images, on_device=where, **settings) for where in (True, False))
        for step in range(6):
            assert torch.equal(there.images(step, 2, 7), here.images(step, 2, 7))


@pytest.mark.parametrize("device", DEVICES)
def test_the_two_ways_to_upsample_agree(device):
    from ddpm.models.layers import Upsample

    layer = Upsample(8).double().to(device)
    x = torch.randn(2, 8, 5, 3, generator=torch.Generator().manual_seed(0)).double().to(device)
    wanted = F.conv2d(
        F.interpolate(x, scale_factor=2.0), layer.conv.weight, layer.conv.bias, padding=1
    )
    torch.testing.assert_close(layer(x, torch.empty(0)), wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.gpu
def test_every_way_of_a_training_step_computes_the_same_or_is_out_with_its_reason(tmp_path):
    small = ["model.base_channels=32", "model.channel_multipliers=[1,2]", "model.num_res_blocks=1"]
    words = ["model=unet32", "data=digits", *small, "training.batch_size=32", "training.steps=20"]
    words += ["model.resolution=16", "runtime.log_every=1", "sampler=ddim50"]
    losses = []
    for tune in ("true", "false"):
        folder = run([*words, f"runtime.tune={tune}", f"outputs={tmp_path / tune}"])
        losses.append([loss for _, loss in loss_curve(folder.path)])
        if tune == "true":
            found = folder.record()["tuned"]["found"]
            for one in found:
                print(one["way"], one["device_batch"], one["seconds"], one["differs"], one["why"])
            assert {"nchw", "compiled", "graphs", "channels_last"} <= {one["way"] for one in found}
            assert found[0]["why"] is None
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
