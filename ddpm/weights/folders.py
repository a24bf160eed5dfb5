"""Folders of weights.

diffusers folders are read and written directly, as JSON and safetensors. Run folders are read, too.
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
MOST_JSON = 10_000_000  # bytes; leaves room for the names of all classes
CLASSES = "classes.json"  # number -> name; diffusers has no such file
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass(frozen=True)
class Pretrained:
    """A network's weights on disk.

    Attributes:
        option: The option that named them, as typed ("init_from=DIR"), for messages.
        model: The network's class and arguments, as in conf/model/.
        file: The file of weights.
        scheduler: The scheduler's settings file in a diffusers folder; None for a run folder.
    """

    option: str
    model: dict[str, Any]
    file: Path
    scheduler: Path | None

    def digest(self) -> str:
        """Returns a short hexadecimal digest of the file's bytes."""
        return sha256(self.file)[:16]

    def weights(self) -> dict[str, Tensor]:
        """Reads the weights; accepts the names and shapes that attention had in old versions.

        Returns:
            float32 tensors by UNet's parameter names, on the CPU.

        Raises:
            ValueError: If the file holds anything but tensors.
        """
        found = read_tensors(self.option, self.file)
        return dict(_renamed(name, tensor) for name, tensor in found.items())

    def network(self) -> nn.Module:
        """Builds the network of a diffusers folder on the CPU, without loading its weights."""
        return UNet(**{key: value for key, value in self.model.items() if key != "_target_"})

    def weights_for(self, network: nn.Module, model: Mapping[str, Any]) -> dict[str, Tensor]:
        """Returns the weights, checked against a network.

        Args:
            network: The network, on any device.
            model: Its class and arguments, as in conf/model/.

        Raises:
            ValueError: If they do not fit; the message has the first name, shape or setting that
                differs.
        """
        weights, wanted = self.weights(), network.state_dict()
        whose = f"the network of {'its config.json' if model is self.model else 'model.*'}"
        for name, tensor in wanted.items():
            if name not in weights:
                classes = (
                    "; training.conditional=false trains without classes"
                    if name.startswith("class_embedding.") and model is not self.model
                    else ""
                )
                raise ValueError(f"{self.option} has no {name}, but {whose} does{classes}")
            if weights[name].shape != tensor.shape:
                raise ValueError(
                    f"{self.option} has {name} of shape {tuple(weights[name].shape)}, but {whose} "
                    f"needs {tuple(tensor.shape)}"
                )
        for name in weights:
            if name not in wanted:
                raise ValueError(f"{self.option} has {name}, but {whose} does not")
        if self.model["_target_"] == model["_target_"] == UNET:
            theirs, ours = unseen(self.model), unseen(model)
            for key in ours:
                if theirs[key] != ours[key]:
                    raise ValueError(
                        f"{self.option} was made with {key}={theirs[key]}, but "
                        f"model.{key}={ours[key]}"
                    )
        return weights

    def classes(self) -> tuple[list[str] | None, int | None]:
        """Returns the names of the classes, and the number of the class "any".

        Without the file that ddpm.export writes, the names are numbers, and nothing tells whether
        the last one stands for "any". None for a network without classes; see Drawing.any_class.

        Raises:
            ValueError: If the file cannot be read.
        """
        count = self.model["num_classes"]
        if count is None:
            return None, None
        part = self.file.parent
        file = (part.parent if part.name == "unet" else part) / CLASSES
        with _naming(f"{self.option}: {CLASSES}"):
            written = _json(file) if file.is_file() else {}
        names = [str(written.get(str(number), number)) for number in range(count)]
        drops_labels = written.keys() == {str(number) for number in range(count - 1)}
        return (names[:-1], count - 1) if written and drops_labels else (names, None)

    def chain(self) -> Chain:
        """Returns the process that the folder's scheduler describes.

        Raises:
            ValueError: If there is none or GaussianDiffusion cannot express it, with the reason.
        """
        if self.scheduler is None:
            raise ValueError(f"{self.option} is a run folder: use run=DIR for it")
        if not self.scheduler.is_file():
            raise ValueError(
                f"{self.option} has no scheduler_config.json, so nothing says how to sample from it"
            )
        with _naming(f"{self.option}: {self.scheduler.name}"):
            return chain(_json(self.scheduler), self.model)


def find(name: str, option: str) -> Pretrained:
    """Finds the weights in a local folder or a hub repository.

    A diffusers folder gives its weights, a run folder the averaged ones of its newest checkpoint.

    Args:
        name: The folder or repository.
        option: The key that named it, for messages.

    Raises:
        ValueError: If nothing is there, or UNet cannot express the network.
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
            f"{option} is not a folder of weights: it has no unet/config.json or config.json "
            "(diffusers) and no config.yaml (run)"
        )
    files = [
        file
        for suffix in ("safetensors", "bin")
        if (file := unet / f"{WEIGHTS}.{suffix}").is_file()
    ]
    if not files:
        raise ValueError(
            f"{option} has no {WEIGHTS}.safetensors or {WEIGHTS}.bin (sharded files and variants "
            "are not supported)"
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
        folder: The folder to create.
        model: The network's class and all its arguments.
        weights: Tensors by UNet's parameter names.
        diffusion: The process that the network was trained for.
        classes: Names of the network's classes, for a file that diffusers ignores.
        card: Text of the model card, README.md.

    Raises:
        ValueError: If diffusers cannot express them, with the reason, or the folder already exists.
    """
    unet, scheduler = unet_config(model), scheduler_config(diffusion)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"to={folder} already exists; choose another name or remove it")
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
    """Returns a weight under its current name and shape; attention used 1x1 convolutions once."""
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
    """Returns the local folder of that name, or a download of the hub repository."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists() or not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name):
        raise ValueError(
            f"{option} {'is a file' if path.exists() else 'does not exist'}: give a folder or a "
            "Hugging Face hub repository (owner/name)"
        )
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    settings = [
        "model_index.json",
        CLASSES,
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
            f"{option}: no such local folder, and the download from the hub failed ({reason}); "
            "give the folder of a local copy"
        ) from error
    return found


def _part(folder: Path, name: str) -> Path:
    """Returns a pipeline part's own folder, or the top folder without one (google/ddpm-*)."""
    return folder / name if (folder / name).is_dir() else folder


def _json(file: Path) -> dict[str, Any]:
    content = json.loads(read_file(file, MOST_JSON))
    if not isinstance(content, dict):
        raise ValueError("must be a JSON object")
    return content


@contextmanager
def _naming(what: str) -> Iterator[None]:
    """Prefixes errors about a foreign file with its name, wrong types in it included."""
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
    """Refuses a model_index.json with more than a U-Net and a scheduler, or code of its own."""
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
                f"{part}={found} is not supported; the pipeline may only have a unet and a "
                "scheduler, both from diffusers"
            )
