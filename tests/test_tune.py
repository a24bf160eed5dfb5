"""runtime.tune tries ways to run a network, checks them, and chooses one."""

import functools
import json
import logging
import math
import tempfile
import time

import numpy as np
import psutil
import pytest
import torch
from torch import nn

from ddpm.config import build
from ddpm.config.compose import compose
from ddpm.config.schema import training_config
from ddpm.runs.folder import RunFolder
from ddpm.system import trials, ways
from ddpm.system.trials import LATE, Failed
from ddpm.train.run import run as train
from ddpm.train.trial import Task
from ddpm.tune.decide import Budget, Choice, Work, budget_of, by_trials, without_trials
from ddpm.tune.search import FEW, Found, checked, fastest, search

CPU = torch.device("cpu")
SETTINGS = [
    *("data=digits", "training.steps=4", "training.batch_size=8", "lr_schedule.warmup_steps=0"),
    *("runtime.num_previews=2", "runtime.log_every=1", "sampler=ddim50"),
]


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Composes a run of liars.py's network, which tells the given lie in the layout nchw."""
    (tmp_path / "my" / "model").mkdir(parents=True)
    (tmp_path / "my" / "model" / "own.yaml").write_text(
        "# @package _global_\nmodel: {resolution: 16, in_channels: '${data.channels}', "
        "_target_: liars.Net, lie: ''}\noptimizer: {lr: 1e-3}\n"
    )

    def made(*words):
        return compose(
            ["model=own", *SETTINGS, "runtime.trusted_modules=[liars]", *words],
            config_dir=str(tmp_path / "my"),
        )

    return made


@pytest.fixture(scope="module")
def server():
    with trials.trials("ddpm.train.trial") as running:
        yield running


@pytest.mark.parametrize(
    ("lie", "why"),
    [
        ("gradient", "computes something else: middle.weight"),
        ("loss", "computes something else"),
        ("second", "which is not finite"),
        ("later", "computes something else"),
        ("raises", "RuntimeError: no kernel image is available and more"),
        ("dies", "died (SIGSEGV)"),
        ("hangs", f"{LATE} 3 s"),
        ("", None),
    ],
)
def test_a_way_that_lies_or_hangs_or_dies_is_out(server, own, lie, why):
    config = training_config(own(f"model.lie={lie}"))
    try:
        seconds = 3 if lie == "hangs" else 120
        plain = server.run("measure", Task(config, 1, 8, 8, "nchw"), seconds)
        found = checked(Found(**plain))
    except Failed as failed:
        found = Found("nchw", 8, why=str(failed))
    if why is None:
        assert found.why is None
        assert found.differs <= FEW
        assert len(found.seconds) > 1
        assert min(found.seconds) > 0
    else:
        assert why in found.why
        assert "\n" not in found.why


