"""resume=DIR continues a run in its own folder with other values, and says so."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch

from ddpm.config.compose import compose
from ddpm.runs import checkpoint
from ddpm.train.run import run as train


@pytest.fixture
def command(tiny, tmp_path):
    def call(*overrides):
        train(compose(overrides or [*tiny, f"outputs={tmp_path}"]))
        return next(tmp_path.glob("*/*/run.json")).parent

    return call


def test_more_steps_go_on_in_the_same_folder_and_what_changed_is_kept(command, tmp_path):
    run = command()
    first = (run / "metrics.jsonl").read_text()
    assert command(f"resume={run}", "training.steps=9", "optimizer.lr=5e-4") == run
    record = json.loads((run / "run.json").read_text())
    assert (record["status"], record["step"]) == ("complete", 9)
    first_start, second = record["starts"]
    assert (first_start["from_step"], first_start["to_step"], first_start["changed"]) == (
        0,
        6,
        None,
    )
    assert (second["from_step"], second["to_step"]) == (6, 9)
    assert second["changed"] == {"optimizer.lr": [0.001, 0.0005], "training.steps": [6, 9]}
    assert f"resume={run}" in second["command"]
    assert "data=digits" in first_start["command"]
    assert (run / "metrics.jsonl").read_text().startswith(first)
    assert checkpoint.find(run / "checkpoints").step == 9
    assert len(list(tmp_path.glob("*/*/run.json"))) == 1
    with pytest.raises(ValueError, match="resume="):
        command()


def test_a_stretched_cosine_says_where_the_rate_jumps(command, tiny, tmp_path):
    cosine = ["lr_schedule=cosine", "lr_schedule.warmup_steps=0", "optimizer.lr=1e-3"]
    run = command(*tiny, *cosine, f"outputs={tmp_path}")
    assert not [note for note in notes_of(run) if "jumps" in note]
    command(f"resume={run}", "training.steps=12")
    # of the learning rate: (1 + cos(5 pi / 6)) / 2, then (1 + cos(pi / 2)) / 2
    assert "the learning rate jumps from 6.7e-05 to 0.0005 after step 6" in notes_of(run)


@pytest.fixture(scope="module")
def begun(tiny, tmp_path_factory):
    """A run of 6 steps, and its weights after two more steps with nothing changed."""
    outputs = tmp_path_factory.mktemp("begun")
    run = train(compose([*tiny, "schedule.num_timesteps=2", f"outputs={outputs}"])).path
    plain = shutil.copytree(run, outputs / "plain")
    train(compose([f"resume={plain}", "training.steps=8"]))
    return run, checkpoint.find(plain / "checkpoints").weights("raw")


@pytest.mark.parametrize(
    "override",
    [
        "optimizer.betas=[0.5,0.9]",
        "optimizer.eps=1e-2",
        "optimizer.lr=1e-4",
        "seed=5",
        "training.grad_clip=1e-3",
        "training.batch_size=16",
        "training.precision=bf16",
        "objective.loss=min_snr",
        # importance sampling starts after ten losses per timestep
        "objective.timestep_sampling=loss_second_moment training.batch_size=64",
    ],
)
def test_what_resume_changes_takes_effect(begun, tmp_path, override):
    """A setting that is recorded but ignored would silently give wrong numbers."""
    run, plain = begun
    copy = shutil.copytree(run, tmp_path / "copy")
    train(compose([f"resume={copy}", "training.steps=8", *override.split()]))
    changed = checkpoint.find(copy / "checkpoints").weights("raw")
    assert any(not torch.equal(tensor, changed[name]) for name, tensor in plain.items())


def notes_of(run):
    return json.loads((run / "run.json").read_text())["data"]["notes"]


def test_resumed_with_nothing_new_a_complete_run_stays_as_it_is(command, capsys):
    run = command()
    before = (run / "run.json").read_bytes()
    command(f"resume={run}", "runtime.log_every=2")
    assert "is complete: 6 steps" in capsys.readouterr().out
    assert (run / "run.json").read_bytes() == before


@pytest.mark.parametrize(
    "override",
    [
        "model=unet32",
        "trainig.steps=9",
        "training.steps=few",
        "~seed",
        "model.base_channels=16",
        "model.dropout=0.2",
        "training.steps=2",
        "seed=7",  # trains no further step
        "optimizer.lr=1e-5",
        "objective.prediction=v",
        "objective.variance=fixed_large",
        "schedule.beta_end=0.01",
        "data.holdout=0.5",
        "data.flip=true",
        "data.white=4095",
        "training.conditional=true",
    ],
)
def test_what_cannot_be_changed_is_refused_in_one_line(run_folder, override):
    run = run_folder
    before = digest_of(run)
    typed = replace(compose([f"resume={run}"]), overrides=[f"resume={run}", override])
    with pytest.raises(
        ValueError, match=re.escape(override.removesuffix(".steps=9").partition("=")[0])
    ) as refused:
        train(typed)
    assert "\n" not in str(refused.value)
    assert digest_of(run) == before


def test_what_would_train_no_step_says_what_to_type(run_folder):
    with pytest.raises(
        ValueError, match=r"seed: .* is complete at 6 steps, .*training\.steps=; .*init_from="
    ):
        train(compose([f"resume={run_folder}", "seed=7"]))


def digest_of(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
