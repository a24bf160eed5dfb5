"""The model card: the README.md that the hub shows beside the weights."""

import shlex
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from ddpm.config.schema import Config
from ddpm.runs.folder import RunFolder, starts_of
from ddpm.runs.identity import flat
from ddpm.runs.results import PARTS, read_measurements
from ddpm.sample.subject import Subject, Trained
from ddpm.system.files import as_key
from ddpm.system.text import shown, unmarked

KINDS = {"ema": "the moving average of the weights", "raw": "the weights as trained"}
ELSEWHERE = ("runtime.", "outputs", "data.cache")  # keys that do not affect what is computed
PIPELINE = """\
from diffusers import DDPMPipeline

pipeline = DDPMPipeline.from_pretrained(".")  # this folder, or its name on the hub
pipeline(batch_size=4, num_inference_steps={steps}).images[0].save("image.png")"""
LOOP = """\
import torch
from diffusers import DDPMScheduler, UNet2DModel

folder = "."  # this folder, or its name on the hub
unet = UNet2DModel.from_pretrained(folder, subfolder="unet")
scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
scheduler.set_timesteps({steps})
classes = torch.tensor([0, 1])  # indices into classes.json
x = torch.randn(2, *{shape})
with torch.inference_mode():
    for t in scheduler.timesteps:
        x = scheduler.step(unet(x, t, class_labels=classes).sample, t, x).prev_sample
images = (x.clamp(-1, 1) + 1) / 2  # {shape} each, in [0, 1]"""


def model_card(trained: Trained, license: str | None) -> str:
    """Returns the card of a run's network: YAML for the hub, then Markdown for people.

    Args:
        trained: The network and its run.
        license: License of the weights, as the hub names it; None for not stated.
    """
    config, subject = trained.config, trained.subject
    kind = "class-conditional" if subject.classes else "unconditional"
    repo = config.data.source.get("repo")
    front = ModelCardData(
        license=license,
        library_name="diffusers",
        pipeline_tag=None if subject.classes else "unconditional-image-generation",
        tags=["diffusers", f"{kind}-image-generation", "ddpm"],
        datasets=[repo] if repo else None,
    )
    sections = [
        f"# {_text(trained.run.path.parent.name)}",
        _network(trained),
        f"## Training\n\n{_training(trained)}",
        f"## Figures\n\n{_figures(trained)}",
        f"## Data\n\n{_data(trained.run, config)}",
        f"## Sampling\n\n{_sampling(subject)}",
        f"## Licence\n\nOf the weights: {_text(license or 'not stated')}.",
    ]
    return f"---\n{front.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"


def _network(trained: Trained) -> str:
    subject, process = trained.subject, trained.subject.diffusion
    channels, height, width = subject.shape
    count = sum(tensor.numel() for tensor in subject.weights().values())
    classes = f", {len(subject.classes)} classes" if subject.classes else ""
    return (
        f"A denoising diffusion network ([Ho et al. 2020](https://arxiv.org/abs/2006.11239)) for "
        f"{'grayscale' if channels == 1 else 'color'} pictures of {height}x{width} "
        f"pixels{classes}: "
        f"{count:,} parameters, {process.num_timesteps} timesteps, prediction {process.prediction},"
        f" variance {process.variance}. It is {KINDS[trained.kind]} after step {trained.step:,}."
    )


def _training(trained: Trained) -> str:
    """The recipe, the commands, and the machine of the last start."""
    run, config, lines = trained.run, trained.config, []
    starts = starts_of(run.record())
    recipe = run.choices().get("experiment", "None")
    if config.recipe is not None:
        note = f" {_text(config.recipe.note)}" if config.recipe.note else ""
        lines.append(f"Recipe {_code(recipe)}: {_text(config.recipe.source)}.{note}")
    if config.init_from is not None:
        name = _code(Path(config.init_from).name)
        lines.append(f"Training started from the weights of {name} (digest {config.init_weights}).")
    commands = [
        _command(start["command"])
        for number, start in enumerate(starts)
        if number == 0 or start.get("changed")
    ]
    if commands:
        lines.append("```bash\n" + "\n".join(commands) + "\n```")
    if starts:
        git, device = starts[-1].get("git") or {}, starts[-1].get("device", "an unknown device")
        commit = f", commit {git['commit'][:7]} of ddpm" if git.get("commit") else ""
        training = config.training
        lines.append(
            f"{trained.step:,} updates of {training.batch_size} pictures each, "
            f"{training.precision}, seed {config.seed}, on {_text(device)}{commit}."
        )
    return "\n\n".join(lines)


