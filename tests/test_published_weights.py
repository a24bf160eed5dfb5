"""Networks from improved-diffusion and guided-diffusion compute the same here as there.

The tests contain no published file; a network with the same layout stands in.
"""

import argparse
import itertools
import re
from pathlib import Path

import pytest
import torch
from published_network import GROUPS, Network
from safetensors.torch import save_file
from weight_folders import randomized

from ddpm.config.compose import compose
from ddpm.models.unet import UNet
from ddpm.runs import checkpoint
from ddpm.runs.folder import RunFolder
from ddpm.sample.run import run as sample
from ddpm.train.run import run as train
from ddpm.train.which import which_run
from ddpm.weights.published import Published, names

# networks this small run slower on two threads
pytestmark = pytest.mark.usefixtures("one_thread")
# flags of guided-diffusion; the first value is improved-diffusion's
CHOICES = {
    "scale_shift": (False, True),
    "updown": (False, True),
    "whole": (False, True),
    "classes": (None, 5),
    "head_channels": (None, 8),
    "out": (3, 6),
    "half": (False, True),
}
RESOLUTION = 8


def ours(scale_shift=False, updown=False, classes=None, head_channels=None, out=3, **changed):
    """UNet arguments for the network that these choices describe."""
    return {
        "resolution": RESOLUTION,
        "in_channels": 3,
        "out_channels": out,
        "base_channels": 16,
        "channel_multipliers": [1, 2],
        "attention_resolutions": [RESOLUTION // 2],
        "num_res_blocks": 1,
        "norm_groups": GROUPS,
        "norm_eps": 1e-5,
        "num_heads": 2 if head_channels is None else 1,
        "head_channels": head_channels,
        "scale_shift_norm": scale_shift,
        "time_embedding": "cos_sin",
        "downsample_padding": "symmetric",
        "resample": "resblock" if updown else "conv",
        "num_classes": classes,
        **changed,
    }


def saved(file: Path, half: bool = False, seed: int = 0, **choices) -> Network:
    """Saves a network in the published layout to a file and returns it."""
    torch.manual_seed(seed)
    network = randomized(Network(**choices)).eval()
    network = network.half().float() if half else network
    torch.save((network.half() if half else network).state_dict(), file)
    return network.float()


def read(file: Path, arguments: dict, whole: bool = False) -> UNet:
    network = UNet(**arguments)
    source = Published(f"from={file}", file, "whole" if whole else "by_head")
    network.load_state_dict(source.weights_for(network, arguments))
    return network.eval()


# half of all combinations; they still contain every combination of any six of the seven flags
HALF = [
    tuple(values[index] for values, index in zip(CHOICES.values(), chosen, strict=True))
    for chosen in itertools.product((0, 1), repeat=len(CHOICES))
    if sum(chosen) % 2 == 0
]


@pytest.mark.parametrize("choices", HALF)
def test_a_published_network_computes_here_what_it_computed_there(tmp_path, choices):
    chosen = dict(zip(CHOICES, choices, strict=True))
    theirs = saved(tmp_path / "model.pt", **chosen).double()
    whole, _ = chosen.pop("whole"), chosen.pop("half")
    network = read(tmp_path / "model.pt", ours(**chosen), whole).double()
    x_t = torch.randn(2, 3, RESOLUTION, RESOLUTION, dtype=torch.float64)
    classes = [] if chosen["classes"] is None else [torch.tensor([4, 0])]
    with torch.inference_mode():
        expected = theirs(x_t, torch.tensor([3, 999]), *classes)
        found = network(x_t, torch.tensor([3, 999]), *classes)
    assert (found - expected).abs().max() < 1e-10 * expected.abs().max()


@pytest.mark.parametrize(
    "shape",
    [
        {"multipliers": (1, 1, 2, 2), "blocks": 3, "factors": (2, 3)},
        {"multipliers": (1, 2, 3), "blocks": 2, "factors": (0, 1, 2), "updown": True},
        {"multipliers": (2,), "blocks": 2, "factors": ()},
    ],
    ids=str,
)
def test_every_published_tensor_is_used_once_and_every_one_of_ours_filled_once(tmp_path, shape):
    theirs = saved(tmp_path / "model.pt", classes=4, **shape)
    arguments = ours(
        updown=shape.get("updown", False),
        classes=4,
        channel_multipliers=list(shape["multipliers"]),
        num_res_blocks=shape["blocks"],
        attention_resolutions=[RESOLUTION >> factor for factor in shape["factors"]],
    )
    network = read(tmp_path / "model.pt", arguments)
    table = names(network)
    assert sorted(table) == sorted(theirs.state_dict())
    assert sorted(name for mine in table.values() for name in mine) == sorted(network.state_dict())
    x_t, t = torch.randn(1, 3, RESOLUTION, RESOLUTION), torch.tensor([321])
    with torch.inference_mode():
        expected, found = (one(x_t, t, torch.tensor([1])) for one in (theirs, network))
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


# the network and process of RECIPE, typed as settings
SAME = [
    "schedule=cosine",
    "schedule.num_timesteps=10",
    "objective=hybrid",
    f"model.resolution={RESOLUTION}",
    "model.base_channels=16",
    "model.channel_multipliers=[1,2]",
    f"model.attention_resolutions=[{RESOLUTION // 2}]",
    "model.num_res_blocks=1",
    f"model.norm_groups={GROUPS}",
    "model.num_heads=2",
]
WORDS = ["model=improved_unet32", *SAME]
HEADS = {"scale_shift": True, "out": 6}
RECIPE = """\
# @package _global_
defaults:
  - override /model: improved_unet32
  - override /data: folder
  - override /schedule: cosine
  - override /objective: hybrid
schedule: {num_timesteps: 10}
model:
  resolution: 8
  base_channels: 16
  channel_multipliers: [1, 2]
  attention_resolutions: [4]
  num_res_blocks: 1
  norm_groups: 8
  num_heads: 2
"""


def drawn(*overrides: str) -> Path:
    few = ["num_samples=2", "sampler=ddim", "sampler.num_steps=2"]
    return sample(compose([*few, *overrides], "sample"))


def refused(*overrides: str) -> str:
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        drawn(*overrides)
    return str(error.value)


def unfit(file: Path) -> str:
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        read(file, ours(scale_shift=True, out=6))
    return str(error.value)


def test_a_file_is_drawn_from_with_the_network_and_process_of_groups_or_of_a_recipe(
    tmp_path, capsys
):
    saved(tmp_path / "ema_0.9999_500000.pt", **HEADS)
    outputs, file = f"outputs={tmp_path / 'outputs'}", f"from={tmp_path / 'ema_0.9999_500000.pt'}"
    by_groups = drawn(outputs, file, *WORDS)
    assert "init_attention=by_head" in capsys.readouterr().out
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    (tmp_path / "own" / "experiment" / "small.yaml").write_text(RECIPE)
    composed = compose(
        [outputs, file, "experiment=small", "num_samples=2", "sampler=ddim", "sampler.num_steps=2"],
        "sample",
        str(tmp_path / "own"),
    )
    assert sample(composed) == by_groups  # the same images, so the same folder
    other = drawn(outputs, file, *WORDS, "init_attention=whole")
    assert other != by_groups
    steps = drawn(outputs, file, *WORDS, "schedule.num_timesteps=11")
    assert steps != by_groups


def test_a_file_with_classes_is_drawn_by_their_numbers(tmp_path, capsys):
    saved(tmp_path / "model.pt", classes=5, **HEADS)
    labels = ["training.conditional=true", "data.num_classes=5", "training.label_dropout=0"]
    file = [f"from={tmp_path / 'model.pt'}", f"to={tmp_path / 'to'}"]
    assert drawn(*file, *WORDS, *labels, "classes=[4]") == tmp_path / "to"
    assert "class 4: 4" in capsys.readouterr().out
    assert "5 in the file, 6 here" in refused(*file, *WORDS, *labels[:2])
    assert "5 in the file, none here" in refused(*file, *WORDS)


def test_a_run_begins_with_a_file_of_weights_and_keeps_its_digest(tmp_path, pictures, capsys):
    data = pictures("data", ["a.png", "b.png", "c.png"])
    saved(tmp_path / "model.pt", **HEADS)
    overrides = [
        *WORDS,
        f"outputs={tmp_path / 'outputs'}",
        "data=folder",
        f"data.path={data}",
        f"init_from={tmp_path / 'model.pt'}",
        "training.steps=1",
        "training.batch_size=2",
        "optimizer.lr=1e-30",
        "sampler=ddim",
        "sampler.num_steps=2",
        "runtime.num_previews=2",
    ]
    begun = which_run(compose(overrides))
    train(compose(overrides))
    out = capsys.readouterr().out
    run = RunFolder(Path(out.splitlines()[0].removeprefix("run ")))
    assert ["init_attention=by_head" in note for note in begun.notes] == [True]
    assert run.path == begun.folder.path
    kept = run.record()["identity"]["init_from"]
    assert kept == run.plain()["init_weights"] == begun.config.init_weights
    expected = read(tmp_path / "model.pt", ours(scale_shift=True, out=6)).state_dict()
    found = checkpoint.find(run.checkpoints).weights("raw")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())

    whole = which_run(compose([*overrides, "init_attention=whole"]))
    assert whole.identity != begun.identity
    saved(tmp_path / "model.pt", seed=1, **HEADS)
    assert which_run(compose(overrides)).identity != begun.identity


