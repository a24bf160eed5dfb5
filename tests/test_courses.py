"""Charts of many runs over training.

Seeds share one curve, costs can be the axis, and nothing is cut off or triggers a warning.
"""

import warnings

import numpy as np
import pytest
from made_runs import PROTOCOL, made
from PIL import Image

from ddpm.compare import courses, drawing
from ddpm.compare.course_plots import draw_courses
from ddpm.runs import reader
from ddpm.runs.folder import RunFolder

FD = "fd_efficientnet_lite0"


@pytest.fixture(scope="module")
def template(run_folder):
    return reader.read(RunFolder(run_folder))


def test_seeds_are_one_course_with_their_mean_least_and_most_and_failed_ones_apart(
    template, tmp_path
):
    losses = {0: [(2, 3.0), (4, 1.0)], 1: [(2, 5.0), (4, 2.0), (6, 1.5)], 2: [(2, 4.0), (4, 6.0)]}
    runs = [
        made(template, tmp_path / str(seed), "failed" if seed == 2 else "complete", of, seed=seed)
        for seed, of in losses.items()
    ]
    (panel,) = courses.find(runs, "loss", "step")
    both, failed = panel.courses
    assert (both.num_seeds, both.failed, failed.num_seeds, failed.failed) == ((1, 2), False, (1, 1), True)  # fmt: skip
    assert both.over.tolist() == [2, 4, 6]
    assert both.mean.tolist() == [4.0, 1.5, 1.5]
    assert (both.least.tolist(), both.most.tolist()) == ([3.0, 1.0, 1.5], [5.0, 2.0, 1.5])
    assert failed.mean.tolist() == [4.0, 6.0]


def test_other_settings_and_other_pictures_are_other_courses(template, tmp_path):
    runs = [
        made(template, tmp_path / f"{lr}-{seed}", losses=[(2, 1.0)], lr=lr, seed=seed)
        for lr in (1e-3, 1e-2)
        for seed in (0, 1)
    ]
    runs[1].record["data"] = {**runs[1].record["data"], "fingerprint": "another"}
    (panel,) = courses.find(runs, "loss", "step")
    assert [course.num_seeds for course in panel.courses] == [(1, 1), (1, 1), (2, 2)]
    assert [course.settings for course in panel.courses] == [
        {"optimizer.lr": 1e-3}, {"optimizer.lr": 1e-3}, {"optimizer.lr": 1e-2},
    ]  # fmt: skip


def test_a_figure_is_drawn_over_what_its_step_had_cost(template, tmp_path):
    """Cost is linear between two reports; a step past the last report has none."""
    figures = [(FD, PROTOCOL, {1: 9.0, 3: 7.0, 4: 5.0, 9: 4.0})]
    run = made(template, tmp_path / "a", "complete", [(2, 1.0), (4, 1.0)], [3600, 14400], figures)
    before = made(template, tmp_path / "b", "complete", [(2, 1.0)], None, figures, seed=1)
    for over, at in (("hours", [0.5, 2.5, 4.0]), ("device_hours", [1.0, 5.0, 8.0]), ("images", [8, 24, 32]), ("flops", [1e9, 3e9, 4e9])):  # fmt: skip
        (panel,) = courses.find([run, before], f"eval/{FD}", over)
        (course,) = panel.courses
        assert course.over.tolist() == at
        assert course.mean.tolist() == [9.0, 7.0, 5.0]
        assert panel.left_out == [str(before.run.path)]
    (panel,) = courses.find([run, before], f"eval/{FD}", "step")
    assert panel.courses[0].over.tolist() == [1, 3, 4, 9]
    with pytest.raises(ValueError, match=r"plot_over=hours: none of these runs has a costs.jsonl"):
        courses.find([before], f"eval/{FD}", "hours")


def test_each_protocol_has_a_panel_of_its_own(template, tmp_path):
    figures = [(FD, {**PROTOCOL, "seed": seed}, {2: 5.0, 4: 4.0 - seed}) for seed in (0, 1)]
    panels = courses.find([made(template, tmp_path / "a", figures=figures)], f"eval/{FD}", "step")
    assert [panel.courses[0].mean.tolist() for panel in panels] == [[5.0, 4.0], [5.0, 3.0]]


