import json
import re
import threading
from pathlib import Path

import pytest
from filelock import FileLock

from ddpm.config.compose import compose
from ddpm.config.schema import training_config
from ddpm.runs.folder import RunFolder
from ddpm.runs.finding import locate
from ddpm.runs.identity import identity


def folder(*overrides: str) -> RunFolder:
    composed = compose(overrides)
    return locate(training_config(composed), composed)


@pytest.mark.parametrize(
    "overrides",
    [
        [
            "runtime.device=cpu",
            "runtime.device_batch=3",
            "runtime.workers=2",
            "runtime.log_every=7",
            "runtime.num_previews=9",
        ],
        ["sampler=ddim", "sampler.num_steps=10"],
        ["data.path=/somewhere/else", "data.cache=/tmp/cache", "data.max_unreadable=0.5"],
        ["seed=0", "model=unet32"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_how_a_run_is_carried_out_never_changes_its_folder(overrides):
    assert (
        folder("model=unet32", "data=cifar10", *overrides).path
        == folder("model=unet32", "data=cifar10").path
    )


def test_outputs_moves_the_folder_and_keeps_its_name(tmp_path):
    moved = folder(f"outputs={tmp_path}").path
    assert moved.parent.parent == tmp_path
    assert moved.parts[-2:] == folder().path.parts[-2:]


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("seed=1", "seed-1"),
        ("optimizer.lr=3e-4", "optimizer.lr-0.0003"),
        ("training.precision=bf16", "training.precision-bf16"),
        ("model.channel_multipliers=[1,2,4]", "model.channel_multipliers-1x2x4"),
        ("schedule=cosine", "schedule-cosine"),
        ("optimizer=adamw", "optimizer-AdamW"),
    ],
)
def test_what_is_computed_is_in_the_name(override, part):
    changed = folder(override).path
    assert changed != folder().path
    assert part in changed.name


def test_the_recipe_itself_has_a_short_name():
    assert re.fullmatch("recipe-[0-9a-f]{8}", folder("model=unet128", "data=butterflies").path.name)


def test_the_order_of_typing_does_not_matter():
    assert folder("seed=1", "model.dropout=0.2").path == folder("model.dropout=0.2", "seed=1").path


def test_runs_whose_difference_is_too_long_to_spell_are_still_told_apart():
    long = [
        "model.base_channels=64",
        "model.num_res_blocks=3",
        "model.channel_multipliers=[1,2,4]",
        "optimizer.lr=3e-4",
        "training.batch_size=8",
        "seed=1",
    ]
    paths = {folder(*long, f"training.ema_decay={decay}").path for decay in (0.1, 0.2)}
    assert len(paths) == 2
    assert all(len(path.name) < 150 for path in paths)


@pytest.mark.parametrize("name", ["cards", "my pictures, (2024)", "a=b", "Bob's", "Größe", "[1]"])
def test_a_folder_of_ones_own_gives_its_name_and_the_run_can_be_typed(tmp_path, name):
    pictures = tmp_path / name
    quoted = str(pictures).replace("'", r"\'")
    found = folder(
        "data=folder", f"data.path='{quoted}'", "optimizer.betas=[0.5,0.9]", "optimizer=adamw"
    ).path
    relative = found.relative_to("outputs").as_posix()
    assert re.fullmatch(r"[A-Za-z0-9._+/-]+", relative)
    assert compose([f"run={found}"], "sample").cfg.run == str(found)
    assert (
        found
        == folder(
            "data=folder", f"data.path='{quoted}/'", "optimizer.betas=[0.5,0.9]", "optimizer=adamw"
        ).path
    )


def test_a_folder_of_ones_own_is_named_after_its_last_part():
    assert (
        folder("data=folder", "data.path=/one/cards").path
        == folder("data=folder", "data.path=/another/cards").path
    )
    assert folder("data=folder", "data.path=/one/cards").path.parent.name == "quickstart-cards"


def test_a_folder_that_was_started_tells_its_configuration_and_how_it_stands(tmp_path):
    composed = compose([f"outputs={tmp_path}", "seed=3"])
    config = training_config(composed)
    run = locate(config, composed)
    assert run.record() == {}
    run.start(config, composed)
    run.update(step=5)
    assert identity(run.config([])) == identity(config)
    record = json.loads((run.path / "run.json").read_text())
    assert (record["status"], record["step"]) == ("running", 5)
    assert {"command", "git", "versions", "created", "updated"} <= record.keys()
    assert run.record() == record


def test_the_classes_of_a_run_are_checked_against_what_the_caller_trusts_and_not_the_folder(
    tmp_path,
):
    composed = compose([f"outputs={tmp_path}"])
    config = training_config(composed)
    run = locate(config, composed)
    run.start(config, composed)
    file = run.path / "config.yaml"
    file.write_text(
        file.read_text()
        .replace("ddpm.models.UNet", "stranger.UNet")
        .replace("trusted_modules: []", "trusted_modules: [stranger]")
    )
    with pytest.raises(ValueError, match=r"model\._target_=stranger\.UNet is not trusted"):
        run.config([])


@pytest.mark.parametrize(
    "content", [None, "", "model: other\n"], ids=["no file", "empty", "another program's"]
)
def test_a_folder_that_is_no_run_is_refused_by_its_path(tmp_path, content):
    if content is not None:
        (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        RunFolder(tmp_path).config([])


def test_whoever_only_looks_whether_a_run_is_alive_does_not_keep_it_from_starting(tmp_path):
    looking = FileLock(tmp_path / ".lock", thread_local=False)
    looking.acquire()
    threading.Timer(0.1, looking.release).start()
    with (
        RunFolder(tmp_path).lock(),
        pytest.raises(ValueError, match="is being trained by process"),
        RunFolder(tmp_path).lock(),
    ):
        pass


def test_options_of_the_users_own_folder_name_a_run_like_any_other(tmp_path, monkeypatch):
    (tmp_path / "theirs.py").write_text(
        "import torch\n\n\ndef betas(num_timesteps: int):\n    return torch.full((num_timesteps,), 0.01, dtype=torch.float64)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf" / "schedule").mkdir()
    (tmp_path / "conf" / "model" / "wide.yaml").write_text(
        "# @package _global_\ndefaults:\n  - quickstart\nmodel:\n  base_channels: 64\n"
    )
    (tmp_path / "conf" / "schedule" / "flat.yaml").write_text(
        "_target_: theirs.betas\nnum_timesteps: 10\n"
    )
    words = [
        "model=wide",
        "schedule=flat",
        "sampler.num_steps=5",
        "runtime.trusted_modules=[theirs]",
        f"outputs={tmp_path}",
    ]
    composed = compose(words, config_dir=str(tmp_path / "conf"))
    config = training_config(composed)
    assert config.model["base_channels"] == 64
    found = locate(config, composed).path
    assert found.parent.name == "wide-digits"
    assert "base_channels" not in found.name  # its own setting
    assert "schedule-betas" in found.name


OLD_NAMES = {
    "ddpm.models.unet.UNet": "ddpm.models.UNet",
    "ddpm.schedules.linear": "ddpm.diffusion.schedules.linear",
    "ddpm.samplers.ddim": "ddpm.diffusion.samplers.ddim",
    "ddpm.lr_schedules.Cosine": "ddpm.train.lr_schedules.Cosine",
}


@pytest.mark.parametrize("name", OLD_NAMES)
def test_the_name_that_something_had_once_is_answered_with_todays(complaint, name):
    assert (
        f"schedule._target_={name} is not trusted: it is called {OLD_NAMES[name]}\n"
        in complaint(f"schedule._target_={name}")
    )


def test_a_run_of_the_first_layout_is_answered_with_todays_names():
    old = RunFolder(Path(__file__).parent / "data" / "run_b7d7171")
    with pytest.raises(ValueError, match=r"it is called ddpm\.models\.UNet$"):
        old.config([])
