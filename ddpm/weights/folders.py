"""Folders of weights.

Those of diffusers are written and read as the JSON and safetensors that they are. Run folders are
another place to start from.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ddpm.diffusion.process import GaussianDiffusion
from ddpm.models.unet import UNet
from ddpm.runs import checkpoint
from ddpm.runs.contents import read_settings
from ddpm.system.bounded import read_file
from ddpm.system.files import sha256, whole
from ddpm.weights.scheduler_settings import Chain, chain, scheduler_config
from ddpm.weights.tensors import read_tensors
from ddpm.weights.unet_settings import UNET, VERSION, unet_config, unet_model, unseen

WEIGHTS = "diffusion_pytorch_model"
MOST_JSON = 10_000_000  # bytes: the names of all classes that there may be
CLASSES = "classes.json"  # ours: number -> name
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass(frozen=True)
class Pretrained:
    """A network's weights on the disk.

    Attributes:
        option: What named them, as typed ("init_from=DIR"), for messages.
        model: The class and its arguments, as in conf/model/.
        file: The weights.
        scheduler: The file of a diffusers folder's scheduler, None in a run folder.
    """

    option: str
    model: dict[str, Any]
    file: Path
    scheduler: Path | None

    def digest(self) -> str:
        """Returns a short hexadecimal digest of the file's bytes."""
        return sha256(self.file)[:16]

    def weights(self) -> dict[str, Tensor]:
        """Reads the weights, whatever names and shapes attention once had.

        Returns:
            float32 tensors by UNet's names, on the CPU.

        Raises:
            ValueError: If the file holds anything but tensors.
        """
        found = read_tensors(self.option, self.file)
        return dict(_renamed(name, tensor) for name, tensor in found.items())

    def network(self) -> nn.Module:
        """Builds the network of a diffusers folder, with first weights of its own, on the CPU."""
        return UNet(**{key: value for key, value in self.model.items() if key != "_target_"})

    def weights_for(self, network: nn.Module, model: Mapping[str, Any]) -> dict[str, Tensor]:
        """Returns the weights, for a network of this class and these arguments, on any device.

        Raises:
            ValueError: If they do not fit; it says the first name, shape or setting that differs.
        """
        weights, wanted = self.weights(), network.state_dict()
        whose = f"the network of {'its config.json' if model is self.model else 'model.*'}"
        for name, tensor in wanted.items():
            if name not in weights:
                classes = (
                    "; training.conditional=false is without classes"
                    if name.startswith("class_embedding.") and model is not self.model
                    else ""
                )
                raise ValueError(f"{self.option} has no {name}, which {whose} has{classes}")
            if weights[name].shape != tensor.shape:
                raise ValueError(
                    f"{self.option} has {name} of shape {tuple(weights[name].shape)}, {whose} "
                    f"{tuple(tensor.shape)}"
                )
        for name in weights:
            if name not in wanted:
                raise ValueError(f"{self.option} has {name}, which {whose} has not")
        if self.model["_target_"] == model["_target_"] == UNET:
            theirs, ours = unseen(self.model), unseen(model)
            for key in ours:
                if theirs[key] != ours[key]:
                    raise ValueError(
                        f"{self.option} was made with {key}={theirs[key]}, but "
                        f"model.{key}={ours[key]}"
                    )
        return weights

    def class_names(self, count: int) -> list[str]:
        """The names of so many classes, as ddpm.export wrote them; else their numbers."""
        file = self.file.parent.parent / CLASSES
        names = [str(number) for number in range(count)]
        if file.is_file():
            with _naming(f"{self.option}: {CLASSES}"):
                found = _json(file)
                names = [str(found.get(name, name)) for name in names]
        return names

    def chain(self) -> Chain:
        """Returns what the folder's scheduler says.

        Raises:
            ValueError: If there is none or GaussianDiffusion cannot express it, with the reason.
        """
        if self.scheduler is None:
            raise ValueError(f"{self.option} is a run's folder: give it as run=DIR")
        if not self.scheduler.is_file():
            raise ValueError(
                f"{self.option} has no scheduler_config.json, so nothing says how to sample from it"
            )
        with _naming(f"{self.option}: {self.scheduler.name}"):
            return chain(_json(self.scheduler), self.model)


def find(name: str, option: str) -> Pretrained:
    """Finds the weights in a folder, or in the hub repository of that name.

    It may be a diffusers folder, or a run folder: the average of its newest checkpoint.

    Args:
        name: Of the folder or repository.
        option: The key that named it.

    Raises:
        ValueError: If there is nothing, or what is there is no network that UNet can be.
    """
    option = f"{option}={name}"
    folder = _folder(name, option)
    if (folder / "config.yaml").is_file():
        with _naming(f"{option}: config.yaml"):
            model = dict(read_settings(folder)["model"])
            _ = model["_target_"]
        with _naming(option):
            return Pretrained(
                option,
                model,
                checkpoint.find(folder / "checkpoints").folder / "ema.safetensors",
                None,
            )
    if (folder / "model_index.json").is_file():
        with _naming(f"{option}: model_index.json"):
            _check_pipeline(_json(folder / "model_index.json"))
    unet = _part(folder, "unet")
    if not (unet / "config.json").is_file():
        raise ValueError(
            f"{option} is no folder of weights: it has no unet/config.json or config.json "
            "(diffusers), nor config.yaml (a run)"
        )
    files = [
        file
        for suffix in ("safetensors", "bin")
        if (file := unet / f"{WEIGHTS}.{suffix}").is_file()
    ]
    if not files:
        raise ValueError(
            f"{option} has no {WEIGHTS}.safetensors or {WEIGHTS}.bin (in one piece, and no other "
            "variant)"
        )
    with _naming(f"{option}: config.json"), torch.device("meta"):
        found = Pretrained(
            option,
            unet_model(_json(unet / "config.json")),
            files[0],
            _part(folder, "scheduler") / "scheduler_config.json",
        )
        found.network()
    return found