@pytest.mark.parametrize(
    ("choices", "reason"),
    [
        ({"base": 24}, r"time_embed\.0\.weight is of shape \(96, 24\), .* needs \(64, 16\); .* model\.base_channels \(24 in the file, 16 here"),
        ({"channels": 6}, r"input_blocks\.0\.0\.weight is of shape \(16, 6, 3, 3\).*an upsampler"),
        ({"channels": 1}, r"input_blocks\.0\.0\.weight .* data\.channels \(1 in the file, 3 here"),
        ({"blocks": 2}, r"input_blocks\.2\.0\.op\.weight is missing.* model\.num_res_blocks \(2 in the file, 1 here"),
        ({"multipliers": (1, 3)}, r"model\.channel_multipliers \(\[1, 3\] in the file, \[1, 2\] here"),
        ({"multipliers": (1, 2, 2)}, r"model\.channel_multipliers \(\[1, 2, 2\] in the file, \[1, 2\] here"),
        ({"factors": (0, 1)}, r"model\.attention_resolutions \(\[8, 4\] in the file, \[4\] here"),
        ({"factors": ()}, r"input_blocks\.3\.1\.norm\.weight is missing.* model\.attention_resolutions \(\[\] in"),
        ({"scale_shift": False}, r"input_blocks\.1\.0\.emb_layers\.1\.weight .* model\.scale_shift_norm \(false in the file, true here"),
        ({"updown": True}, r"model\.resample \(resblock in the file, conv here"),
        ({"out": 3}, r"out\.2\.weight is of shape \(3, 16, 3, 3\), .* objective, .* \(3 in the file, 6 here"),
        ({"classes": 5}, r"label_emb\.weight is of shape \(5, 64\), .* has no such layer; .*training\.conditional"),
    ],
    ids=str,
)  # fmt: skip
def test_the_first_tensor_that_does_not_fit_is_named_with_what_decides(tmp_path, choices, reason):
    saved(tmp_path / "model.pt", **{**HEADS, **choices})
    said = unfit(tmp_path / "model.pt")
    assert said.startswith(f"from={tmp_path / 'model.pt'}: ")
    assert re.search(reason, said)


