"""Weights out and in: folders that diffusers loads, folders that it wrote, and runs and samples that start from them."""

import json
import logging
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ddpm import build, checkpoint, diffusers_folder, export, sampling_run, train
from ddpm.cli import compose
from ddpm.config import training_config
from ddpm.diffusers_settings import unseen
from ddpm.diffusion import GaussianDiffusion
from ddpm.models.unet import UNet
from ddpm.run_folder import RunFolder, computed, locate
from ddpm.samplers import ancestral, spaced_timesteps

CPU = torch.device("cpu")
NARROW = ["model.base_channels=32", "model.norm_groups=8"]
SMALL = ["data=digits", "model.base_channels=8", "model.norm_groups=4", "model.channel_multipliers=[1,2]", "model.attention_resolutions=[8]"]
GOOGLE = {  # google/ddpm-cifar10-32, but a quarter as wide
    **{"act_fn": "silu", "attention_head_dim": None, "center_input_sample": False, "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1},
    **{"in_channels": 3, "out_channels": 3, "layers_per_block": 2, "mid_block_scale_factor": 1, "norm_eps": 1e-6, "norm_num_groups": 32, "sample_size": 32},
    **{"time_embedding_type": "positional", "block_out_channels": (32, 64, 64, 64)},
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def randomized(network: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter away from what an initialiser leaves at 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    return network.eval()


def finished(outputs: Path, *overrides: str) -> RunFolder:
    """A run folder as it is after three steps, with random weights."""
    composed = compose([f"outputs={outputs}", *overrides])
    config = training_config(composed)
    run = locate(config, composed)
    run.start(config, composed)
    classes = [f"class {number}" for number in range(config.data.num_classes or 0)]
    run.update(status="complete", step=3, data={"classes": classes, "fingerprint": "", "images": 1, "unreadable": []})
    raw, ema = (randomized(build.network(config, CPU, len(classes)), seed) for seed in (1, 2))
    checkpoint.save(run.checkpoints, 3, raw.state_dict(), ema.state_dict(), {}, keep=1)
    return run


def exported(run: RunFolder, outputs: Path, *overrides: str) -> Path:
    export.task(compose([f"run={run.path}", f"to={outputs / 'exported'}", *overrides], "export"))
    return outputs / "exported"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Networks as small as these are slower on two, much so beside other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> RunFolder:
    """A finished run of a small network. Only to be read."""
    return finished(tmp_path_factory.mktemp("small"), *SMALL)


@pytest.fixture(scope="module")
def small_exported(small, tmp_path_factory) -> Path:
    """Its export. Only to be read."""
    return exported(small, tmp_path_factory.mktemp("small"))


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


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(["model=unet32", "model.dropout=0.1"], id="unet32 itself"),
        pytest.param(["model=unet32", *NARROW], id="unet32"),
        pytest.param(["model=unet128", *NARROW, "model.resolution=64", "model.attention_resolutions=[8]"], id="unet128"),
        pytest.param(["model=unet256", *NARROW, "model.resolution=64", "model.attention_resolutions=[4]"], id="unet256"),
        pytest.param(["model=quickstart", "data=digits"], id="quickstart"),
        pytest.param(["model=improved_unet32", *NARROW, "objective=hybrid"], id="improved_unet32"),
        pytest.param(["model=improved_unet64_large", *NARROW, "model.num_heads=1", "model.num_res_blocks=1"], id="improved_unet64, one head"),
        pytest.param(["model=adm64", *NARROW, "model.head_channels=16", "model.num_res_blocks=1", "objective=hybrid"], id="adm64"),
        pytest.param(["model=unet32", *NARROW, "model.resolution=[16,32]", "model.attention_resolutions=[8]"], id="not square"),
    ],
)
def test_diffusers_loads_what_is_exported_and_computes_what_we_do(tmp_path, overrides):
    overrides = overrides if "data=digits" in overrides else ["data=cifar10", *overrides]
    run = finished(tmp_path, *overrides)
    assert_same(network_of(run), theirs(exported(run, tmp_path) / "unet"))


def test_a_network_with_classes_keeps_them(tmp_path, capsys):
    run = finished(tmp_path, *SMALL, "training.conditional=true")
    folder = exported(run, tmp_path)
    assert "class_labels" in capsys.readouterr().out
    assert_same(network_of(run), theirs(folder / "unet"), torch.tensor([0, 10]))
    assert diffusers_folder.find(str(folder), "from").model["num_classes"] == 11


def test_the_weights_as_trained_are_exported_where_asked(small, tmp_path, capsys):
    folder = exported(small, tmp_path, "weights=raw")
    assert_same(network_of(small, "raw"), theirs(folder / "unet"))
    assert capsys.readouterr().out.splitlines()[-1] == f"exported {folder}"


@pytest.mark.parametrize("settings", [["objective=epsilon"], ["objective=hybrid", "schedule=cosine"], ["objective=v", "schedule.zero_terminal_snr=true"]])
def test_the_pipeline_loads_without_a_complaint_and_draws(tmp_path, caplog, settings):
    logging.getLogger("diffusers").addHandler(caplog.handler)
    try:
        pipeline = DDPMPipeline.from_pretrained(written(tmp_path / "exported", *settings)[0])
    finally:
        logging.getLogger("diffusers").removeHandler(caplog.handler)
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == []
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(batch_size=2, num_inference_steps=3, output_type="np").images
    assert drawn.shape == (2, 16, 16, 1)
    assert np.isfinite(drawn).all()


def written(folder: Path, *settings: str) -> tuple[Path, GaussianDiffusion, dict[str, Tensor]]:
    """A folder for a small network with random weights and that diffusion."""
    config = training_config(compose([*SMALL, *settings]))
    diffusion, network = build.diffusion(config), randomized(build.network(config, CPU, 10))
    out_channels = 2 if diffusion.learns_variance else 1
    diffusers_folder.write(folder, {**config.model, "out_channels": out_channels}, network.state_dict(), diffusion)
    return folder, diffusion, network.state_dict()


CHAINS = [
    ["objective=epsilon"],
    ["objective=epsilon_fixed_large", "schedule=quad"],
    ["objective=v", "schedule=cosine", "schedule.zero_terminal_snr=true"],
    ["objective=x0", "schedule=warmup50", "schedule.num_timesteps=50"],
    ["objective=hybrid", "schedule=cosine"],
    ["objective=epsilon", "schedule=linear_rescaled", "schedule.num_timesteps=200"],
]


@pytest.mark.parametrize("settings", CHAINS)
def test_the_exported_scheduler_walks_our_ancestral_chain(tmp_path, settings):
    folder, diffusion, _ = written(tmp_path / "exported", *settings)
    network, scheduler = theirs(folder / "unet"), DDPMScheduler.from_pretrained(folder / "scheduler")
    shape = (2, 1, 16, 16)
    start = torch.randn(shape, generator=torch.Generator().manual_seed(7))

    def generator(t: int) -> torch.Generator:
        return torch.Generator().manual_seed(int(t))

    def ours(x_t: Tensor, t: Tensor) -> Tensor:
        return network(x_t, t).sample

    scheduler.set_timesteps(5)
    x = start
    with torch.inference_mode():
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t).sample, t, x, generator=generator(t)).prev_sample
        timesteps = spaced_timesteps(diffusion.alphas_cumprod, 5, "respaced")
        found = ancestral(
            diffusion.denoiser(ours), start, diffusion.alphas_cumprod, timesteps, lambda t: torch.randn(shape, generator=generator(t)), diffusion.variance
        )
    assert scheduler.timesteps.tolist() == timesteps
    assert (found - x).abs().max() < 2e-3


