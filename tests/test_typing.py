"""What a new user types works, or one line says what to type instead.

A sweep is checked as a whole before its first job.
"""

import re
import shutil

import pytest
import yaml

from ddpm.config.compose import CONF, compose
from ddpm.config.schema import training_config
from ddpm.system.internals import flags_last
from ddpm.train.which import check_job

GLOBAL = "# @package _global_\n"


@pytest.fixture
def own(tmp_path):
    """Writes an options file and returns the folder for --config-dir."""

    def write(name: str, text: str) -> str:
        file = tmp_path / "my" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return str(tmp_path / "my")

    return write


def duration(*overrides: str, folder: str | None = None) -> tuple[int | None, int | None]:
    training = training_config(compose(overrides, config_dir=folder)).training
    return training.steps, training.epochs


@pytest.mark.parametrize(
    ("text", "typed", "expected"),
    [
        ("training: {epochs: 2}\n", [], (None, 2)),  # data=digits sets steps
        ("training: {epochs: 2}\n", ["training.steps=7"], (7, None)),
        ("training: {steps: 9}\n", ["training={epochs:3}"], (None, 3)),
        (
            "defaults: [override /data: butterflies]\ntraining: {steps: 9}\n",  # 300 epochs
            [],
            (9, None),
        ),
        ("defaults: [override /data: butterflies]\n", [], (None, 300)),
        ("defaults: [emoji32, _self_]\ntraining: {epochs: 4}\n", [], (None, 4)),
    ],
)
def test_of_two_units_of_the_duration_the_later_one_wins(own, text, typed, expected):
    folder = own("experiment/mine.yaml", GLOBAL + text)
    assert duration("experiment=mine", *typed, folder=folder) == expected


def test_a_built_in_recipe_may_give_the_other_unit_too(recipe):
    assert duration(recipe("training: {epochs: 2}\n")) == (None, 2)


def test_both_units_at_once_are_refused(own, typed, complaint):
    folder = own("experiment/mine.yaml", GLOBAL + "training: {steps: 3, epochs: 2}\n")
    for words in (
        ["--config-dir", folder, "experiment=mine"],
        ["training={epochs:2}", "training.steps=3"],
        ["training={epochs:2,steps:3}"],
    ):
        assert "training.steps=3 and training.epochs=2: give one" in complaint(*words)


@pytest.mark.parametrize(
    ("file", "option"),
    [
        ("schedule/linear.yaml", "schedule=linear"),
        ("model/common/unet.yaml", "model/common=unet"),
        ("config.yaml", "config.yaml"),
        ("experiment/cifar10.yaml", "experiment=cifar10"),
    ],
)
def test_an_own_file_that_a_built_in_one_hides_is_refused(own, complaint, file, option):
    folder = own(file, "seed: 1\n")
    for asked in (["--config-dir", folder], [f"hydra.searchpath=['file://{folder}']"]):
        line = complaint(*asked)
        assert f"{folder}/{file} is hidden by" in line
        assert option in line


def test_the_built_in_folder_itself_may_be_named(typed):
    done = typed("train", "--config-dir", str(CONF), "--cfg", "job", "-p", "training")
    assert done.code == 0, done.err


@pytest.mark.parametrize(
    "word",
    ["experiment=glob(typo*)", "model=glob([typo*])", "seed=range(0)", "seed=range(3,3)"],
)
def test_a_sweep_over_nothing_is_an_error(complaint, word):
    assert f"{word}: nothing to sweep over" in complaint("-m", word, "training.batch_size=4")


def test_a_sweep_over_nothing_in_a_file_is_an_error_too(own, complaint):
    params = "hydra: {sweeper: {params: {seed: range(0)}}}\n"
    folder = own("experiment/mine.yaml", GLOBAL + params)
    assert "nothing to sweep over" in complaint("--config-dir", folder, "-m", "experiment=mine")


def jobs(done) -> list[str]:
    """The table's column with the settings in which the jobs differ."""
    assert done.code == 0, done.err
    return [
        re.split("  +", line)[1] for line in done.out.strip().split("\n\n")[-1].splitlines()[1:]
    ]


@pytest.fixture
def composes(typed, monkeypatch):
    """Composes a command line of ddpm.train without training."""
    monkeypatch.setattr("ddpm.train.run.run", training_config)
    monkeypatch.setattr("ddpm.train.run.facts", lambda composed: {"shown": "yes"})
    return lambda *words: typed("train", *words)


