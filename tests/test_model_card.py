"""The model card of an exported network: metadata for the Hub and text for readers."""

import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from weight_folders import SMALL, exported, finished

from ddpm.runs import results
from ddpm.runs.folder import RunFolder
from ddpm.runs.results import Measurement
from ddpm.sample.subject import of_run
from ddpm.weights import folders

# networks this small run slower on two threads
pytestmark = pytest.mark.usefixtures("one_thread")
PROTOCOL = {"count": 5000, "split": "train", "sampler": "ddim50", "weights": "ema", "step": 3}


def card(run: RunFolder, folder: Path, *overrides: str) -> ModelCard:
    return ModelCard((exported(run, folder, *overrides) / "README.md").read_text())


@pytest.fixture
def run(small, tmp_path) -> RunFolder:
    """A finished run that a test may change."""
    return RunFolder(shutil.copytree(small.path, tmp_path / "quickstart-digits" / small.path.name))


def test_the_hub_reads_what_the_network_is_from_the_front(run, tmp_path):
    data = card(run, tmp_path, "license=mit").data.to_dict()
    assert data == {
        "license": "mit",
        "library_name": "diffusers",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["diffusers", "unconditional-image-generation", "ddpm"],
    }


def test_a_licence_that_nobody_stated_is_not_made_up(run, tmp_path):
    found = card(run, tmp_path)
    assert "license" not in found.data.to_dict()
    assert "Of the weights: not stated." in found.text
    assert "licence of the pictures: cc-by-4.0" in found.text  # scikit-learn's digits


def test_a_data_set_of_the_hub_is_named_and_its_licence_unknown_where_no_option_tells(tmp_path):
    found = card(finished(tmp_path, *SMALL, "data=cifar10", "data.channels=1"), tmp_path)
    assert found.data.datasets == ["uoft-cs/cifar10"]
    assert "<https://huggingface.co/datasets/uoft-cs/cifar10>" in found.text
    assert "licence of the pictures: unknown here" in found.text


def test_figures_stand_with_their_protocols_and_only_those_of_this_network(run, tmp_path):
    network = of_run(run, 3, "ema", []).subject.identity()
    told = [
        Measurement("fd_x", 12.345678, PROTOCOL, deviation=0.5, floor=1.25, network=network),
        Measurement("kd_x", 0.5, PROTOCOL, network=network),
        Measurement("fd_x", 77.7, {**PROTOCOL, "count": 1000, "seed": 7}, network=network),
        Measurement("fd_x", 99.9, {**PROTOCOL, "weights": "raw"}, network="another"),
        Measurement("recall", 0.25, PROTOCOL),  # written by a version that kept no hash
        Measurement("recall", 0.125, {**PROTOCOL, "step": 2}),
    ]
    results.record(run.path / "evaluation.json", told)
    text = card(run, tmp_path).text
    assert "`fd_x` 12.35 ± 0.5 (floor, two halves of the data: 1.25)" in text
    of_5000, of_1000 = re.findall("(?:^- .*\n)+\n  by the protocol .*", text, re.M)[:2]
    assert "`kd_x` 0.5" in of_5000
    assert "count=5000; split=train; sampler=ddim50; weights=ema; step=3" in of_5000
    assert "77.7" in of_1000
    assert "count=1000" in of_1000
    assert "seed=7" in of_1000
    assert "`recall` 0.25" in text
    assert "99.9" not in text
    assert "0.125" not in text


def test_a_network_without_figures_says_so(run, tmp_path):
    assert "Nothing was measured of this network." in card(run, tmp_path).text


EVIL = "a: b\n---\nlicense: x\n```\n<script> | `x` # *[y](z)*"


def test_words_of_others_break_neither_the_front_nor_the_text(run, tmp_path):
    plain = yaml.safe_load((run.path / "config.yaml").read_text())
    plain["recipe"] = {"source": EVIL, "note": EVIL, "expect": {}}
    plain["data"]["license"] = EVIL
    (run.path / "config.yaml").write_text(yaml.safe_dump(plain))
    starts = run.record()["starts"]
    starts[0]["command"] = ["python", "-m", "ddpm.train", f"+x={EVIL}", "data.path=/home/me/mine"]
    starts[0]["command"][3:3] = ["--config-dir", "/home/me/own"]
    run.update(starts=starts)
    metric = Measurement(EVIL, 1.0, {**PROTOCOL, "sampler": EVIL}, network=None)
    results.record(run.path / "evaluation.json", [metric])
    text = (exported(run, tmp_path, f"license='{EVIL}'") / "README.md").read_text()
    found = ModelCard(text)
    assert found.data.license == EVIL
    assert found.data.library_name == "diffusers"
    assert len(re.findall("^---$", text, re.M)) == 2
    assert len(re.findall("^```", text, re.M)) == 6  # three blocks, each closed
    body = re.sub("```.*?```", "", found.text, flags=re.S)
    assert "<script>" not in re.sub("`[^`\n]*`", "", body).replace(r"\<script\>", "")
    assert re.findall("^#.*", found.text, re.M)[1:] == [
        "## Training",
        "## Figures",
        "## Data",
        "## Sampling",
        "## Licence",
    ]
    assert "/home/me" not in text
    assert "--config-dir own" in text
    assert "data.path=mine" in text


def test_the_recipe_its_commands_and_first_weights_are_told(tmp_path, small):
    name = ["experiment=emoji32", "model.base_channels=8", "model.norm_groups=4"]
    words = [*name, "runtime.workers=1", f"init_from={tmp_path / 'first.pt'}"]
    run = finished(tmp_path / "outputs", *name)
    plain = yaml.safe_load((run.path / "config.yaml").read_text())
    plain |= {"init_from": str(tmp_path / "first.pt"), "init_weights": "0123456789abcdef"}
    (run.path / "config.yaml").write_text(yaml.safe_dump(plain))
    (first,) = run.record()["starts"]
    first = {**first, "command": ["python", "-m", "ddpm.train", *words]}
    again = {
        **first,
        "command": ["python", "-m", "ddpm.train", f"resume={tmp_path}/x", "training.steps=9"],
    }
    run.update(starts=[first, first, {**again, "changed": {"training.steps": [5, 9]}}])
    text = card(run, tmp_path).text
    assert "Recipe `emoji32`: " in text
    assert f"python -m ddpm.train {' '.join(name)} init_from=first.pt\n" in text
    assert text.count("experiment=emoji32") == 1
    assert "python -m ddpm.train resume=x training.steps=9" in text
    assert "the weights of `first.pt` (digest 0123456789abcdef)" in text
    assert str(tmp_path) not in text


@pytest.mark.parametrize("conditional", [False, True])
def test_the_cards_lines_for_diffusers_draw(tmp_path, conditional, monkeypatch):
    words = [*SMALL, "schedule.num_timesteps=3", f"training.conditional={conditional}"]
    words += ["objective=hybrid", "objective.rescale_timesteps=false"] if conditional else []
    folder = exported(finished(tmp_path, *words), tmp_path)
    text = (folder / "README.md").read_text()
    (code,) = re.findall("```python\n(.*?)```", text, re.S)
    monkeypatch.chdir(folder)
    told: dict[str, object] = {}
    exec(code, told)
    if conditional:
        assert told["images"].shape == (2, 1, 16, 16)
        assert torch.isfinite(told["images"]).all()
        assert ModelCard(text).data.tags == [
            "diffusers",
            "class-conditional-image-generation",
            "ddpm",
        ]
    else:
        assert (folder / "image.png").is_file()
    assert folders.find(str(folder), "from").model["resolution"] == 16
