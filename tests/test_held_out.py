"""The loss on held-out pictures: what determines it, and the names of it and other figures."""

import json
import re
import shutil

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ddpm import run
from ddpm.diffusion import GaussianDiffusion
from ddpm.diffusion.schedules import linear
from ddpm.diffusion.timesteps import quartiles
from ddpm.evaluate.bound import quartile_sums
from ddpm.runs import results
from ddpm.runs.recording import LAYOUT
from ddpm.runs.results import Measurement


@pytest.mark.parametrize("num_timesteps", [1, 2, 3, 4, 5, 10, 50, 1000])
def test_quartiles_are_those_of_trainings_reports(num_timesteps):
    expected = {}
    for t in range(num_timesteps):
        first, _ = expected.get(4 * t // num_timesteps, (t, t))
        expected[4 * t // num_timesteps] = (first, t)
    assert quartiles(num_timesteps) == expected


def off_by_root_of_t(process):
    """Returns a model of all-gray pictures with loss t at each t."""

    def model(x_t, t):
        noise = x_t / (1 - process.alphas_cumprod[t]).sqrt()[:, None, None, None].float()
        return noise + t.sqrt()[:, None, None, None]

    return model


def test_the_total_weighs_quartiles_by_their_timesteps_and_no_batch_changes_it():
    betas = linear(5, 0.02, 0.4)
    process = GaussianDiffusion(betas, prediction="epsilon", variance="fixed_small", loss="simple")
    x0, numbers = torch.zeros(40, 1, 2, 2), torch.arange(40)
    model = off_by_root_of_t(process)
    sums = quartile_sums(model, process, [(numbers, x0)], seed=0)
    found = sums.by_quartile()
    assert {index: found[index] for index in (1, 2, 3)} == pytest.approx({1: 2, 2: 3, 3: 4})
    assert 0.2 < found[0] < 0.8  # t is 0 or 1
    assert sums.total() == pytest.approx((2 * found[0] + 2 + 3 + 4) / 5)
    halves = [(numbers[part], x0[part]) for part in (slice(25, 40), slice(25))]
    again = quartile_sums(model, process, halves, seed=0)
    assert again.by_quartile() == pytest.approx(found)
    other = quartile_sums(model, process, [(numbers, x0)], seed=1)
    assert other.by_quartile()[0] != found[0]


@pytest.fixture(scope="module")
def settings(tiny):
    watching = ["runtime.evaluate_every=2", "evaluation.metrics=[]", "data.holdout=0.02"]
    return [*tiny, "runtime.device=cpu", "schedule.num_timesteps=20", *watching]


@pytest.fixture(scope="module")
def watched(settings, tmp_path_factory):
    """A run that holds out one picture in fifty. Read-only."""
    return run([*settings, f"outputs={tmp_path_factory.mktemp('outputs')}"])


def evaluations(path):
    found = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if any(key.startswith("eval/") for key in line)]


WANTED = {f"eval/loss_{part}:{split}" for part in ("total", "q0", "q1", "q2", "q3") for split in ("train", "heldout")}  # fmt: skip


def test_both_losses_are_recorded_at_each_evaluation_and_shown_in_one_chart(watched):
    found = evaluations(watched.path)
    assert [line["step"] for line in found] == [2, 4, 6]
    assert all(line.keys() == {"step", *WANTED} for line in found)
    assert len({value for line in found for value in line.values()}) == 3 + 3 * len(WANTED)
    board = EventAccumulator(str(watched.path)).Reload()
    assert set(board.Tags()["scalars"]) >= WANTED
    ((_, (pattern,)),) = [
        chart for title, chart in LAYOUT["evaluation"].items() if title.startswith("loss, held out")
    ]
    shown = {tag for tag in board.Tags()["scalars"] if re.search(pattern, tag)}
    assert shown == {"eval/loss_total:train", "eval/loss_total:heldout"}
    entries = results.read_measurements(watched.path / "evaluation.json")
    counts = {entry["protocol"]["split"]: entry["protocol"]["count"] for entry in entries}
    assert counts == {"train": 512, "heldout": watched.record()["data"]["held_out"]}
    assert watched.record()["best"]["id"].startswith("loss_total@")
    assert ":heldout:" in watched.record()["best"]["id"]


def test_nothing_but_the_weights_moves_the_curves(settings, tmp_path):
    still = run([*settings, f"outputs={tmp_path}", "optimizer.lr=1e-30", "training.steps=4"])
    first, *others = [{**line, "step": 0} for line in evaluations(still.path)]
    assert others == [first]


def test_the_weights_are_those_of_a_run_that_measures_nothing(watched, settings, tmp_path):
    plain = run([*settings, f"outputs={tmp_path}", "runtime.evaluate_every=null"])
    assert plain.path.name == watched.path.name
    assert evaluations(plain.path) == []
    for name in ("model.safetensors", "ema.safetensors"):
        files = [one.checkpoints / "step_00000006" / name for one in (plain, watched)]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_an_evaluation_of_nothing_is_refused(complaint):
    refused = complaint("runtime.evaluate_every=2", "evaluation.metrics=[]")
    assert "evaluation.metrics=[]" in refused
    assert "data.holdout=0.1" in refused


def test_an_evaluation_that_a_stop_cut_off_is_made_up_for(watched, settings, tmp_path):
    folder = tmp_path / watched.path.parent.name / watched.path.name
    shutil.copytree(watched.path, folder)
    file = folder / "metrics.jsonl"
    expected = file.read_bytes()
    file.write_bytes(b"".join(expected.splitlines(keepends=True)[:-1]))
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**record, "status": "preempted"}))
    run([*settings, f"outputs={tmp_path}"])
    assert file.read_bytes() == expected


