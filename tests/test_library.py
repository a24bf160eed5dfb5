"""The project as a library, as a notebook uses it."""

import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

import ddpm
from ddpm.runs.folder import RunFolder
from ddpm.sample.folder import read_samples


def files_of(folder):
    return {
        file.relative_to(folder): (file.stat().st_mtime_ns, file.stat().st_size)
        for file in folder.rglob("*")
    }


def test_importing_it_is_light():
    heavy = "{'torch', 'numpy', 'hydra', 'accelerate', 'datasets', 'pydantic'}"
    code = f"import sys, ddpm; assert not {heavy} & set(sys.modules), sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_public_names_are_there_when_asked_for():
    from ddpm.diffusion import GaussianDiffusion
    from ddpm.models import UNet

    assert ddpm.UNet is UNet
    assert ddpm.GaussianDiffusion is GaussianDiffusion
    assert ddpm.diffusion.GaussianDiffusion is GaussianDiffusion
    assert {"load", "run", "UNet", "models"} <= set(dir(ddpm))
    with pytest.raises(AttributeError, match="has no attribute 'Unet'"):
        ddpm.Unet  # noqa: B018


def test_it_draws_what_the_command_draws_and_leaves_the_run_as_it_was(run_folder, typed, tmp_path):
    done = typed(
        "sample", f"run={run_folder}", "sampler=ddim50", "sampler.num_steps=3", "seed=1",
        "num_samples=5", f"to={tmp_path / 'samples'}",
    )  # fmt: skip
    assert done.code == 0, done.err
    before = files_of(run_folder)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    drawn = ddpm.load(run_folder).sample(5, "ddim50", seed=1, num_steps=3, batch_size=2)
    assert drawn.dtype == np.uint8
    np.testing.assert_array_equal(drawn, read_samples(tmp_path / "samples", 5))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert files_of(run_folder) == before


def test_its_network_predicts_what_its_samples_are_drawn_with(run_folder):
    run = ddpm.load(RunFolder(run_folder))  # what ddpm.run returns
    assert run.status == "complete"
    assert run.config.training.steps == 6
    network = run.network()
    assert not network.training
    x = torch.zeros(2, 1, 16, 16)
    assert network(x, torch.tensor([0, 999])).shape == x.shape
    raw = run.network(weights="raw").state_dict()
    assert any(not torch.equal(tensor, raw[name]) for name, tensor in network.state_dict().items())
    assert run.diffusion.num_timesteps == 1000


def test_its_metrics_are_rows_of_a_table(run_folder, typed, tmp_path):
    copy = shutil.copytree(run_folder, tmp_path / "run")
    words = ["evaluation.metrics=[losses]", "evaluation.num_images=4"]
    assert typed("evaluate", f"run={copy}", *words).code == 0
    rows = {row["metric"]: row for row in ddpm.load(copy).metrics()}
    total = rows["loss_t0000_0099"]
    assert rows["loss"]["step"] == total["step"] == 6
    assert total["value"] > 0
    assert total["name"].startswith("loss_t0000_0099@4:")
    assert total["protocol"]["count"] == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler": "ddmi50"}, "ddmi50: no such option of sampler; did you mean ddim50"),
        ({"num_step": 5}, "num_step=5 is no setting of sampler"),
        ({"classes": [1]}, "trained without classes"),
        ({"step": 5}, "5"),
        ({"num_samples": 0}, "num_samples"),
        ({"guidance_scale": 2.0}, "guidance_scale=2.0 needs a network"),
        ({"device": "gpu"}, "device"),
    ],
)
def test_what_cannot_be_is_one_line(run_folder, settings, message):
    with pytest.raises(ValueError, match=message) as refused:
        ddpm.load(run_folder).sample(**settings)
    assert "\n" not in str(refused.value)


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} is not a run folder"):
        ddpm.load(tmp_path)
