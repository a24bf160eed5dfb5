"""Studies: a claim's numbers per seed, what follows from them, and resuming a study."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from ddpm.compare import verdicts
from ddpm.config.compose import compose
from ddpm.config.schema import plain_config, training_config
from ddpm.config.validation import validate
from ddpm.evaluate.run import Settings as EvaluateSettings
from ddpm.runs.folder import RunFolder
from ddpm.study import figures, page, picture, plan
from ddpm.study import run as study
from ddpm.study.figures import Cell, StudyRun
from ddpm.study.plan import Claim


def test_the_interval_of_a_mean_is_students():
    # t at 0.975 with 2 degrees of freedom is 4.302653 (tables); three numbers, deviation 1
    found = verdicts.interval([1.0, 2.0, 3.0])
    assert found == pytest.approx((2.0, 2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5), rel=1e-6)
    with pytest.raises(ValueError, match="2 seeds or more, got 1"):
        verdicts.interval([1.0])


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ([-1.0, -1.1, -0.9], "holds"),
        ([1.0, 1.1, 0.9], "does not hold here"),
        ([-1.0, 1.0, -0.5], "undecided at these seeds"),
        ([-1.0], "undecided at these seeds"),
        ([], "undecided at these seeds"),
        ([0.0, 0.0, 0.0], "undecided at these seeds"),
    ],
)
def test_a_verdict_needs_the_whole_interval_on_one_side(numbers, expected):
    assert verdicts.verdict(numbers) == expected


def test_a_slope_is_over_doublings():
    assert verdicts.slope([1, 2, 4, 8], [5.0, 3.0, 1.0, -1.0]) == pytest.approx(-2.0)
    with pytest.raises(ValueError, match="above 0"):
        verdicts.slope([0, 1], [1.0, 2.0])


def cell(seed, value, status="complete", **settings):
    values = {} if value is None else {"fd": value}
    return Cell({key: str(word) for key, word in settings.items()}, seed, "DIR", status, values)


def claim(**about):
    return Claim.model_validate({"says": "s", "source": "p", "of": "fd", **about})


def test_differences_are_of_runs_of_one_seed_and_of_settings_that_both_sides_have():
    cells = [
        cell(0, 1.0, loss="a", lr=1), cell(0, 3.0, loss="b", lr=1),
        cell(0, 10.0, loss="a", lr=2),  # b has no such run
        cell(1, 2.0, loss="a", lr=1), cell(1, 7.0, loss="b", lr=1),
        cell(1, 4.0, loss="a", lr=2), cell(1, 5.0, loss="b", lr=2),
    ]  # fmt: skip
    found = figures.tried(claim(less={"loss": "a"}, than={"loss": "b"}), cells)
    assert found.numbers == {0: -2.0, 1: pytest.approx((-5 - 1) / 2)}
    one = figures.tried(claim(where={"lr": 2}, less={"loss": "a"}, than={"loss": "b"}), cells)
    assert one.numbers == {1: -1.0}


def test_slopes_are_of_the_seed_and_their_sign_is_the_claims():
    cells = [cell(seed, seed + place, steps=2**place) for seed in (0, 1) for place in (0, 1, 2)]
    assert figures.tried(claim(falls_with="steps"), cells).numbers == pytest.approx({0: 1, 1: 1})
    assert figures.tried(claim(rises_with="steps"), cells).numbers == pytest.approx({0: -1, 1: -1})


def test_the_best_value_of_a_setting_takes_the_place_of_the_measure():
    # the best lr is 1 at batch 1, and 4 at batch 4
    values = {(1, 1): 0.5, (1, 4): 2.0, (4, 1): 3.0, (4, 4): 1.0}
    cells = [cell(0, value, batch=batch, lr=lr) for (batch, lr), value in values.items()]
    found = figures.tried(claim(best="lr", rises_with="batch"), cells)
    assert found.numbers == {0: pytest.approx(-1.0)}


def test_no_slope_is_0_without_a_sign():
    rises = claim(rises_with="steps")
    cells = [cell(seed, 1.0, steps=steps) for seed in (0, 1) for steps in (1, 2)]
    assert "over log2 steps 0 [0, 0], 2 seeds" in page.text([figures.tried(rises, cells)])


def test_the_best_places_are_those_within_the_deviation_of_the_best_however_far_others_spread():
    of_places = [[0.9, 1.1], [1.0, 1.2], [1.2, 1.4], [0.9, 33.0]]  # 1.0 and a deviation of 0.1414
    assert picture.near_best([np.array(values) for values in of_places]) == [0, 1]
    assert picture.near_best([np.array([2.0]), np.array([1.0])]) == [1]


def test_a_run_that_failed_is_named_and_its_seed_not_counted():
    cells = [
        cell(0, 1.0, loss="a"), cell(0, None, "failed", loss="b"),
        cell(1, 1.0, loss="a"), cell(1, 2.0, loss="b"),
    ]  # fmt: skip
    found = figures.tried(claim(less={"loss": "a"}, than={"loss": "b"}), cells)
    assert (found.numbers, found.verdict) == ({1: -1.0}, "undecided at these seeds")
    assert found.missing == ["seed 0, loss b: failed, no fd"]


@pytest.mark.parametrize("name", plan.names())
def test_each_study_is_of_runs_and_measurements_that_can_be(name):
    study = plan.load(name)
    for job in plan.jobs(study.train):
        training_config(compose(job.words))
    for way in plan.jobs(study.evaluate):
        composed = compose(["run=DIR", *way.words], "evaluate")
        validate(EvaluateSettings, plain_config(composed))
    assert all(len(said) <= 100 for said in (one.says for one in study.claims))


def test_a_choice_of_a_claim_finds_the_settings_that_a_line_sweeps_over():
    (one, other) = plan.jobs([["sampler.clip=true,false", "sampler.num_steps=5"]])
    assert plan.matches(one.settings, {"sampler.clip": True, "sampler.num_steps": 5})
    assert plan.matches(other.settings, {"sampler.clip": False})
    assert not plan.matches(other.settings, {"sampler.clip": "true"})


def test_the_page_has_one_row_per_setting_where_one_sampler_drew():
    study = plan.Study(
        title="T", question="Q", method="M", seeds=3, train=[["loss=a,b"]],
        evaluate=[["sampler=ddim"], ["evaluation.metrics=[bits_per_dim]"]],
        claims=[
            {"says": "s", "source": "x", "of": of, "less": {"loss": "a"}, "than": {"loss": "b"}}
            for of in ("fd", "bits_per_dim", "train/grad_norm")
        ],
    )  # fmt: skip
    cells = []
    for loss, more in (("a", {}), ("b", {}), ("b", {"rate": "2"})):
        trained = {"loss": loss, **more}
        run = Cell(trained, 0, "r", "complete", {"train/grad_norm": 1.0, "bits_per_dim": 2.0})
        cells += [run, Cell({**trained, "sampler": "ddim"}, 0, "r", "complete", {"fd": 3.0})]
    head, rows = page.means(study, cells)
    assert head == ["loss", "rate", "fd", "bits_per_dim", "train/grad_norm"]
    assert rows == [[*start, "3", "2", "1"] for start in (["a", ""], ["b", ""], ["b", "2"])]


TOY = {
    "title": "A toy", "question": "Is it more?", "method": "By the loss.", "seeds": 3,
    "train": [["data=digits", "training.steps=2,4", "training.batch_size=4", "model.base_channels=8",
               "model.norm_groups=4", "model.channel_multipliers=[1]", "model.attention_resolutions=[]",
               "runtime.preview_sampler=ddim10", "runtime.num_previews=1", "runtime.log_every=1"]],
    "evaluate": [["evaluation.metrics=[losses]", "evaluation.num_images=8", "sampler=ddim10"]],
    "claims": [
        {"says": "More steps, less loss", "source": "nobody", "of": "loss_t0900_0999",
         "less": {"training.steps": 4}, "than": {"training.steps": 2}},
        {"says": "Norms rise", "source": "nobody", "of": "train/grad_norm", "rises_with": "training.steps"},
    ],
}  # fmt: skip


def test_a_study_runs_its_lines_and_typed_again_only_what_is_missing(ddpm, tmp_path):
    """Each command takes seconds to start, so this study evaluates nothing."""
    file, to = tmp_path / "toy.yaml", tmp_path / "page"
    file.write_text(yaml.safe_dump({**TOY, "evaluate": [], "claims": TOY["claims"][1:]}))
    words = [str(file), f"outputs={tmp_path / 'runs'}", f"study.to={to}", "study.jobs=1"]
    first = ddpm("study", *words, "study.seeds=2")
    assert first.code == 0, first.err
    assert first.out.count("\npython -m ddpm.train -m") == 1
    found = json.loads((to / "toy.json").read_text())
    assert list(found["claims"][0]["numbers"]) == ["0", "1"]
    assert len({one["run"] for one in found["cells"]}) == 4
    # the runs' own files have the same numbers: log_every=1, so the mean over the later half
    for one in found["cells"]:
        lines = (tmp_path / one["run"] / "metrics.jsonl").read_text().splitlines()
        norms = [json.loads(line)["train/grad_norm"] for line in lines if "grad_norm" in line]
        late = norms[len(norms) // 2 :]
        assert one["values"]["train/grad_norm"] == pytest.approx(sum(late) / len(late))
    text = (to / "README.md").read_text()
    assert "Norms rise" in text
    assert found["claims"][0]["verdict"] in text
    assert (to / "toy.png").is_file()

    # typed again with one more seed, as the file says, the study trains only that seed
    more = ddpm("study", *words)
    assert more.code == 0, more.err
    (line,) = [line for line in more.out.splitlines() if line.startswith("python -m ddpm.train")]
    assert " seed=2" in line
    grown = json.loads((to / "toy.json").read_text())
    assert list(grown["claims"][0]["numbers"]) == ["0", "1", "2"]
    kept = {one["run"]: one["values"] for one in grown["cells"] if one["seed"] < 2}
    assert kept == {one["run"]: one["values"] for one in found["cells"]}


def test_what_a_line_measures_is_found_and_nothing_else(typed, run_folder, tmp_path):
    run = RunFolder(shutil.copytree(run_folder, tmp_path / "run"))
    (job,) = plan.jobs([["data=digits", "schedule=linear", "objective=epsilon"]])
    one = StudyRun(job, 3, run)
    line = ["evaluation.metrics=[losses]", "evaluation.num_images=8", "sampler=ddim10"]
    (way,) = plan.jobs([line])
    assert not figures.is_measured(one, way)
    for words in (["seed=3"], ["seed=4"], ["seed=3", "weights=raw"]):
        done = typed("evaluate", f"run={run.path}", *line, *words)
        assert done.code == 0, done.err
    assert figures.is_measured(one, way)
    assert not figures.is_measured(dataclasses.replace(one, seed=5), way)
    assert not figures.is_measured(one, plan.jobs([["evaluation.num_images=4", *line[:1]]])[0])
    study = plan.Study.model_validate({**TOY, "train": [job.words], "evaluate": [line]})
    trained, cell = figures.cells(study, one)
    assert trained.values.keys() == {"train/grad_norm"}
    (value,) = [
        entry["value"]
        for entry in json.loads((run.path / "evaluation.json").read_text())
        if entry["metric"] == "loss_t0900_0999"
        and (entry["protocol"]["seed"], entry["protocol"]["weights"]) == (3, "ema")
    ]
    assert cell.values["loss_t0900_0999"] == value


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            {"claims": [{**TOY["claims"][0], "less": {"training.steps": 5}}]},
            "no run or measurement",
        ),
        ({"claims": [{**TOY["claims"][0], "falls_with": "training.steps"}]}, "exactly one of"),
        ({"claims": [{**TOY["claims"][1], "rises_with": "seed"}]}, "fewer than two values"),
        ({"seeds": 2}, "seeds"),
        ({"colour": "red"}, "colour"),
        ({"train": [["hydra.run.dir=/tmp"]]}, "hydra.run.dir=/tmp: a study's line may not set"),
        ({"train": [["runtime.trusted_modules=[os]"]]}, "trusted_modules"),
        ({"train": [["+x=1"]]}, "may not set this key"),
        ({"train": [["outputs=/tmp"]]}, "outputs=/tmp"),
        ({"train": [["model=(,"]]}, "toy.yaml"),
    ],
)
def test_a_study_that_cannot_be_is_refused_in_a_line_that_names_its_file(
    typed, tmp_path, change, named
):
    file = tmp_path / "toy.yaml"
    file.write_text(yaml.safe_dump({**TOY, **change}))
    done = typed("study", str(file), f"outputs={tmp_path / 'runs'}")
    assert done.code == 1
    assert done.err.startswith("error: toy.yaml: ")
    assert named in done.err
    assert done.err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_name_that_is_no_study_is_refused_with_the_nearest(typed):
    assert "did you mean song_steps?" in typed("study", "song_step").err
    assert typed("study").out.split().count("song_steps") == 1


def test_study_show_prints_lines_that_can_be_typed(typed, tmp_path):
    done = typed("study", "song_steps", "study.show=true", f"outputs={tmp_path}", "study.jobs=2")
    lines = [line for line in done.out.splitlines() if line.startswith("python -m ")]
    assert len(lines) == 5
    assert "seed=0,1,2,3" in lines[0]
    assert all("hydra.launcher.n_jobs=2" in line for line in lines)
    assert not list(tmp_path.iterdir())


def test_a_study_needs_no_launcher_on_one_device(typed, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "visible_devices", list)
    done = typed("study", "song_steps", "study.show=true", f"outputs={tmp_path}")
    assert "python -m ddpm.train" in done.out
    assert "hydra" not in done.out


def test_a_study_whose_runs_all_fail_says_so_and_its_commands_print_no_tracebacks(
    typed, tmp_path, monkeypatch
):
    lines, envs = [], []

    def fails(line, env, **_):
        lines.append(line)
        envs.append(env)
        return SimpleNamespace(returncode=1)

    monkeypatch.setattr(study, "subprocess", SimpleNamespace(run=fails))
    done = typed("study", "guidance", f"outputs={tmp_path}")
    assert done.code == 1
    assert "study guidance: no run was trained and measured" in done.err
    assert [line[2] for line in lines] == ["ddpm.train"]
    assert "PATH" in envs[0]
    assert "HYDRA_FULL_ERROR" not in envs[0]


def test_real_digits_are_named_and_noise_is_not():
    from sklearn.datasets import load_digits

    from ddpm.evaluate import digits
    from ddpm.evaluate.distances import classes
    from ddpm.evaluate.features import of_digits
    from ddpm.evaluate.metrics import CannotBeHad

    extractor, data = of_digits(torch.device("cpu")), load_digits()
    images = (data.images * (255 / 16)).round().astype("uint8")[:400, :, :, None]
    asked = [str(digit) for digit in data.target[:400]]
    drawn = extractor(images)
    named, right = classes(drawn, asked, extractor, {"count": 400})
    assert (named.metric, right.metric) == ("named", "class_accuracy")
    assert named.value > 0.8
    assert right.value > 0.97
    assert 0.8 < named.floor < 0.9  # on digits that the classifier was not trained on
    wrong = [str((digit + 1) % 10) for digit in data.target[:400]]
    assert classes(drawn, wrong, extractor, {"count": 400})[1].value < 0.03
    noise = torch.randint(0, 256, (200, 16, 16, 1), generator=torch.Generator().manual_seed(0))
    seen = extractor(noise.to(torch.uint8).numpy())
    (of_noise,) = classes(seen, None, extractor, {"count": 200})
    assert of_noise.value < named.value / 2
    with pytest.raises(CannotBeHad, match="images were drawn of cat"):
        classes(drawn, ["cat"] * 400, extractor, {"count": 400})
    assert digits.classifier() is digits.classifier()
