"""What the README says to type can be typed."""

import re
import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from ddpm import build
from ddpm.cli import CONF, compose
from ddpm.config import training_config

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands():
    """(module, overrides) of each line of the README's bash blocks that starts one of our commands, sweeps job by job."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", README, flags=re.S):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            started = next((index for index, word in enumerate(words) if word.startswith("ddpm.")), None)
            if started is None or "--config-dir" in words:
                continue
            ends = next((index for index, word in enumerate(words) if index > started and word == "&"), len(words))
            found.append((words[started].removeprefix("ddpm."), [word for word in words[started + 1 : ends] if word != "-m"]))
    return found


def jobs(overrides):
    """The overrides of each job of a sweep."""
    lists = [[]]
    for override in OverridesParser.create().parse_overrides([override.replace("=~/", "=/home/") for override in overrides]):
        values = [f"{override.key_or_group}={value}" for value in override.sweep_string_iterator()] if override.is_sweep_override() else [override.input_line]
        lists = [[*before, value] for before in lists for value in values]
    return lists


@pytest.mark.parametrize(("module", "overrides"), commands(), ids=lambda value: value if isinstance(value, str) else " ".join(value))
def test_a_command_of_the_readme_composes(module, overrides):
    for job in jobs(overrides):
        composed = compose(job, "config" if module == "train" else module)
        if module == "train" and composed.cfg.resume is None:
            build.check(training_config(composed))


def test_the_readme_has_two_commands_to_set_up():
    assert len(re.findall(r"^pip install .*&&", README, flags=re.M)) == 2


def test_the_readmes_table_names_every_option_of_every_group():
    rows = dict(re.findall(r"^\| `(\w+)` \|([^|]*)\|", README, flags=re.M))
    groups = [folder.name for folder in CONF.iterdir() if folder.is_dir() and folder.name != "hydra"]
    assert {group: [file.stem for file in (CONF / group).glob("*.yaml") if f"`{file.stem}`" not in rows.get(group, "")] for group in groups} == {
        group: [] for group in groups
    }


def test_what_the_readme_points_at_is_there():
    links = re.findall(r"\]\(((?!http)[^)#]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