def write(
    folder: Path,
    model: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    diffusion: GaussianDiffusion,
    classes: Sequence[str] | None = None,
    card: str | None = None,
) -> None:
    """Writes a folder that diffusers.DDPMPipeline.from_pretrained loads, whole or not at all.

    Args:
        folder: Where to write it.
        model: The network's class and arguments, all that it was built with.
        weights: By UNet's names.
        diffusion: The process that the network was trained for.
        classes: Names of the network's classes, which go into a file beside what diffusers reads.
        card: The model card, README.md.

    Raises:
        ValueError: If diffusers cannot express them, with the reason, or the folder is there
            already.
    """
    unet, scheduler = unet_config(model), scheduler_config(diffusion)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"to={folder} is already there; give another name, or remove it")
    parts = {"scheduler": ["diffusers", "DDPMScheduler"], "unet": ["diffusers", "UNet2DModel"]}
    folder.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    with whole(folder) as scratch:
        for part, file, content in (
            (
                ".",
                "model_index.json",
                {"_class_name": "DDPMPipeline", "_diffusers_version": VERSION, **parts},
            ),
            ("unet", "config.json", unet),
            ("scheduler", "scheduler_config.json", scheduler),
            (".", CLASSES, None if classes is None else dict(enumerate(classes))),
        ):
            if content is None:
                continue
            (scratch / part).mkdir(parents=True, exist_ok=True)
            (scratch / part / file).write_text(
                json.dumps(content, indent=2) + "\n", encoding="utf-8"
            )
        if card is not None:
            (scratch / "README.md").write_text(card, encoding="utf-8")
        save_file(tensors, scratch / "unet" / f"{WEIGHTS}.safetensors", metadata={"format": "pt"})


def _renamed(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    """A weight's name and shape today: attention's were 1x1 convolutions once."""
    parts = re.fullmatch(
        r"(.*attentions\.\d+\.)(query|key|value|proj_attn|to_q|to_k|to_v|to_out\.0)\.(weight|bias)",
        name,
    )
    if parts is None:
        return name, tensor
    return f"{parts[1]}{OLD_ATTENTION.get(parts[2], parts[2])}.{parts[3]}", tensor.flatten(
        1
    ) if tensor.ndim == 4 and tensor.shape[2:] == (1, 1) else tensor


def _folder(name: str, option: str) -> Path:
    """The local folder of that name, or the hub's repository, downloaded."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists() or not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name):
        raise ValueError(
            f"{option} is {'a file' if path.exists() else 'not here'}: give a folder, or a "
            "repository of the Hugging Face hub (owner/name)"
        )
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    settings = [
        "model_index.json",
        "config.json",
        "scheduler_config.json",
        "unet/config.json",
        "scheduler/scheduler_config.json",
    ]
    try:
        for suffix in ("safetensors", "bin"):
            weights = [f"{part}{WEIGHTS}.{suffix}" for part in ("", "unet/")]
            found = Path(
                huggingface_hub.snapshot_download(name, allow_patterns=[*settings, *weights])
            )
            if any((found / file).is_file() for file in weights):
                break
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{option}: no such folder here, and the hub does not give it ({reason}); give a local "
            "copy's folder"
        ) from error
    return found


def _part(folder: Path, name: str) -> Path:
    """Where a part of a pipeline lies: in its own folder, or beside all else (google/ddpm-*)."""
    return folder / name if (folder / name).is_dir() else folder


def _json(file: Path) -> dict[str, Any]:
    content = json.loads(read_file(file, MOST_JSON))
    if not isinstance(content, dict):
        raise ValueError("is not a table of settings")
    return content


@contextmanager
def _naming(what: str) -> Iterator[None]:
    """Has complaints about a file that others wrote name it, those about its values' types too."""
    try:
        yield
    except (
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RuntimeError,
        OSError,
    ) as error:
        raise ValueError(
            f"{what}: {error}"
            if isinstance(error, ValueError)
            else f"{what} is not as expected: {type(error).__name__} {error}"
        ) from error


def _check_pipeline(index: dict[str, Any]) -> None:
    """Checks a model_index.json.

    Raises:
        ValueError: If it has more in it than a U-Net and a scheduler, or code of its own.
    """
    if index.get("_class_name") not in ("DDPMPipeline", "DDIMPipeline"):
        raise ValueError(
            f"_class_name={index.get('_class_name')} must be DDPMPipeline or DDIMPipeline"
        )
    for part, found in index.items():
        if not part.startswith("_") and (
            part not in ("unet", "scheduler")
            or not isinstance(found, list)
            or found[0] != "diffusers"
        ):
            raise ValueError(
                f"{part}={found} is not one of diffusers' own parts of such a pipeline, which are "
                "unet and scheduler"
            )
