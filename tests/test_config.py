import re
import shutil
import sys

import pytest
from omegaconf import OmegaConf

from ddpm.config.compose import Composed, compose
from ddpm.config.schema import training_config
from ddpm.evaluate import __main__ as evaluate
from ddpm.export import __main__ as export
from ddpm.plan import __main__ as plan
from ddpm.sample import __main__ as sample


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ("model=unet23", "model=unet23: .*did you mean unet32"),
        ("experiment=butterflies12", "experiment=butterflies12: .*butterflies128"),
        ("lr=1e-4", r"lr: no such key; .*did you mean optimizer\.lr"),
        ("trainig.steps=3", "trainig.*did you mean training"),
        ("training.step=3", r"training\.step: .*did you mean steps"),
        ("model.dropuot=0.1", r"model\.dropuot: .*did you mean dropout"),
        (
            "optimizer=adamw optimizer.weight_deacy=0",
            r"optimizer\.weight_deacy: .*did you mean weight_decay",
        ),
        ("+training.step=3", r"training\.step: .*did you mean steps"),
        ("+model.num_haeds=4", r"model\.num_haeds"),
        ("+sampler.function.eat=0.5 sampler=ddim", r"sampler\.function\.eat: .*did you mean eta"),
        ("~model.base_channels", "model.*base_channels"),
        ("training.steps=0", r"training\.steps=0"),
        ("training.steps=1.5", r"training\.steps=1\.5"),
        ("training.steps=many", r"training\.steps=many"),
        ("training.steps=3 training.epochs=3", r"training\.steps=3 and training\.epochs=3"),
        ("training.steps=null", r"training\.steps=null|training\.steps=None"),
        ("training.batch_size=0", r"training\.batch_size=0"),
        ("training.precision=fp8", r"training\.precision=fp8 .*'fp32'.*'bf16'.*'fp16'"),
        ("training.grad_clip=-1", r"training\.grad_clip=-1"),
        ("training.ema_decay=1", r"training\.ema_decay=1"),
        ("training.drop_last=2", r"training\.drop_last=2"),
        ("runtime.device=gpu", r"runtime\.device=gpu .*'cuda'"),
        ("runtime.device_batch=0", r"runtime\.device_batch=0"),
        ("runtime.log_every=0", r"runtime\.log_every=0"),
        ("runtime.trusted_modules=mylib", r"runtime\.trusted_modules=mylib"),
        ("seed=-1", "seed=-1"),
        ("seed=${nothing}", "nothing"),
        ("data.channels=2", r"data\.channels=2"),
        ("data.crop=centre", r"data\.crop=centre"),
        ("data.max_unreadable=1.5", r"data\.max_unreadable=1\.5"),
        ("data.background=wihte", r"data\.background=wihte"),
        ("data.resolution=[16,16,16]", r"data\.resolution=\[16, 16, 16\]"),
        ("data=cifar10 ++data.source.repo=???", r"data\.source\.repo"),
        ("model.resolution=18", r"model\.resolution=18 .*divisible by 4"),
        ("model.base_channels=7", r"model\.base_channels=7"),
        ("model.base_channels=[32]", r"model\.base_channels=\[32\]"),
        ("model.norm_groups=7", r"model\.channel_multipliers .*norm_groups=7"),
        ("model.channel_multipliers=[1,two]", r"model\.channel_multipliers"),
        ("model.channel_multipliers=[]", r"model\.channel_multipliers"),
        ("model.attention_resolutions=[5]", r"model\.attention_resolutions .*16, 8, 4"),
        ("model.dropout=1.0", r"model\.dropout=1\.0"),
        ("schedule.num_timesteps=1", r"schedule\.num_timesteps=1"),
        ("schedule.beta_end=2", r"schedule\.beta_end=2"),
        ("objective.prediction=noise", r"objective\.prediction=noise .*'epsilon'.*'v'"),
        ("optimizer.lr=fast", r"optimizer\.lr=fast"),
        ("optimizer.lr=-1", r"optimizer.*-1"),
        ("optimizer.lr=.nan", r"optimizer\.lr"),
        ("lr_schedule.warmup_steps=-1", r"lr_schedule\.warmup_steps=-1"),
        ("sampler.num_steps=1001", r"sampler\.num_steps=1001 .*1000"),
        ("sampler.spacing=even", r"sampler\.spacing=even .*'linear'"),
        (
            "sampler.function._target_=ddpm.diffusion.samplers.dimm",
            r"sampler\.function\._target_=ddpm\.diffusion\.samplers\.dimm .*did you mean ddpm\.diffusion\.samplers\.ddim",
        ),
        ("model._target_=UNet", r"model\._target_=UNet"),
        ("schedule=cosine,linear", "schedule.*-m"),
        (
            "schedule.num_timesteps=1000000000",
            r"schedule\.num_timesteps=1000000000 .*2 and 1000000",
        ),
        ("schedule.beta_start=0", r"schedule\.beta_start=0"),
        ("schedule=cosine schedule.beta_end=0.02", r"schedule\.beta_end: .*max_beta"),
        ("schedule=sigmoid schedule.start=4", r"schedule\.start=4 .*end=3"),
        ("schedule.zero_terminal_snr=true", r"objective\.prediction=epsilon .*use v"),
        (
            "objective=hybrid objective.variance=fixed_small",
            r"objective\.loss=hybrid .*learned_range",
        ),
        (
            "objective.timestep_sampling=importance",
            r"objective\.timestep_sampling=importance .*'uniform'",
        ),
        ("sampler=ddim sampler.function.eta=1.5", r"sampler\.function\.eta=1\.5 .*1"),
        ("sampler=ddim sampler.function.eta=-1", r"sampler\.function\.eta=-1 .*0"),
        ("sampler.num_steps=0", r"sampler\.num_steps=0"),
        ("sampler.function=null", r"sampler\.function=null"),
        ("sampler=dimm", "sampler=dimm: .*did you mean ddim"),
        ("sampler.guidance_scale=2", r"sampler\.guidance_scale=2 .*training\.conditional=true"),
        (
            "sampler.guidance_scale=2 training.conditional=true training.label_dropout=0",
            r"sampler\.guidance_scale=2 .*training\.label_dropout",
        ),
        (
            "training.conditional=true data=butterflies",
            r"training\.conditional=true .*data=butterflies",
        ),
        ("training.label_dropout=1", r"training\.label_dropout=1"),
        ("training.steps=", r"training\.steps= "),
        ("training.steps=99999999999999999999999999", r"training\.steps=9+ "),
        ("training.precision=no", r"training\.precision=no .*'fp32'"),
        ("training.lr=1e-4", r"training\.lr: no such key in training"),
        ("optimizer.learning_rate=1e-4", r"optimizer\.learning_rate: no such key in optimizer"),
        ("optimizer.lr=0", r"optimizer\.lr=0"),
        ("optimizer.lr=null", r"optimizer\.lr=null"),
        ("~optimizer.lr", r"optimizer\.lr is missing"),
        ("~optimizer", r"optimizer\._target_ is missing"),
        ("optimizer.betas=[0.9]", r"optimizer\.betas"),
        ("optimizer.betas=[0.9,1.5]", r"optimizer.*beta.*1\.5"),
        ("+optimizer._args_=[1]", r"optimizer\._args_: no such key"),
        ("~training", r"training\.\w+ is missing"),
        ("~model", r"model\.resolution"),
        ("data.resolution=32", r"model\.resolution=16 and data\.resolution=32"),
        ("data=emoji model.in_channels=1", r"model\.in_channels=1 and data\.channels=3"),
        ("model.resolution=[16]", r"data\.resolution=\[16\]"),
        ("model.num_res_blocks=0", r"model\.num_res_blocks=0"),
        (
            "data=cifar10 data.num_classes=null training.conditional=true",
            r"training\.conditional=true .*data\.num_classes=null",
        ),
        ("data.flip=maybe", r"data\.flip=maybe .*boolean"),
        (
            "data.path=pictures",
            r"data\.path=pictures: data=digits has pictures of its own; .*data=folder",
        ),
        ("data.path=3", r"data\.path=3"),
        ("data=folder data.path=", r"data\.path= should not be empty"),
        ("data.holdout=1", r"data\.holdout=1"),
        ("data.source=3", r"data\.source=3"),
        ("outputs=", "outputs= should not be empty"),
        ("outputs=null", "outputs=null"),
        ("seed=9999999999999999999999", "seed=9+ should be less than 9223372036854775808"),
        ("seed=${seed}", "seed: Recursive"),
        ("seed=${oc.env:NO_SUCH_VARIABLE}", "seed: .*NO_SUCH_VARIABLE"),
        ("seed=${shell:ls}", "seed: .*shell"),
        ("+init_weights=abc", "init_weights: no such key"),
        ("init_from=", "init_from= should not be empty"),
        ("recipe=3", "recipe=3"),
        ("+recipe.source=x", r"recipe\.expect is missing"),
        ("experiment=cifar10 recipe.expect.parameters=many", r"recipe\.expect\.parameters=many"),
        ("evaluation.metrics=[fid]", r"evaluation\.metrics\.0=fid .*'fd'"),
        (
            "runtime.evaluate_every=10 evaluation.split=heldout",
            r"evaluation\.split=heldout .*data\.holdout",
        ),
        (
            "runtime.evaluate_every=10 evaluation.bound_split=test",
            r"evaluation\.bound_split=test: .*data=digits",
        ),
        ("runtime.workers=-1", r"runtime\.workers=-1"),
        ("model=", "model=: no such option of model; there are .*unet32"),
        ("model=unet32.yaml", r"model=unet32\.yaml: .*did you mean unet32"),
        ("model=[unet32,unet64]", r"model=\[unet32,unet64\]: no such option"),
        ("data=common/any", "data=common/any: no such option"),
        ("+experiment=cifar10", "experiment"),
        ("+experiments=cifar10", "experiments: no such key"),
        ("experiment=null", "experiment=null: no such option"),
        ("lr=1e-4", "lr: no such key; there are .*optimizer"),
        ("hydra/launcher=slurm", "hydra/launcher=slurm: no such option"),
        ("hydra.job.chdir=maybe", r"hydra\.job\.chdir=maybe"),
        ("model", "model is no setting: .*key=value"),
        ("=3", "=3: .*key=value"),
        ("training.steps=[1", r"training\.steps=\[1 cannot be read"),
        ("training.steps:3", "training.steps:3 is no setting"),
        ("--training.steps=3", r"--training\.steps=3; .*without dashes, as training\.steps=3"),
        ("--sweep", "--sweep; see --help"),
        ("--resolve", "--resolve"),
        ("--config-name=nope", "nope"),
    ],
)
def test_a_bad_value_is_refused_in_one_line_that_names_its_key(complaint, overrides, key):
    assert re.search(key, complaint(*overrides.split()))