def test_a_glob_takes_a_list(composes):
    done = composes("-m", "runtime.check_sweep=false", "model=glob([small*,quick*],exclude=*64)")
    assert jobs(done) == ["model=quickstart", "model=small32"]


def test_a_key_that_all_swept_options_have_need_not_be_in_the_default(composes):
    done = composes("-m", "schedule=cosine,sigmoid", "schedule.max_beta=0.9", "seed=1")
    assert jobs(done) == ["schedule=cosine", "schedule=sigmoid"]


def test_no_experiment_is_one_of_those_swept(composes):
    done = composes("-m", "runtime.check_sweep=false", "experiment=null,emoji32")
    assert jobs(done) == ["experiment=null", "experiment=emoji32"]
    assert duration("experiment=emoji32", "experiment=null") == (1000, None)


def test_flags_may_stand_anywhere(composes, own):
    folder = own("experiment/sub/deep.yaml", f"{GLOBAL}seed: 5\n")
    done = composes("model=small32", "-m", "seed=0,1", "--config-dir", folder, "data=emoji")
    assert jobs(done) == ["seed=0", "seed=1"]
    done = composes("experiment=sub/deep", "--config-dir", folder, "--cfg", "job", "data=emoji")
    assert (yaml.safe_load(done.out)["seed"], done.code) == (5, 0)
    assert flags_last(["a=1", "--config-dir=x", "-p", "y", "b=2", "--info", "c=3"]) == [
        *("a=1", "b=2", "c=3", "--config-dir=x", "-p", "y", "--info")
    ]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["-m", "optimizer=adam,adamw", "optimizer.weight_decay=0.1"],
            r"weight_decay: no such key .*adamw has it, adam does not; \+\+optimizer\.weight_decay=",
        ),
        (
            ["-m", "schedule=cosine,linear", "schedule.max_beta=0.9"],
            r"max_beta: .*schedule=cosine, sigmoid have it, linear does not \(job 1: schedule=lin",
        ),
        (
            ["-m", "schedule=cosine,sigmoid", "schedule.beta_end=0.02"],
            r"schedule\.beta_end: no such key in schedule; .*max_beta.*; schedule=linear, .* have it",
        ),
        (["-m", "optimizer.lr=interval(1e-5,1e-3)"], r"interval\(1e-5,1e-3\): .*list values"),
        (["+experiment=emoji32"], r"experiment has an option already; .* experiment="),
        (["model@foo=small32"], r"model@foo: .*no packages.* model="),
        (["seed=${oc.env:NO_SUCH,7}"], r'seed="7" .*integer, and is text.*oc\.decode:\$\{oc\.env'),
        (["optimizer.lr='1e-4'"], r'optimizer\.lr="1e-4" .*number, and is text'),
        (
            ["outputs=2024"],
            r"""outputs=2024 .*string, and is a number: quote it, as in 'outputs="2024"'""",
        ),
        (["training.grad_clip=none"], r"grad_clip=none should be a valid number or null"),
        (["data.flip=yes"], r'data\.flip="yes" should be .*true or false'),
        (["hydra.run.dir=here"], r"hydra\.run\.dir=here: a run's folder follows .*outputs=DIR"),
        (["-m", "hydra.sweep.dir=here", "seed=0,1"], r"hydra\.sweep\.dir=here: .*outputs=DIR"),
        (["hydra.job.chdir=true"], r"hydra\.job\.chdir=true: .*outputs=DIR"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_one_line_says_what_to_type(typed, tmp_path, monkeypatch, words, line):
    monkeypatch.chdir(tmp_path)
    done = typed("train", *words)
    assert done.code == 1
    assert re.search(line, done.err), done.err
    assert done.err.startswith("error: ")
    assert len(done.err.splitlines()) == 1 + ("none of the" in done.err)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("seed: 3\n", r"experiment/mine\.yaml: its first line must be '# @package _global_'"),
        ("defaults: [override /model: small32]\n", r"first line must be '# @package _global_'"),
        (f"{GLOBAL}defaults: [override model: small32]\n", r"mine\.yaml: .*override /model: "),
        (f"{GLOBAL}hydra: {{run: {{dir: x}}}}\n", r"hydra\.run\.dir=x: .*outputs=DIR"),
    ],
)
def test_an_own_experiment_that_is_wrong_is_told_what_it_lacks(own, complaint, text, line):
    folder = own("experiment/mine.yaml", text)
    assert re.search(line, complaint("--config-dir", folder, "experiment=mine"))


