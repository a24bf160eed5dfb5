"""Import: folders that diffusers wrote are read, and draw images, or are refused with a reason."""

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from weight_folders import SMALL, assert_same, exported, finished, randomized, theirs

from ddpm.config import build
from ddpm.config.compose import compose
from ddpm.config.schema import training_config
from ddpm.models.unet import UNet
from ddpm.sample.run import run as sample
from ddpm.sample.run import settings_of
from ddpm.weights import folders
from ddpm.weights.unet_settings import unseen

pytestmark = pytest.mark.usefixtures("one_thread")  # networks this small are slower on two threads
GOOGLE = {  # google/ddpm-cifar10-32 at a quarter of its width
    **{
        "act_fn": "silu",
        "attention_head_dim": None,
        "center_input_sample": False,
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
    },
    **{
        "in_channels": 3,
        "out_channels": 3,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-6,
        "norm_num_groups": 32,
        "sample_size": 32,
    },
    **{"time_embedding_type": "positional", "block_out_channels": (32, 64, 64, 64)},
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.mark.parametrize(
    "settings",
    [
        {"beta_schedule": "linear", "beta_end": 0.01},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 300},
        {"trained_betas": [0.1, 0.2, 0.3], "num_train_timesteps": 3},
        {
            "beta_schedule": "linear",
            "rescale_betas_zero_snr": True,
            "prediction_type": "v_prediction",
        },
    ],
    ids=str,
)
@pytest.mark.parametrize("scheduler", [DDPMScheduler, DDIMScheduler])
def test_the_schedules_of_diffusers_are_read(saved, tmp_path, scheduler, settings):
    assert_schedule_is_read(scheduler(**settings), saved, tmp_path)


def test_the_sigmoid_schedule_of_diffusers_is_read(saved, tmp_path):
    assert_schedule_is_read(DDPMScheduler(beta_schedule="sigmoid"), saved, tmp_path)


def assert_schedule_is_read(
    scheduler: DDPMScheduler | DDIMScheduler, saved: Path, folder: Path
) -> None:
    scheduler.save_pretrained(folder / "scheduler")
    (folder / "unet").symlink_to(saved)
    alphas_cumprod = chain_of(folder).diffusion.alphas_cumprod
    assert torch.allclose(alphas_cumprod.float(), scheduler.alphas_cumprod, rtol=1e-4, atol=1e-6)


def google(folder: Path, variance: str | None = None, **changed: object) -> Path:
    """Returns a flat folder that diffusers saved, like google/ddpm-cifar10-32, with random weights.

    Without a variance, no scheduler is written.
    """
    torch.manual_seed(0)
    randomized(UNet2DModel(**{**GOOGLE, **changed})).save_pretrained(folder)
    if variance is not None:
        DDPMScheduler(variance_type=variance).save_pretrained(folder)
    return folder


def chain_of(folder: Path) -> folders.Chain:
    return folders.find(str(folder), "from").chain()


def ours(folder: Path) -> UNet:
    found = folders.find(str(folder), "from")
    network = found.network()
    network.load_state_dict(found.weights_for(network, found.model))
    return network.eval()


def rename(weights: dict[str, Tensor], convolutions: bool) -> dict[str, Tensor]:
    """Renames attention weights as in diffusers before 0.12.

    With `convolutions`, the layers become 1x1 convolutions, as in PyTorch checkpoints of that time.
    """
    renamed = {}
    for name, tensor in weights.items():
        parts = re.fullmatch(r"(.*\.attentions\.\d+\.)(to_q|to_k|to_v|to_out\.0)(\..*)", name)
        if parts:
            name = parts[1] + OLD_NAMES[parts[2]] + parts[3]
            tensor = (
                tensor[:, :, None, None].contiguous()
                if convolutions and tensor.ndim == 2
                else tensor
            )
        renamed[name] = tensor
    assert any("proj_attn" in name for name in renamed)
    return renamed


@pytest.mark.parametrize(
    "form", ["now", "old names", "old names and convolutions", "bin", "half precision"]
)
def test_the_layout_of_googles_weights_is_read(tmp_path, form):
    folder = google(tmp_path, "fixed_large")
    network, file = theirs(folder), folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    if form != "now":
        file.unlink()  # the network may still be mapped from this file: never overwrite it
    if form.startswith("old"):
        save_file(rename(weights, "convolutions" in form), file)
    elif form == "bin":
        torch.save(rename(weights, convolutions=False), file.with_suffix(".bin"))
    elif form == "half precision":
        save_file({name: tensor.half() for name, tensor in weights.items()}, file)
        network = network.half().float()
    assert_same(ours(folder), network)
    diffusion = chain_of(folder).diffusion
    assert (diffusion.variance, diffusion.prediction, diffusion.num_timesteps) == (
        "fixed_large",
        "epsilon",
        1000,
    )
    assert (diffusion.betas[0].item(), diffusion.betas[-1].item()) == (
        pytest.approx(1e-4),
        pytest.approx(0.02),
    )