@pytest.mark.parametrize("settings", CHAINS)
def test_what_was_exported_is_read_back_as_it_was(tmp_path, settings):
    folder, diffusion, expected = written(tmp_path / "exported", *settings)
    found = diffusers_folder.find(str(folder), "from")
    chain = found.chain()
    assert torch.allclose(chain.diffusion.betas, diffusion.betas, rtol=1e-12, atol=0)
    assert (chain.diffusion.prediction, chain.diffusion.variance, chain.clip) == (diffusion.prediction, diffusion.variance, True)
    weights = found.fitting(found.network(), found.model)
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    "settings",
    [
        {"beta_schedule": "linear", "beta_end": 0.01},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 300},
        {"trained_betas": [0.1, 0.2, 0.3], "num_train_timesteps": 3},
        {"beta_schedule": "linear", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    ],
    ids=str,
)
@pytest.mark.parametrize("scheduler", [DDPMScheduler, DDIMScheduler])
def test_the_schedules_of_diffusers_are_read(saved, tmp_path, scheduler, settings):
    assert_schedule_is_read(scheduler(**settings), saved, tmp_path)


def test_the_sigmoid_schedule_of_diffusers_is_read(saved, tmp_path):
    assert_schedule_is_read(DDPMScheduler(beta_schedule="sigmoid"), saved, tmp_path)


