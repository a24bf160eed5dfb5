"""Figures with their protocol: each is kept once and is the same however the work is split.

A figure that cannot be measured is refused in one line.
"""

import contextlib
import hashlib
import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ddpm.config.schema import Metric
from ddpm.evaluate import distances
from ddpm.evaluate.features import Features
from ddpm.evaluate.run import lines
from ddpm.runs import results
from ddpm.runs.results import Measurement

PROTOCOL = {
    "count": 50_000,
    "split": "train",
    "extractor": "inception",
    "sampler": "ancestral1000",
    "weights": "ema",
    "step": 800_000,
    "seed": 0,
}


def test_a_figures_id_says_its_protocol():
    assert (
        Measurement("fid", 3.17, PROTOCOL).id
        == "fid@50k:train:inception:ancestral1000:ema:step800000"
    )
    assert (
        Measurement(
            "bits_per_dim", 3.7, {"count": 256, "split": "test", "weights": "raw", "step": 5}
        ).id
        == "bits_per_dim@256:test:raw:step5"
    )


def test_a_figure_takes_the_place_of_the_same_one_and_no_other(tmp_path):
    file = tmp_path / "evaluation.json"
    results.record(
        file, [Measurement("fid", 9.0, PROTOCOL), Measurement("precision", 0.5, PROTOCOL)]
    )
    results.record(
        file, [Measurement("fid", 8.0, PROTOCOL), Measurement("fid", 7.0, {**PROTOCOL, "seed": 1})]
    )
    assert [(entry["metric"], entry["value"], entry["protocol"]["seed"]) for entry in results.read_measurements(file)] == [
        ("fid", 8.0, 0), ("precision", 0.5, 0), ("fid", 7.0, 1),
    ]  # fmt: skip


def test_which_of_two_values_is_the_better_is_known_where_one_is():
    assert [results.better(name) for name in ("fid", "kd_efficientnet_lite0", "bits_per_dim")] == [
        min
    ] * 3
    assert [results.better(name) for name in ("inception_score", "precision", "recall")] == [
        max
    ] * 3
    assert results.better("nearest_ratio") is results.better("channel_0_mean_gap") is None


def test_the_table_shows_what_was_published_beside_what_was_measured():
    shown = lines(
        [Measurement("fid", 3.4, PROTOCOL, floor=1.5)],
        [Metric(name="fid", value=3.17, tolerance=0.2, protocol="50k samples")],
    )
    assert "3.4000" in shown
    assert "floor 1.5000" in shown
    assert "published 3.17 +- 0.2 (50k samples)" in shown


def test_colour_gaps_are_those_of_the_channels_and_a_tint_is_warned_of():
    data = np.random.default_rng(0).integers(50, 200, (20, 3, 8, 8), dtype=np.uint8)
    drawn = data.transpose(0, 2, 3, 1).copy()
    drawn[..., 2] += 20
    figures, warnings = distances.colour(
        [drawn[:7], drawn[7:]], [data.transpose(0, 2, 3, 1)], PROTOCOL
    )
    gaps = {figure.metric: figure.value for figure in figures}
    assert gaps["channel_2_mean_gap"] == pytest.approx(20)
    assert all(value == 0 for name, value in gaps.items() if name != "channel_2_mean_gap")
    assert len(warnings) == 1
    assert "channel 2" in warnings[0]


def test_copies_of_training_pictures_are_found_and_come_first():
    reference = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    drawn = torch.cat([reference[7:8] + 3.0, reference[20:21], reference[8:9] - 3.0])
    figure, pairs = distances.nearest_pairs(Features(drawn, None), reference, PROTOCOL)
    assert pairs[0] == (1, 20)
    copies, _ = distances.nearest_pairs(Features(reference, None), reference, PROTOCOL)
    assert copies.value == 0
    assert figure.value > 0


def test_figures_that_several_write_at_once_are_all_kept(tmp_path):
    file = tmp_path / "evaluation.json"

    def write(number):
        for seed in range(5):
            protocol = {**PROTOCOL, "seed": seed}
            results.record(file, [Measurement(f"fid_{number}", 1.0, protocol)])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    assert len(results.read_measurements(file)) == 20


@contextlib.contextmanager
def forwards():
    """A list that records every call of a network."""
    calls = []
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, inputs: calls.append(type(module).__name__)
    )
    try:
        yield calls
    finally:
        hook.remove()


