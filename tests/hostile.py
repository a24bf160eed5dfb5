"""Hostile inputs: each function writes one into a folder and returns the command line to type.

Nothing here is harmful: code that runs leaves a trace, and links lead to a folder of canaries.
"""

import json
import os
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml

GLOBAL = "# @package _global_\n"
CALLBACK = "{callbacks: {mine: {_target_: stranger.Callback}}}"


@dataclass(frozen=True)
class Place:
    """The folders that a hostile input is written to.

    Attributes:
        tmp: The test's temporary folder.
        run: A copy of a finished run.
        canary: A folder that nothing may change.
    """

    tmp: Path
    run: Path
    canary: Path

    def own(self, name: str, text: str) -> list[str]:
        """Writes a file of user options. Returns the words that name its folder."""
        file = self.tmp / "my" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return ["--config-dir", str(self.tmp / "my")]

    def experiment(self, text: str) -> list[str]:
        return [*self.own("experiment/mine.yaml", GLOBAL + text), "experiment=mine"]

    def pictures(self, *names: str) -> Path:
        """Writes pictures into a folder, each of a different gray."""
        from PIL import Image

        for number, name in enumerate(names or ("1.png",)):
            file = self.tmp / "set" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (4, 4), number + 1).save(file, "PNG")
        return self.tmp / "set"

    def linked(self, name: str) -> Path:
        """Replaces a file or folder of the run by a link to a canary of the same kind."""
        link = self.run / name
        if link.is_dir():
            link.rename(self.tmp / "moved")
        link.unlink(missing_ok=True)
        link.symlink_to(self.canary if (self.tmp / "moved").exists() else self.canary / "file")
        return link


@dataclass(frozen=True)
class Typed:
    """A command line.

    Attributes:
        words: The words to type.
        says: A pattern in the one line that the command ends with; None if the command works.
        command: The command, such as train.
    """

    words: list[str]
    says: str | None
    command: str = "train"


Case = Callable[[Place], Typed]


