"""Each recipe is what its source describes, as far as that shows without data or training."""

import functools
import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from weight_folders import assert_same_chain, randomized

from ddpm import recipes
from ddpm.config import build
from ddpm.config.compose import CONF, EXPERIMENTS, compose
from ddpm.config.schema import Config, training_config
from ddpm.models.unet import UNet
from ddpm.plan.run import departures, expectations
from ddpm.plan.sizes import Sizes
from ddpm.runs import results
from ddpm.runs.finding import locate
from ddpm.runs.identity import identity
from ddpm.runs.results import Measurement
from ddpm.weights import folders
from ddpm.weights.scheduler_settings import scheduler_config
from ddpm.weights.unet_settings import UNET, unet_config

NAMES = sorted(file.stem for file in EXPERIMENTS.glob("*.yaml"))
PLAIN = {
    "butterflies128": "model=unet128 data=butterflies",
    "butterflies256": "model=unet256 data=butterflies",
    "mtg128": "model=unet128 data=mtg",
    "mtg256": "model=unet256 data=mtg",
    "cifar10": "model=unet32 data=cifar10",
    "cifar10_epsilon_bound": "model=unet32 data=cifar10 objective=epsilon_bound",
    "cifar10_epsilon_bound_learned": "model=unet32 data=cifar10 objective=epsilon_bound_learned",
    "cifar10_mean": "model=unet32 data=cifar10 objective=mean",
    "cifar10_mean_bound": "model=unet32 data=cifar10 objective=mean_bound",
    "cifar10_mean_bound_learned": "model=unet32 data=cifar10 objective=mean_bound_learned",
    "celebahq256": "model=unet256 data=celebahq256",
    "lsun_bedroom256": "model=unet256 data=lsun_bedroom256",
    "lsun_church256": "model=unet256 data=lsun_church256",
    "lsun_cat256": "model=unet256 data=lsun_cat256",
}


composed = functools.cache(lambda *overrides: compose(overrides))


@functools.cache
def configured(*overrides: str) -> Config:
    return training_config(composed(*overrides))


def run(*overrides: str) -> str:
    """What decides the folder of a run, but for its readable part."""
    return json.dumps(identity(configured(*overrides)), sort_keys=True)


def num_steps(config: Config) -> int:
    return config.training.steps or config.training.epochs * steps_per_epoch(config)


def steps_per_epoch(config: Config) -> int:
    images, batch = config.data.num_images, config.training.batch_size
    return images // batch if config.training.drop_last else -(-images // batch)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_can_be_built_and_comes_to_what_it_says(name):
    config = configured(f"experiment={name}")
    build.check(config)
    network = build.network(config, torch.device("meta"), config.data.num_classes or 1)
    schedule, rate, abar = (
        build.lr_schedule(config),
        config.optimizer["lr"],
        build.diffusion(config).alphas_cumprod,
    )
    expect = config.recipe.expect
    found = {
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "steps_per_epoch": steps_per_epoch(config),
    }
    found["last_step"] = num_steps(config) - 1
    assert {key: getattr(expect, key) for key in found} == found
    assert {step: schedule(step, num_steps(config), rate) for step in expect.lr} == pytest.approx(
        expect.lr, rel=1e-6
    )
    assert {t: abar[t].item() for t in expect.alphas_cumprod} == pytest.approx(
        expect.alphas_cumprod, rel=1e-6, abs=0
    )
    assert {0, len(abar) - 1} <= expect.alphas_cumprod.keys()
    assert 0 in expect.lr
    assert max(expect.lr) < num_steps(config)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_opens_with_its_command_and_prints_each_figure_once(name):
    first = (EXPERIMENTS / f"{name}.yaml").read_text().splitlines()[0]
    command, _, plain = first.partition("  ")
    assert command.removesuffix(" data.path=DIR") == f"# python -m ddpm.train experiment={name}"
    assert plain.strip() == (f"(the same run as {PLAIN[name]})" if name in PLAIN else "")
    recipe = configured(f"experiment={name}").recipe
    protocols = [(metric.name, metric.protocol) for metric in recipe.expect.metrics]
    assert len(set(protocols)) == len(protocols)
    assert {metric.name for metric in recipe.expect.metrics} <= recipes.METRICS.keys()


