"""What published protocols do differently is a setting and is recorded with each figure.

Figures of unlike protocols stay apart. Figures of earlier versions keep their meaning.
"""

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from ddpm.compare import tables
from ddpm.config.compose import compose
from ddpm.evaluate import distances, features
from ddpm.evaluate.features import Extractor, Features
from ddpm.evaluate.metrics import TooFew
from ddpm.evaluate.reference import Reference
from ddpm.runs import reader, results
from ddpm.runs.folder import RunFolder
from ddpm.runs.results import Measurement
from ddpm.sample.images import to_levels

# the protocol in figures of versions without the newer fields
BEFORE = {
    "count": 50_000,
    "split": "train",
    "extractor": "inception",
    "sampler": "ancestral1000",
    "weights": "ema",
    "step": 6,
    "seed": 0,
}
EXTRACTOR = Extractor("inception", "fid", "kid", lambda _: None, torch.device("cpu"), 1)


def test_samples_are_rounded_cut_or_left_as_floats():
    """(0.999 + 1) * 127.5 is 254.87."""
    x = torch.tensor([-1.2, -1.0, 0.0, 0.999, 1.0, 3.0]).reshape(1, 1, 1, 6)
    levels = {how: to_levels(x, how).flatten() for how in ("round", "truncate", "none")}
    assert levels["round"].tolist() == [0, 0, 128, 255, 255, 255]
    assert levels["truncate"].tolist() == [0, 0, 127, 254, 255, 255]
    assert levels["none"] == pytest.approx([0, 0, 127.5, 254.8725, 255, 255])
    assert [found.dtype for found in levels.values()] == [np.uint8, np.uint8, np.float32]


def test_the_inception_score_of_one_split_is_that_of_all_images_in_whatever_order():
    """Certain predictions of 20 classes score exp(KL) = 20.

    The images are sorted by class, so ten splits in their order would hold two classes each.
    """
    sure = torch.eye(20).repeat_interleave(50, dim=0)
    drawn = Features(torch.zeros(1000, 2), sure)
    one, ten = (
        distances.distance("inception_score", drawn, None, EXTRACTOR, {"splits": splits}, 0)[0]
        for splits in (1, 10)
    )
    assert one.value == pytest.approx(20)
    assert one.deviation == 0
    # a split of 100 images does not hold exactly 5 per class, which lowers the score
    assert 17 < ten.value < 20


def test_precision_and_recall_take_so_many_pictures_evenly_spaced():
    """Every second picture lies among the samples; the others lie far away."""
    generator = torch.Generator().manual_seed(0)
    near = torch.randn(200, 4, generator=generator)
    real = torch.stack([near[:100], near[:100] + 1000], dim=1).flatten(0, 1)
    drawn = Features(near[100:], None)

    def measured(count):
        found = distances.distance(
            "precision_recall",
            drawn,
            Reference(None, real),
            EXTRACTOR,
            {"num_reference": count},
            0,
        )
        return {one.metric: one for one in found}

    whole, half = measured(None), measured(100)
    assert whole["recall"].value == pytest.approx(half["recall"].value / 2)
    assert half["recall"].value > 0.8
    with pytest.raises(TooFew, match=r"evaluation\.num_reference=201 is more than the 200 pictur"):
        measured(201)


def test_features_of_whole_levels_are_the_same_as_floats():
    extractor = features.efficientnet_lite0(torch.device("cpu"))
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    bytes_, floats = extractor(images), extractor(images.astype(np.float32), quantized=False)
    torch.testing.assert_close(bytes_.features, floats.features, rtol=0, atol=0)
    with pytest.raises(ValueError, match="of type float32, got"):
        extractor(images, quantized=False)


@pytest.mark.parametrize(
    ("metric", "fields", "ending"),
    [
        ("fid", {"quantize": "round", "resize": "bicubic"}, ""),
        ("fid", {"quantize": "none", "resize": "bicubic"}, ":quantize_none"),
        ("fid", {"quantize": "truncate", "resize": "box"}, ":resize_box:quantize_truncate"),
        ("inception_score", {"splits": 10}, ""),
        ("inception_score", {"splits": 1}, ":splits_1"),
        ("precision", {"num_reference": None}, ""),
        ("recall", {"num_reference": 10_000}, ":num_reference_10000"),
    ],
)
def test_a_figures_name_tells_what_is_not_as_before(metric, fields, ending):
    plain = Measurement(metric, 1.0, BEFORE).id
    assert Measurement(metric, 1.0, {**BEFORE, **fields}).id == plain.replace(
        ":step6", f"{ending}:step6"
    )