@pytest.mark.parametrize("name", ["sample", "evaluate"])
def test_the_other_commands_keep_a_runs_folder_too(typed, name):
    assert "outputs=DIR" in typed(name, "run=x", "hydra.job.chdir=true").err


@pytest.mark.parametrize(
    ("launcher", "settings"),
    [
        ("submitit_slurm", {"timeout_min": 1440, "max_num_timeout": 100, "signal_delay_s": 300}),
        ("joblib", {"n_jobs": "${num_devices:}"}),
    ],
)
def test_a_launcher_that_a_file_chooses_is_set_up_like_one_that_is_typed(
    typed, own, launcher, settings
):
    pytest.importorskip(f"hydra_plugins.hydra_{launcher.partition('_')[0]}_launcher")
    folder = own(
        "experiment/mine.yaml", f"{GLOBAL}defaults: [override /hydra/launcher: {launcher}]\n"
    )
    looking = ["--cfg", "hydra", "-p", "hydra.launcher"]
    for asked in (["--config-dir", folder, "experiment=mine"], [f"hydra/launcher={launcher}"]):
        shown = yaml.safe_load(typed("train", *asked, *looking).out)
        assert settings.items() <= shown.items()


def test_a_sweep_with_wrong_jobs_trains_none_and_lists_them_all(typed, tiny, tmp_path):
    words = ["-m", *tiny, f"outputs={tmp_path / 'outputs'}", "seed=0"]
    done = typed("train", *words, "optimizer.lr=1e-3,nope,-1", "model.dropout=0.1")
    assert done.code == 1
    first, second, last = done.err.splitlines()
    assert re.match(r"error: optimizer.lr=nope .* \(job 1: optimizer.lr=nope\)$", first)
    assert re.match(r"error: optimizer.lr=-1.* \(job 2: optimizer.lr=-1\)$", second)
    assert last.startswith("none of the 3 jobs was started; runtime.check_sweep=false")
    assert not list(tmp_path.rglob("run.json"))


def test_jobs_that_are_all_wrong_in_the_same_way_are_told_so_once(typed):
    done = typed("train", "-m", "seed=0,1", "training.batch_size=0")
    assert done.err == "error: training.batch_size=0 should be greater than 0\n"


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        (["data=folder", "data.path=/nowhere"], "data.path=/nowhere does not exist"),
        (["runtime.device=mps"], "device=mps"),
    ],
)
def test_data_and_device_are_looked_for_only_where_the_jobs_run(wrong, line):
    composed = compose(wrong)
    with pytest.raises(ValueError, match=line):
        check_job(composed, True)
    check_job(composed, False)


def test_the_check_of_a_sweep_can_be_switched_off(composes):
    done = composes("-m", "data=folder", "data.path=/none,/nowhere", "runtime.check_sweep=false")
    assert len(jobs(done)) == 2


def test_one_run_is_not_carried_on_by_two_jobs(typed, run_folder, tmp_path):
    copy = shutil.copytree(run_folder, tmp_path / "run")
    before = {file: file.read_bytes() for file in copy.rglob("*") if file.is_file()}
    words = ["-m", f"resume={copy}", "optimizer.lr=1e-3,1e-4", "training.steps=8"]
    done = typed("train", *words)
    assert done.code == 1
    assert f"jobs 0 and 1 of this sweep both resume {copy}" in done.err
    assert {file: file.read_bytes() for file in copy.rglob("*") if file.is_file()} == before


def test_jobs_that_are_one_run_are_refused(typed, tiny, tmp_path):
    done = typed("train", "-m", *tiny, f"outputs={tmp_path}", "sampler.num_steps=2,3", "seed=0,1")
    assert done.code == 1
    assert done.err.count("are the same run, since nothing that changes its weights") == 2
    assert "jobs 0 and 2 of this sweep" in done.err
    assert "(job 2: sampler.num_steps=3 seed=0)" in done.err
    assert not list(tmp_path.rglob("run.json"))
