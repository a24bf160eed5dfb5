"""Previews take at most 5% of training by default and say which sampler drew them."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from gaussian import ONE_COLOUR, spread_kept
from hydra.utils import instantiate
from omegaconf import OmegaConf

from ddpm import run
from ddpm.config import build
from ddpm.config.compose import CONF, compose, shipped_option, shipped_options
from ddpm.config.schema import training_config
from ddpm.diffusion.process import GaussianDiffusion
from ddpm.diffusion.samplers import Sampler, ddim
from ddpm.diffusion.schedules import linear
from ddpm.runs.folder import RunFolder
from ddpm.sample.images import grid, read_png, save_png, text_of, to_uint8
from ddpm.sample.previews import drawn_by, others_before, previews_of
from ddpm.sample.subject import of_run
from ddpm.system import signals

SCHEDULES = shipped_options("schedule")
# a short run with the paper's settings
PLAIN = [
    *("schedule=linear", "objective=epsilon", "training.conditional=false", "training.steps=1800"),
    *("runtime.sample_every=900", "runtime.num_previews=36"),
]


def chosen(*overrides, steps=None):
    config = training_config(compose([*PLAIN, *overrides]))
    return previews_of(config, steps or config.training.steps)


def process(schedule, zero_terminal_snr=False):
    settings = OmegaConf.load(CONF / "schedule" / f"{schedule}.yaml")
    settings.zero_terminal_snr = zero_terminal_snr
    return GaussianDiffusion(instantiate(settings), prediction="v")


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("option", shipped_options("sampler"))
def test_the_calls_of_each_sampler_are_counted_right(option, zero_terminal_snr):
    diffusion = process("cosine", zero_terminal_snr)
    if option == "ddim25" and zero_terminal_snr:
        with pytest.raises(ValueError, match="ddim25 starts at timestep 960"):
            build.sampler(shipped_option("sampler", option), diffusion)
        return
    built = build.sampler(shipped_option("sampler", option), diffusion)
    visited = len(built.timesteps(diffusion))
    expected = {"heun": 2 * visited - 1, "dpmpp": visited + zero_terminal_snr}
    count = expected.get(option.rstrip("0123456789"), visited)
    assert built.calls(diffusion) == count
    assert replace(built, guidance_scale=2.0).calls(diffusion) == 2 * count


@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
def test_the_calls_of_a_sampler_of_ones_own_are_counted(variance):
    def thrice(denoise, x, alphas_cumprod, timesteps, noise):
        for t in timesteps:
            for _ in range(3):
                x = denoise(x, torch.full((len(x),), t)).x0_hat
        return x

    loss = "hybrid" if variance == "learned_range" else "simple"
    diffusion = GaussianDiffusion(linear(100), "epsilon", variance=variance, loss=loss)
    assert Sampler(thrice, num_steps=10).calls(diffusion) == 30


def test_calls_are_counted_also_in_a_run_that_was_told_to_stop():
    """Stopping there would leave the run's other processes waiting for this one."""
    diffusion = process("cosine", zero_terminal_snr=False)
    with signals.listening():
        signals.tell("a test")
        assert Sampler(ddim, num_steps=10).calls(diffusion) == 10


