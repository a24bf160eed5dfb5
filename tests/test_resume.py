"""An interrupted run ends with the same bytes as an uninterrupted one.

That holds for every network, precision and optimizer.
"""

import psutil
import pytest
import torch
from decoded import DIGITS

from ddpm import run
from ddpm.runs import checkpoint, recording

SMALL = [
    "model.base_channels=32",
    "model.resolution=16",
    "model.channel_multipliers=[1,2]",
    "model.attention_resolutions=[8]",
]
FAMILIES = {
    "learned timesteps": [
        *("model.base_channels=8", "model.norm_groups=4", "model.channel_multipliers=[1,2]"),
        *("model.attention_resolutions=[8]", "training.conditional=true"),
        # few timesteps, so that the learned probabilities come into use
        *("objective.timestep_sampling=loss_second_moment", "schedule.num_timesteps=2"),
    ],
    "ddpm": ["model=unet32", *SMALL],
    "improved": ["model=improved_unet32", *SMALL, "objective=hybrid", "training.conditional=true"],
    "adm": ["model=adm64", *SMALL, "model.head_channels=32", "training.conditional=true"],
}


def trained(*overrides):
    return run([*DIGITS, "training.steps=4", "training.batch_size=4", "runtime.checkpoint_every=2", "runtime.log_every=3",
                        "runtime.num_previews=1", "sampler=ddim", "sampler.num_steps=2", "runtime.device=cpu", *overrides])  # fmt: skip


@pytest.mark.parametrize(
    ("family", "precision"),
    # each network once; one with classes in each precision
    [("learned timesteps", "bf16"), ("ddpm", "fp32"), ("improved", "fp32"), ("adm", "bf16")],
)
def test_cut_off_and_carried_on_is_the_same_run(tmp_path, family, precision):
    settings = [
        f"outputs={tmp_path}",
        *FAMILIES[family],
        f"training.precision={precision}",
        "runtime.device_batch=3",
        "model.dropout=0.1",
    ]
    run = trained(*settings)
    last = run.checkpoints / "step_00000004"
    whole = last.rename(tmp_path / "whole")
    metrics = (run.path / "metrics.jsonl").read_bytes()
    preview = (run.samples / "step_00000004.png").read_bytes()
    (run.samples / "step_00000004.png").unlink()
    run.update(status="running", step=2)
    last.mkdir()  # half-written, like the last line of metrics.jsonl
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "tra')

    assert trained(*settings).path == run.path

    for name in ("model.safetensors", "ema.safetensors"):
        assert (last / name).read_bytes() == (whole / name).read_bytes()
    torch.testing.assert_close(
        checkpoint.Checkpoint(last, 4).state(),
        checkpoint.Checkpoint(whole, 4).state(),
        rtol=0,
        atol=0,
    )
    assert (run.path / "metrics.jsonl").read_bytes() == metrics
    assert (run.samples / "step_00000004.png").read_bytes() == preview
    first = checkpoint.find(run.checkpoints, 2).weights("raw")
    assert any(
        not torch.equal(tensor, first[name])
        for name, tensor in checkpoint.find(run.checkpoints, 4).weights("raw").items()
    )


def test_a_training_process_takes_no_more_memory_as_it_goes_on(tmp_path, monkeypatch):
    held = {}
    really = recording.Recorder.scalars

    def scalars(self, step, values):
        held[step] = psutil.Process().memory_info().rss
        really(self, step, values)

    monkeypatch.setattr(recording.Recorder, "scalars", scalars)
    narrow = [
        "model.base_channels=8",
        "model.norm_groups=4",
        "model.channel_multipliers=[1,2]",
        "model.attention_resolutions=[8]",
    ]
    trained(
        f"outputs={tmp_path}",
        *narrow,
        "training.steps=250",
        "runtime.log_every=50",
        "runtime.checkpoint_every=50",
    )
    assert held[250] - held[100] < 8 * 2**20
