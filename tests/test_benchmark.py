import json

import torch

from ddpm.benchmark.run import run as benchmark
from ddpm.config.compose import compose
from ddpm.plan.timing import HostWaits

QUICK = [
    "rounds=2",
    "seconds=0.01",
    "sample_batch=2",
    "training.batch_size=4",
    "runtime.device=cpu",
]


def test_a_benchmark_says_what_it_measured_and_where(tiny, tmp_path, capsys):
    benchmark(compose([*tiny, *QUICK, f"to={tmp_path / 'speed.json'}"], "benchmark"))
    assert "images/s" in capsys.readouterr().out
    report = json.loads((tmp_path / "speed.json").read_text())
    assert report["machine"]["torch"] == f"torch {torch.__version__}"
    for work, batch in (("training", 4), ("sampling", 2)):
        speed = report[work]["images_per_second"]
        assert report[work]["batch"] == batch
        assert speed["rounds"] == 2
        assert 0 < speed["lowest"] <= speed["median"] <= speed["highest"]
    assert report["training"]["gflop_per_image"] > 2.9 * report["sampling"]["gflop_per_image"]


def test_no_training_step_waits_for_the_device(tiny, tmp_path):
    benchmark(
        compose(
            [*tiny, *QUICK, "training.conditional=true", f"to={tmp_path / 'speed.json'}"],
            "benchmark",
        )
    )
    assert json.loads((tmp_path / "speed.json").read_text())["training"]["host_waits_per_step"] == 0


def test_a_wait_for_the_device_is_counted():
    number = torch.ones(3)
    with HostWaits() as waits:
        number.sum().item()
        bool(number.sum() > 1)
        number.nonzero()
        number + 1
    assert waits.count == 3