def assert_schedule_is_read(scheduler: DDPMScheduler | DDIMScheduler, saved: Path, folder: Path) -> None:
    scheduler.save_pretrained(folder / "scheduler")
    (folder / "unet").symlink_to(saved)
    alphas_cumprod = chain_of(folder).diffusion.alphas_cumprod
    assert torch.allclose(alphas_cumprod.float(), scheduler.alphas_cumprod, rtol=1e-4, atol=1e-6)


def google(folder: Path, variance: str | None = None, **changed: object) -> Path:
    """A folder that diffusers saved, flat as google/ddpm-cifar10-32 is, with random weights. Its scheduler is left as it is without a variance."""
    torch.manual_seed(0)
    randomized(UNet2DModel(**{**GOOGLE, **changed})).save_pretrained(folder)
    if variance is not None:
        DDPMScheduler(variance_type=variance).save_pretrained(folder)
    return folder


def chain_of(folder: Path) -> diffusers_folder.Chain:
    return diffusers_folder.find(str(folder), "from").chain()


def ours(folder: Path) -> UNet:
    found = diffusers_folder.find(str(folder), "from")
    network = found.network()
    network.load_state_dict(found.fitting(network, found.model))
    return network.eval()


def rename(weights: dict[str, Tensor], convolutions: bool) -> dict[str, Tensor]:
    """The names that attention had in diffusers before 0.12; in a pytorch checkpoint its layers were 1x1 convolutions."""
    renamed = {}
    for name, tensor in weights.items():
        parts = re.fullmatch(r"(.*\.attentions\.\d+\.)(to_q|to_k|to_v|to_out\.0)(\..*)", name)
        if parts:
            name = parts[1] + OLD_NAMES[parts[2]] + parts[3]
            tensor = tensor[:, :, None, None].contiguous() if convolutions and tensor.ndim == 2 else tensor
        renamed[name] = tensor
    assert any("proj_attn" in name for name in renamed)
    return renamed


@pytest.mark.parametrize("form", ["now", "old names", "old names and convolutions", "bin", "half precision"])
def test_the_layout_of_googles_weights_is_read(tmp_path, form):
    folder = google(tmp_path, "fixed_large")
    network, file = theirs(folder), folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    if form.startswith("old"):
        save_file(rename(weights, "convolutions" in form), file)
    elif form == "bin":
        file.unlink()
        torch.save(rename(weights, convolutions=False), file.with_suffix(".bin"))
    elif form == "half precision":
        save_file({name: tensor.half() for name, tensor in weights.items()}, file)
        network = network.half().float()
    assert_same(ours(folder), network)
    diffusion = chain_of(folder).diffusion
    assert (diffusion.variance, diffusion.prediction, diffusion.num_timesteps) == ("fixed_large", "epsilon", 1000)
    assert (diffusion.betas[0].item(), diffusion.betas[-1].item()) == (pytest.approx(1e-4), pytest.approx(0.02))


