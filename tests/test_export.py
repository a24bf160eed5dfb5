"""Export: diffusers loads the written folders, and reading them back changes nothing."""

import logging
import re
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from huggingface_hub.utils import filter_repo_objects
from torch import Tensor
from weight_folders import (
    SMALL,
    assert_same,
    assert_same_chain,
    exported,
    finished,
    network_of,
    randomized,
    theirs,
)

from ddpm.config import build
from ddpm.config.compose import compose
from ddpm.config.schema import training_config
from ddpm.diffusion.process import GaussianDiffusion
from ddpm.diffusion.samplers import Sampler, ddim
from ddpm.export.run import run as export
from ddpm.sample.subject import of_folder, of_run
from ddpm.weights import folders

pytestmark = pytest.mark.usefixtures("one_thread")  # networks this small are slower on two threads
NARROW = ["model.base_channels=32", "model.norm_groups=8"]


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(["model=unet32", "model.dropout=0.1"], id="unet32 itself"),
        pytest.param(["model=unet32", *NARROW], id="unet32"),
        pytest.param(
            ["model=unet128", *NARROW, "model.resolution=64", "model.attention_resolutions=[8]"],
            id="unet128",
        ),
        pytest.param(
            ["model=unet256", *NARROW, "model.resolution=64", "model.attention_resolutions=[4]"],
            id="unet256",
        ),
        pytest.param(["model=quickstart", "data=digits"], id="quickstart"),
        pytest.param(["model=improved_unet32", *NARROW, "objective=hybrid"], id="improved_unet32"),
        pytest.param(
            ["model=improved_unet64_large", *NARROW, "model.num_heads=1", "model.num_res_blocks=1"],
            id="improved_unet64, one head",
        ),
        pytest.param(
            [
                "model=adm64",
                *NARROW,
                "model.head_channels=16",
                "model.num_res_blocks=1",
                "objective=hybrid",
            ],
            id="adm64",
        ),
        pytest.param(
            [
                "model=unet32",
                *NARROW,
                "model.resolution=[16,32]",
                "model.attention_resolutions=[8]",
            ],
            id="not square",
        ),
    ],
)
def test_diffusers_loads_what_is_exported_and_computes_what_we_do(tmp_path, overrides):
    overrides = overrides if "data=digits" in overrides else ["data=cifar10", *overrides]
    run = finished(tmp_path, *overrides)
    classes = [torch.tensor([0, 10])] if run.config([]).training.conditional else []
    assert_same(network_of(run), theirs(exported(run, tmp_path) / "unet"), *classes)


def test_a_network_with_classes_keeps_them(tmp_path, capsys):
    run = finished(tmp_path, *SMALL, "training.conditional=true")
    folder = exported(run, tmp_path)
    assert "class_labels" in capsys.readouterr().out
    assert_same(network_of(run), theirs(folder / "unet"), torch.tensor([0, 10]))
    assert folders.find(str(folder), "from").model["num_classes"] == 11


@pytest.mark.parametrize(("dropped", "any_class"), [(0.1, 10), (0.0, None)])
def test_an_export_samples_the_classes_of_its_run_and_knows_guidance(tmp_path, dropped, any_class):
    run = finished(
        tmp_path, *SMALL, "training.conditional=true", f"training.label_dropout={dropped}"
    )
    folder = exported(run, tmp_path)
    subject, _ = of_folder(str(folder))
    expected = of_run(run, None, "ema", []).subject
    assert subject.classes == expected.classes == [f"class {number}" for number in range(10)]
    assert subject.any_class == expected.any_class == any_class
    scale = 1.0 if any_class is None else 3.0
    sampler = Sampler(ddim, num_steps=3, guidance_scale=scale)
    drawn, wanted = (
        one.drawing(sampler, 0, torch.device("cpu"), "fp32").images([0, 1], [3, 9])
        for one in (subject, expected)
    )
    torch.testing.assert_close(drawn, wanted, rtol=0, atol=1e-6)
    (folder / "classes.json").unlink()  # as a folder of somebody else
    subject, _ = of_folder(str(folder))
    assert subject.classes == [str(number) for number in range(11 if dropped else 10)]
    assert subject.any_class is None


def test_of_an_export_on_the_hub_all_that_sampling_needs_is_downloaded(tmp_path, monkeypatch):
    folder = exported(finished(tmp_path, *SMALL, "training.conditional=true"), tmp_path)

    def snapshot_download(name, allow_patterns):
        files = [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()]
        for file in filter_repo_objects(files, allow_patterns=allow_patterns):
            (tmp_path / "hub" / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / file, tmp_path / "hub" / file)
        return tmp_path / "hub"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    here, there = (of_folder(name)[0] for name in (str(folder), "owner/name"))
    assert here.identity() == there.identity()
    assert here.classes == there.classes
    assert here.any_class == there.any_class == 10


