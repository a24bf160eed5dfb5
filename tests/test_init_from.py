"""Runs that start from the weights of a folder.

The weights matter at the first step only, and they must fit the run's network.
"""

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from weight_folders import SMALL

from ddpm.config import build
from ddpm.config.compose import compose
from ddpm.config.schema import training_config
from ddpm.runs import checkpoint
from ddpm.runs.folder import RunFolder
from ddpm.runs.identity import identity
from ddpm.train.run import run as train
from ddpm.weights import folders
from ddpm.weights.initial import with_initial_weights

pytestmark = pytest.mark.usefixtures("one_thread")  # networks this small are slower on two threads


@pytest.mark.parametrize("kind", ["diffusers", "run"])
def test_training_starts_from_weights_and_only_at_its_first_step(
    small, small_exported, tmp_path, tiny, capsys, kind
):
    source = small_exported if kind == "diffusers" else small.path
    given = checkpoint.find(small.checkpoints).weights("ema")
    overrides = [
        *tiny,
        f"outputs={tmp_path / 'outputs'}",
        f"init_from={source}",
        "optimizer.lr=1e-3",
        "runtime.checkpoint_every=1",
        "training.steps=2",
    ]
    capsys.readouterr()
    train(compose(overrides))
    run = RunFolder(Path(capsys.readouterr().out.splitlines()[0].removeprefix("run ")))
    assert run.path.name.startswith("linear_epsilon_init_from-")
    assert source.name[-30:] in run.path.name  # a long name keeps its end, which has the run's hash
    first, second = (checkpoint.find(run.checkpoints, step) for step in (1, 2))
    for kind_of_weights in ("raw", "ema"):
        found = first.weights(kind_of_weights)
        # Adam moves a weight by at most the learning rate
        assert all((found[name] - tensor).abs().max() < 2e-3 for name, tensor in given.items())

    expected = second.weights("raw")
    for file in second.folder.iterdir():
        file.unlink()
    second.folder.rmdir()
    run.update(status="preempted", step=1)
    train(compose(overrides))
    carried_on = checkpoint.find(run.checkpoints, 2).weights("raw")
    assert all(torch.equal(carried_on[name], tensor) for name, tensor in expected.items())


def test_the_content_of_the_first_weights_is_part_of_the_run_and_their_place_is_not(
    small_exported, tmp_path
):
    def half(source: Path | None) -> dict:
        return identity(
            with_initial_weights(
                training_config(
                    compose([*SMALL, *([] if source is None else [f"init_from={source}"])])
                )
            )
        )

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
        (
            ["model.base_channels=16"],
            r"has time_embedding\.linear_1\.weight of shape \(32, 8\), but the network of model\.\* needs \(64, 16\)",
        ),
        (["model.num_res_blocks=2"], r"has no down_blocks\.0\.resnets\.1\.norm1\.weight"),
        (
            ["model.attention_resolutions=[]"],
            r"has down_blocks\.1\.attentions\.0\.\S+, but the network of model\.\* does not",
        ),
        (
            ["training.conditional=true", "data.num_classes=10"],
            r"has no class_embedding\.weight.*; training\.conditional=false trains without classes",
        ),
        (["+model.norm_eps=1e-5"], r"norm_eps=1e-06, but model\.norm_eps=1e-05"),
        (["model.norm_groups=8"], r"norm_groups=4, but model\.norm_groups=8"),
        (["+model.time_embedding=cos_sin"], "time_embedding=sin_cos, but"),
        (["+model.downsample_padding=symmetric"], "downsample_padding=same, but"),
        (["+model.num_heads=2"], "num_heads=.*, but"),
    ],
)
@pytest.mark.parametrize("kind", ["diffusers", "run"])
def test_weights_of_another_network_are_refused_before_data_is_read(
    small, small_exported, tmp_path, overrides, reason, kind
):
    source = small_exported if kind == "diffusers" else small.path
    with pytest.raises(ValueError, match=f"^init_from={re.escape(str(source))} .*{reason}"):
        train(
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
    config = training_config(
        compose(
            [*SMALL, "model.resolution=32", "model.attention_resolutions=[16]", "model.dropout=0.2"]
        )
    )
    found = folders.find(str(small_exported), "init_from")
    assert (
        found.weights_for(build.network(config, torch.device("meta"), 10), config.model).keys()
        == found.weights().keys()
    )
