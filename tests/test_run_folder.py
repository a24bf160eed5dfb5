import json
import re
import threading

import pytest
from filelock import FileLock

from ddpm.config.compose import compose
from ddpm.config.schema import training_config
from ddpm.runs.finding import locate
from ddpm.runs.folder import RunFolder
from ddpm.runs.format import FORMAT
from ddpm.runs.identity import identity
from ddpm.runs.pictures import with_pictures
from ddpm.train.which import which_run


def folder(*overrides: str) -> RunFolder:
    return locate(with_pictures(training_config(compose(overrides)))[0])


def test_outputs_moves_the_folder_and_keeps_its_name(tmp_path):
    moved = folder(f"outputs={tmp_path}").path
    assert moved.parent.parent == tmp_path
    assert moved.parts[-2:] == folder().path.parts[-2:]


@pytest.mark.parametrize("name", ["cards", "my pictures, (2024)", "a=b", "Bob's", "Größe", "[1]"])
def test_a_folder_of_ones_own_gives_its_name_and_the_run_can_be_typed(tmp_path, pictures, name):
    place = pictures(name, ["1.png"])
    quoted = str(place).replace("'", r"\'")
    words = [f"outputs={tmp_path / 'outputs'}", "data=folder", "optimizer=adamw"]
    found, slashed = (folder(*words, f"data.path='{quoted}{end}'").path for end in ("", "/"))
    relative = found.relative_to(tmp_path / "outputs").as_posix()
    assert re.fullmatch(r"[A-Za-z0-9._+/-]+", relative)
    assert compose([f"run={found}"], "sample").cfg.run == str(found)
    assert found == slashed


def test_a_damaged_run_beside_it_keeps_none_from_being_found(tmp_path):
    for name, content in (("cut", '{"status": "comp'), ("odd", "[3]"), ("bytes", "\x00\x01")):
        (tmp_path / "quickstart-digits" / name).mkdir(parents=True)
        (tmp_path / "quickstart-digits" / name / "run.json").write_text(content)
    begun = which_run(compose([f"outputs={tmp_path}"]))
    assert begun.folder.path.parent == tmp_path / "quickstart-digits"
    assert begun.folder.record() == {}


def test_a_folder_that_was_started_tells_its_configuration_and_how_it_stands(tmp_path):
    composed = compose([f"outputs={tmp_path}", "seed=3"])
    config = training_config(composed)
    run = locate(config)
    assert run.record() == {}
    run.start(config, composed, identity(config))
    run.update(step=5)
    assert identity(run.config([])) == identity(config)
    record = json.loads((run.path / "run.json").read_text())
    assert (record["status"], record["step"]) == ("running", 5)
    assert record["format"] == FORMAT
    assert {"created", "updated"} <= record.keys()
    assert {"command", "started", "git", "versions"} <= record["starts"][0].keys()
    assert run.record() == record


def test_the_classes_of_a_run_are_checked_against_what_the_caller_trusts_and_not_the_folder(
    tmp_path,
):
    composed = compose([f"outputs={tmp_path}"])
    config = training_config(composed)
    run = locate(config)
    run.start(config, composed, identity(config))
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
    found = locate(config).path
    assert found.parent.name == "quickstart-digits"
    assert found.name.startswith("schedule-betas_base_channels-64_num_timesteps-10-")
    typed = compose(["model.base_channels=64", *words[1:]], config_dir=str(tmp_path / "conf"))
    assert locate(training_config(typed)).path == found


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


def test_every_step_counts_in_the_time_that_a_run_took(run_folder):
    timed = json.loads((run_folder / "run.json").read_text())["timed"]
    assert timed["images"] == 6 * 8
    assert 0 < timed["seconds_in_steps"] <= timed["seconds"]
    assert timed["seconds_to_save"] > 0
