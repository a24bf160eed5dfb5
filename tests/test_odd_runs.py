"""Unexpected content in a run's files is reported in that run's row and spoils no other run.

A run with a damaged checkpoint falls back to the one before.
"""

import csv
import json
import os
import random
import re
import shutil
from pathlib import Path

import pytest
import synthetic_runs
import yaml

from ddpm.runs import checkpoint
from ddpm.runs.folder import RunFolder
from ddpm.runs.reader import read
from ddpm.runs.results import window_means
from ddpm.system.plain import Unreadable, read_json, read_yaml

EXAMPLES = int(os.environ.get("DDPM_ODD_EXAMPLES", "3"))
DIGITS = "1" * 400
DEEP = "[" * 100_000
META = "checkpoints/step_00000006/meta.json"
DRAWN = ("num_samples=1", "sampler=ddim", "sampler.num_steps=2")
FIGURE = {"metric": "fid", "value": 1, "protocol": {"step": 6, "count": 10}}


def with_(document, **changes):
    return json.dumps({**document, **changes})


RECORD = {"status": "complete", "step": 6}
UNREADABLE = [  # file, content
    ("run.json", "[]"),
    ("run.json", '"complete"'),
    ("run.json", ""),
    ("run.json", b"\x00\xff\xfe\x00"),
    ("run.json", DEEP),
    ("run.json", '{"a":' * 900 + "1" + "}" * 900),
    ("run.json", f'{{"status": "complete", "step": {DIGITS}}}'),
    ("run.json", f'{{"status": "complete", "step": 6, "more": [{DIGITS}]}}'),
    ("run.json", with_(RECORD, step="6")),
    ("run.json", with_(RECORD, step=True)),
    ("run.json", with_(RECORD, step=-1)),
    ("run.json", '{"status": "complete"}'),
    ("run.json", with_(RECORD, status="\x1b[31m")),
    ("run.json", with_(RECORD, starts={"0": 1})),
    ("run.json", with_(RECORD, starts=[3])),
    ("run.json", with_(RECORD, starts=[{"from_step": 0, "to_step": 1, "changed": {"a": 1}}])),
    ("run.json", with_(RECORD, data=[1])),
    ("run.json", with_(RECORD, data={"fingerprint": ["x"]})),
    ("run.json", with_(RECORD, timed={"images": "many"})),
    ("run.json", with_(RECORD, num_steps=1.5)),
    ("config.yaml", ""),
    ("config.yaml", "- a\n- b"),
    ("config.yaml", "a: [1"),
    ("config.yaml", "a: &a [*a]"),
    ("config.yaml", "a: &a {b: *a}\nmodel: *a"),
    ("config.yaml", "seed: 2020-01-01"),
    ("config.yaml", "3: 4"),
    ("config.yaml", "? [a]\n: 1"),
    ("config.yaml", "a: !!python/object/apply:os.system [true]"),
    ("config.yaml", "a: !!set {b}"),
    ("config.yaml", "a: " + "1:" * 1000 + "1"),
    ("config.yaml", "a: 0x" + "f" * 4000),
    ("config.yaml", "a: &a {b: 1}\nc:\n  <<: *a"),
    ("config.yaml", "a: 1\n---\nb: 2"),
    ("config.yaml", "[" * 900 + "]" * 900),
    ("config.yaml", "\n".join(["a0: &a0 [x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)])),
    ("config.yaml", b"\xff\xfe"),
    (".hydra/choices.yaml", "- model"),
    (".hydra/choices.yaml", "model: [a]"),
    (".hydra/choices.yaml", "model: 3"),
    (".hydra/choices.yaml", "model: 'a=b'"),
    ("evaluation.json", "{}"),
    ("evaluation.json", "[3]"),
    ("evaluation.json", json.dumps([{**FIGURE, "value": "low"}])),
    ("evaluation.json", json.dumps([{**FIGURE, "protocol": []}])),
    ("evaluation.json", json.dumps([{**FIGURE, "protocol": {"step": 6}}])),
    ("evaluation.json", json.dumps([{**FIGURE, "protocol": {"step": 6, "count": 10, "sampler_settings": {}}}])),
    ("evaluation.json", json.dumps([{**FIGURE, "protocol": {"step": 6, "count": 10, "reference": 3}}])),
    (META, "[]"),
    (META, json.dumps({"step": 6, "sha256": {}})),
    (META, json.dumps({"step": 6, "sha256": {"../../../secret": "0"}})),
    (META, json.dumps({"step": 6, "sha256": {"/etc/passwd": "0"}})),
    (META, json.dumps({"step": 5, "sha256": dict.fromkeys(["model.safetensors", "ema.safetensors", "state.pt"], "0")})),
]  # fmt: skip
WORKS = [
    ("run.json", '{"status": "failed", "status": "complete", "step": 3, "step": 6}'),
    ("run.json", '{"status": "complete", "step": 6, "timed": null, "stamp": {"a": [NaN]}}'),
    ("metrics.jsonl", "[]\n{}\nnull\n" + DEEP + '\n{"step": 1e3}\n{"step": true}\n{"step": 2, "train/loss": "x"}\n'),
    ("metrics.jsonl", f'{{"step": {DIGITS}}}\n{{"step": 2, "train/loss": {DIGITS}}}\n{{"step": -2, "train/loss": 1}}\n'),
    ("metrics.jsonl", '{"step": 2, "train/loss": 1}\n{"step": 2, "train/loss": 2}\n{"step": 0, "train/loss": 2}\n{"step": 1, "train/loss": NaN}\n'),
    ("metrics.jsonl", b"\x00\xff\n" * 9),
    ("metrics.jsonl", ""),
    ("costs.jsonl", '{"step": 2, "images": null}\n{"step": 2, "images": 1, "seconds": NaN, "seconds_in_steps": 0}\n[1]\n'),
    ("evaluation.json", json.dumps([FIGURE, FIGURE, {**FIGURE, "value": float("nan")}])),
    ("evaluation.json", json.dumps([{**FIGURE, "value": float("inf"), "more": {"a": [1, None]}}])),
]  # fmt: skip


@pytest.fixture(scope="module")
def pair(run_folder, tmp_path_factory):
    """Two healthy runs; the second is the first with another seed, and tests copy it further."""
    root = tmp_path_factory.mktemp("pair")
    shutil.copytree(run_folder, root / "good")
    one = synthetic_runs.write_run(
        RunFolder(run_folder), root / "one", {"seed": 1}, figures={6: 3.0}, costs=True, num_records=3,
        record={"status": "complete", "step": 6},
    )  # fmt: skip
    shutil.copytree(run_folder / "checkpoints", one / "checkpoints")
    return root


@pytest.fixture
def odd(pair, tmp_path):
    """A copy of a run for a test to damage."""
    return Path(shutil.copytree(pair / "one", tmp_path / "odd"))


def put(folder, file, content):
    (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())


def test_what_no_file_of_ours_holds_is_said_in_its_row_alone(pair, typed, tmp_path):
    for number, (file, content) in enumerate(UNREADABLE):
        shutil.copytree(pair / "one", tmp_path / "runs" / f"{number:03d}")
        put(tmp_path / "runs" / f"{number:03d}", file, content)
    shutil.copytree(pair / "good", tmp_path / "runs" / "good")
    done = typed(
        *("compare", f"runs={tmp_path / 'runs'}", f"to={tmp_path / 'tables'}", "plot=true"),
        f"report={tmp_path / 'report.html'}",
    )
    assert (done.code, done.err) == (0, "")
    rows = {Path(row["run"]).name: row for row in csv.DictReader((tmp_path / "tables/table.csv").open())}  # fmt: skip
    assert len(rows) == len(UNREADABLE) + 1
    assert rows.pop("good")["status"] == "complete"
    for name, row in rows.items():
        file, content = UNREADABLE[int(name)]
        assert row["status"].startswith(f"unreadable ({file}: "), (
            file,
            content[:99],
            row["status"],
        )
        assert row["status"].isprintable()
    assert (tmp_path / "tables" / "loss.png").is_file()
    assert f"unreadable ({META}: " in (tmp_path / "report.html").read_text()


def test_what_is_odd_and_can_be_read_is_compared_with_the_others(pair, typed, tmp_path):
    for number, (file, content) in enumerate(WORKS):
        shutil.copytree(pair / "one", tmp_path / "runs" / f"{number:03d}")
        # without weights, the runs are not taken for copies of one run
        shutil.rmtree(tmp_path / "runs" / f"{number:03d}" / "checkpoints")
        put(tmp_path / "runs" / f"{number:03d}", file, content)
    done = typed(
        *("compare", f"runs=[{pair / 'good'},{tmp_path / 'runs'}]", f"to={tmp_path / 'tables'}"),
        *("plot=true", "plot_over=images", f"report={tmp_path / 'report.html'}"),
    )
    assert done.code == 0, done.err
    assert all("damaged and left out" in line or "costs.jsonl" in line for line in done.err.splitlines())  # fmt: skip
    rows = list(csv.DictReader((tmp_path / "tables" / "table.csv").open()))
    assert [row["status"] for row in rows] == ["complete"] * (1 + len(WORKS))


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", "costs.jsonl", "evaluation.json", "config.yaml"])  # fmt: skip
def test_a_pipe_a_folder_and_a_huge_file_are_never_read(odd, name):
    for make in (
        os.mkfifo,
        lambda file: file.mkdir(),
        lambda file: os.truncate(os.open(file, os.O_CREAT | os.O_WRONLY), 3 * 2**30),
    ):
        (odd / name).unlink()
        make(odd / name)
        assert read(RunFolder(odd)).status.startswith(f"unreadable ({name}: ")
        if (odd / name).is_dir():
            (odd / name).rmdir()
            (odd / name).touch()


def test_a_link_that_leads_nowhere_or_in_a_circle_is_told(odd):
    (odd / "run.json").unlink()
    (odd / "run.json").symlink_to("run.json")
    assert read(RunFolder(odd)).status.startswith("unreadable (run.json: ")


def test_our_own_yaml_is_read_as_pyyaml_reads_it(tmp_path):
    values = {
        "numbers": [0, -3, 10**20, 1e-5, 1.5e300, -0.0, 1e22, float("inf"), -float("inf")],
        "words": ["yes", "null", "~", "1e3", "2020-01-01", "1:30", "0o7", "010", "<<", "", " x ", "é\U0001f600", "a: b", "#", "*a", "&a", "|", "line\nline", "tab\t"],
        "others": [None, True, False, {}, []],
        "nested": {"a": {"b": [{"c": 1}]}},
    }  # fmt: skip
    for text in (
        yaml.safe_dump(values),
        yaml.safe_dump(values, default_flow_style=True, allow_unicode=True),
        "a: 0x1F\nb: 0b101\nc: 017\nd: 1_000\ne: +5\nf: 1.e+3\ng: .5\nh: Yes\ni: OFF\nj:\n",
    ):
        put(tmp_path, "file.yaml", text)
        found = read_yaml(tmp_path / "file.yaml", 10**6)
        assert json.dumps(found) == json.dumps(yaml.safe_load(text))
    shared = ["shared"]
    put(tmp_path, "file.yaml", yaml.safe_dump({"a": shared, "b": shared}))
    assert read_yaml(tmp_path / "file.yaml", 10**6) == {"a": shared, "b": shared}


def test_a_file_is_read_up_to_its_limit_and_not_beyond(tmp_path):
    put(tmp_path, "file.json", "[1, 2]")
    assert read_json(tmp_path / "file.json", 6) == [1, 2]
    with pytest.raises(Unreadable, match="6 bytes, more than the limit of 5"):
        read_json(tmp_path / "file.json", 5)
    assert read_json(tmp_path / "nothing.json", 5) is None


def test_a_step_reported_twice_counts_once_and_the_later_report_counts(odd):
    put(odd, "metrics.jsonl", '{"step": 20, "train/loss": 9}\n{"step": 10, "train/loss": 5}\n{"step": 20, "train/loss": 1}\n')  # fmt: skip
    (loss,) = [one for one in read(RunFolder(odd)).results if one.metric == "loss"]
    assert (loss.final, loss.best) == ((1.0, 20), (1.0, 20))
    assert window_means([(10, 5.0), (20, 1.0)]) == [(10, 5.0), (20, 1.0)]


def two_checkpoints(run):
    """Adds a newer checkpoint to the run's own and returns its path; both are whole."""
    older, newer = run / "checkpoints" / "step_00000006", run / "checkpoints" / "step_00000012"
    shutil.copytree(older, newer)
    meta = json.loads((newer / "meta.json").read_text())
    (newer / "meta.json").write_text(json.dumps({**meta, "step": 12}))
    return newer


@pytest.mark.parametrize(
    "content",
    ["[]", "", DEEP, "{}", '{"step": 12, "sha256": [1]}', '{"step": 12, "sha256": {"../x": "0"}}', '{"step": 12, "sha256": {}}', b"\xff"],
)  # fmt: skip
def test_a_checkpoint_whose_meta_is_no_meta_is_passed_over(odd, content, caplog):
    newer = two_checkpoints(odd)
    assert checkpoint.find(odd / "checkpoints").step == 12
    weights = read(RunFolder(odd)).weights
    put(newer, "meta.json", content)
    assert checkpoint.find(odd / "checkpoints").step == 6
    (said,) = caplog.messages
    assert "skipping a damaged checkpoint" in said
    assert f"{newer}: meta.json" in said
    assert read(RunFolder(odd)).weights == weights  # both checkpoints hold the same weights
    with pytest.raises(ValueError, match="step=12: .* is damaged: meta.json cannot be read"):
        checkpoint.find(odd / "checkpoints", 12)


def test_names_in_meta_stay_inside_the_folder(odd, tmp_path):
    newer = two_checkpoints(odd)
    meta = json.loads((newer / "meta.json").read_text())
    (tmp_path / "secret").write_text("outside")
    for name in ("../../../secret", str(tmp_path / "secret"), "..", "a/b", ""):
        put(newer, "meta.json", json.dumps({**meta, "sha256": {**meta["sha256"], name: "0"}}))
        assert checkpoint.Checkpoint(newer, 12).damage().startswith("meta.json cannot be read (sha256")  # fmt: skip


def test_a_copied_checkpoint_is_not_that_of_another_step(odd):
    shutil.copytree(odd / "checkpoints/step_00000006", odd / "checkpoints/step_99999999")
    assert checkpoint.find(odd / "checkpoints").step == 6


def test_commands_fall_back_too(pair, typed, tmp_path, caplog):
    odd = Path(shutil.copytree(pair / "good", tmp_path / "odd"))
    put(two_checkpoints(odd), "meta.json", "[1]")
    done = typed("sample", f"run={odd}", *DRAWN, f"to={tmp_path / 'drawn'}")
    assert done.code == 0, done.err
    (said,) = caplog.messages
    assert "step_00000012: meta.json cannot be read" in said
    done = typed("train", f"resume={odd}", "training.steps=8")
    assert done.code == 0, done.err
    assert checkpoint.find(odd / "checkpoints").step == 8


PIECES = [None, True, 0, -1, 6, 1.5, 10**30, float("nan"), float("inf"), "", "x", "complete", "running", "2020-01-01", "\x1b[1m", "../x", "${seed}"]  # fmt: skip


def mutated(chance, value, keys):
    """The document with a random part replaced or removed, or a random document instead of it."""
    kind = chance.random()
    if kind < 0.25 or not isinstance(value, dict | list) or not value:
        return anything(chance, keys, 3)
    if isinstance(value, list):
        index = chance.randrange(len(value))
        return [*value[:index], mutated(chance, value[index], keys), *value[index + 1 :]]
    key = chance.choice(list(value))
    if kind < 0.35:
        return {name: inner for name, inner in value.items() if name != key}
    return {**value, key: mutated(chance, value[key], keys)}


def anything(chance, keys, depth):
    kind = chance.randrange(4 if depth else 2)
    if kind < 2:
        return chance.choice(PIECES)
    some = [anything(chance, keys, depth - 1) for _ in range(chance.randrange(4))]
    return some if kind == 2 else {chance.choice(keys): one for one in some}


def texts(chance, run):
    """Yields each of a run's files with content that nobody foresaw."""
    for file in ("run.json", "config.yaml", ".hydra/choices.yaml", "evaluation.json", META, "metrics.jsonl", "costs.jsonl"):  # fmt: skip
        lines = file.endswith(".jsonl")
        own = yaml.safe_load((run / file).read_text().splitlines()[0] if lines else (run / file).read_text())  # fmt: skip
        keys = re.findall(r"\w+", json.dumps(own))[:200]
        odd = mutated(chance, own, keys)
        text = yaml.safe_dump(odd) if file.endswith(".yaml") else json.dumps(odd)
        yield file, f"{text}\n{json.dumps(own)}\n" if lines else text


def ends_well(done):
    """Checks that a command worked, or failed with exactly one line about an expected error."""
    said = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(said) == (done.code != 0), done.err
    assert "Traceback" not in done.err
    assert not re.search(r"error: \w+(Error|Exception|Exit)\b", done.err), done.err
    return True


@pytest.mark.parametrize("seed", range(EXAMPLES))
def test_whatever_lies_there_all_commands_work_or_say_so_in_a_line(pair, typed, tmp_path, seed):
    chance = random.Random(seed)
    places = []
    for number, (file, content) in enumerate(texts(chance, pair / "one")):
        places.append(Path(shutil.copytree(pair / "one", tmp_path / f"odd{number}")))
        put(places[-1], file, content)
    done = typed(
        *(
            "compare",
            f"runs=[{pair / 'good'},{tmp_path}]",
            f"to={tmp_path / 'tables'}",
            "plot=true",
        ),
        f"report={tmp_path / 'report.html'}",
    )
    assert done.code == 0, done.err
    assert ends_well(done)
    statuses = [row["status"] for row in csv.DictReader((tmp_path / "tables/table.csv").open())]
    assert statuses[0] or "complete" in statuses
    place = places[seed % len(places)]
    assert ends_well(typed("sample", f"run={place}", *DRAWN, f"to={tmp_path / 'drawn'}"))
    assert ends_well(typed("evaluate", f"run={place}", "evaluation.metrics=[losses]", "evaluation.num_images=2", "evaluation.batch_size=2"))  # fmt: skip
    assert ends_well(typed("train", f"resume={place}", "training.steps=7"))