def test_a_trial_that_takes_too_much_memory_is_ended_and_the_next_one_runs(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    free = psutil.virtual_memory().available
    monkeypatch.setattr(trials, "SHARE_OF_MEMORY", 1e9 / free)
    with trials.trials("liars") as running:
        with pytest.raises(Failed, match=r"took more than 1\.0 GB of memory"):
            running.run("hangs_or_dies", "eats", 60)
        assert running.run("hangs_or_dies", "", 60) == {"done": ""}
        server = psutil.Process(running._server.pid)
    assert not server.is_running()
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_tuned_trains_as_one_that_is_not_and_keeps_its_choice(
    tmp_path, own, capsys, caplog, ddpm, monkeypatch
):
    """The network lies in the layout nchw, but not when it is compiled."""
    # otherwise the compiler spends long on finding out what the CPU can do
    monkeypatch.setenv("TORCHINDUCTOR_VEC_ISA_OK", "0")
    losses = {}
    for tune in ("true", "false"):
        words = ["model.lie=gradient", f"runtime.tune={tune}", f"outputs={tmp_path / tune}"]
        folder = train(own(*words, f"data.cache={tmp_path / 'cache'}"))
        lines = (folder.path / "metrics.jsonl").read_text().splitlines()
        losses[tune] = [json.loads(line)["train/loss"] for line in lines]
        tuned = folder.record()["tuned"]
        if tune == "false":
            assert (tuned["way"], tuned["why"]) == ("channels_last", "tune=false")
            continue
        found = {one["way"]: one for one in tuned["found"] if one["asked"] == 8}
        assert set(found) == {"channels_last", "compiled", "nchw"}  # the network has no blocks
        assert "middle.weight" in found.pop("nchw")["why"]
        assert [one["why"] for one in found.values()] == [None] * 2
        assert all(min(one["seconds"]) > 0 for one in found.values())
        assert tuned["way"] in found
        assert tuned["facts"]["torch"] == torch.__version__
        assert "tuning: " in capsys.readouterr().out
        cache = f"data.cache={tmp_path / 'cache'}"
        again = train(own(*words, cache, "training.steps=6")).record()["tuned"]
        assert "tried 0 in 0 s" in capsys.readouterr().out  # another run uses the same trials
        assert again["found"] == tuned["found"]
        two = [*own(*words, cache, "training.batch_size=16").overrides]  # 8 per process
        done = ddpm("train", "--config-dir", str(tmp_path / "my"), *two, processes=2)
        assert done.code == 0, done.err
        assert "tried 0 in 0 s" in done.out
        words = ["training.steps=5", f"resume={folder.path}", "runtime.trusted_modules=[liars]"]
        carried_on = train(compose(words)).record()["tuned"]
        assert carried_on["why"] == "as before"
        assert carried_on["way"] == tuned["way"]
        assert "tuning" not in capsys.readouterr().out
        record = json.loads((folder.path / "run.json").read_text())
        record["tuned"]["facts"]["torch"] = "1.0"
        (folder.path / "run.json").write_text(json.dumps(record))
        again = train(compose(["training.steps=6", *words[1:]])).record()["tuned"]
        assert again["facts"] == tuned["facts"]
        assert f"tuning again: torch was 1.0 and is {torch.__version__} now" in caplog.text
    assert losses["true"] == pytest.approx(losses["false"], rel=1e-5)
    assert len(set(losses["true"])) == 4


def test_images_are_drawn_the_same_in_a_way_that_was_tried(tmp_path, own, typed, monkeypatch):
    monkeypatch.setattr(ways, "possible", lambda *_, **named: ["channels_last", "nchw"])
    folder = train(own("model.lie=loss", f"outputs={tmp_path}")).path
    words = [f"run={folder}", "num_samples=5", "batch_size=4", "sampler=ddim50", "format=[npz]"]
    words.append("trusted_modules=[liars]")
    drawn = []
    for tune in ("false", "true"):
        done = typed("sample", *words, f"tune={tune}", f"to={tmp_path / tune}")
        assert done.code == 0, done.err
        drawn.append(np.load(tmp_path / tune / "samples.npz")["arr_0"].astype(int))
    assert np.abs(drawn[0] - drawn[1]).max() <= 1
    assert drawn[0].std() > 10
    (file,) = (tmp_path / "cache" / "tune").glob("*.json")
    found = {one["way"]: one for one in json.loads(file.read_text())["found"]}
    assert set(found) == {"channels_last", "nchw"}
    assert "computes something else" in found["nchw"]["why"]
    again = typed("sample", *words, "tune=true", f"to={tmp_path / 'true'}")
    assert "tuning" not in again.out  # all images are there already


def test_auto_leaves_a_cpu_as_it_is(tmp_path, own):
    choice = train(own(f"outputs={tmp_path}", "training.steps=1")).record()["tuned"]
    assert (choice["way"], choice["found"]) == ("channels_last", [])
    assert choice["why"] == "tune=auto: nothing is gained on cpu"


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("runtime.compile=true", "runtime.compile: no such key in runtime; it is called tune now"),
        ("runtime.tune=fast", "runtime.tune=fast should be a valid boolean, true or false or be"),
        ("runtime.tune=graphs", "tune=graphs needs an NVIDIA GPU, but this runs on cpu: choose"),
        ("runtime.tune=nchw_search", "tune=nchw_search needs an NVIDIA GPU"),
    ],
)
def test_what_cannot_be_asked_for_is_told_in_a_line(typed, tmp_path, word, told):
    done = typed("train", "training.steps=1", word, f"outputs={tmp_path}")
    assert done.code != 0
    assert told in done.err
    assert not list(tmp_path.glob("*/*/checkpoints/step*"))