@pytest.mark.parametrize(
    "changed",
    [
        {"downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0, "norm_eps": 1e-5, "attention_head_dim": 8},
        {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 32},
        {"downsample_type": "resnet", "upsample_type": "resnet"}
        | {
            "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "ResnetUpsampleBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        },
        {"sample_size": (16, 32)},
        {"in_channels": 1, "out_channels": 2},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_other_networks_that_diffusers_saved_are_read(tmp_path, changed):
    if "resnet" in changed.values():  # only then does the last level on the way up have something to resample with
        changed["up_block_types"] = ("ResnetUpsampleBlock2D", "ResnetUpsampleBlock2D", "AttnUpBlock2D", "UpBlock2D")
    folder = google(tmp_path, **changed)
    assert_same(ours(folder), theirs(folder))


def test_the_published_network_is_unet32(tmp_path):
    """128 channels wide, it is the paper's, dropout apart, which is a matter of training."""
    folder = google(tmp_path, "fixed_large")
    edit(folder / "config.json", block_out_channels=[128, 256, 256, 256])
    model = diffusers_folder.find(str(folder), "from").model
    paper = training_config(compose(["model=unet32", "data=cifar10"])).model
    assert {**model, **paper, "dropout": 0.0} == model
    assert unseen(paper) == unseen(model)


def edit(file: Path, **changed: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return google(tmp_path_factory.mktemp("google"), "fixed_large", block_out_channels=(32, 32), **levels("", "Attn"))


def levels(*kinds: str) -> dict[str, tuple[str, ...]]:
    return {"down_block_types": tuple(f"{kind}DownBlock2D" for kind in kinds), "up_block_types": tuple(f"{kind}UpBlock2D" for kind in reversed(kinds))}


@pytest.mark.parametrize(
    ("file", "changed", "reason"),
    [
        ("config.json", {"_class_name": "UNet2DConditionModel"}, "_class_name=UNet2DConditionModel must be UNet2DModel"),
        ("config.json", {"act_fn": "mish"}, "act_fn=mish must be silu"),
        ("config.json", {"mid_block_type": None}, "mid_block_type=None"),
        ("config.json", {"add_attention": False}, "add_attention=False"),
        ("config.json", {"center_input_sample": True}, "center_input_sample=True"),
        ("config.json", {"time_embedding_type": "fourier"}, "time_embedding_type=fourier"),
        ("config.json", {"class_embed_type": "timestep"}, "class_embed_type=timestep"),
        ("config.json", {"mid_block_scale_factor": 1.4}, r"mid_block_scale_factor=1\.4"),
        ("config.json", {"freq_shift": 0}, r"flip_sin_to_cos and freq_shift=\(False, 0\)"),
        ("config.json", {"downsample_padding": 2}, "downsample_padding=2"),
        ("config.json", {"down_block_types": ["SkipDownBlock2D", "AttnDownBlock2D"]}, "block type SkipDownBlock2D"),
        ("config.json", {"up_block_types": ["UpBlock2D", "AttnUpBlock2D"]}, "attention on the way down and on the way up"),
        ("config.json", {"down_block_types": ["DownBlock2D"]}, "one length"),
        ("config.json", {"upsample_type": "resnet"}, "resampled in one way"),
        ("config.json", {"block_out_channels": [64, 96]}, r"block_out_channels=\[64, 96\]"),
        ("config.json", {"time_embedding_dim": 64}, "time_embedding_dim=64"),
        ("config.json", {"norm_num_groups": None}, "norm_num_groups=null"),
        ("config.json", {"norm_num_groups": 5}, "norm_groups=5"),
        ("config.json", {"attn_norm_num_groups": 8}, "attn_norm_num_groups=8"),
        ("config.json", {"resnet_time_scale_shift": "scale_shift"}, "attn_norm_num_groups=None"),
        ("config.json", {"attention_head_dim": 5}, "head_channels=5"),
        ("config.json", {"sample_size": None}, "sample_size is null"),
        ("config.json", {"sample_size": "large"}, "config.json"),
        ("config.json", {"block_out_channels": 5}, "config.json is not as expected"),
        ("config.json", {"quantization_config": {"bits": 4}}, "quantization_config=.* unknown"),
        ("scheduler_config.json", {"_class_name": "EulerDiscreteScheduler"}, "_class_name=EulerDiscreteScheduler"),
        ("scheduler_config.json", {"thresholding": True}, "thresholding=True"),
        ("scheduler_config.json", {"variance_type": "learned"}, "variance_type=learned"),
        ("scheduler_config.json", {"variance_type": "learned_range"}, "variance_type=learned_range does not fit .* 3 out"),
        ("scheduler_config.json", {"clip_sample_range": 2.0}, r"clip_sample_range=2\.0"),
        ("scheduler_config.json", {"prediction_type": "flow"}, "prediction_type=flow"),
        ("scheduler_config.json", {"beta_schedule": "laplace"}, "beta_schedule=laplace"),
        ("scheduler_config.json", {"trained_betas": [0.1, 0.2]}, "trained_betas must be num_train_timesteps=1000"),
        ("scheduler_config.json", {"rescale_betas_zero_snr": True}, "zero terminal SNR"),
        ("scheduler_config.json", {"predict_epsilon": False}, "predict_epsilon=False"),
        ("scheduler_config.json", {"sigma_data": 0.5}, r"sigma_data=0\.5 is unknown"),
        ("model_index.json", {"vae": ["diffusers", "AutoencoderKL"]}, "vae="),
        ("model_index.json", {"unet": ["my_code", "UNet"]}, "unet=.*my_code"),
        ("model_index.json", {"_class_name": ["pipeline", "MyPipeline"]}, "_class_name=.*MyPipeline"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
)
def test_what_cannot_be_expressed_here_is_refused_with_the_reason(tmp_path, saved, file, changed, reason):
    (tmp_path / "model_index.json").write_text(
        json.dumps({"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDPMScheduler"]})
    )
    for name in ("config.json", "scheduler_config.json"):
        (tmp_path / name).write_text((saved / name).read_text())
    (tmp_path / "diffusion_pytorch_model.safetensors").symlink_to(saved / "diffusion_pytorch_model.safetensors")
    assert chain_of(tmp_path).diffusion.variance == "fixed_large"
    edit(tmp_path / file, **changed)
    with pytest.raises(ValueError, match=rf"^from={re.escape(str(tmp_path))}: .*{reason}") as refused:
        chain_of(tmp_path)
    assert "\n" not in str(refused.value)


def test_weights_that_are_not_of_the_config_beside_them_are_refused(tmp_path):
    folder = google(tmp_path, "fixed_large", block_out_channels=(32, 32), **levels("", "Attn"))
    edit(folder / "config.json", layers_per_block=1)
    with pytest.raises(ValueError, match=r"^from=.* has down_blocks\.0\.resnets\.1\.\S+, which the network of its config\.json has not"):
        ours(folder)


class Payload:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.trace,)


def test_a_pickle_that_would_run_code_is_refused_unread(tmp_path):
    folder = google(tmp_path / "folder", "fixed_large")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps({"conv_in.weight": Payload(tmp_path / "trace")}, protocol=2))
    with pytest.raises(ValueError, match="from=.*cannot be read as tensors alone"):
        diffusers_folder.find(str(folder), "from").weights()
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("owner/nothing", "the hub does not give it"),
        ("nothing", "not here"),
        ("./no/such/folder", "not here"),
        ("{tmp}", "no folder of weights"),
        ("{tmp}/file", "a file"),
    ],
)
def test_where_there_are_no_weights_the_option_is_named(tmp_path, name, reason):
    (tmp_path / "file").touch()
    name = name.format(tmp=tmp_path)
    with pytest.raises(ValueError, match=f"^init_from={re.escape(name)}.*{reason}") as refused:
        diffusers_folder.find(name, "init_from")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (["model=unet_readme", "data=cifar10", "model.resolution=32"], r"model\._target_=ddpm\.models\.unet_readme\.ReadmeUNet"),
        ([*SMALL, "model.channel_multipliers=[2,2]"], r"model\.channel_multipliers starts with 2"),
        ([*SMALL, "+model.num_heads=2", "model.attention_resolutions=[16,8]"], r"model\.num_heads=2 on widths 8, 16"),
        ([*SMALL, "objective=mean"], r"objective\.prediction=mean"),
        ([*SMALL, "objective=epsilon_bound_learned"], r"objective\.variance=learned"),
        ([*SMALL, "objective=hybrid", "schedule=linear_rescaled"], r"objective\.rescale_timesteps=true .*num_timesteps=4000"),
    ],
    ids=lambda value: "" if isinstance(value, str) else value[-1],
)
def test_what_diffusers_cannot_express_is_refused_with_the_reason(tmp_path, settings, reason):
    config = training_config(compose(settings))
    with pytest.raises(ValueError, match=reason) as refused:
        diffusers_folder.write(tmp_path / "out" / "exported", config.model, {}, build.diffusion(config))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_an_export_never_replaces_what_is_there(small, tmp_path):
    (tmp_path / "exported").mkdir()
    folder = exported(small, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["exported"]
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    with pytest.raises(ValueError, match=f"to={re.escape(str(folder))} is already there"):
        exported(small, tmp_path)
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before


@pytest.mark.parametrize("missing", ["run", "to"])
def test_an_export_without_its_folders_says_which_is_missing(missing):
    with pytest.raises(ValueError, match=f"{missing} is missing"):
        export.task(compose([f"{key}=x" for key in ("run", "to") if key != missing], "export"))


def sampled(*overrides: str) -> None:
    composed = compose([*overrides, "num_samples=3", "batch_size=2", "sampler.num_steps=4"], "sample")
    sampling_run.carry_out(sampling_run.SampleConfig.of(composed))


def test_a_folder_gives_the_images_that_its_run_gives(tmp_path):
    run = finished(tmp_path, *SMALL, "objective=epsilon_fixed_large")
    folder = exported(run, tmp_path)
    sampled(f"run={run.path}", f"to={tmp_path / 'of_run'}", "seed=5")
    sampled(f"from={folder}", f"outputs={tmp_path / 'outputs'}", "seed=5")
    of_run, of_folder = (
        [np.asarray(Image.open(file)) for file in sorted(path.glob("*.png"))]
        for path in (tmp_path / "of_run", *(tmp_path / "outputs" / "samples-exported").iterdir())
    )
    assert len(of_run) == len(of_folder) == 4
    assert all(np.array_equal(one, other) for one, other in zip(of_run, of_folder, strict=True))


@pytest.mark.parametrize(("overrides", "clips"), [([], False), (["sampler.clip=true"], True), (["sampler=ddim", "sampler.clip=true"], True)])
def test_a_scheduler_that_does_not_clip_is_heard_unless_the_command_line_says_otherwise(saved, tmp_path, overrides, clips):
    DDPMScheduler(clip_sample=False, variance_type="fixed_large").save_pretrained(tmp_path / "scheduler")
    (tmp_path / "unet").symlink_to(saved)
    config = sampling_run.SampleConfig.of(compose([f"from={tmp_path}", *overrides], "sample"))
    assert config.sampler["clip"] is clips
    assert config.sampler["function"].get("variance", "fixed_large") == "fixed_large"


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ([], "run is missing"),
        (["run=a", "from=b"], "run=a and from=b"),
        (["from={folder}", "step=3"], "step=3"),
        (["from={folder}", "weights=raw"], "weights=raw"),
        (["from={folder}", "classes=[1]"], r"classes=\[1\]"),
        (["from={folder}", "sampler.guidance_scale=2.0"], r"guidance_scale=2\.0"),
    ],
)
def test_settings_of_sampling_that_make_no_sense_are_refused(saved, tmp_path, overrides, reason):
    with pytest.raises(ValueError, match=reason):
        sampled(f"outputs={tmp_path}", *(override.format(folder=saved) for override in overrides))
    assert list(tmp_path.iterdir()) == []