@pytest.mark.parametrize(
    ("main", "overrides", "key"),
    [
        (sample.main, "", "run is missing"),
        (sample.main, "run=/nowhere", "run=/nowhere is no run folder"),
        (sample.main, "run={run}/checkpoints", "run=.*checkpoints is no run folder"),
        (sample.main, "run={run} from=x", "run=.* and from=x"),
        (sample.main, "run={run} num_sample=3", "num_sample: .*did you mean num_samples"),
        (sample.main, "run={run} num_samples=0", "num_samples=0"),
        (sample.main, "run={run} step=5", "step=5 .*there are 6"),
        (sample.main, "run={run} weights=emma", "weights=emma .*'ema' or 'raw'"),
        (sample.main, "run={run} format=[jpg]", r"format\.0=jpg .*'png'"),
        (sample.main, "run={run} format=[]", r"format=\[\] should have at least 1"),
        (
            sample.main,
            "run={run} figure=interpolate pictures=[0]",
            r"pictures=\[0\] should have at least 2",
        ),
        (sample.main, "run={run} figure=mosaic", "figure=mosaic .*'progressive'"),
        (sample.main, "run={run} classes=[1]", r"classes=\[1\]: .*training\.conditional=true"),
        (sample.main, "run={run} sampler.num_steps=2000", r"sampler\.num_steps=2000 .*1000"),
        (sample.main, "run={run} sampler=ddim sampler.function.eta=3", r"sampler\.function\.eta=3"),
        (sample.main, "run={run} device=gpu", "device=gpu .*'cuda'"),
        (sample.main, "run={run} to=", "to= should not be empty"),
        (sample.main, "run={run} model=unet32", "model: no such key"),
        (sample.main, "from=/nowhere", "from=/nowhere is not here"),
        (sample.main, "from={run}", "from=.* is a run's folder"),
        (
            evaluate.main,
            "run={run} evaluation.metric=[fd]",
            r"evaluation\.metric: .*did you mean metrics",
        ),
        (evaluate.main, "run={run} step=0", "step=0"),
        (
            evaluate.main,
            "run={run} evaluation.metrics=[losses] evaluation.bound_split=heldout",
            r"data\.holdout",
        ),
        (
            evaluate.main,
            "run={run} evaluation.metrics=[losses] evaluation.bound_split=test",
            "no test split",
        ),
        (export.main, "run={run}", "to is missing"),
        (export.main, "run={run} to={run}", "to=.* is already there"),
        (export.main, "run={run} to=x step=3", "step=3 .*there are 6"),
        (plan.main, "probe=abc", "probe=abc"),
        (plan.main, "probe=-1", "probe=-1"),
        (plan.main, "prob=1", "prob: .*did you mean probe"),
    ],
)
def test_the_other_commands_refuse_in_one_line_too(refusal, run_folder, main, overrides, key):
    before = sorted(run_folder.rglob("*"))
    assert re.search(key, refusal(main, *overrides.format(run=run_folder).split()))
    assert sorted(run_folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"config.yaml": "model: [1\n}"}, "is no run folder: its config.yaml cannot be read"),
        ({"config.yaml": "- 1"}, "its config.yaml is not one of ddpm.train"),
        ({"config.yaml": "runtime: {}"}, "is missing"),
        ({"run.json": '{"step": 6, "da'}, "run.json cannot be read"),
        ({"run.json": "{}"}, "no run.json that tells of its data"),
    ],
)
def test_a_run_folder_with_a_damaged_file_is_refused_by_its_name(
    refusal, run_folder, tmp_path, changed, message
):
    damaged = shutil.copytree(run_folder, tmp_path / "run")
    for name, text in changed.items():
        (damaged / name).write_text(text)
    assert message in refusal(sample.main, f"run={damaged}", "sampler=ddim10")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training: {steps: 3\n", "experiment=trial: trial.yaml cannot be used: .*line 2"),
        ("- 1\n", "trial.yaml cannot be used: it is no table"),
        ("seed: ${\n", "trial.yaml|seed"),
        (
            "defaults: [override /modle: unet32]\n",
            "override /modle: there is no such group; did you mean model",
        ),
        ("defaults: [override /model: unet23]\n", "model=unet23: .*did you mean unet32"),
        (
            "defaults: [override /model: [unet32, unet64]]\n",
            "trial.yaml cannot be used: its defaults have .*unet32",
        ),
        ("defaults: 3\n", "defaults=3 is no list"),
        ("training: {step: 3}\n", "training.*step.*did you mean steps"),
        ("trainig: {steps: 3}\n", "trainig: no such key; did you mean training"),
        ("training: {steps: many}\n", r"training\.steps=many"),
        ("training: 3\n", "training"),
        ("model: null\n", "model"),
        ("recipe: {source: x, expect: {parameters: -1}}\n", r"recipe\.expect\.parameters=-1"),
        ("\x00", "trial.yaml cannot be used"),
    ],
)
def test_a_recipe_that_is_wrong_is_refused_in_one_line(complaint, recipe, text, message):
    assert re.search(message, complaint(recipe(text)))