@pytest.mark.parametrize("name", PLAIN)
def test_the_plain_command_is_the_recipes_run(name):
    paths = {
        locate(configured(*overrides)).path
        for overrides in ([f"experiment={name}"], PLAIN[name].split())
    }
    assert len(paths) == 1


def test_two_recipes_are_never_one_run():
    assert len({run(f"experiment={name}") for name in NAMES}) == len(NAMES)


@pytest.mark.parametrize(
    ("data", "steps", "flip"),
    [
        ("celebahq256", 500_000, True),
        ("lsun_bedroom256", 2_400_000, False),
        ("lsun_church256", 1_200_000, True),
        ("lsun_cat256", 1_800_000, True),
    ],
)
def test_the_papers_runs_at_256_are_those_of_its_appendix_b(data, steps, flip):
    config = configured("model=unet256", f"data={data}")
    training = config.training
    assert (
        training.steps,
        training.batch_size,
        training.ema_decay,
        training.ema_warmup,
        training.grad_clip,
    ) == (steps, 64, 0.9999, False, 1.0)
    assert (
        config.optimizer["lr"],
        config.model["dropout"],
        config.data.flip,
        config.data.resolution,
    ) == (2e-5, 0.0, flip, 256)
    assert (
        config.objective["prediction"],
        config.objective["loss"],
        config.objective["variance"],
    ) == ("epsilon", "simple", "fixed_small")


IMPROVED = [
    "cifar10_hybrid",
    "cifar10_vlb",
    "imagenet64_hybrid",
    "imagenet64_vlb",
    "imagenet64_conditional",
    "lsun_bedroom256_improved_a",
    "lsun_bedroom256_improved_b",
]


@pytest.mark.parametrize("name", IMPROVED)
def test_improved_ddpm_trains_without_warm_up_clipping_or_decay(name):
    """Its bound weighs T / 1000 of the whole, or 1 / T where the code rescales nothing.

    Nichol & Dhariwal 2021, README.
    """
    config = configured(f"experiment={name}")
    optimizer = build.optimizer(config, [torch.nn.Parameter(torch.zeros(1))])
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults["weight_decay"] == 0
    assert (
        config.training.grad_clip,
        config.training.ema_decay,
        config.training.ema_warmup,
        config.data.flip,
    ) == (None, 0.9999, False, False)
    assert config.lr_schedule == {"_target_": "ddpm.train.lr_schedules.Constant", "warmup_steps": 0}
    diffusion = build.diffusion(config)
    rescales = name in IMPROVED[:4]
    assert diffusion.variance == "learned_range"
    assert diffusion.rescale_timesteps == rescales
    if name.endswith("vlb"):
        assert (diffusion.loss, diffusion.vlb_weight, diffusion.timestep_sampling) == (
            "bound",
            1.0,
            "loss_second_moment",
        )
    else:
        assert (diffusion.loss, diffusion.timestep_sampling) == ("hybrid", "uniform")
        assert diffusion.vlb_weight == pytest.approx(
            0.001 if rescales else 1 / diffusion.num_timesteps
        )


# Dhariwal & Nichol 2021, Table 11:
# width, blocks, multipliers, dropout, batch, steps, rate, parameters in millions
ADM = {
    "imagenet64_adm": (192, 3, [1, 2, 3, 4], 0.1, 2048, 540_000, 3e-4, 296),
    "imagenet128_adm": (256, 2, [1, 1, 2, 3, 4], 0.0, 256, 4_360_000, 1e-4, 422),
    "imagenet256_adm": (256, 2, [1, 1, 2, 2, 4, 4], 0.0, 256, 1_980_000, 1e-4, 554),
    "lsun_bedroom256_adm": (256, 2, [1, 1, 2, 2, 4, 4], 0.1, 256, 500_000, 1e-4, 552),
    "lsun_cat256_adm": (256, 2, [1, 1, 2, 2, 4, 4], 0.1, 256, 200_000, 1e-4, 552),
    "lsun_horse256_adm": (256, 2, [1, 1, 2, 2, 4, 4], 0.1, 256, 250_000, 1e-4, 552),
}


