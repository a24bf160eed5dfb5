"""Run folders, recipes, weights and data sets of others are data.

They run no code, read no file outside themselves, and open no port.
"""

import ast
import functools
import hashlib
import json
import os
import pickle
import re
import shutil
import socket
import stat
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image

from ddpm.config.compose import PACKAGE, compose
from ddpm.data import sources
from ddpm.data.decoding import Decoding
from ddpm.data.image_set import image_set
from ddpm.evaluate import __main__ as evaluate
from ddpm.export import __main__ as export
from ddpm.runs import checkpoint
from ddpm.runs.folder import RunFolder
from ddpm.sample import __main__ as sample
from ddpm.train import __main__ as train
from ddpm.weights import folders

TARGETS = [
    *(
        "os.system",
        "builtins.exec",
        "pandas.eval",
        "torch.hub.load",
        "torch.load",
        "subprocess.run",
        "stranger.leave_trace",
    ),
    *(
        "ddpm..os.system",
        ".os.system",
        "ddpm.models..unet.UNet",
        "ddpm.models.unet.__builtins__.exec",
    ),  # malformed dotted names
    *(
        "ddpm.config.build.torch.hub.load",
        "ddpm.config.cli.os.system",
        "ddpm.models.unet.torch.hub.load",
        "torch.optim.adam.torch.hub.load",
    ),  # reached through another module
    *(
        "ddpm.data.sources.partial",
        "ddpm.diffusion.Tensor",
        "ddpm.diffusion.schedules.math",
        "ddpm.data.sources._reachable",
    ),  # imported there, or private
    *(
        "ddpm.config.build.instantiate",
        "ddpm.system.files.write_whole",
        "ddpm.evaluate.features._fetch",
    ),  # ours, but no part of a run
    *(
        "ddpm.train.run.run",
        "ddpm.sample.run.run",
        "ddpm.run",
        "ddpm.load",
        "ddpm.library.Run",
        "ddpm.export.__main__.main",
        "ddpm.train.loop.train",
        "ddpm.train.state.EMA",
    ),
    *(
        "ddpm.models.layers.ResBlock",
        "ddpm.models.unet.level_sizes",
        "ddpm.diffusion.samplers.latents",
        "ddpm.diffusion.process.normal_kl",
    ),
]
REFUSED = "is not trusted|is not a public dotted name|cannot be imported"


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    """A module that creates a file when it is imported; the value is that file's path."""
    trace = tmp_path / "trace"
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "stranger.py").write_text(f"open({str(trace)!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path / "modules")
    yield trace
    sys.modules.pop("stranger", None)


@pytest.fixture
def copy(run_folder, tmp_path):
    """A copy of a run's folder to tamper with."""
    return RunFolder(shutil.copytree(run_folder, tmp_path / "run"))


def tamper(run: RunFolder, key: str, value) -> None:
    file = run.path / "config.yaml"
    config = yaml.safe_load(file.read_text())
    *parents, last = key.split(".")
    functools.reduce(dict.__getitem__, parents, config)[last] = value
    file.write_text(yaml.safe_dump(config))


class Payload:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("target", TARGETS)
def test_a_run_folder_names_nothing_that_would_be_called(copy, stranger, target):
    before = set(sys.modules)
    for key, value in (
        ("model._target_", target),
        ("sampler.function._target_", target),
        ("model.init", [{"deep": {"_target_": target}}]),
    ):
        shutil.copyfile(copy.path / "config.yaml", copy.path / "kept.yaml")
        tamper(copy, key, value)
        with pytest.raises(ValueError, match=REFUSED) as refused:
            copy.config([])
        assert "\n" not in str(refused.value)
        shutil.copyfile(copy.path / "kept.yaml", copy.path / "config.yaml")
    assert not stranger.exists()
    assert not {name.partition(".")[0] for name in set(sys.modules) - before} & {
        target.partition(".")[0],
        "pandas",
        "stranger",
    } - {"ddpm", "torch"}


@pytest.mark.parametrize(
    "main",
    [sample.main, evaluate.main, functools.partial(export.main)],
    ids=["sample", "evaluate", "export"],
)
def test_every_command_that_reads_a_run_folder_refuses_it(copy, stranger, refusal, main):
    tamper(copy, "model._target_", "stranger.leave_trace")
    assert "model._target_=stranger.leave_trace is not trusted" in refusal(
        main, f"run={copy.path}", *(["to=x"] if isinstance(main, functools.partial) else [])
    )
    assert not stranger.exists()


@pytest.mark.parametrize("target", TARGETS[::3])
def test_a_recipe_names_nothing_that_would_be_called(complaint, recipe, stranger, target):
    assert re.search(REFUSED, complaint(recipe(f"model: {{_target_: '{target}'}}\n")))
    assert not stranger.exists()


@pytest.mark.parametrize(
    "text",
    [
        "hydra: {callbacks: {mine: {_target_: stranger.Callback}}}\n",
        "hydra: {launcher: {_target_: stranger.Launcher}}\n",
        "hydra: {searchpath: ['pkg://stranger']}\n",
        "defaults: [/optimizer@hydra.callbacks.mine: adam]\n",
        "defaults: [../../somewhere/else]\n",
        "defaults: [override /model: ../../somewhere/else]\n",
        "model: !!python/object/apply:stranger.leave_trace []\n",
    ],
)
def test_a_recipe_does_not_reach_for_hydra_or_other_files(complaint, recipe, stranger, text):
    """Hydra instantiates its own settings' classes before the configuration can be checked."""
    assert "trial.yaml cannot be used" in complaint(recipe(text))
    assert not stranger.exists()


@pytest.mark.parametrize(
    "group", ["experiment", "model", "data", "+experiment@here", "hydra/callbacks"]
)
def test_an_option_is_no_path(complaint, stranger, tmp_path, group):
    (tmp_path / "evil.yaml").write_text(
        "# @package _global_\nhydra: {callbacks: {mine: {_target_: stranger.Callback}}}\n"
    )
    for path in (
        tmp_path / "evil",
        os.path.relpath(tmp_path / "evil", PACKAGE.parent / "conf" / "model"),
        "../../x",
    ):
        assert "no such option" in complaint(f"{group}={path}")
        with pytest.raises(ValueError, match="no such option"):
            compose([f"{group}={path}"])
    assert not stranger.exists()


def test_a_python_object_in_a_run_folders_yaml_is_not_made(copy, stranger, refusal):
    (copy.path / "config.yaml").write_text(
        "runtime: !!python/object/apply:stranger.leave_trace []\n"
    )
    assert "config.yaml cannot be read" in refusal(sample.main, f"run={copy.path}")
    assert not stranger.exists()


@pytest.mark.parametrize("key", ["data.name", "data.path", "model.init", "recipe"])
def test_a_run_folder_cannot_ask_for_the_environment(copy, key):
    tamper(copy, key, "${oc.env:HOME}")
    with pytest.raises(ValueError, match=f"{key}=.*oc.env:HOME.* is an interpolation"):
        copy.config([])


@pytest.mark.parametrize("name", ["state.pt", "model.safetensors", "ema.safetensors"])
def test_a_pickle_in_place_of_a_checkpoints_file_is_left_unread(copy, tmp_path, name):
    """The checksums match, too."""
    found = checkpoint.find(copy.checkpoints)
    (found.folder / name).write_bytes(
        pickle.dumps({"conv_in.weight": Payload(tmp_path / "trace")}, protocol=2)
    )
    meta = json.loads((found.folder / "meta.json").read_text())
    meta["sha256"][name] = hashlib.sha256((found.folder / name).read_bytes()).hexdigest()
    (found.folder / "meta.json").write_text(json.dumps(meta))
    read = {
        "state.pt": found.state,
        "model.safetensors": lambda: found.weights("raw"),
        "ema.safetensors": lambda: found.weights("ema"),
    }[name]
    with pytest.raises(
        ValueError, match=rf"{re.escape(name)} (holds more|is not) .* was not loaded"
    ) as refused:
        read()
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "trace").exists()