def test_a_runs_folder_is_not_sampled_as_if_it_were_diffusers(small):
    with pytest.raises(ValueError, match=f"from={re.escape(str(small.path))} is a run's folder"):
        sampled(f"from={small.path}")


@pytest.mark.parametrize("kind", ["diffusers", "run"])
def test_training_starts_from_weights_and_only_at_its_first_step(small, small_exported, tmp_path, tiny, capsys, kind):
    source = small_exported if kind == "diffusers" else small.path
    given = checkpoint.find(small.checkpoints).weights("ema")
    overrides = [*tiny, f"outputs={tmp_path / 'outputs'}", f"init_from={source}", "optimizer.lr=1e-3", "runtime.checkpoint_every=1", "training.steps=2"]
    capsys.readouterr()
    train.task(compose(overrides))
    run = RunFolder(Path(capsys.readouterr().out.splitlines()[0].removeprefix("run ")))
    assert run.path.name.startswith("init_from-")
    assert source.name[-30:] in run.path.name  # a long name keeps its end, with the run's hash
    first, second = (checkpoint.find(run.checkpoints, step) for step in (1, 2))
    for kind_of_weights in ("raw", "ema"):
        found = first.weights(kind_of_weights)
        assert all((found[name] - tensor).abs().max() < 2e-3 for name, tensor in given.items())  # Adam moves by lr at most

    expected = second.weights("raw")
    for file in second.folder.iterdir():
        file.unlink()
    second.folder.rmdir()
    run.update(status="preempted", step=1)
    train.task(compose(overrides))
    carried_on = checkpoint.find(run.checkpoints, 2).weights("raw")
    assert all(torch.equal(carried_on[name], tensor) for name, tensor in expected.items())