def test_what_training_reports_is_drawn_by_its_name(template, tmp_path):
    run = made(template, tmp_path / "a", losses=[(2, 1.0)])
    (run.run.path / "metrics.jsonl").write_text('{"step": 2, "train/loss": 1, "train/lr": 0.5}\n')
    (panel,) = courses.find([run], "train/lr", "step")
    assert (panel.name, panel.courses[0].mean.tolist()) == ("train/lr", [0.5])
    with pytest.raises(ValueError, match=r"plot_of=train/lo: no run has reported it; did you mean"):
        courses.find([run], "train/lo", "step")


def many(template, folder):
    """Returns 50 runs: five learning rates, two batch sizes, five seeds."""
    return [
        made(template, folder / f"{lr}-{size}-{seed}", losses=[(2, 1.0 + lr + seed), (4, 0.1 + lr), (6, 0.05)], lr=lr, batch_size=size, seed=seed)
        for lr in (1e-4, 2e-4, 3e-4, 4e-4, 5e-4)
        for size in (8, 16)
        for seed in range(5)
    ]  # fmt: skip


CASES = {
    "many": many,
    "all differ": lambda template, folder: [
        made(template, folder / str(lr), losses=[(2, 1.0), (4, 0.5 + lr)], lr=lr / 7e3)
        for lr in range(1, 51)
    ],
    "one": lambda template, folder: [made(template, folder / "a", losses=[(2, 1.0)])],
    "constant": lambda template, folder: [
        made(template, folder / str(seed), losses=[(2, 1.0), (4, 1.0)], seed=seed)
        for seed in (0, 1)
    ],
    "zeros": lambda template, folder: [made(template, folder / "a", losses=[(2, 0.0), (4, 0.0)])],
    "some zeros": lambda template, folder: [
        made(template, folder / "a", losses=[(2, 1.0), (4, 0.0)])
    ],
    "not finite": lambda template, folder: [
        made(template, folder / "a", losses=[(2, 1.0), (4, float("nan")), (6, float("inf"))])
    ],
    "names": lambda template, folder: [
        made(template, folder / str(index), losses=[(2, 1.0)], name=name)
        for index, name in enumerate(["日本語", r"$x_{1", r"$\frac{1$", "long " * 60, "_a", "<script>", None])
    ],
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_picture_is_whole_and_nothing_warns(case, template, tmp_path, capfd, caplog):
    """Text that is cut off would leave ink at the picture's edge."""
    panels = courses.find(CASES[case](template, tmp_path), "loss", "step")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_courses(tmp_path / "loss.png", panels, "step", None)
    picture = np.asarray(Image.open(tmp_path / "loss.png").convert("L"))
    edges = (picture[:3], picture[-3:], picture[:, :3], picture[:, -3:])
    assert all((edge == 255).all() for edge in edges)
    assert (picture < 128).any()
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


def test_a_legend_is_complete_or_says_what_it_leaves_out(template, tmp_path, monkeypatch):
    """All 10 combinations have a line; of 50 values, 12 have one and the other 38 are counted."""
    made_legends = []
    # keeps the legend's texts instead of drawing them
    monkeypatch.setattr(drawing, "legend", lambda axes, legend: made_legends.append(legend))
    for case in ("many", "all differ"):
        panels = courses.find(CASES[case](template, tmp_path / case), "loss", "step")
        draw_courses(tmp_path / "loss.png", panels, "step", None)
    whole, part = made_legends
    assert whole.texts == [
        f"lr {lr}, batch_size {size}, mean of 5 seeds"
        for lr in (0.0001, 0.0002, 0.0003, 0.0004, 0.0005)
        for size in (8, 16)
    ]
    assert whole.title == "band: lowest to highest seed"
    assert len(part.texts) == 12
    assert part.title == "50 curves, one seed each; 38 more values of lr"


def test_the_colour_follows_the_setting_that_is_asked_for(template, tmp_path, monkeypatch):
    handles = []
    monkeypatch.setattr(drawing, "legend", lambda axes, legend: handles.extend(legend.handles))
    panels = courses.find(many(template, tmp_path), "loss", "step")
    draw_courses(tmp_path / "loss.png", panels, "step", "training.batch_size")
    assert len({handle.get_color() for handle in handles}) == 2
    looks = {
        (handle.get_color(), handle.get_linestyle(), handle.get_marker()) for handle in handles
    }
    assert len(looks) == 10  # no two alike