# metric -> the fields that only newer figures have
NOW = {
    "fid": {"quantize": "round", "resize": "bicubic"},
    "inception_score": {"quantize": "round", "resize": "bicubic", "splits": 10},
    "recall": {"quantize": "round", "resize": "bicubic", "num_reference": None},
    "bits_per_dim": {"resize": "bicubic"},
}
OTHER = {
    "fid": [{"quantize": "none"}, {"quantize": "truncate"}, {"resize": "lanczos"}],
    "inception_score": [{"splits": 1}],
    "recall": [{"num_reference": 10_000}],
    "bits_per_dim": [{"resize": "box_bicubic"}, {"split": "validation"}],
}


def before(metric: str) -> dict:
    of_pictures = {key: BEFORE[key] for key in ("count", "split", "weights", "step", "seed")}
    return of_pictures if metric == "bits_per_dim" else BEFORE


def as_written(folder, *figures: Measurement) -> None:
    """Writes figures to evaluation.json as they are, without adding fields."""
    entries = [
        {"id": one.id, "metric": one.metric, "value": one.value, "protocol": one.protocol}
        | {"deviation": None, "floor": None, "network": None}
        for one in figures
    ]
    (folder / "evaluation.json").write_text(json.dumps(entries))


@pytest.mark.parametrize("metric", NOW)
def test_a_figure_of_before_compares_with_todays_of_the_defaults_and_no_other(
    metric, run_folder, tmp_path
):
    protocols = [
        before(metric),
        {**before(metric), **NOW[metric]},
        *({**before(metric), **NOW[metric], **other} for other in OTHER[metric]),
    ]
    runs = [shutil.copytree(run_folder, tmp_path / str(n)) for n in range(len(protocols))]
    for number, (run, protocol) in enumerate(zip(runs, protocols, strict=True)):
        as_written(run, Measurement(metric, float(number), protocol))
    compared = [reader.read(RunFolder(run)) for run in runs]
    rows = tables.rows(compared)
    columns = [
        [key for key, value in row.items() if key.startswith(metric) and value is not None]
        for row in rows
    ]
    assert len(columns[0]) == 1
    assert columns[1] == columns[0]
    others = [column for (column,) in columns[2:]]
    assert len({*others, *columns[0]}) == 1 + len(others)


def test_a_figure_measured_again_takes_the_place_of_the_one_of_before(tmp_path):
    as_written(tmp_path, Measurement("fid", 9.0, BEFORE), Measurement("recall", 0.5, BEFORE))
    file = tmp_path / "evaluation.json"
    results.record(file, [Measurement("fid", 8.0, {**BEFORE, **NOW["fid"]})])
    assert [entry["value"] for entry in results.read_measurements(file)] == [8.0, 0.5]
    results.record(file, [Measurement("fid", 7.0, {**BEFORE, **NOW["fid"], "quantize": "none"})])
    assert [entry["value"] for entry in results.read_measurements(file)] == [8.0, 0.5, 7.0]


def test_figures_of_pictures_of_another_size_or_crop_are_in_another_column(run_folder, tmp_path):
    runs = [shutil.copytree(run_folder, tmp_path / name) for name in ("a", "b", "c")]
    for run, change in zip(runs, ({}, {"crop": "none"}, {"resolution": 64}), strict=True):
        plain = yaml.safe_load((run / "config.yaml").read_text())
        plain["data"] |= change
        (run / "config.yaml").write_text(yaml.safe_dump(plain))
        as_written(run, Measurement("fid", 9.0, BEFORE))
    rows = tables.rows([reader.read(RunFolder(run)) for run in runs])
    columns = [
        key for row in rows for key, value in row.items() if key[:3] == "fid" and value == 9.0
    ]
    assert len(set(columns)) == 3