def _command(words: list[str]) -> str:
    """A start's command, without what means nothing on another machine."""
    kept = []
    for word in words:
        key, equals, value = word.rpartition("=")
        if not key.lstrip("+").startswith(ELSEWHERE):
            place = value.startswith(("/", "~", "."))  # a path on the user's disk
            kept.append(f"{key}{equals}{Path(value).name}" if place else word)
    # one line that cannot end the code block around it
    return shown(" ".join(shlex.join(kept).split())).replace("```", "'''")


def _figures(trained: Trained) -> str:
    """What was measured of this very network, grouped by protocol."""
    network = trained.subject.identity()
    found = [
        entry
        for entry in read_measurements(trained.run.path / "evaluation.json")
        if not entry["metric"].startswith(PARTS) and _is_of(entry, trained, network)
    ]
    if not found:
        return "Nothing was measured of this network."
    parts = []
    for _, same in groupby(found, key=lambda entry: as_key(entry["protocol"])):
        entries = list(same)
        lines = [f"- {_code(entry['metric'])} {_value(entry)}" for entry in entries]
        said = flat(entries[0]["protocol"])
        how = "; ".join(f"{key}={value}" for key, value in said.items() if value is not None)
        parts.append("\n".join([*lines, "", f"  by the protocol {_code(how)}"]))
    return "\n\n".join(parts)


def _is_of(entry: Mapping[str, Any], trained: Trained, network: str) -> bool:
    if entry.get("network") is not None:
        return entry["network"] == network
    protocol = entry["protocol"]  # written by an earlier version
    return (protocol.get("step"), protocol.get("weights")) == (trained.step, trained.kind)


def _value(entry: Mapping[str, Any]) -> str:
    deviation, floor = entry.get("deviation"), entry.get("floor")
    return (
        f"{entry['value']:.4g}"
        + ("" if deviation is None else f" ± {deviation:.2g}")
        + ("" if floor is None else f" (floor, two halves of the data: {floor:.4g})")
    )


def _data(run: RunFolder, config: Config) -> str:
    """The pictures and their license, as far as the data option knows."""
    data, record = config.data, run.record().get("data") or {}
    repo = data.source.get("repo")
    page = f"https://huggingface.co/datasets/{repo}" if repo else None
    known = data.license or ("unknown here; see the data set's page" if page else "unknown")
    return "\n".join(
        [
            f"- data set: {_code(data.name)}" + (f", <{_text(page)}>" if page else ""),
            f"- pictures: {record.get('images', 'unknown')}, {data.holdout:g} of them held out, "
            f"{'half of them mirrored' if data.flip else 'none mirrored'}",
            f"- fingerprint: {_code(str(record.get('fingerprint') or 'unknown'))}",
            f"- licence of the pictures: {_text(known)}",
        ]
    )


def _sampling(subject: Subject) -> str:
    steps = subject.diffusion.num_timesteps
    form = LOOP if subject.classes else PIPELINE
    number = subject.any_class
    any_class = "" if number is None else f"Class {number} stands for any class.\n\n"
    return (
        f"With diffusers:\n\n```python\n{form.format(steps=steps, shape=subject.shape)}\n```\n\n"
        f"{any_class}"
        "With ddpm:\n\n```bash\npython -m ddpm.sample from=FOLDER num_samples=16\n```"
    )


def _text(words: str) -> str:
    """Other people's words, escaped so that they mean nothing in Markdown."""
    return unmarked(words)


def _code(words: str) -> str:
    return f"`{shown(' '.join(words.split())).replace('`', chr(39))}`"