@pytest.mark.parametrize("name", ADM)
def test_the_adm_recipes_are_those_of_the_papers_table(name):
    config = configured(f"experiment={name}")
    model, training, diffusion = config.model, config.training, build.diffusion(config)
    found = (
        model["base_channels"],
        model["num_res_blocks"],
        model["channel_multipliers"],
        model["dropout"],
        training.batch_size,
        training.steps,
        config.optimizer["lr"],
    )
    *table, millions = ADM[name]
    assert list(found) == table
    parameters = config.recipe.expect.parameters
    assert parameters / 1e6 == pytest.approx(millions, abs=1)  # the paper's LSUN: 552, of 552.8
    assert (training.precision, training.ema_decay, training.ema_warmup, training.grad_clip) == (
        *("fp16", 0.9999, False, None),
    )
    optimizer = build.optimizer(config, [torch.nn.Parameter(torch.zeros(1))])
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults["weight_decay"] == 0
    assert (diffusion.variance, diffusion.loss, diffusion.num_timesteps) == (
        *("learned_range", "hybrid", 1000),
    )
    imagenet = name.startswith("imagenet")
    assert training.conditional == imagenet
    assert config.data.resize == ("box_bicubic" if imagenet else "box")
    steps = len(build.sampler(config.sampler, diffusion).timesteps(diffusion))
    assert steps == (250 if imagenet else 1000)
    ddim = configured(f"experiment={name}", "sampler=ddim25").sampler
    assert build.sampler(ddim, diffusion).timesteps(diffusion) == list(range(960, -1, -40))


@pytest.mark.parametrize("name", NAMES)
def test_what_a_recipe_must_have_is_checked_by_plan_and_what_it_has_otherwise_is_named(name):
    config = configured(f"experiment={name}")
    recipe, needs = config.recipe, Sizes(0, 0, 0, {})
    checked = [
        verdict
        for verdict in expectations(config, recipe.expect, needs, num_steps(config))
        if verdict.what.startswith("settings.")
    ]
    assert len(checked) == len(recipe.expect.settings)
    assert all(verdict.passed for verdict in checked)
    assert (len(checked) > 20) == (name in ADM)
    differing = departures(config, recipe)
    assert all(one.published != one.found for one in differing)
    typed = [f"{one.key}={one.published}" for one in differing]
    there = configured(f"experiment={name}", *typed)
    assert all(one.published == one.found for one in departures(there, recipe))


def test_the_recipes_name_the_resizing_of_their_sources():
    """Pictures are shrunk as in the sources.

    StyleGAN2's tool for Ho et al.'s LSUN, datasets/lsun_bedroom.py of OpenAI's repositories,
    torchvision's Resize of the original README.
    """
    departs = {name: configured(f"experiment={name}").recipe.departs for name in NAMES}
    resized = {name: values.get("data.resize") for name, values in departs.items() if values}
    assert resized == {
        **dict.fromkeys(
            ["lsun_bedroom256", "lsun_bedroom256_large", "lsun_cat256", "lsun_church256"], "lanczos"
        ),
        **dict.fromkeys(["lsun_bedroom256_improved_a", "lsun_bedroom256_improved_b"], "box"),
        "imagenet64_conditional": "box_bicubic",
        **dict.fromkeys(
            ["butterflies128", "butterflies128_readme_net", "butterflies256", "mtg128", "mtg256"],
            "bilinear",
        ),
    }
    assert "training.epochs=150" in configured("experiment=mtg256").recipe.note