def test_a_zipped_pickle_that_torch_wrote_is_left_unread_too(copy, tmp_path):
    file = checkpoint.find(copy.checkpoints).folder / "state.pt"
    torch.save({"optimizer": Payload(tmp_path / "trace")}, file)
    with pytest.raises(ValueError, match=r"state\.pt holds .* was not loaded"):
        checkpoint.all_in(copy.checkpoints)[-1].state()
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    ("file", "changed", "reason"),
    [
        ("model_index.json", {"unet": ["stranger", "UNet"]}, "unet=.*stranger"),
        ("model_index.json", {"_class_name": ["stranger", "Pipeline"]}, "_class_name"),
        ("model_index.json", {"safety_checker": ["stranger", "Checker"]}, "safety_checker"),
        ("unet/config.json", {"auto_map": {"AutoModel": "stranger.UNet"}}, "auto_map"),
        ("unet/config.json", {"_class_name": "stranger.UNet"}, "_class_name=stranger.UNet"),
        (
            "scheduler/scheduler_config.json",
            {"_class_name": "stranger.Scheduler"},
            "_class_name=stranger.Scheduler",
        ),
        ("unet/diffusion_pytorch_model.bin", None, "cannot be read as tensors only"),
    ],
)
def test_a_diffusers_folder_brings_no_code(artefacts, stranger, tmp_path, file, changed, reason):
    folder = shutil.copytree(artefacts / "exported", tmp_path / "folder")
    for place in (folder, folder / "unet"):
        shutil.copyfile(tmp_path / "modules" / "stranger.py", place / "stranger.py")
    if changed is None:
        (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
        (folder / file).write_bytes(pickle.dumps({"conv_in.weight": Payload(stranger)}, protocol=2))
    else:
        (folder / file).write_text(
            json.dumps({**json.loads((folder / file).read_text()), **changed})
        )

    def read():
        found = folders.find(str(folder), "from")
        return found.chain(), found.weights()

    with pytest.raises(ValueError, match=reason):
        read()
    assert not stranger.exists()


@pytest.mark.parametrize("path", ["../secret.png", "{tmp}/secret.png", "sub/../../secret.png"])
def test_a_data_sets_rows_name_no_file_outside_of_it(tmp_path, path):
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    (tmp_path / "set").mkdir()
    pq.write_table(
        pa.table({"image": [{"bytes": None, "path": path.format(tmp=tmp_path)}]}),
        tmp_path / "set" / "train.parquet",
    )
    with pytest.raises(ValueError, match="outside of the data set"):
        image_set(
            sources.folder(str(tmp_path / "set")),
            Decoding(4, 4, 3, "none", "white"),
            tmp_path / "cache",
            1,
            0.5,
        )


@pytest.mark.parametrize("repo", ["../x", "/etc", "a/../b", "./x", "a/b/c"])
def test_a_hub_data_sets_name_is_no_path(repo):
    with pytest.raises(ValueError, match="is not a hub repository"):
        sources.hub(repo)


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory, tiny):
    """Everything that a run, its samples and its export wrote.

    The umask is 0o027, and no socket may bind or listen.
    """
    root = tmp_path_factory.mktemp("artefacts")

    def listen(*arguments):
        raise AssertionError("something wants to listen")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("bind", "listen"):
            patch.setattr(socket.socket, name, listen)
        before = os.umask(0o027)
        try:
            outputs = root / "outputs"
            own = ("training.steps=2", f"outputs={outputs}", f"data.cache={outputs / 'cache'}")
            run(patch, train.main, *tiny, *own)
            folder = next((root / "outputs").glob("*/*/run.json")).parent
            run(
                patch,
                sample.main,
                f"run={folder}",
                "sampler=ddim",
                "sampler.num_steps=2",
                "num_samples=2",
                "format=[png,npz]",
            )
            run(patch, export.main, f"run={folder}", f"to={root / 'exported'}")
        finally:
            os.umask(before)
    return root