@pytest.mark.parametrize(
    "changed",
    [
        {
            "downsample_padding": 1,
            "flip_sin_to_cos": True,
            "freq_shift": 0,
            "norm_eps": 1e-5,
            "attention_head_dim": 8,
        },
        {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 32},
        {"downsample_type": "resnet", "upsample_type": "resnet"}
        | {
            "down_block_types": (
                "ResnetDownsampleBlock2D",
                "AttnDownBlock2D",
                "ResnetDownsampleBlock2D",
                "DownBlock2D",
            ),
            "up_block_types": (
                "UpBlock2D",
                "ResnetUpsampleBlock2D",
                "AttnUpBlock2D",
                "ResnetUpsampleBlock2D",
            ),
        },
        {"sample_size": (16, 32)},
        {"in_channels": 1, "out_channels": 2},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_other_networks_that_diffusers_saved_are_read(tmp_path, changed):
    # only then does the last level on the way up have a block that can resample
    if "resnet" in changed.values():
        changed["up_block_types"] = (
            "ResnetUpsampleBlock2D",
            "ResnetUpsampleBlock2D",
            "AttnUpBlock2D",
            "UpBlock2D",
        )
    folder = google(tmp_path, **changed)
    assert_same(ours(folder), theirs(folder))


def test_the_published_network_is_unet32(tmp_path):
    """At 128 channels it is the paper's network, except dropout, which belongs to training."""
    folder = google(tmp_path, "fixed_large")
    edit(folder / "config.json", block_out_channels=[128, 256, 256, 256])
    model = folders.find(str(folder), "from").model
    paper = training_config(compose(["model=unet32", "data=cifar10"])).model
    assert {**model, **paper, "dropout": 0.0} == model
    assert unseen(paper) == unseen(model)


def edit(file: Path, **changed: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return google(
        tmp_path_factory.mktemp("google"),
        "fixed_large",
        block_out_channels=(32, 32),
        **levels("", "Attn"),
    )


def levels(*kinds: str) -> dict[str, tuple[str, ...]]:
    return {
        "down_block_types": tuple(f"{kind}DownBlock2D" for kind in kinds),
        "up_block_types": tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
    }


@pytest.mark.parametrize(
    ("file", "changed", "reason"),
    [
        (
            "config.json",
            {"_class_name": "UNet2DConditionModel"},
            "_class_name=UNet2DConditionModel must be UNet2DModel",
        ),
        ("config.json", {"act_fn": "mish"}, "act_fn=mish must be silu"),
        ("config.json", {"mid_block_type": None}, "mid_block_type=None"),
        ("config.json", {"add_attention": False}, "add_attention=False"),
        ("config.json", {"center_input_sample": True}, "center_input_sample=True"),
        ("config.json", {"time_embedding_type": "fourier"}, "time_embedding_type=fourier"),
        ("config.json", {"class_embed_type": "timestep"}, "class_embed_type=timestep"),
        ("config.json", {"mid_block_scale_factor": 1.4}, r"mid_block_scale_factor=1\.4"),
        ("config.json", {"freq_shift": 0}, r"flip_sin_to_cos and freq_shift=\(False, 0\)"),
        ("config.json", {"downsample_padding": 2}, "downsample_padding=2"),
        (
            "config.json",
            {"down_block_types": ["SkipDownBlock2D", "AttnDownBlock2D"]},
            "block type SkipDownBlock2D",
        ),
        (
            "config.json",
            {"up_block_types": ["UpBlock2D", "AttnUpBlock2D"]},
            "attention on the way down and on the way up",
        ),
        ("config.json", {"down_block_types": ["DownBlock2D"]}, "the same length"),
        ("config.json", {"upsample_type": "resnet"}, "resampled in the same way"),
        ("config.json", {"block_out_channels": [64, 96]}, r"block_out_channels=\[64, 96\]"),
        ("config.json", {"time_embedding_dim": 64}, "time_embedding_dim=64"),
        ("config.json", {"norm_num_groups": None}, "norm_num_groups=null"),
        ("config.json", {"norm_num_groups": 5}, "norm_groups=5"),
        ("config.json", {"attn_norm_num_groups": 8}, "attn_norm_num_groups=8"),
        ("config.json", {"resnet_time_scale_shift": "scale_shift"}, "attn_norm_num_groups=None"),
        ("config.json", {"attention_head_dim": 5}, "head_channels=5"),
        ("config.json", {"sample_size": None}, "sample_size=null"),
        ("config.json", {"sample_size": "large"}, "config.json"),
        ("config.json", {"block_out_channels": 5}, "config.json is not as expected"),
        ("config.json", {"quantization_config": {"bits": 4}}, "quantization_config=.* unknown"),
        (
            "scheduler_config.json",
            {"_class_name": "EulerDiscreteScheduler"},
            "_class_name=EulerDiscreteScheduler",
        ),
        ("scheduler_config.json", {"thresholding": True}, "thresholding=True"),
        ("scheduler_config.json", {"variance_type": "learned"}, "variance_type=learned"),
        (
            "scheduler_config.json",
            {"variance_type": "learned_range"},
            "variance_type=learned_range does not fit .* 3 output",
        ),
        ("scheduler_config.json", {"clip_sample_range": 2.0}, r"clip_sample_range=2\.0"),
        ("scheduler_config.json", {"prediction_type": "flow"}, "prediction_type=flow"),
        ("scheduler_config.json", {"beta_schedule": "laplace"}, "beta_schedule=laplace"),
        (
            "scheduler_config.json",
            {"trained_betas": [0.1, 0.2]},
            "trained_betas must be num_train_timesteps=1000",
        ),
        ("scheduler_config.json", {"rescale_betas_zero_snr": True}, "zero terminal SNR"),
        ("scheduler_config.json", {"predict_epsilon": False}, "predict_epsilon=False"),
        ("scheduler_config.json", {"sigma_data": 0.5}, r"sigma_data=0\.5: unknown key"),
        ("model_index.json", {"vae": ["diffusers", "AutoencoderKL"]}, "vae="),
        ("model_index.json", {"unet": ["my_code", "UNet"]}, "unet=.*my_code"),
        (
            "model_index.json",
            {"_class_name": ["pipeline", "MyPipeline"]},
            "_class_name=.*MyPipeline",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
)
def test_what_cannot_be_expressed_here_is_refused_with_the_reason(
    tmp_path, saved, file, changed, reason
):
    (tmp_path / "model_index.json").write_text(
        json.dumps(
            {
                "_class_name": "DDPMPipeline",
                "unet": ["diffusers", "UNet2DModel"],
                "scheduler": ["diffusers", "DDPMScheduler"],
            }
        )
    )
    for name in ("config.json", "scheduler_config.json"):
        (tmp_path / name).write_text((saved / name).read_text())
    (tmp_path / "diffusion_pytorch_model.safetensors").symlink_to(
        saved / "diffusion_pytorch_model.safetensors"
    )
    assert chain_of(tmp_path).diffusion.variance == "fixed_large"
    edit(tmp_path / file, **changed)
    with pytest.raises(
        ValueError, match=rf"^from={re.escape(str(tmp_path))}: .*{reason}"
    ) as refused:
        chain_of(tmp_path)
    assert "\n" not in str(refused.value)


def test_weights_that_are_not_of_the_config_beside_them_are_refused(tmp_path):
    folder = google(tmp_path, "fixed_large", block_out_channels=(32, 32), **levels("", "Attn"))
    edit(folder / "config.json", layers_per_block=1)
    with pytest.raises(
        ValueError,
        match=r"^from=.* has down_blocks\.0\.resnets\.1\.\S+, but the network of its config\.json does not",
    ):
        ours(folder)


class Payload:
    """Leaves a trace when unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.trace,)


def test_a_pickle_that_would_run_code_is_refused_unread(tmp_path):
    folder = google(tmp_path / "folder", "fixed_large")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "diffusion_pytorch_model.bin").write_bytes(
        pickle.dumps({"conv_in.weight": Payload(tmp_path / "trace")}, protocol=2)
    )
    with pytest.raises(ValueError, match="from=.*cannot be read as tensors only"):
        folders.find(str(folder), "from").weights()
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("owner/nothing", "the download from the hub failed"),
        ("nothing", "does not exist"),
        ("./no/such/folder", "does not exist"),
        ("{tmp}", "not a folder of weights"),
        ("{tmp}/file", "is a file"),
    ],
)
def test_where_there_are_no_weights_the_option_is_named(tmp_path, name, reason):
    (tmp_path / "file").touch()
    name = name.format(tmp=tmp_path)
    with pytest.raises(ValueError, match=f"^init_from={re.escape(name)}.*{reason}") as refused:
        folders.find(name, "init_from")
    assert "\n" not in str(refused.value)


def sampled(*overrides: str) -> None:
    sample(compose([*overrides, "num_samples=3", "batch_size=2", "sampler.num_steps=4"], "sample"))


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


@pytest.mark.parametrize(
    ("overrides", "clips"),
    [([], False), (["sampler.clip=true"], True), (["sampler=ddim", "sampler.clip=true"], True)],
)
def test_a_scheduler_that_does_not_clip_is_heard_unless_the_command_line_says_otherwise(
    saved, tmp_path, overrides, clips
):
    DDPMScheduler(clip_sample=False, variance_type="fixed_large").save_pretrained(
        tmp_path / "scheduler"
    )
    (tmp_path / "unet").symlink_to(saved)
    settings = settings_of(compose([f"from={tmp_path}", *overrides], "sample"))
    assert settings.sampler["clip"] is clips
    sampler = build.sampler_settings(
        settings.sampler, folders.find(str(tmp_path), "from").chain().diffusion
    )
    assert sampler["function"].get("variance", "fixed_large") == "fixed_large"


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
    with pytest.raises(ValueError, match=f"from={re.escape(str(small.path))} is a run folder"):
        sampled(f"from={small.path}")