def sparse(path: Path, size: int = 3 * 10**9, start: bytes = b"") -> Path:
    """Writes a file that takes no disk space, but much memory if it is read whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(start)
        file.truncate(size)
    return path


def option(text: str, says: str, name: str = "experiment/mine.yaml") -> Case:
    """An option file that sets a key it may not set, or that cannot be read."""

    def write(place: Place) -> Typed:
        group, _, stem = name.removesuffix(".yaml").rpartition("/")
        return Typed([*place.own(name, text), f"{group}={stem}"], f"{name}.*{says}")

    return write


ALONE = "only the command line may"
TRUST = {
    "trust in a recipe": option(
        GLOBAL + "runtime: {trusted_modules: [stranger]}\nschedule: {_target_: stranger.betas}\n",
        f"runtime.trusted_modules=.stranger.*{ALONE}",
    ),
    "trust by a package": option("# @package runtime\ntrusted_modules: [stranger]\n", ALONE),
    "trust by reference": option(
        GLOBAL + "recipe: {trust: [stranger]}\nruntime: {trusted_modules: '${recipe.trust}'}\n",
        ALONE,
    ),
    "trust as a word": option(GLOBAL + "runtime: {trusted_modules: stranger}\n", ALONE),
    "trust by a sweep": option(
        GLOBAL + "hydra: {sweeper: {params: {runtime.trusted_modules: '[stranger]'}}}\n", ALONE
    ),
    "trust in an option": option(
        GLOBAL + "model: {_target_: stranger.Net}\nruntime: {trusted_modules: [stranger]}\n",
        ALONE,
        "model/net.yaml",
    ),
    "a callback": option(f"{GLOBAL}hydra: {CALLBACK}\n", f"hydra.callbacks.*{ALONE}"),
    "a callback by a package": option(
        "# @package hydra.callbacks.mine\n_target_: stranger.Callback\n", ALONE
    ),
    "a callback by a group": option(
        "mine: {_target_: stranger.Callback}\n", ALONE, "hydra/callbacks/mine.yaml"
    ),
    "code in logging": option(
        GLOBAL + "hydra: {job_logging: {formatters: {x: {'()': stranger.Formatter}}}}\n", ALONE
    ),
    "code in a group of logging": option(
        "version: 1\nformatters: {x: {'()': stranger.Formatter}}\n",
        ALONE,
        "hydra/job_logging/mine.yaml",
    ),
    "code in Hydra's logging": option(
        GLOBAL + "hydra: {hydra_logging: {handlers: {x: {'()': stranger.Handler}}}}\n", ALONE
    ),
    "the environment of jobs": option(
        GLOBAL + "hydra: {job: {env_set: {LD_PRELOAD: /x}}}\n", ALONE
    ),
    "a shell of Slurm": option(GLOBAL + "hydra: {launcher: {setup: [touch trace]}}\n", ALONE),
    "a search space": option(
        GLOBAL + "hydra: {sweeper: {custom_search_space: stranger.space}}\n", ALONE
    ),
    "all of runtime by reference": option(GLOBAL + "runtime: ${hydra:runtime}\n", "table of keys"),
    "Hydra by reference": option(GLOBAL + "hydra: ${recipe}\n", ""),
}


def target(group: str, name: str, *more: str) -> Case:
    """A _target_ that does not fit its place."""

    def write(place: Place) -> Typed:
        words = [*more, f"{group}._target_={name}"]
        return Typed(words, rf"{group}\._target_={name}.*(not trusted|does not fit)")

    return write


def nested(place: Place) -> Typed:
    word = "schedule.beta_start={_target_:ddpm.diffusion.schedules.linear}"
    return Typed(["schedule=linear", word], "schedule.beta_start=.*valid number")


HOOK = "torch.optim.optimizer.register_optimizer_step_pre_hook"
TARGETS = {
    "a hub as schedule": target("schedule", "ddpm.data.sources.hub"),
    "a path as schedule": target("schedule", "ddpm.data.local.local"),
    "a folder as learning rate": target("lr_schedule", "ddpm.data.sources.folder"),
    "a hook as schedule": target("schedule", HOOK),
    "a hook as optimizer": target("optimizer", HOOK),
    "a schedule as optimizer": target("optimizer", "torch.optim.lr_scheduler.StepLR"),
    "a schedule as network": target("model", "ddpm.diffusion.schedules.linear"),
    "a network as data": target("data.source", "ddpm.models.UNet"),
    "a sampler in itself": target("sampler.function", "ddpm.diffusion.samplers.Sampler"),
    "a class of numbers as objective": target("objective", "ddpm.diffusion.Denoised"),
    "a name where a number is due": nested,
}


def tampered(place: Place) -> Typed:
    file = place.run / "config.yaml"
    config = yaml.safe_load(file.read_text())
    config["schedule"] = {"_target_": "ddpm.data.sources.hub", "repo": "a/b"}
    file.write_text(yaml.safe_dump(config))
    return Typed([f"run={place.run}"], "schedule._target_=ddpm.data.sources.hub", "sample")


TARGETS["a hub in a run's folder"] = tampered


def link(name: str, command: str = "train") -> Case:
    """A link in a run's folder at a path that the command writes to."""

    def write(place: Place) -> Typed:
        made = place.linked(name)
        going_on = [f"resume={place.run}", "training.steps=8"]
        words = going_on if command == "train" else [f"run={place.run}"]
        return Typed(words, f"{made} is a link", command)

    return write


def link_in_samples(name: str) -> Case:
    def write(place: Place) -> Typed:
        (place.tmp / "to").mkdir()
        (place.tmp / "to" / name).symlink_to(place.canary / "file")
        words = [f"run={place.run}", f"to={place.tmp / 'to'}", "num_samples=2"]
        return Typed(words, f"to/{name} is a link", "sample")

    return write