@pytest.mark.parametrize(
    ("data", "path"),
    [
        ("lsun_bedroom256", None),
        ("lsun_cat256", None),
        ("celebahq256", "nowhere"),
        ("imagenet64", "nowhere"),
        ("imagenet128", "nowhere"),
        ("lsun_horse256", None),
    ],
)
def test_data_that_is_not_there_is_asked_for_by_data_path(data, path):
    with pytest.raises(ValueError, match=r"data\.path"):
        build.source(configured(f"data={data}", *([f"data.path={path}"] if path else [])))


def commands() -> list[list[str]]:
    """The command lines of the page, a sweep as its jobs."""
    found = []
    for line in re.sub(r"\\\n\s*", "", recipes.SWEEPS).splitlines():
        if line.startswith("python -m ddpm.train "):
            choices = [
                [f"{key}={value}" for value in values.split(",")]
                for key, _, values in (
                    word.partition("=") for word in line.split()[3:] if word != "-m"
                )
            ]
            found += [list(job) for job in itertools.product(*choices)]
    return found


def test_the_pages_sweeps_are_the_rows_of_the_papers_tables():
    jobs = commands()
    for job in jobs:
        build.check(configured(*job))
    runs = [run(*job) for job in jobs]
    rows = [
        "cifar10",
        "cifar10_epsilon_bound",
        "cifar10_epsilon_bound_learned",
        "cifar10_mean",
        "cifar10_mean_bound",
        "cifar10_mean_bound_learned",
    ]
    assert runs[:6] == [run(f"experiment={name}") for name in rows]
    assert len(set(runs)) == len(runs) == 12
    assert {run("experiment=cifar10_hybrid"), run("experiment=cifar10_vlb")} <= set(runs[6:])
    noise = {
        (
            job[1:].count("schedule=linear"),
            len(diffusion.betas),
            f"{diffusion.alphas_cumprod[-1]:.6g}",
        )
        for job in jobs[6:]
        for diffusion in [build.diffusion(configured(*job))]
    }
    assert noise == {(0, 4000, "1.51798e-10"), (0, 4000, "4.24665e-05"), (1, 1000, "4.03583e-05")}


def test_the_page_is_what_the_command_prints(capsys):
    recipes.main()
    assert capsys.readouterr().out == (EXPERIMENTS / "README.md").read_text()


def test_the_page_has_a_row_and_a_note_for_each_recipe():
    page = (EXPERIMENTS / "README.md").read_text()
    rows = {row.split("|")[1].strip(): row for row in page.splitlines() if row.startswith("| [")}
    assert sorted(rows) == [f"[{name}]" for name in NAMES]
    assert [row for row in rows.values() if len(row) > 110] == []
    assert rows["[cifar10]"].startswith("| [cifar10] | unet32 | cifar10 | FID 3.17 (A) |")
    assert [name for name in NAMES if f"\n[{name}]: {name}.yaml\n" not in page] == []
    assert [name for name in NAMES if f"\n- {name}: " not in page] == []
    assert "35,746,307 parameters, 800,000 steps" in page
    assert "50,100 steps (300\n  epochs)" in page or "50,100 steps (300 epochs)" in page


def test_the_page_has_every_published_figure_with_its_protocol():
    page = (EXPERIMENTS / "README.md").read_text()
    letters = dict(re.findall(r"^- ([A-Z]): ((?:.+)(?:\n  .+)*)", page, flags=re.M))
    letters = {" ".join(said.split()): letter for letter, said in letters.items()}
    found = 0
    for name in NAMES:
        for metric in configured(f"experiment={name}").recipe.expect.metrics:
            letter = letters[metric.protocol]
            row = re.search(rf"^\| {name} \| {letter} \|(.*)\|$", page, flags=re.M)
            assert f"{metric.value:g}" in [cell.strip() for cell in row[1].split("|")]
            found += 1
    assert found > 60


