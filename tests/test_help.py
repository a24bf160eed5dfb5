"""--help lists every group with its options and every key of the YAML files.

It fits one screen and imports nothing heavy.
"""

import importlib

import pytest

from ddpm.config.compose import CONF, EXPERIMENTS


@pytest.mark.parametrize("name", ["train", "sample", "plan", "evaluate", "export"])
def test_help_is_one_screen_with_every_group_option_and_key(name, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", [name, "--help"])
    importlib.import_module(f"ddpm.{name}.__main__").main()
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) <= 60
    assert max(map(len, shown.splitlines())) <= 160
    assert shown.count(f"python -m ddpm.{name}") == 3
    wanted = [file.stem for file in EXPERIMENTS.glob("*.yaml")] if name in ("train", "plan") else []
    groups = {
        "train": ["model", "data", "schedule", "objective", "optimizer", "lr_schedule", "sampler"],
        "sample": ["sampler"],
    }.get(name, [])
    wanted += [file.stem for group in groups for file in (CONF / group).glob("*.yaml")]
    words = shown.replace("*", " ").replace("=", " ").split()
    assert [option for option in wanted if option not in words] == []