def test_a_sweep_typed_again_calls_no_network_and_one_with_more_measures_only_that(
    typed, run_folder, tmp_path
):
    run = shutil.copytree(run_folder, tmp_path / "run")
    words = ["-m", f"run={run}", f"outputs={tmp_path}", "device=cpu", "evaluation.num_samples=4", "evaluation.num_images=4", "sampler=ddim"]  # fmt: skip

    def sweep(*more):
        with forwards() as calls:
            done = typed("evaluate", *words, *more)
        assert done.code == 0, done.err
        return calls, json.loads((run / "evaluation.json").read_text())

    two = ["seed=0,1", "sampler.num_steps=2,3"]
    calls, found = sweep(*two, "evaluation.metrics=[colour,losses]")
    assert calls
    protocols = [entry["protocol"] for entry in found if entry["metric"] == "channel_0_mean_gap"]
    assert {(one["seed"], one["sampler"]) for one in protocols} == {
        (seed, sampler) for seed in (0, 1) for sampler in ("ddim2", "ddim3")
    }
    # losses do not depend on the sampler, so both share one measurement
    assert sum(entry["metric"].startswith("loss_") for entry in found) == 10 * 2
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*") if ".lock" not in file.name}
    assert sweep(*two, "evaluation.metrics=[colour,losses]") == ([], found)
    assert before == {
        file: file.stat().st_mtime_ns for file in run.rglob("*") if ".lock" not in file.name
    }
    calls, more = sweep("seed=1", "sampler.num_steps=3,4", "evaluation.metrics=[colour]")
    assert calls
    assert more[: len(found)] == found
    assert {entry["protocol"]["sampler"] for entry in more[len(found) :]} == {"ddim4"}


def test_another_network_at_the_same_step_is_measured_again(typed, run_folder, tmp_path):
    run = shutil.copytree(run_folder, tmp_path / "run")
    words = [f"run={run}", "device=cpu", "evaluation.num_images=4", "evaluation.metrics=[losses]"]
    assert typed("evaluate", *words).code == 0
    entries = json.loads((run / "evaluation.json").read_text())
    (run / "evaluation.json").write_text(
        json.dumps([{**entry, "network": "another", "value": 123.0} for entry in entries])
    )
    assert typed("evaluate", *words).code == 0
    assert json.loads((run / "evaluation.json").read_text()) == entries


def test_images_that_ddpm_sample_has_drawn_are_measured_as_they_are(typed, run_folder, tmp_path):
    run = shutil.copytree(run_folder, tmp_path / "run")
    words = [f"run={run}", "device=cpu", "sampler=ddim", "sampler.num_steps=2", "seed=7"]
    assert typed("sample", *words, "num_samples=4").code == 0
    with forwards() as calls:
        done = typed("evaluate", *words, "evaluation.metrics=[colour]", "evaluation.num_samples=4")
    assert (done.code, calls) == (0, []), done.err
    assert any(name.startswith("channel_0_mean_gap@4:train:ddim2") for name in measured(run))


