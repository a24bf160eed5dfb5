import math
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import scipy.linalg
import torch

from ddpm.config.schema import EvaluationSettings
from ddpm.evaluate.distances import distance
from ddpm.evaluate.features import Features
from ddpm.evaluate.job import NAMES
from ddpm.evaluate.measure import OF_SAMPLES
from ddpm.evaluate.metrics import (
    Moments,
    MomentSums,
    TooFew,
    frechet_distance,
    inception_score,
    kernel_distance,
    moments,
    nearest,
    precision_recall,
)
from ddpm.evaluate.reference import Reference

pytestmark = pytest.mark.usefixtures("one_thread")


def drawn(
    count: int, dimensions: int, seed: int, scale: float = 1.0, shift: float = 0.0
) -> torch.Tensor:
    """Correlated features with variances that span three orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dimensions, dimensions, generator=generator) * torch.logspace(
        0, -1.5, dimensions
    )
    return torch.randn(count, dimensions, generator=generator) @ mixing * scale + shift


def distances(a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
    """Pairwise distances, computed from differences rather than from dot products."""
    return torch.cdist(a.double(), b.double(), compute_mode="donot_use_mm_for_euclid_dist").numpy()


def test_moments_are_the_mean_and_numpys_covariance():
    features = drawn(50, 6, seed=0, shift=3.0)
    found = moments(features)
    np.testing.assert_allclose(found.mean, features.double().numpy().mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(
        found.covariance, np.cov(features.double().numpy(), rowvar=False), rtol=1e-10, atol=1e-12
    )
    assert found.count == 50


@pytest.mark.parametrize("shift", [0.0, 3.0, 1e6])
def test_moments_of_a_stream_are_numpys_however_it_is_cut_up(shift):
    """With a mean of 1e6, plain sums of squares would lose twelve of float64's sixteen digits."""
    features = drawn(5000, 24, seed=0).double() + shift
    expected = np.cov(features.numpy(), rowvar=False)
    for sizes in ([1, 4999], [1000] * 5, [7] * 714 + [2]):
        sums = MomentSums()
        for part in features.split(sizes):
            sums.add(part)
        found = sums.moments()
        assert found.count == 5000
        np.testing.assert_allclose(found.mean, features.numpy().mean(axis=0), rtol=1e-12)
        gap = np.abs(found.covariance.numpy() - expected).max()
        assert gap <= (1e-10 if shift < 1e6 else 1e-8) * np.abs(expected).max()


def test_the_frechet_distance_is_that_of_the_matrix_square_root():
    a, b = moments(drawn(400, 48, seed=0)), moments(drawn(300, 48, seed=1, scale=1.3, shift=0.2))
    root = scipy.linalg.sqrtm(a.covariance.numpy() @ b.covariance.numpy())
    expected = float((a.mean - b.mean).square().sum()) + np.trace(
        a.covariance.numpy() + b.covariance.numpy() - 2 * root.real
    )
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-6)


def test_the_frechet_distance_is_that_of_torchmetrics():
    # if torch-fidelity is installed, this import also needs torchvision
    theirs = pytest.importorskip("torchmetrics.image.fid", exc_type=ImportError)
    a, b = moments(drawn(400, 48, seed=0)), moments(drawn(300, 48, seed=1, scale=1.3, shift=0.2))
    assert frechet_distance(a, b) == pytest.approx(
        float(theirs._compute_fid(*a[:2], *b[:2])), rel=1e-6
    )


def test_the_frechet_distance_of_diagonal_covariances_has_a_closed_form():
    generator = torch.Generator().manual_seed(0)
    a, b = (
        Moments(
            torch.randn(5, generator=generator).double(),
            torch.rand(5, generator=generator).double().diag(),
            9,
        )
        for _ in range(2)
    )
    expected = (a.mean - b.mean).square().sum() + (
        a.covariance.diag().sqrt() - b.covariance.diag().sqrt()
    ).square().sum()
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-12)


def test_the_frechet_distance_stays_accurate_with_fewer_images_than_features():
    """With fewer images than features, the trace of sqrt(S_a S_b) comes from a small matrix.

    It is the sum of the singular values of one set's centered features times the other's.
    """
    a, b = drawn(20, 100, seed=0).double(), drawn(30, 100, seed=1).double()
    centred = [(x - x.mean(dim=0)) / (len(x) - 1) ** 0.5 for x in (a, b)]
    trace = torch.linalg.svdvals(centred[0] @ centred[1].T).sum()
    expected = (
        (a.mean(dim=0) - b.mean(dim=0)).square().sum()
        + sum(x.square().sum() for x in centred)
        - 2 * trace
    )
    assert frechet_distance(moments(a), moments(b)) == pytest.approx(float(expected), rel=1e-9)
    assert frechet_distance(moments(a), moments(a)) == pytest.approx(0, abs=1e-9)