def test_the_weights_as_trained_are_exported_where_asked(small, tmp_path, capsys):
    folder = exported(small, tmp_path, "weights=raw")
    assert_same(network_of(small, "raw"), theirs(folder / "unet"))
    assert capsys.readouterr().out.splitlines()[-1] == f"exported {folder}"


@pytest.mark.parametrize(
    "settings",
    [
        ["objective=epsilon"],
        ["objective=hybrid", "schedule=cosine"],
        ["objective=v", "schedule.zero_terminal_snr=true"],
    ],
)
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
    """Writes a folder of a small random network. Returns folder, diffusion and weights."""
    config = training_config(compose([*SMALL, *settings]))
    diffusion, network = (
        build.diffusion(config),
        randomized(build.network(config, torch.device("cpu"), 10)),
    )
    out_channels = 2 if diffusion.learns_variance else 1
    folders.write(
        folder, {**config.model, "out_channels": out_channels}, network.state_dict(), diffusion
    )
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
    network, scheduler = (
        theirs(folder / "unet"),
        DDPMScheduler.from_pretrained(folder / "scheduler"),
    )
    assert_same_chain(scheduler, diffusion, lambda x_t, t: network(x_t, t).sample)


@pytest.mark.parametrize("settings", CHAINS)
def test_what_was_exported_is_read_back_as_it_was(tmp_path, settings):
    folder, diffusion, expected = written(tmp_path / "exported", *settings)
    found = folders.find(str(folder), "from")
    chain = found.chain()
    assert torch.allclose(chain.diffusion.betas, diffusion.betas, rtol=1e-12, atol=0)
    assert (chain.diffusion.prediction, chain.diffusion.variance, chain.clip) == (
        diffusion.prediction,
        diffusion.variance,
        True,
    )
    weights = found.weights_for(found.network(), found.model)
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (
            ["model=unet_readme", "data=cifar10", "model.resolution=32"],
            r"model\._target_=ddpm\.models\.ReadmeUNet",
        ),
        ([*SMALL, "model.channel_multipliers=[2,2]"], r"model\.channel_multipliers starts with 2"),
        (
            [*SMALL, "+model.num_heads=2", "model.attention_resolutions=[16,8]"],
            r"model\.num_heads=2 on widths 8, 16",
        ),
        ([*SMALL, "objective=mean"], r"objective\.prediction=mean"),
        ([*SMALL, "objective=epsilon_bound_learned"], r"objective\.variance=learned"),
        (
            [*SMALL, "objective=hybrid", "schedule=linear_rescaled"],
            r"objective\.rescale_timesteps=true .*num_timesteps=4000",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else value[-1],
)
def test_what_diffusers_cannot_express_is_refused_with_the_reason(tmp_path, settings, reason):
    config = training_config(compose(settings))
    with pytest.raises(ValueError, match=reason) as refused:
        folders.write(tmp_path / "out" / "exported", config.model, {}, build.diffusion(config))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_an_export_never_replaces_what_is_there(small, tmp_path):
    (tmp_path / "exported").mkdir()
    folder = exported(small, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["exported"]
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    with pytest.raises(ValueError, match=f"to={re.escape(str(folder))} already exists"):
        exported(small, tmp_path)
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before


@pytest.mark.parametrize("missing", ["run", "to"])
def test_an_export_without_its_folders_says_which_is_missing(missing):
    with pytest.raises(ValueError, match=f"{missing} is missing"):
        export(compose([f"{key}=x" for key in ("run", "to") if key != missing], "export"))


@pytest.mark.slow
def test_the_commands_say_where_they_wrote(small, tmp_path, ddpm):
    wrote = ddpm("export", f"run={small.path}", f"to={tmp_path / 'exported'}")
    assert (wrote.code, wrote.out.splitlines()[-1]) == (0, f"exported {tmp_path / 'exported'}")
    drew = ddpm(
        "sample",
        f"from={tmp_path / 'exported'}",
        f"to={tmp_path / 'images'}",
        "num_samples=2",
        "sampler.num_steps=2",
    )
    assert (drew.code, drew.out.splitlines()[-1]) == (
        0,
        f"samples {tmp_path / 'images' / 'grid.png'}",
    )
    refused = ddpm("sample", "from=owner/nothing")
    assert refused.code == 1
    assert refused.err.count("\n") == 1
    assert refused.err.startswith("error: from=owner/nothing: ")