def test_one_seed_under_two_names_is_refused(typed, run_folder):
    done = typed("evaluate", f"run={run_folder}", "seed=1", "evaluation.seed=2")
    assert done.code == 1
    assert "seed=1 and evaluation.seed=2 are the same key" in done.err


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Settings that train on 60 small pictures, so that features are cheap."""
    folder = tmp_path_factory.mktemp("pictures")
    for seed in range(60):
        Image.fromarray(
            np.random.default_rng(seed).integers(0, 256, (16, 16), dtype=np.uint8)
        ).save(folder / f"{seed:02d}.png")
    return [
        "data=folder",
        f"data.path={folder}",
        f"data.cache={folder.parent / 'cache'}",
        "data.channels=1",
    ]


@pytest.fixture(scope="module")
def run(typed, tiny, few, tmp_path_factory):
    done = typed(
        "train",
        f"outputs={tmp_path_factory.mktemp('outputs')}",
        *tiny,
        *few,
        "data.holdout=0.2",
        "schedule.num_timesteps=50",
    )
    assert done.code == 0, done.err
    return done.run


def measured(run):
    return {
        entry["id"]: entry["value"] for entry in json.loads((run / "evaluation.json").read_text())
    }


SETTINGS = [
    "sampler=ddim",
    "sampler.num_steps=2",
    "evaluation.num_samples=12",
    "evaluation.num_images=6",
    "device=cpu",
    "evaluation.split=heldout",
]


@pytest.mark.slow
def test_figures_do_not_depend_on_batches_or_processes_and_are_kept(ddpm, run):
    metrics = "evaluation.metrics=[kd,nearest,colour,losses,bits_per_dim]"
    done = ddpm(
        "evaluate",
        f"run={run}",
        *SETTINGS,
        metrics,
        "evaluation.batch_size=4",
        "evaluation.bound_split=heldout",
    )
    assert done.code == 0, done.err
    first = measured(run)
    assert {
        "kd_efficientnet_lite0@12:heldout:efficientnet_lite0:ddim2:ema:step6",
        "bits_per_dim@6:heldout:ema:step6",
    } <= first.keys()
    assert first["bits_per_dim_rate@6:heldout:ema:step6"] + first[
        "bits_per_dim_distortion@6:heldout:ema:step6"
    ] == pytest.approx(first["bits_per_dim@6:heldout:ema:step6"])
    # beside the training curves, in a tag that names the protocol
    board = EventAccumulator(str(run)).Reload()
    tag = "eval/kd_efficientnet_lite0@12:heldout:efficientnet_lite0:ddim2:ema"
    assert board.Scalars(f"{tag}_final")[0].value == pytest.approx(board.Scalars(tag)[0].value)
    two = ddpm(
        "evaluate",
        f"run={run}",
        *SETTINGS,
        metrics,
        "evaluation.batch_size=3",
        "evaluation.bound_split=heldout",
        processes=2,
    )
    assert two.code == 0, two.err
    assert measured(run) == pytest.approx(first, rel=1e-3, abs=1e-4)


@pytest.mark.slow
def test_a_reference_written_from_the_data_gives_the_same_distance_under_another_name(
    typed, run, tmp_path
):
    words = [f"run={run}", *SETTINGS, "evaluation.metrics=[fd]"]
    stats = tmp_path / "stats.npz"
    for more in ([], [f"reference_to={stats}"], [f"evaluation.reference={stats}"]):
        done = typed("evaluate", *words, *more)
        assert done.code == 0, done.err
    with np.load(stats) as found:
        assert (found["mu"].shape, found["sigma"].shape) == ((1280,), (1280, 1280))
    digest = hashlib.sha256(stats.read_bytes()).hexdigest()
    names = {name: value for name, value in measured(run).items() if name.startswith("fd_")}
    of_data = names["fd_efficientnet_lite0@12:heldout:efficientnet_lite0:ddim2:ema:step6"]
    of_file = names[
        f"fd_efficientnet_lite0@12:reference-{digest[:8]}:efficientnet_lite0:ddim2:ema:step6"
    ]
    assert of_file == pytest.approx(of_data, rel=1e-12)


@pytest.mark.slow
def test_what_cannot_be_had_is_said_in_one_line_and_the_rest_is_measured(typed, run):
    done = typed(
        "evaluate",
        f"run={run}",
        *SETTINGS,
        "evaluation.metrics=[fd,losses]",
        "evaluation.extractor=inception",
        "evaluation.num_images=5",
    )
    assert done.code == 1
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "torch-fidelity" in errors[0] or "weights_path" in errors[0]
    assert any(name.startswith("loss_t0000") and "@5:" in name for name in measured(run))


@pytest.mark.slow
@pytest.mark.parametrize(("overrides", "named"), [
    (["evaluation.split=test"], "no split test"), (["step=5"], "step=5"), (["evaluation.num_samples=1"], "evaluation.num_samples"), (["evaluation.metrics=[fdd]"], "evaluation.metrics"),
])  # fmt: skip
def test_an_impossible_protocol_is_refused_in_one_line(typed, run, overrides, named):
    done = typed("evaluate", f"run={run}", *SETTINGS, *overrides)
    assert done.code == 1
    assert named in done.err.splitlines()[-1]


@pytest.mark.slow
def test_in_training_the_best_checkpoint_is_kept(typed, tiny, few, tmp_path):
    done = typed(
        "train", f"outputs={tmp_path}", *tiny, *few, "runtime.evaluate_every=2", "runtime.keep_checkpoints=1", "evaluation.num_samples=6", "evaluation.metrics=[kd]",
        "optimizer.lr=0.1", "lr_schedule=constant", "lr_schedule.warmup_steps=0",
    )  # fmt: skip
    assert done.code == 0, done.err
    best = json.loads((done.run / "run.json").read_text())["best"]
    by_step = {
        entry["protocol"]["step"]: entry["value"]
        for entry in json.loads((done.run / "evaluation.json").read_text())
    }
    assert by_step.keys() == {2, 4, 6}
    assert best["step"] == min(by_step, key=by_step.get)
    assert {int(folder.name[-8:]) for folder in (done.run / "checkpoints").glob("step_*")} == {
        best["step"],
        6,
    }