@pytest.mark.parametrize(
    ("overrides", "steps", "name", "share"),
    [
        # share: network calls of all previews / (2 * images trained)
        ([], None, "quick", 0.05),  # 160 steps
        (["runtime.preview_sampler=run"], None, "run", 2 * 36 * 1000 / (2 * 1800 * 64)),
        (["runtime.preview_sampler=heun18"], None, "heun18", 2 * 36 * 35 / (2 * 1800 * 64)),
        (["data=cifar10", "model=unet32", "training.batch_size=128", "runtime.sample_every=5000",
          "runtime.num_previews=64"], 800_000, "run", 160 * 64 * 1000 / (2 * 800_000 * 128)),
        (["schedule=quad"], None, "quick", 0.05),
        (["schedule=jsd", "objective=v"], None, "dpmpp20", 2 * 36 * 21 / (2 * 1800 * 64)),
        (["runtime.sample_every=450"], None, "quick", 4 * 36 * 80 / (2 * 1800 * 64)),
        # a quick chain of 53 steps would fit in 5% but lose brightness
        (["runtime.sample_every=300"], None, "dpmpp20", 6 * 36 * 20 / (2 * 1800 * 64)),
        (["runtime.sample_every=100"], None, "dpmpp20", 18 * 36 * 20 / (2 * 1800 * 64)),
        (["runtime.sample_every=100", "schedule=quad"], None, "quick", 18 * 36 * 50 / (2 * 1800 * 64)),
        (["schedule=quad", "schedule.zero_terminal_snr=true", "objective=v",
          "runtime.sample_every=100"], None, "dpmpp20", 18 * 36 * 21 / (2 * 1800 * 64)),
        (["objective=mean"], None, "run", 2 * 36 * 1000 / (2 * 1800 * 64)),
        (["training.conditional=true", "sampler.guidance_scale=2"], None, "quick", 0.05),
        # exactly 5%, and one picture above it; the previews of the last step count, too
        (["training.batch_size=100", "runtime.num_previews=15"], 900, "quick", 0.05),
        (["training.batch_size=100", "runtime.num_previews=10", "runtime.sample_every=2000"],
         1000, "run", 0.05),
        (["training.batch_size=100", "runtime.num_previews=11", "runtime.sample_every=2000"],
         1000, "quick", 11 * 909 / 200_000),
        (["sampler=ddim10"], 1, "run", 36 * 10 / (2 * 64)),  # no other sampler is quicker
    ],
)  # fmt: skip
def test_what_draws_previews_by_default_and_what_it_takes(overrides, steps, name, share):
    found = chosen(*overrides, steps=steps)
    assert (found.name, found.share) == (name, pytest.approx(share, rel=1e-12))


def test_what_draws_the_quick_starts_own_previews():
    # 80 steps of the paper's sampler would fit in 5% but lose brightness on the cosine schedule
    config = training_config(compose([]))
    found = previews_of(config, config.training.steps)
    assert (found.name, found.share) == ("dpmpp20", pytest.approx(2 * 40 * 20 / (2 * 1000 * 64)))


def test_a_quick_sampler_keeps_the_guidance_of_the_runs_own():
    given = ("training.conditional=true", "sampler.guidance_scale=2.5")
    assert chosen(*given).settings["guidance_scale"] == 2.5
    assert chosen(*given).steps == 80


@pytest.mark.parametrize(
    ("schedule", "every"),
    [
        *((schedule, 900) for schedule in SCHEDULES),
        *[("linear", 450), ("cosine", 450), ("quad", 100), ("sigmoid", 100)],
    ],
)
def test_a_quick_sampler_keeps_what_the_papers_keeps_of_the_brightness(schedule, every):
    """With chains of 160 and of 80 steps, and where neither fits."""
    config = training_config(
        compose([*PLAIN, f"schedule={schedule}", "objective=v", f"runtime.sample_every={every}"])
    )
    diffusion, found = build.diffusion(config), previews_of(config, 1800)

    def kept(settings):
        built = build.sampler(settings, diffusion)
        return spread_kept(built.function, diffusion.alphas_cumprod, built.timesteps(diffusion))

    whole = shipped_option("sampler", "ancestral")
    whole = kept({**whole, "function": {**whole["function"], "variance": "fixed_small"}})
    least = 0.93 if schedule in ("quad", "linear_readme") and every == 100 else 0.95
    assert least * whole <= kept(found.settings) < 1.025


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
def test_dpmpp20_holds_for_each_prediction(prediction):
    diffusion = GaussianDiffusion(
        instantiate(OmegaConf.load(CONF / "schedule" / "linear.yaml")), prediction=prediction
    )
    built = build.sampler(shipped_option("sampler", "dpmpp20"), diffusion)

    def model(x_t, t):
        abar = diffusion.alphas_cumprod[t].reshape(-1, 1, 1, 1)
        x0 = abar.sqrt() * ONE_COLOUR / (abar * ONE_COLOUR + 1 - abar) * x_t
        noise = (x_t - abar.sqrt() * x0) / (1 - abar).sqrt()
        v = abar.sqrt() * noise - (1 - abar).sqrt() * x0
        return {"epsilon": noise, "x0": x0, "v": v}[prediction]

    denoise = diffusion.denoiser(model, clip=False)
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    out = built.function(
        denoise, x, diffusion.alphas_cumprod, built.timesteps(diffusion), lambda t: None
    )
    assert out.item() / ONE_COLOUR**0.5 == pytest.approx(1, abs=0.02)