def test_the_kernel_distance_of_whole_sets_is_the_direct_double_sum():
    a, b = drawn(7, 4, seed=0).double().numpy(), drawn(7, 4, seed=1, shift=0.5).double().numpy()

    def kernel(x, y):
        return (x @ y / 4 + 1) ** 3

    within = sum(
        kernel(s[i], s[j]) for s in (a, b) for i in range(7) for j in range(7) if i != j
    ) / (7 * 6)
    between = sum(kernel(x, y) for x in a for y in b) / 49
    assert kernel_distance(a, b, seed=0) == (pytest.approx(within - 2 * between, rel=1e-10), 0)


def test_the_kernel_distance_over_subsets_scatters_about_that_of_the_whole():
    a, b = drawn(400, 8, seed=0), drawn(400, 8, seed=0, scale=1.2)
    whole, _ = kernel_distance(a, b, seed=0)
    mean, deviation = kernel_distance(a, b, seed=0, num_subsets=200, subset_size=50)
    assert deviation > 0
    assert mean == pytest.approx(whole, abs=4 * deviation / 200**0.5)
    assert (mean, deviation) == kernel_distance(a, b, seed=0, num_subsets=200, subset_size=50)
    assert mean != kernel_distance(a, b, seed=1, num_subsets=200, subset_size=50)[0]


def test_the_kernel_distance_of_sets_of_one_distribution_is_zero_on_average():
    """Unbiased: over many pairs of small sets, the mean is 0 within four standard errors."""
    features = drawn(4000, 4, seed=0).split(20)
    found = np.array(
        [
            kernel_distance(a, b, seed=0)[0]
            for a, b in zip(features[::2], features[1::2], strict=True)
        ]
    )
    assert abs(found.mean()) < 4 * found.std() / len(found) ** 0.5


def test_subsets_are_no_larger_than_the_smaller_set():
    mean, deviation = kernel_distance(
        drawn(30, 4, seed=0), drawn(5, 4, seed=1), seed=0, num_subsets=10
    )
    assert np.isfinite(mean)
    # each subset takes all of the smaller set, but other samples of the larger one
    assert deviation > 0


def test_the_inception_score_is_its_definition():
    p = (
        torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
        .mul(2)
        .softmax(dim=1)
        .numpy()
        .astype(np.float64)
    )
    expected = np.exp(np.mean(np.sum(p * (np.log(p) - np.log(p.mean(axis=0))), axis=1)))
    assert inception_score(p, num_splits=1) == (pytest.approx(expected, rel=1e-9), 0)


def test_the_inception_score_goes_from_one_to_the_number_of_classes():
    certain = torch.eye(8).repeat(5, 1)  # one-hot predictions, each class equally often
    assert inception_score(certain, num_splits=1)[0] == pytest.approx(8)
    assert inception_score(torch.full((40, 8), 1 / 8)) == (pytest.approx(1), pytest.approx(0))