PROTOCOL = {"count": 50_000, "split": "train", "weights": "ema", "step": 5, "seed": 0}


def figure(metric, value, **protocol):
    return Measurement(metric, value, {**PROTOCOL, **protocol})


def test_a_tag_of_training_says_what_tells_it_from_the_others():
    assert results.tags([figure("fd", 1.0), figure("kd", 2.0)]) == {"fd": 1.0, "kd": 2.0}
    two = [figure("loss_t0", 1.0), figure("loss_t0", 2.0, split="heldout", count=7), figure("fd", 3.0)]  # fmt: skip
    assert results.tags(two) == {"loss_t0:train": 1.0, "loss_t0:heldout": 2.0, "fd": 3.0}
    same_split = [figure("kd", 1.0, sampler="ddim5"), figure("kd", 2.0, sampler="ddim9")]
    assert results.tags(same_split) == {"kd:ddim5": 1.0, "kd:ddim9": 2.0}


def test_a_recorded_figures_name_is_its_own_and_stays_when_others_come():
    drawn = {"sampler": "ddim50", "sampler_settings": {"guidance_scale": 1.0, "clip": True}}
    guided = {**drawn, "sampler_settings": {"guidance_scale": 1.5, "clip": True}}
    figures = [
        ("fid", {**PROTOCOL, **drawn}),
        ("fid", {**PROTOCOL, **guided}),
        ("fid", {**PROTOCOL, **drawn, "seed": 1}),
        ("fid", {**PROTOCOL, **drawn, "step": 6}),
    ]
    plain = "fid@50k:train:ddim50:ema"
    found = results.names(figures)
    assert found == [plain, f"{plain}:guidance_scale_1.5", f"{plain}:seed_1", plain]
    assert results.names(figures[:1]) == [plain]


def test_each_of_several_seeds_has_a_figure_in_tensorboard(typed, watched, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(watched.path, folder)
    words = [f"run={folder}", "device=cpu", "evaluation.num_images=2", "evaluation.metrics=[bits_per_dim]"]  # fmt: skip
    done = typed("evaluate", "-m", *words, "seed=0,1")
    assert done.code == 0, done.err
    tags = EventAccumulator(str(folder)).Reload().Tags()["scalars"]
    mine = {tag for tag in tags if tag.startswith("eval/bits_per_dim@")}
    plain = "eval/bits_per_dim@2:train:ema"
    assert mine == {
        f"{plain}{seed}{end}" for seed in ("", ":seed_1") for end in ("", "_final", "_best")
    }