def test_a_recipe_that_is_wrong_harms_nobody_who_does_not_ask_for_it(recipe):
    recipe("training: {steps: 3\n")
    assert composed("experiment=cifar10").data.name == "cifar10"


def composed(*overrides: str):
    return training_config(compose(overrides))


def test_a_value_on_the_command_line_wins_over_every_file():
    config = composed(
        "experiment=cifar10",
        "model.dropout=0.3",
        "optimizer.lr=1e-3",
        "training.batch_size=64",
        "lr_schedule.warmup_steps=7",
    )
    found = (
        config.model["dropout"],
        config.optimizer["lr"],
        config.training.batch_size,
        config.lr_schedule["warmup_steps"],
    )
    assert found == (0.3, 1e-3, 64, 7)


def test_a_path_may_begin_at_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert composed("data=folder", "data.path=~/pictures").data.path == str(tmp_path / "pictures")


def test_a_group_on_the_command_line_wins_over_the_experiments():
    assert composed("experiment=butterflies128", "model=unet64").data.resolution == 64


@pytest.mark.parametrize(
    ("given", "expected"), [("training.steps=10", (10, None)), ("training.epochs=2", (None, 2))]
)
@pytest.mark.parametrize("data", ["butterflies", "digits"])  # published in epochs, in steps
def test_a_duration_on_the_command_line_takes_the_place_of_the_recipes(data, given, expected):
    training = composed(f"data={data}", given).training
    assert (training.steps, training.epochs) == expected