def optimizer_state(network: Network) -> dict:
    adam = torch.optim.AdamW(network.parameters())
    sum(parameter.sum() for parameter in network.parameters()).backward()
    adam.step()
    return adam.state_dict()


def classifier(network: Network) -> dict:
    return {
        name: tensor
        for name, tensor in network.state_dict().items()
        if not name.startswith("output_blocks")
    }


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (lambda network: network, "cannot be read as tensors only.*published_network.Network"),
        (lambda network: {"model": network.state_dict(), "args": argparse.Namespace()}, "argparse"),
        (lambda network: {"state_dict": network.state_dict(), "step": 3}, "it has state_dict, step"),
        (optimizer_state, "an optimizer's state; .*ema_"),
        (classifier, "has no output_blocks: it is a classifier"),
        (lambda network: {"conv_in.weight": torch.zeros(1)}, "named as in diffusers"),
        (lambda network: {f"module.{name}": tensor for name, tensor in network.state_dict().items()}, r"strip module\. from the names"),
        (lambda network: {"fc.weight": torch.zeros(1)}, r"no time_embed\.0\.weight; its first tensor is fc\.weight"),
        (lambda network: {}, "no other tensor"),
        (lambda network: [torch.zeros(1)], "is a list"),
    ],
)  # fmt: skip
def test_a_file_that_is_something_else_is_refused_in_a_line(tmp_path, content, reason):
    torch.save(content(Network(**HEADS)), tmp_path / "model.pt")
    assert re.search(reason, unfit(tmp_path / "model.pt"))