def run(patch: pytest.MonkeyPatch, main, *overrides: str) -> None:
    patch.setattr(sys, "argv", ["ddpm", *overrides])
    main()


def test_nothing_listens_while_a_run_is_made(artefacts):
    """In `artefacts`, a socket that binds or listens raises an error."""
    assert (artefacts / "exported" / "model_index.json").is_file()


def test_no_code_of_the_package_listens():
    names = {
        "bind",
        "listen",
        "serve_forever",
        "start_server",
        "create_server",
        "HTTPServer",
        "TCPServer",
        "launch_tensorboard",
    }
    modules = {
        "http",
        "socketserver",
        "xmlrpc",
        "asyncio",
        "multiprocessing.managers",
        "wsgiref",
        "flask",
        "gradio",
    }
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                assert node.attr not in names, f"{file}:{node.lineno}"
            if isinstance(node, ast.Import | ast.ImportFrom):
                imported = (
                    [alias.name for alias in node.names]
                    if isinstance(node, ast.Import)
                    else [str(node.module)]
                )
                assert not modules & {name.partition(".")[0] for name in imported} | modules & set(
                    imported
                ), f"{file}:{node.lineno}"


def test_all_that_is_written_has_the_permissions_that_the_umask_gives(artefacts):
    found = {
        path.relative_to(artefacts): stat.S_IMODE(path.stat().st_mode)
        for path in artefacts.rglob("*")
    }
    kinds = {path.suffix for path in found}
    assert kinds >= {
        ".safetensors",
        ".pt",
        ".json",
        ".jsonl",
        ".png",
        ".npy",
        ".npz",
        ".yaml",
        ".log",
    }
    assert {
        str(path): oct(mode)
        for path, mode in found.items()
        if mode != (0o750 if (artefacts / path).is_dir() else 0o640)
    } == {}


def test_numbers_that_are_pickled_in_a_cache_are_left_unread(tmp_path, pictures):
    folder = pictures("set", ["a/1.png", "b/2.png"])

    def decode():
        return image_set(
            sources.folder(str(folder)),
            Decoding(4, 4, 3, "none", "white"),
            tmp_path / "cache",
            1,
            0.5,
        )

    expected = decode()
    cached = next((tmp_path / "cache").glob("*/labels.npy"))
    np.save(cached, np.array([Payload(tmp_path / "trace")] * 2, dtype=object), allow_pickle=True)
    assert decode().labels.tolist() == expected.labels.tolist()
    assert not (tmp_path / "trace").exists()


def test_no_command_trusts_what_a_folder_says_of_trust(copy, stranger, refusal):
    tamper(copy, "model._target_", "stranger.leave_trace")
    tamper(copy, "runtime.trusted_modules", ["stranger"])
    assert "is not trusted" in refusal(sample.main, f"run={copy.path}")
    assert not stranger.exists()


def test_what_starts_with_a_trusted_name_but_is_another_is_refused(complaint):
    for target in ("ddpm.modelsx.UNet", "ddpm.models", "torch.optimizer.Adam"):
        assert "is not trusted" in complaint(f"model._target_={target}")