@pytest.mark.parametrize("labels", [torch.arange(2000) // 200, torch.arange(2000) % 10])
def test_images_in_the_order_of_their_classes_score_as_any_other(labels):
    mean, deviation = inception_score(torch.eye(10)[labels])
    assert 9 < mean < 10
    assert 0 < deviation < 0.5


@pytest.mark.parametrize(
    ("real", "generated", "neighbours"), [(40, 30, 3), (40, 30, 1), (4200, 4100, 3)]
)
def test_precision_and_recall_are_those_of_brute_force_neighbours(real, generated, neighbours):
    a, b = drawn(real, 3, seed=0), drawn(generated, 3, seed=0, scale=1.5, shift=0.3)
    between = distances(a, b)
    # index 0 is the image itself
    radii_a, radii_b = (np.sort(distances(x, x), axis=1)[:, neighbours] for x in (a, b))
    expected = (
        (between <= radii_a[:, None]).any(axis=0).mean(),
        (between <= radii_b).any(axis=1).mean(),
    )
    assert 0 < expected[0] < 1 or real > 1000
    assert precision_recall(a, b, neighbours) == (
        pytest.approx(expected[0], abs=1e-12),
        pytest.approx(expected[1], abs=1e-12),
    )


def test_precision_and_recall_tell_missing_modes_from_bad_images():
    modes = torch.cat([drawn(50, 4, seed=0), drawn(50, 4, seed=1, shift=100)])
    # every image is good, but half of the real ones are missed
    assert precision_recall(modes, modes[:50]) == (
        1,
        0.5,
    )
    assert precision_recall(modes[:50], modes) == (0.5, 1)
    assert precision_recall(modes, modes + 1000) == (0, 0)


@pytest.mark.parametrize("count", range(1, 9))
def test_of_few_pictures_each_distance_is_had_or_says_how_many_it_needs(count):
    random = torch.Generator().manual_seed(0)
    drawn = Features(torch.randn(8, 6, generator=random), None)
    features = torch.randn(count, 6, generator=random)
    reference = Reference(moments(features) if count > 1 else None, features)
    extractor = SimpleNamespace(name="x", distance_name="fd_x", kernel_name="kd_x")
    protocol = {"num_reference": None}
    for metric, least in (("fd", 2), ("kd", 2), ("precision_recall", 4)):
        if count < least:
            with pytest.raises(TooFew, match=f"at least {least} images, got {count}"):
                distance(metric, drawn, reference, extractor, protocol, 0)
        else:
            for one in distance(metric, drawn, reference, extractor, protocol, 0):
                assert math.isfinite(one.value)
                assert (one.floor is not None) == (count >= 2 * least)


@pytest.mark.parametrize(("queries", "references"), [(20, 30), (4100, 4200)])
def test_nearest_is_the_least_of_all_distances(queries, references):
    a, b = drawn(queries, 3, seed=0), drawn(references, 3, seed=1)
    expected = distances(a, b)
    distance, index = nearest(a, b)
    np.testing.assert_array_equal(index, expected.argmin(axis=1))
    np.testing.assert_allclose(distance, expected.min(axis=1), rtol=1e-9)


@pytest.mark.parametrize("count", [30, 4200])
def test_nearest_to_others_leaves_each_image_itself_out(count):
    a = drawn(count, 3, seed=0)
    expected = distances(a, a) + np.diag(np.full(count, np.inf))
    distance, index = nearest(a, a, exclude_self=True)
    np.testing.assert_array_equal(index, expected.argmin(axis=1))
    np.testing.assert_allclose(distance, expected.min(axis=1), rtol=1e-9)
    assert nearest(a, a)[0].abs().max() == 0


def test_nearest_reads_pixels_and_finds_a_copy_at_distance_zero():
    pixels = np.random.default_rng(0).integers(0, 256, (50, 300), dtype=np.uint8)
    distance, index = nearest(pixels[[7, 3]], pixels)
    assert distance.tolist() == [0, 0]
    assert index.tolist() == [7, 3]
    changed = pixels[[7]].astype(np.int64)
    changed[0, :2] += [3, -4]
    assert nearest(changed, pixels)[0].item() == 5


@pytest.mark.parametrize("value", [0.0, 0.1, 1e4])
def test_identical_images_have_finite_figures(value):
    same = torch.full((20, 5), value)
    other = drawn(20, 5, seed=0)
    assert frechet_distance(moments(same), moments(same)) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(moments(same), moments(other)) > 0
    assert kernel_distance(same, same, seed=0)[0] == pytest.approx(0, abs=1e-9 * (1 + value) ** 6)
    assert np.isfinite(kernel_distance(same, other, seed=0)).all()
    assert precision_recall(same, same) == (1, 1)
    assert precision_recall(same, other + value + 1000) == (0, 0)
    assert nearest(same, same, exclude_self=True)[0].abs().max() == 0


def test_arrays_and_tensors_of_any_float_give_the_same_figures():
    a, b = drawn(30, 4, seed=0), drawn(30, 4, seed=1)
    kinds = [(a, b), (a.double(), b.numpy()), (a.clone().requires_grad_(), b)]
    found = [
        (frechet_distance(moments(x), moments(y)), kernel_distance(x, y, 0), precision_recall(x, y))
        for x, y in kinds
    ]
    assert found[0] == found[1] == found[2]


def test_fewer_images_than_are_needed_are_refused_with_the_number():
    one, three = drawn(1, 4, seed=0), drawn(3, 4, seed=1)
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        moments(one)
    with pytest.raises(ValueError, match="kernel distance needs at least 2 images, got 1"):
        kernel_distance(three, one, seed=0)
    with pytest.raises(ValueError, match="at least 4 images, got 3"):
        precision_recall(drawn(9, 4, seed=0), three)
    with pytest.raises(ValueError, match="num_splits=10 needs at least 10 images, got 3"):
        inception_score(three.softmax(dim=1))
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        inception_score(one.softmax(dim=1), num_splits=1)
    with pytest.raises(ValueError, match="at least 1 image, got 0"):
        nearest(three, three[:0])
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        nearest(one, one, exclude_self=True)


def test_features_that_make_no_sense_are_refused():
    a = drawn(5, 4, seed=0)
    broken = a.clone()
    broken[2, 1] = torch.nan
    for call in (
        lambda: moments(broken),
        lambda: kernel_distance(a, broken, 0),
        lambda: precision_recall(broken, a),
        lambda: nearest(a, broken),
    ):
        with pytest.raises(ValueError, match="finite"):
            call()
    for call in (
        lambda: frechet_distance(moments(a), moments(a[:, :3])),
        lambda: kernel_distance(a, a[:, :3], 0),
        lambda: precision_recall(a, a[:, :3]),
        lambda: nearest(a, a[:, :3]),
    ):
        with pytest.raises(ValueError, match="one length, got 4 and 3"):
            call()
    with pytest.raises(ValueError, match="sum to 1"):
        inception_score(a, num_splits=1)
    with pytest.raises(ValueError, match=r"\(N, D\), got \(5,\)"):
        moments(a[:, 0])
    with pytest.raises(ValueError, match="same images on both sides"):
        nearest(a, a[:4], exclude_self=True)


def test_every_metric_that_can_be_chosen_is_measured_and_found_again():
    (of_list,) = get_args(EvaluationSettings.model_fields["metrics"].annotation)
    chosen = set(get_args(of_list))
    assert chosen == set(OF_SAMPLES) | {"losses", "bits_per_dim"} == set(NAMES)