@pytest.mark.parametrize(
    ("before", "now"), [("true", "compiled"), ("false", False), ("auto", "auto")]
)
def test_runs_of_before_say_compile(run_folder, tmp_path, before, now):
    text = (run_folder / "config.yaml").read_text()
    assert "  tune: auto\n" in text
    (tmp_path / "config.yaml").write_text(text.replace("  tune: auto\n", f"  compile: {before}\n"))
    (tmp_path / "run.json").write_text((run_folder / "run.json").read_text())
    assert RunFolder(tmp_path).config([]).runtime.tune == now


def of(value, *rest):
    return {"a": torch.tensor([value, *rest]), "b": torch.tensor([10.0, 0.0])}


@pytest.mark.parametrize(
    ("found", "of_what", "times"),
    [
        (of(1.0, 1.0), "a", 0.0),
        (of(1.0, 1.0 + 3e-3), "a", 3.0),  # the measured rounding of a is 1e-3
        (of(1.0, 2.0), "a", 1000.0),
        (of(1.0, math.nan), "a, which is not finite", math.inf),
    ],
)
def test_a_difference_is_told_in_times_the_rounding_of_the_plain_way(found, of_what, times):
    told = ways.difference(found, of(1.0, 1.0), of(1.0, 1.0 + 1e-3), 2.0**-20)
    if times:
        assert told.of == of_what
    assert told.times == pytest.approx(times, rel=1e-3)


def work(repeats=100_000, seconds=0.1, device="cuda", **changes):
    given = {"deterministic": False, "facts": {"device": device}, "cache": None, **changes}
    names = ["nchw", "compiled", "graphs", "channels_last"]
    return Work(
        torch.device(device),
        given["deterministic"],
        repeats,
        given["facts"],
        names,
        8,
        True,
        lambda: seconds,
        given["cache"],
    )


@pytest.mark.parametrize(
    ("tune", "job", "why"),
    [
        ("auto", work(device="cpu"), "nothing is gained on cpu"),
        ("auto", work(device="mps"), "nothing is gained on mps"),
        ("auto", work(deterministic=True), "can differ each time"),
        ("auto", work(repeats=500), "500 repeats are too few"),
        ("auto", work(seconds=0.01), "about 17 minutes are too short to pay for trials"),
        (False, work(), "tune=false"),
        ("compiled", work(), "tune=compiled"),
    ],
)
def test_where_nothing_is_tried_it_is_said_why(tune, job, why):
    choice = without_trials(tune, job, None) or budget_of(tune, job)
    assert isinstance(choice, Choice)
    assert why in choice.why
    assert choice.way == ("compiled" if tune == "compiled" else "nchw")


def test_auto_takes_at_most_a_fiftieth_of_the_planned_time():
    budget = budget_of("auto", work())
    assert budget.total == pytest.approx(0.02 * 100_000 * 0.1)


def times_of(way, seconds, first=0.0, size=8, **more):
    return Found(way, size, [seconds] * 5, first, asked=size, **more)


def test_ways_are_tried_one_by_one_and_what_time_does_not_allow_is_left():
    asked = []

    def attempt(name, size, seconds):
        asked.append((name, size))
        if name == "graphs":
            raise Failed("died (SIGSEGV)")
        return times_of(
            name,
            {"nchw": 1.0, "compiled": 0.5, "channels_last": 1.2}[name.split("_s")[0]],
            size=size,
        )

    found = search(
        attempt, work().names, 8, True, True, 1000, Budget(1e9, 1e9), [], lambda one: None
    )
    assert asked == [
        *(("nchw", 8), ("compiled", 8), ("graphs", 8), ("channels_last", 8)),
        *(("compiled_search", 8), ("compiled", 4)),
    ]
    assert [one.why for one in found if one.why] == ["died (SIGSEGV)"]
    assert fastest(found, 1000).way == "compiled"

    asked.clear()
    budget = Budget(100.0, 100.0, began=time.monotonic() - 95.0)
    search(attempt, work().names, 8, True, True, 1000, budget, [], lambda one: None)
    assert asked == []


@pytest.mark.parametrize(
    ("others", "repeats", "chosen"),
    [
        ([times_of("compiled", 0.5, first=60.0)], 1000, "compiled"),
        ([times_of("compiled", 0.5, first=60.0)], 100, "nchw"),  # 110 s instead of 100 s
        ([times_of("channels_last", 0.98)], 1000, "nchw"),  # no real difference
        ([times_of("compiled", 0.1, why="computes something else")], 1000, "nchw"),
        ([times_of("compiled", 0.5), times_of("graphs", 0.3)], 1000, "graphs"),
    ],
)
def test_that_is_chosen_with_which_all_is_done_soonest(others, repeats, chosen):
    assert fastest([times_of("nchw", 1.0), *others], repeats).way == chosen