def test_another_network_than_the_published_is_none_to_begin_with(tmp_path):
    saved(tmp_path / "model.pt", **HEADS)
    words = ["model=unet_readme", "data=digits", "model.resolution=32"]
    with pytest.raises(
        ValueError, match=r"^init_from=\S+: model\._target_=\S*ReadmeUNet cannot load"
    ):
        which_run(compose([*words, f"init_from={tmp_path / 'model.pt'}"]))


class Payload:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return Path.touch, (self.trace,)


def test_code_in_a_file_is_not_run(tmp_path):
    torch.save({"time_embed.0.weight": Payload(tmp_path / "trace")}, tmp_path / "model.pt")
    assert "cannot be read as tensors only" in unfit(tmp_path / "model.pt")
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_file_that_was_cut_off_is_refused_in_a_line(tmp_path, legacy, share):
    weights = Network(**HEADS).state_dict()
    whole, cut = tmp_path / "whole.pt", tmp_path / "cut.pt"
    torch.save(weights, whole, _use_new_zipfile_serialization=not legacy)
    read(whole, ours(scale_shift=True, out=6))
    content = whole.read_bytes()
    cut.write_bytes(content[: int(share * len(content))])
    assert "cannot be read as tensors only" in unfit(cut)


def test_safetensors_with_the_published_names_are_read_and_others_refused(tmp_path):
    theirs = saved(tmp_path / "model.pt", **HEADS).state_dict()
    save_file(theirs, tmp_path / "model.safetensors")
    files = (tmp_path / "model.pt", tmp_path / "model.safetensors")
    one, other = (read(file, ours(scale_shift=True, out=6)).state_dict() for file in files)
    assert all(torch.equal(one[name], tensor) for name, tensor in other.items())
    (tmp_path / "other.safetensors").write_bytes(b"no safetensors")
    assert "cannot be read" in unfit(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("name", "words", "reason"),
    [
        ("model.pt", [], "is a file of weights only: give experiment=NAME, or model= and schedule="),
        ("model.pt", ["model=improved_unet32"], "model= and schedule="),
        ("model.pt", ["experiment=cifar10_hybri"], "did you mean cifar10_hybrid"),
        ("model.pt", [*WORDS, "model.widht=3"], r"model\.widht: no such key"),
        ("model.pt", [*WORDS, "step=3"], "step=3"),
        ("nowhere.pt", WORDS, "there is no such file"),
        ("", WORDS, "not a folder of weights|already defines"),
    ],
)  # fmt: skip
def test_words_that_do_not_go_with_a_file_are_refused(tmp_path, name, words, reason):
    saved(tmp_path / "model.pt", **HEADS)
    outputs = f"outputs={tmp_path / 'outputs'}"
    assert re.search(reason, refused(outputs, f"from={tmp_path / name}", *words))


def test_what_is_told_of_a_file_is_no_setting_of_a_runs_samples(small_exported, typed):
    done = typed("sample", f"run={small_exported}", "experiment=cifar10")
    assert (done.code, done.err.count("\n")) == (1, 1), done.err
    assert "experiment: no such key" in done.err
    assert "already defines" in refused(f"from={small_exported}", "experiment=cifar10")


def test_the_command_draws_from_a_file(tmp_path, typed):
    saved(tmp_path / "model.pt", half=True, **HEADS)
    words = [*WORDS, "num_samples=2", "sampler=ddim", "sampler.num_steps=2"]
    done = typed("sample", f"from={tmp_path / 'model.pt'}", f"to={tmp_path / 'to'}", *words)
    assert done.code == 0, done.err
    assert (tmp_path / "to" / "grid.png").is_file()
    wrong = typed("sample", f"from={tmp_path / 'model.pt'}", "experiment=cifar10_hybrid")
    assert wrong.code == 1
    assert wrong.err.startswith("error: from=")
    assert wrong.err.count("\n") == 1