def test_adms_protocol_is_that_of_its_evaluator():
    """guided-diffusion's evaluations/README.md and evaluator.py define the protocol.

    The README has 50,000 samples, statistics of the whole set, and 10,000 of its pictures.
    evaluator.py has splits of 5,000.
    """
    cfg = compose(["run=there", "evaluation=adm"], "evaluate").cfg.evaluation
    assert cfg.metrics == ["fd", "inception_score", "precision_recall"]
    assert (cfg.extractor, cfg.split) == ("inception", "train")
    assert (cfg.num_samples, cfg.num_reference, cfg.quantize) == (50_000, 10_000, "truncate")
    assert cfg.num_samples // cfg.inception_splits == 5_000


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    """A folder with a training and a validation split, both with the same two classes."""
    folder = tmp_path_factory.mktemp("pictures")
    for seed, name in enumerate(
        [f"train/{seed % 2}/{seed}" for seed in range(12)]
        + [f"val/{seed % 2}/{seed}" for seed in range(4)]
    ):
        file = folder / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(file)
    return folder


@pytest.fixture(scope="module")
def run(splits, typed, tiny, tmp_path_factory):
    """A class-conditional run on the training split."""
    outputs = tmp_path_factory.mktemp("outputs")
    words = [f"data.path={splits}", "data.channels=1", "data.resize=lanczos"]
    few = ["training.steps=2", "training.conditional=true", "schedule.num_timesteps=20"]
    done = typed("train", *tiny, "data=folder", *words, *few, f"outputs={outputs}")
    assert done.code == 0, done.err
    return done.run


ASKED = ["sampler=ddim", "sampler.num_steps=2", "evaluation.num_samples=6", "device=cpu"]


def test_bits_per_dim_of_the_validation_part(run, typed):
    asked = ["evaluation.metrics=[bits_per_dim,losses]", "evaluation.bound_split=validation"]
    done = typed("evaluate", f"run={run}", *ASKED, *asked)
    assert done.code == 0, done.err
    found = {
        entry["id"]: entry["protocol"]
        for entry in results.read_measurements(run / "evaluation.json")
    }
    protocol = found["bits_per_dim@4:validation:ema:resize_lanczos:step2"]
    assert (protocol["split"], protocol["count"], protocol["resize"]) == (
        "validation",
        4,
        "lanczos",
    )
    assert any(":validation:" in name for name in found if name.startswith("loss_t"))


def test_validation_pictures_that_name_other_classes_are_refused(run, typed, splits, tmp_path):
    """All validation pictures lie in one folder, as in ImageNet's archive."""
    shutil.copytree(splits / "train", tmp_path / "train")
    (tmp_path / "val" / "only").mkdir(parents=True)
    shutil.copyfile(splits / "val" / "0" / "0.png", tmp_path / "val" / "only" / "0.png")
    asked = ["evaluation.metrics=[bits_per_dim]", "evaluation.bound_split=validation"]
    done = typed("evaluate", f"run={run}", *ASKED, *asked, f"data.path={tmp_path}")
    assert done.code == 1
    assert done.err.splitlines()[-1].startswith(
        "error: the split validation has 1 classes, not the 2 that the network was trained with"
    )


def test_a_part_that_is_not_there_is_refused(run, typed, tmp_path, splits):
    shutil.copytree(splits / "train", tmp_path / "train")
    asked = ["evaluation.metrics=[bits_per_dim]", "evaluation.bound_split=test"]
    done = typed("evaluate", f"run={run}", *ASKED, *asked, f"data.path={tmp_path}")
    assert done.code == 1
    assert "test" in done.err.splitlines()[-1]


def test_quantization_is_measured_as_asked_and_its_samples_are_kept_apart(run, typed):
    """Truncating lowers the mean by half a level on average; rounding does not change it."""
    for how in ("round", "truncate", "none"):
        asked = ["evaluation.metrics=[colour]", f"evaluation.quantize={how}"]
        done = typed("evaluate", f"run={run}", *ASKED, *asked)
        assert done.code == 0, done.err
    gaps = {
        entry["protocol"]["quantize"]: entry["value"]
        for entry in results.read_measurements(run / "evaluation.json")
        if entry["metric"] == "channel_0_mean_gap"
    }
    assert gaps["round"] == pytest.approx(gaps["none"], abs=0.1)
    assert gaps["truncate"] == pytest.approx(gaps["none"] - 0.5, abs=0.15)
    drawn = [
        folder for folder in (run / "evaluation").iterdir() if (folder / "protocol.json").is_file()
    ]
    suffixes = sorted({file.suffix for file in folder.glob("00*")}.pop() for folder in drawn)
    assert suffixes == [".npy", ".png", ".png"]