def test_a_preview_is_drawn_by_what_it_says(run_folder, tiny, tmp_path):
    own = text_of(run_folder / "samples" / "step_00000006.png")
    assert own["drawn by"] == "the run's sampler (ddim, 2 steps)"
    assert json.loads(own["sampler"])["num_steps"] == 2
    quick = run([*tiny, f"outputs={tmp_path}", "runtime.preview_sampler=dpmpp20"])
    assert quick.path.name == run_folder.name  # previews are no part of a run's identity
    file = quick.samples / "step_00000006.png"
    assert text_of(file)["drawn by"] == "dpmpp20 (dpm_solver_pp, 20 steps)"
    trained = of_run(quick, 6, "ema", [])
    sampler = build.sampler(json.loads(text_of(file)["sampler"]), trained.subject.diffusion)
    drawing = trained.subject.drawing(
        sampler, trained.config.seed, torch.device("cpu"), trained.config.training.precision
    )
    assert (read_png(file) == grid(to_uint8(drawing.images(range(4))))).all()


def test_a_run_carried_on_from_an_earlier_version_says_that_previews_are_drawn_otherwise(
    run_folder, tmp_path
):
    run_ = RunFolder(shutil.copytree(run_folder, tmp_path / "run"))
    config = run_.config([])
    pictures = sorted(run_.samples.glob("*.png"))
    runtime = config.runtime.model_copy(update={"preview_sampler": "dpmpp20"})
    other = config.model_copy(update={"runtime": runtime})
    by_own, by_other = (previews_of(one, 6) for one in (config, other))
    assert others_before(config, by_own, pictures) is None
    assert others_before(other, by_other, []) is None
    save_png(pictures[-1], read_png(pictures[-1]))  # as earlier versions wrote it: without text
    assert others_before(config, by_own, pictures) is None
    said = others_before(other, by_other, pictures)
    assert "dpmpp20" in said
    assert "step_00000006.png by the run's sampler" in said
    whole = pictures[-1].read_bytes()
    # a file that was cut short has no text, either, and stops no run
    pictures[-1].write_bytes(whole[:100])
    assert others_before(other, by_other, pictures) == said
    pictures[-1].write_bytes(whole)
    save_png(tmp_path / "step_00000009.png", read_png(pictures[-1]), by_other.text(other, 9))
    assert others_before(other, by_other, [*pictures, tmp_path / "step_00000009.png"]) is None
    assert drawn_by(pictures) == "the run's sampler"
    mixed = drawn_by([*pictures, tmp_path / "step_00000009.png"])
    assert "from step_00000009 dpmpp20 (dpm_solver_pp, 20 steps)" in mixed


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["runtime.preview_sampler=dpm"], "dpm must be auto, run, or an option of sampler: anc"),
        (["runtime.preview_sampler=dpmpp20", "schedule=quad"], "dpmpp20: .* keep only 0.92"),
    ],
)
def test_a_sampler_that_cannot_draw_them_is_refused_before_training(complaint, overrides, reason):
    assert re.match(f"error: runtime.preview_sampler={reason}", complaint(*overrides))


def test_plan_says_what_previews_take(typed, tmp_path):
    done = typed("plan", "probe=0", *PLAIN, f"outputs={tmp_path}")
    assert (
        "previews    2 x 36 by a quick sampler (ancestral, 160 steps), 5% of training" in done.out
    )
    assert "(ancestral, 1000 steps) would take 31.2% (runtime.preview_sampler=run)" in done.out
    shorter = typed("plan", "probe=0", *PLAIN, "training.steps=10", f"outputs={tmp_path}")
    assert "(ancestral, 1000 steps) would take 2,812% (" in shorter.out
    assert "56.2% of training, more than 5%" in shorter.out
