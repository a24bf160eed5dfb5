"""A classifier of scikit-learn's digits: features of an image, and class probabilities."""

import functools
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC
from torch import Tensor

SIZE = 16  # height and width of the classifier's input, in pixels
CLASSES = [str(digit) for digit in range(10)]


class Classifier(NamedTuple):
    """A support vector machine with calibrated probabilities, and its output on real digits.

    Attributes:
        calibrated: The calibrated classifier, trained on three quarters of the digits.
        machine: The support vector machine inside it.
        of_real: (N, 10) probabilities for the other quarter.
    """

    calibrated: CalibratedClassifierCV
    machine: SVC
    of_real: np.ndarray


@functools.cache
def classifier() -> Classifier:
    """Trains the classifier, which takes a second or two and always gives the same result."""
    data = load_digits()
    levels = np.rint(data.images * (255 / 16)).astype(np.uint8)
    rows = _seen(levels)
    train, held_out, labels, _ = train_test_split(
        rows, data.target, random_state=0, stratify=data.target
    )
    calibrated = CalibratedClassifierCV(SVC(), ensemble=False).fit(train, labels)
    machine = calibrated.calibrated_classifiers_[0].estimator
    return Classifier(calibrated, machine, calibrated.predict_proba(held_out))


def network(images: Tensor) -> tuple[Tensor, Tensor]:
    """Computes the classifier's features and probabilities.

    Args:
        images: (B, C, H, W) levels from 0 to 255, white on black; channels are averaged.

    Returns:
        The machine's ten decision values, (B, 10), and the probabilities of the digits, (B, 10).
    """
    calibrated, machine, _ = classifier()
    rows = _seen(images.float().mean(dim=1).cpu().numpy())
    features, probabilities = machine.decision_function(rows), calibrated.predict_proba(rows)
    return torch.from_numpy(features), torch.from_numpy(probabilities)


def _seen(levels: np.ndarray) -> np.ndarray:
    """(N, H, W) levels of 0 to 255 -> (N, SIZE * SIZE) in [0, 1], as data=digits has them."""
    if levels.shape[1:] != (SIZE, SIZE):
        images = [Image.fromarray(np.rint(one).astype(np.uint8)) for one in levels]
        size, filter = (SIZE, SIZE), Image.Resampling.BICUBIC
        levels = np.stack([np.asarray(image.resize(size, filter)) for image in images])
    return levels.reshape(len(levels), -1) / 255