def test_the_content_of_the_first_weights_is_part_of_the_run_and_their_place_is_not(small_exported, tmp_path):
    def half(source: Path | None) -> dict:
        return computed(training_config(compose([*SMALL, *([] if source is None else [f"init_from={source}"])])))

    source = small_exported
    here = half(source)
    moved = tmp_path / "moved"
    shutil.copytree(source, moved)
    assert half(moved) == here
    assert half(None) != here
    assert "init_from" not in half(None)
    file = moved / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)
    assert half(moved) != here


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["model.base_channels=16"], r"has time_embedding\.linear_1\.weight of shape \(32, 8\), the network of model\.\* \(64, 16\)"),
        (["model.num_res_blocks=2"], r"has no down_blocks\.0\.resnets\.1\.norm1\.weight"),
        (["model.attention_resolutions=[]"], r"has down_blocks\.1\.attentions\.0\.\S+, which the network of model\.\* has not"),
        (["training.conditional=true", "data.num_classes=10"], r"has no class_embedding\.weight"),
        (["+model.norm_eps=1e-5"], r"norm_eps=1e-06, but model\.norm_eps=1e-05"),
        (["model.norm_groups=8"], r"norm_groups=4, but model\.norm_groups=8"),
        (["+model.time_embedding=cos_sin"], "time_embedding=sin_cos, but"),
        (["+model.downsample_padding=symmetric"], "downsample_padding=same, but"),
        (["+model.num_heads=2"], "num_heads=.*, but"),
    ],
)
@pytest.mark.parametrize("kind", ["diffusers", "run"])
def test_weights_of_another_network_are_refused_before_data_is_read(small, small_exported, tmp_path, overrides, reason, kind):
    source = small_exported if kind == "diffusers" else small.path
    with pytest.raises(ValueError, match=f"^init_from={re.escape(str(source))} .*{reason}"):
        train.task(
            compose(
                [
                    *SMALL,
                    f"outputs={tmp_path / 'outputs'}",
                    "data=folder",
                    f"data.path={tmp_path / 'nowhere'}",
                    "data.channels=1",
                    f"init_from={source}",
                    *overrides,
                ]
            )
        )
    assert not (tmp_path / "outputs").exists()


def test_weights_start_a_network_at_another_resolution_and_with_other_dropout(small_exported):
    config = training_config(compose([*SMALL, "model.resolution=32", "model.attention_resolutions=[16]", "model.dropout=0.2"]))
    found = diffusers_folder.find(str(small_exported), "init_from")
    assert found.fitting(build.network(config, torch.device("meta"), 10), config.model).keys() == found.weights().keys()


@pytest.mark.slow
def test_the_commands_say_where_they_wrote(small, tmp_path, ddpm):
    wrote = ddpm("export", f"run={small.path}", f"to={tmp_path / 'exported'}")
    assert (wrote.code, wrote.out.splitlines()[-1]) == (0, f"exported {tmp_path / 'exported'}")
    drew = ddpm("sample", f"from={tmp_path / 'exported'}", f"to={tmp_path / 'images'}", "num_samples=2", "sampler.num_steps=2")
    assert (drew.code, drew.out.splitlines()[-1]) == (0, f"samples {tmp_path / 'images' / 'grid.png'}")
    refused = ddpm("sample", "from=owner/nothing")
    assert refused.code == 1
    assert refused.err.count("\n") == 1
    assert refused.err.startswith("error: from=owner/nothing: ")