def test_what_was_found_is_not_tried_again_but_for_what_more_time_may_change(tmp_path):
    asked = []

    def attempt(name, size, seconds):
        asked.append(name)
        if name == "graphs":
            raise Failed(f"{LATE} 3 s")
        if name == "channels_last":
            raise Failed("died (SIGABRT)")
        return times_of(name, 1.0, size=size)

    said = []
    job = work(cache=tmp_path)
    first = by_trials(job, Budget(1e9, 1e9), attempt, said.append)
    assert first.way == "nchw"
    assert "none of 6 is worth a change" in said[-1]
    asked.clear()
    by_trials(job, Budget(1e9, 1e9), attempt, said.append)
    assert asked == ["graphs"]
    asked.clear()
    by_trials(
        work(cache=tmp_path, facts={"device": "another"}), Budget(1e9, 1e9), attempt, said.append
    )
    assert asked[0] == "nchw"


class Double(nn.Module):
    def forward(self, x):
        return x + x


class Net(nn.Module):
    def forward(self, x_t, t):
        return x_t + x_t


@pytest.fixture
def quick_compiler(monkeypatch):
    """Compiles without making machine code, which takes most of the time."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))


@pytest.mark.usefixtures("quick_compiler")
def test_what_is_compiled_after_the_first_step_is_named(caplog):
    torch._dynamo.reset()
    net, after = Double(), ways.Recompilations()
    with ways.carried_out("compiled"):
        ways.put(net, "compiled")
        net(torch.ones(8, 3))
        assert after.since() == []  # the first step may compile
        net(torch.ones(8, 3))
        assert after.since() == []
        net(torch.ones(5, 3))
        (one,) = after.since()
    assert ways.in_words([one]).startswith("1 in ")
    assert "expected 8, actual 5" in ways.in_words([one])
    assert after.count == 1


@pytest.mark.usefixtures("quick_compiler")
def test_more_shapes_than_code_is_made_for_stop_in_a_line(monkeypatch, caplog):
    torch._dynamo.reset()
    monkeypatch.setattr(ways, "SHAPES", 9)
    net, done = Double(), []

    def grow():
        with ways.carried_out("compiled"):
            for count in range(1, 11):
                done.append(net(torch.ones(count, 3)).sum().item())

    ways.put(net, "compiled")
    with pytest.raises(ValueError, match="batch shapes, the limit") as told:
        grow()
    assert done == [6.0 * count for count in range(1, 10)]
    assert "\n" not in str(told.value)
    assert not [one for one in caplog.records if one.levelno >= logging.WARNING]


def test_a_network_runs_as_it_is_where_that_is_asked():
    torch._dynamo.reset()
    net, after = Double(), ways.Recompilations()
    after.since()
    ways.put(net, "compiled")
    with ways.carried_out("compiled"), ways.as_it_is():
        net(torch.ones(6, 3))
    assert after.since() == []


@pytest.mark.usefixtures("quick_compiler")
def test_images_of_a_batch_are_drawn_by_what_is_compiled_and_others_as_they_are():
    net, after = Net(), ways.Recompilations()
    after.since()
    with ways.carried_out("compiled"), torch.inference_mode():
        call = ways.of_batch(net, "compiled", 4)
        for count in (4, 3, 4, 2):
            x = torch.randn(count, 3)
            assert torch.equal(call(x, torch.zeros(count)), 2 * x)
    assert len(after.since()) == 1


@pytest.mark.parametrize(
    ("model", "kinds"), [("unet32", {"ResBlock", "AttentionBlock"}), ("unet_readme", None)]
)
def test_a_networks_blocks_are_its_parts_that_occur_more_than_once(model, kinds):
    config = training_config(
        compose([f"model={model}", "data=cifar10" if kinds else "data=butterflies"])
    )
    found = ways.blocks(build.network(config, torch.device("meta"), 10))
    names = [type(part).__name__ for part in found]
    assert len(names) > 10
    assert all(names.count(name) > 1 for name in names)
    if kinds:
        assert kinds <= set(names)
