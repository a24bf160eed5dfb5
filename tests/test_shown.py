"""Texts of others hide nothing when they are printed, logged or written.

Nor do they mean anything to what shows them, such as a terminal, a spreadsheet or Markdown.
"""

import csv
import io
import logging

import datasets
import numpy as np
import pytest
import yaml

from ddpm.compare import drawing, tables
from ddpm.config.compose import compose
from ddpm.config.sweeps import align
from ddpm.data import sources
from ddpm.data.decoding import Decoding
from ddpm.data.image_set import image_set
from ddpm.runs.recording import Recorder
from ddpm.sample import __main__ as sample
from ddpm.system.text import cell, guard_logs, say, shown, unmarked

HOSTILE = "a\n\x1b[2J\x9b\u202e\u2066\u200f\udcff\ud800b"
SAFE = r"a\n\x1b[2J\x9b\u202e\u2066\u200f\xff\ud800b"


def test_what_would_act_or_hide_is_shown_as_its_escape(capsys):
    assert shown(HOSTILE) == SAFE
    assert shown("größer 日本 é 👍 = 50%") == "größer 日本 é 👍 = 50%"
    say(f"run {HOSTILE}")
    say(f"error: {HOSTILE}", to_error=True)
    assert capsys.readouterr() == (f"run {SAFE}\n", f"error: {SAFE}\n")


def test_a_log_has_one_line_a_record(capsys):
    guard_logs()
    handler = logging.StreamHandler()
    logger = logging.getLogger("ddpm.test")
    logger.addHandler(handler)
    try:
        logger.error("%s: left out", HOSTILE)
    finally:
        logger.removeHandler(handler)
    assert capsys.readouterr().err == f"{SAFE}: left out\n"


def test_a_table_has_a_line_a_row():
    assert align([["name", "x"], [HOSTILE, "1"]]).splitlines()[1] == f"{SAFE}  1"


@pytest.mark.parametrize(
    "text", ["=1+1", "+1+1", "-1+1", "@SUM(A1)", "\t=1+1", "\r=1+1", " =1+1", "=cmd|' /C calc'!A0"]
)
def test_a_formula_is_text_in_a_csv(text):
    assert cell(text).startswith("'")
    table = [{"run": text, "loss": -0.5, text: "x", "seed": None}]
    names, row = csv.reader(io.StringIO(tables.as_csv(table)))
    assert names == ["run", "loss", cell(text), "seed"]
    assert row == [cell(text), "-0.5", "x", ""]


@pytest.mark.parametrize("value", ["-0.5", "1e-3", "runs/x", "-", "", 3, -0.25, True])
def test_numbers_and_names_stay_as_they_are_in_a_csv(value):
    assert cell(value) == value


def test_words_mean_nothing_in_markdown_or_as_mathematics():
    assert unmarked("a\n# <b>[x](y)") == r"a \# \<b\>\[x\](y)"
    assert drawing.wrapped("$\\frac$") == "\\$\\frac\\$"
    assert "\x1b" not in drawing.wrapped("\x1b[2J")


def test_text_in_tensorboard_stays_in_its_block(tmp_path):
    recorder = Recorder(tmp_path, 0)
    recorder.text("command", "train '\n```\n<script>x</script>' \x1b[2J")
    recorder.close()
    (file,) = tmp_path.glob("events.out*")
    content = file.read_bytes()
    assert b"```\ntrain '\n'''\n<script>x</script>' \\x1b[2J\n```" in content


def test_a_saved_set_with_a_format_is_read(tmp_path):
    pixels = [np.full((4, 4, 3), level, dtype=np.uint8) for level in (10, 200)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    saved = datasets.Dataset.from_dict({"image": pixels, "label": [0, 1]}, features=features)
    saved.with_format("torch").save_to_disk(str(tmp_path / "set"))
    found = image_set(
        sources.folder(str(tmp_path / "set")),
        Decoding(4, 4, 3, "none", "white"),
        tmp_path / "cache",
        1,
        0.0,
    )
    assert [image.max() for image in found.stored] == [10, 200]
    assert found.labels.tolist() == [0, 1]


@pytest.mark.parametrize("word", ["run=~/x", 'run="~/x"', "run='~/x'"])
def test_the_home_folder_may_be_quoted(monkeypatch, word):
    monkeypatch.setenv("HOME", "/home/me")
    assert compose([word], "sample").cfg.run == "/home/me/x"


@pytest.mark.parametrize("section", ["model", "training"])
def test_a_number_as_a_key_of_a_runs_configuration_is_named(run_folder, tmp_path, refusal, section):
    config = yaml.safe_load((run_folder / "config.yaml").read_text())
    config[section][7] = 1
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    line = refusal(sample.main, f"run={tmp_path}")
    assert f"{section}.7: no such key" in line or "a key must be text" in line