LINKS = {
    **{
        f"{name} as a link": link(name)
        for name in (".lock", "train.log", "checkpoints", "samples", ".hydra", "metrics.jsonl")
    },
    "a preview's scratch as a link": link("samples/.step_00000008.png.1"),
    "the latest checkpoint as a link": link("checkpoints/latest"),
    "samples as a link, drawn into": link("samples", "sample"),
    **{
        f"{name} as a link among samples": link_in_samples(name)
        for name in (".lock", "grid.png", ".grid.png.1", "00000.png", "protocol.json")
    },
}


def bomb(levels: int = 12) -> str:
    lines = [f"a0: &a0 [{', '.join('x' * 10)}]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels)]
    return "\n".join(lines) + "\n"


def sparse_option(place: Place) -> Typed:
    words = place.own("model/mine.yaml", "")
    sparse(place.tmp / "my" / "model" / "mine.yaml", start=b"# x\n")
    return Typed([*words, "model=mine"], "model/mine.yaml")


def settings(text: str) -> Case:
    """A run with this text as its config.yaml."""

    def write(place: Place) -> Typed:
        (place.run / "config.yaml").write_text(text)
        return Typed([f"run={place.run}"], f"{place.run.name}.*config.yaml", "sample")

    return write


def sparse_settings(place: Place) -> Typed:
    sparse(place.run / "config.yaml")
    return Typed([f"run={place.run}"], "config.yaml", "sample")


def among_pictures(make: Callable[[Path], None], says: str) -> Case:
    """A folder with one file that is not a picture, so that the error names it."""

    def write(place: Place) -> Typed:
        (place.tmp / "set").mkdir()
        make(place.tmp / "set")
        words = ["data=folder", f"data.path={place.tmp / 'set'}", f"outputs={place.tmp / 'out'}"]
        return Typed([*words, "training.steps=2"], says)

    return write


def pipe(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    (folder / "2.png").symlink_to(folder / "pipe")


def device(folder: Path) -> None:
    (folder / "zeros.png").symlink_to("/dev/zero")


def pipe_as_set(place: Place) -> Typed:
    os.mkfifo(place.tmp / "set")
    return Typed(["data=folder", f"data.path={place.tmp / 'set'}"], "data.path=.*set is neither")


def parquet_of(says: str, **columns: object) -> Case:
    """A parquet file with broken columns or broken metadata of the datasets library."""

    def write(place: Place) -> Typed:
        about = columns.pop("about", None) if "about" in columns else None
        table = pa.table({"image": [b"x"], **columns})
        if about is not None:
            table = table.replace_schema_metadata({"huggingface": about})
        (place.tmp / "set").mkdir()
        pq.write_table(table, place.tmp / "set" / "train.parquet")
        return Typed(["data=folder", f"data.path={place.tmp / 'set'}"], f"train.parquet.*{says}")

    return write


def huge_state(place: Place) -> Typed:
    sparse(place.tmp / "set" / "state.json")
    return Typed(["data=folder", f"data.path={place.tmp / 'set'}"], "data.path=.*set.*3 GB")


def saved_pipe(place: Place) -> Typed:
    datasets.Dataset.from_dict({"image": [b"x"]}).save_to_disk(str(place.tmp / "set"))
    file = next((place.tmp / "set").glob("*.arrow"))
    file.unlink()
    os.mkfifo(file)
    return Typed(["data=folder", f"data.path={place.tmp / 'set'}"], "data.path=.*set.*a pipe")


def long_header(place: Place) -> Typed:
    size = 95_000_000
    header = b'{"' + b"x" * (size - 60) + b'":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    header += b" " * (size - len(header))
    file = place.tmp / "weights.safetensors"
    file.write_bytes(struct.pack("<Q", size) + header)
    return Typed([f"init_from={file}", "model=small32", "data=emoji"], "weights.safetensors.*20 MB")


def claims_more(place: Place) -> Typed:
    file = place.tmp / "weights.pt"
    torch.save({"time_embed.0.weight": torch.zeros(1).expand(10**12)}, file)
    says = "weights.pt.*time_embed.0.weight has shape .* but less data"
    return Typed([f"init_from={file}"], says)


def ill_named(place: Place) -> Typed:
    file = place.tmp / "weights.pt"
    torch.save({"\x1b[2J\u202eerror: fake\nerror: all is well": torch.zeros(1)}, file)
    return Typed([f"init_from={file}"], r"weights\.pt.*\\x1b\[2J\\u202eerror: fake")


def exported(changed: dict[str, object]) -> Case:
    """A diffusers folder with changed settings."""

    def write(place: Place) -> Typed:
        folder = place.tmp / "folder"
        (folder / "unet").mkdir(parents=True)
        config = {
            "_class_name": "UNet2DModel",
            **{"sample_size": 16, "in_channels": 1, "out_channels": 1, "norm_num_groups": 4},
            **{"block_out_channels": [8], "layers_per_block": 1, "attention_head_dim": None},
            **{"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]},
        }
        (folder / "unet" / "config.json").write_text(json.dumps({**config, **changed}))
        (folder / "unet" / "diffusion_pytorch_model.safetensors").touch()
        return Typed([f"from={folder}"], f"{folder}.*config.json", "sample")

    return write


def nested_json(place: Place) -> Typed:
    typed = exported({})(place)
    (place.tmp / "folder" / "unet" / "config.json").write_text("[" * 100_000)
    return typed


def sparse_json(place: Place) -> Typed:
    typed = exported({})(place)
    sparse(place.tmp / "folder" / "unet" / "config.json")
    return typed


def typed(*words: str, command: str = "train", says: str) -> Case:
    return lambda place: Typed([word.format(run=place.run) for word in words], says, command)


def sparse_reference(place: Place) -> Typed:
    sparse(place.tmp / "reference.npz")
    words = [f"run={place.run}", f"evaluation.reference={place.tmp / 'reference.npz'}"]
    return Typed([*words, "evaluation.metrics=[fd]"], "reference.npz", "evaluate")


def huge_reference(place: Place) -> Typed:
    """A reference file with a header that claims a terabyte array."""
    header = {"descr": "<f8", "fortran_order": False, "shape": (2**37,)}
    file = place.tmp / "reference.npz"
    with zipfile.ZipFile(file, "w") as archive, archive.open("mu.npy", "w") as array:
        np.lib.format.write_array_header_1_0(array, header)
    words = [f"run={place.run}", f"evaluation.reference={place.tmp / 'reference.npz'}"]
    return Typed([*words, "evaluation.metrics=[fd]"], "reference.npz", "evaluate")


MANY = "2000000000"
ENDS = {
    "aliases that stand for 10^12 values": option(GLOBAL + bomb(), "stand for more than"),
    "aliases in a run": settings(bomb()),
    "an alias of itself": option(GLOBAL + "a: &a [*a]\n", "itself"),
    "an alias of itself in a run": settings("a: &a [*a]\n"),
    "a number to the base 60": option(GLOBAL + f"seed: 1{':59' * 20_000}\n", "digits"),
    "a number to the base 60 in a run": settings(f"seed: 1{':59' * 20_000}\n"),
    "a number of 10,000 digits": option(GLOBAL + f"seed: {'7' * 10_000}\n", "digits"),
    "a date in a run": settings("seed: 2020-02-02\n"),
    "brackets without end": option(GLOBAL + f"a: {'[' * 5_000}\n", "deep"),
    "brackets without end in a run": settings("[" * 100_000),
    "3 GB of options": sparse_option,
    "3 GB of settings": sparse_settings,
    "a pipe among pictures": among_pictures(pipe, "data.path=.*set has no images"),
    "a device among pictures": among_pictures(device, "data.path=.*set has no images"),
    "a pipe as pictures": pipe_as_set,
    "3 GB as a picture": among_pictures(lambda folder: sparse(folder / "1.png"), r"1\.png.*3 GB"),
    "3 GB as a table": among_pictures(lambda folder: sparse(folder / "1.parquet"), r"1\.parquet"),
    "3 GB of a saved set's state": huge_state,
    "a pipe in a saved set": saved_pipe,
    "a header of 95 MB": long_header,
    "a tensor that claims more than it holds": claims_more,
    "layers of a block": exported({"layers_per_block": 10**7}),
    "levels without end": exported(
        {
            "block_out_channels": [8] * 5000,
            "down_block_types": ["DownBlock2D"] * 5000,
            "up_block_types": ["UpBlock2D"] * 5000,
        }
    ),
    "JSON without end": nested_json,
    "3 GB of JSON": sparse_json,
    "3 GB of a reference": sparse_reference,
    "a reference of a terabyte": huge_reference,
    "residual blocks": typed("model.num_res_blocks=1000000", says="model.num_res_blocks=1000000"),
    "previews": typed(f"runtime.num_previews={MANY}", says="runtime.num_previews=2000000000"),
    "workers": typed(f"runtime.workers={MANY}", says="runtime.workers=2000000000"),
    "figures of samples": typed(
        f"evaluation.num_samples={MANY}", says="evaluation.num_samples=2000000000"
    ),
    "samples": typed(
        "run={run}", f"num_samples={MANY}", command="sample", says="num_samples=2000000000"
    ),
    "frames": typed("run={run}", f"frames={MANY}", command="sample", says="frames=2000000000"),
    "a long name of a run": typed(f"run={'x' * 300}", command="sample", says="x{300}"),
    "a long name of a set": typed("data=folder", f"data.path={'x' * 300}", says="x{300}"),
}


def ill_named_picture(name: str | bytes, says: str) -> Case:
    """A damaged file, the only picture, with a name that a terminal would act on."""

    def write(place: Place) -> Typed:
        folder = place.tmp / "set"
        folder.mkdir()
        Path(os.fsdecode(os.fsencode(folder) + b"/" + os.fsencode(name))).write_bytes(b"none")
        words = ["data=folder", f"data.path={folder}", f"outputs={place.tmp / 'out'}"]
        return Typed([*words, "training.steps=2"], says)

    return write


PRINTED = {
    "a line in a name": ill_named_picture("a\nerror: fake.png", r"a(\\n| )error: fake\.png"),
    "an escape in a name": ill_named_picture(
        "\x1b[2J\x1b]0;x\x07.png", r"\\x1b\[2J\\x1b\]0;x\\x07"
    ),
    "a turned name": ill_named_picture("\u202egnp.txt.png", r"\\u202egnp"),
    "an isolated name": ill_named_picture("\u2066x\u2069\u200f.png", r"\\u2066x\\u2069\\u200f"),
    "a C1 control in a name": ill_named_picture("\x9b2J.png", r"\\x9b2J"),
    "a name that is no UTF-8": ill_named_picture(b"\xff\xfe.png", r"\\xff\\xfe"),
    "a tensor's name": ill_named,
    "a typed value": typed("data.crop=\u202ex", says=r"data\.crop=\\u202ex"),
}
SMALL = {
    "no JSON in a table": parquet_of("invalid metadata", about=b"{"),
    "a list in a table": parquet_of("invalid metadata", about=b"[1]"),
    "names that are none": parquet_of(
        "class names in column label that are not strings",
        about=b'{"info": {"features": {"label": {"names": 7, "_type": "ClassLabel"}}}}',
        label=[0],
    ),
    "classes that are lists": parquet_of("label_column", label=[[1, 2]]),
    "classes that are too many": parquet_of("label_column has", label=[10**9]),
}
ALL = {**TRUST, **TARGETS, **LINKS, **ENDS, **PRINTED, **SMALL}