def test_what_was_measured_is_read_from_what_was_stored(tmp_path):
    assert recipes.measured_rows("cifar10", tmp_path) == []
    (tmp_path / "cifar10").mkdir()
    (tmp_path / "cifar10" / "run.json").write_text(
        '{"status": "complete", "step": 800000, "command": [], "device": "1 x cuda", "git": {"commit": "0123456789"}}'
    )
    protocol = {"count": 50_000, "split": "train", "weights": "ema", "step": 800_000}
    results.record(
        tmp_path / "cifar10" / "evaluation.json",
        [
            Measurement("fid", 3.2, protocol, floor=1.5),
            Measurement("loss_t0000_0099", 0.1, protocol),
        ],
    )
    assert recipes.measured_rows("cifar10", tmp_path) == [
        ["cifar10", "fid", "3.2", "1.5", "50k:train:ema:step800000"]
    ]


RUNS = [
    *(f"experiment={name}" for name in NAMES),
    *(f"model={file.stem}" for file in sorted((CONF / "model").glob("*.yaml"))),
]
RESCALED = r"rescale_timesteps=true with schedule\.num_timesteps=4000"
HEADS = r"model\.num_heads=4 on widths \d+, \d+"
NO_EXPORT = {  # what diffusers' UNet2DModel and DDPMScheduler cannot express
    "experiment=butterflies128_readme_net": "ReadmeUNet",
    "model=unet_readme": "ReadmeUNet",
    "experiment=cifar10_epsilon_bound_learned": r"objective\.variance=learned",
    "experiment=cifar10_mean_bound_learned": r"objective\.prediction=mean",
    "experiment=cifar10_mean": r"objective\.prediction=mean",
    "experiment=cifar10_mean_bound": r"objective\.prediction=mean",
    "experiment=cifar10_hybrid": RESCALED,
    "experiment=cifar10_vlb": RESCALED,
    "experiment=imagenet64_hybrid": HEADS,
    "experiment=imagenet64_vlb": HEADS,
    "experiment=imagenet64_conditional": HEADS,
    "model=improved_unet64": HEADS,
    "model=improved_unet64_large": HEADS,
    "model=adm128": HEADS,
    "experiment=imagenet128_adm": HEADS,
}


@pytest.mark.parametrize("word", RUNS)
def test_a_run_is_the_same_in_diffusers_or_not_exported_with_the_reason(word):
    config = configured(word)
    arguments = {**config.model, **build.network_arguments(config, config.data.num_classes or 1)}
    diffusion = build.diffusion(config)
    if word in NO_EXPORT:
        with pytest.raises(ValueError, match=f"^[^\n]*{NO_EXPORT[word]}[^\n]*$"):
            folders.write(Path("/nowhere"), arguments, {}, diffusion)
        return
    exported_forward(json.dumps(arguments))
    scheduler = DDPMScheduler.from_config(scheduler_config(diffusion))
    channels = 2 if diffusion.learns_variance else 1
    assert_same_chain(
        scheduler, diffusion, lambda x_t, t: 0.9 * x_t.repeat(1, channels, 1, 1).cos()
    )


@functools.cache
def exported_forward(arguments: str) -> None:
    """Has diffusers compute what the network computes, with fewer channels, in float64."""
    full = {key: value for key, value in json.loads(arguments).items() if key != "_target_"}
    narrow = {**full, "base_channels": 32, "norm_groups": 8}
    narrow |= {"head_channels": 16} if full.get("head_channels") else {}
    narrow |= {"num_classes": 5} if full.get("num_classes") else {}
    ours = randomized(UNet(**narrow)).double().eval()
    settings = unet_config({"_target_": UNET, **narrow})
    full_settings = unet_config({"_target_": UNET, **full})
    assert full_settings["down_block_types"] == settings["down_block_types"]
    theirs = UNet2DModel.from_config(settings).double().eval()
    theirs.load_state_dict(ours.state_dict())
    side = 2 ** (len(narrow["channel_multipliers"]) - 1)
    x_t = torch.randn(1, narrow["in_channels"], side, side, dtype=torch.float64)
    label = [torch.tensor([3])] if full.get("num_classes") else []
    with torch.inference_mode():
        expected, found = ours(x_t, torch.tensor([731]), *label), theirs(x_t, 731, *label).sample
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