def test_the_resolution_of_the_data_follows_the_models():
    config = composed(
        "model.resolution=[16,24]",
        "model.attention_resolutions=[6]",
        "model.channel_multipliers=[1,2,2]",
    )
    assert config.data.resolution == (16, 24)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module that leaves a trace when it is imported."""
    (tmp_path / "stranger.py").write_text("def schedule(warmup_steps: int): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "stranger"
    sys.modules.pop("stranger", None)


@pytest.mark.parametrize(
    "overrides",
    [
        ["model._target_=stranger.schedule"],
        ["data.source._target_=stranger.schedule"],
        ["sampler.function._target_=stranger.schedule"],
        ["schedule._target_=stranger.schedule", "runtime.trusted_modules=[strange]"],
        ["+optimizer.params=[{_target_: stranger.schedule}]"],
        ["+optimizer.params=[{_target_: stranger.schedule, _partial_: true}]"],
        ["optimizer.betas=[{_target_: stranger.schedule}]"],
        ["+schedule._args_=[{_target_: stranger.schedule}]"],
    ],
)
def test_what_is_not_trusted_is_refused_without_being_imported(module, complaint, overrides):
    complaint(*overrides)
    assert module not in sys.modules


def test_what_the_user_trusts_is_taken_and_its_arguments_are_checked(module, complaint):
    trusting = [
        "lr_schedule=constant",
        "lr_schedule._target_=stranger.schedule",
        "runtime.trusted_modules=[stranger]",
    ]
    assert composed("data=folder", *trusting).lr_schedule["_target_"] == "stranger.schedule"
    assert "lr_schedule.warmup_steps=long" in complaint(
        "data=folder", *trusting, "lr_schedule.warmup_steps=long"
    )


def test_what_is_composed_holds_the_choices_and_the_overrides():
    found = compose(["experiment=butterflies128", "seed=3"])
    assert isinstance(found, Composed)
    assert {group: found.choices[group] for group in ("model", "data", "experiment")} == {
        "model": "unet128",
        "data": "butterflies",
        "experiment": "butterflies128",
    }
    assert found.overrides == ["experiment=butterflies128", "seed=3"]
    assert OmegaConf.select(found.cfg, "hydra") is None


def test_a_key_of_ones_own_network_is_suggested(typed, tmp_path):
    (tmp_path / "my" / "model").mkdir(parents=True)
    (tmp_path / "my" / "model" / "net.yaml").write_text(
        '# @package _global_\nmodel: {_target_: mylib.Net, in_channels: "${data.channels}", width: 64}\n'
    )
    done = typed("train", "--config-dir", str(tmp_path / "my"), "model=net", "model.widht=3")
    assert done.code == 1
    assert "model.widht: no such key in model; did you mean width" in done.err
