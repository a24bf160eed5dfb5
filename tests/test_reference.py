"""Reference statistics: published files are read in a stream or refused in one line.

A bad path for the project's own statistics is refused, too.
"""

import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm.evaluate import __main__ as evaluate
from ddpm.evaluate import distances, reference
from ddpm.evaluate.features import Extractor, Features
from ddpm.runs.results import Measurement

pytestmark = pytest.mark.usefixtures("one_thread")
ALL = ["fd", "kd", "precision_recall"]


def pixels(count: int, size: int = 4) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def extractor(calls: list[int] | None = None) -> Extractor:
    """An extractor with three features: the mean of each channel."""

    def network(images):
        if calls is not None:
            calls.append(len(images))
        return images.float().mean(dim=(2, 3)), None

    return Extractor("efficientnet_lite0", "fd_x", "kd_x", network, torch.device("cpu"), 5)


def seen(pictures: np.ndarray) -> np.ndarray:
    return pictures.astype(np.float32).mean(axis=(1, 2))


def write(path, **arrays):
    np.savez(path, **arrays)
    return path


def normal(length: int, seed: int = 0) -> dict[str, np.ndarray]:
    rows = np.random.default_rng(seed).normal(size=(2 * length, length))
    return {"mu": rows.mean(axis=0), "sigma": np.cov(rows, rowvar=False)}


def test_pictures_are_read_in_a_stream_and_give_numpys_moments_and_evenly_spaced_features(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(reference, "KEPT", 7)
    monkeypatch.setattr(reference, "AT_ONCE", 10 * 48)  # bytes: ten pictures per block
    pictures, calls = pixels(43), []
    file = reference.open_file(
        write(tmp_path / "a.npz", arr_0=pictures, arr_1=np.arange(43)), "inception", ALL
    )
    assert file.pictures == pictures.shape
    assert [len(block) for block in file.blocks()] == [10, 10, 10, 10, 3]
    for _ in range(2):  # the second time from the cache
        found = file.reference(extractor(calls), tmp_path / "cache", ALL)
        rows = seen(pictures)
        np.testing.assert_allclose(found.moments.mean, rows.mean(axis=0), rtol=1e-6)
        np.testing.assert_allclose(
            found.moments.covariance, np.cov(rows.astype(np.float64), rowvar=False), rtol=1e-6
        )
        np.testing.assert_allclose(found.features, rows[[0, 6, 12, 18, 24, 30, 36]], rtol=1e-6)
    assert sum(calls) == 43


def test_with_both_the_distance_is_to_the_statistics_and_the_rest_to_the_pictures(tmp_path):
    """guided-diffusion's files hold statistics of a whole set and 10,000 of its pictures."""
    statistics = normal(1280)
    path = write(tmp_path / "virtual.npz", arr_0=pixels(9), mu_s=np.zeros(3), **statistics)
    file = reference.open_file(path, "efficientnet_lite0", ALL)
    calls: list[int] = []
    alone = file.reference(extractor(calls), tmp_path, ["fd"])
    assert (alone.features, calls) == (None, [])
    both = file.reference(extractor(calls), tmp_path, ALL)
    for found in (alone, both):
        np.testing.assert_array_equal(found.moments.covariance, statistics["sigma"])
    np.testing.assert_allclose(both.features, seen(pixels(9)), rtol=1e-6)


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_statistics_in_either_precision_give_the_distance_of_their_normals(tmp_path, kind):
    """Mean m and variances s differ from a standard normal by |m|^2 + sum (sqrt(s) - 1)^2."""
    path = write(tmp_path / "s.npz", mu=np.zeros(1280, kind), sigma=np.eye(1280, dtype=kind))
    against = reference.open_file(path, "efficientnet_lite0", ["fd"]).reference(
        extractor(), tmp_path, ["fd"]
    )
    rows = torch.zeros(3, 1280)
    rows[:, 0] = torch.tensor([3.0, 5.0, 7.0])  # mean 5, variance 4; elsewhere 0 and 0
    (figure,) = distances.distance("fd", Features(rows, None), against, extractor(), {}, 0)
    assert figure.value == pytest.approx(5**2 + (2 - 1) ** 2 + 1279, rel=1e-9)
    assert figure.floor is None


BAD = {
    "nothing of the kind": ({"feats": np.zeros((3, 4))}, "has feats; it should have mu and sigma"),
    "one alone": ({"mu": np.zeros(3)}, "it should have mu and sigma"),
    "one beside pictures": ({"mu": np.zeros(3), "arr_0": pixels(3)}, "only one of mu and sigma"),
    "shapes": ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"sigma \(4, 4\) .*should be \(D,\)"),
    "whole numbers": ({"mu": np.zeros(3, int), "sigma": np.eye(3)}, "both of floating point"),
    "objects": ({"mu": np.array([{}]), "sigma": np.eye(1)}, r"has mu \(1,\) of object"),
    "floats": ({"arr_0": pixels(3) / 255}, r"of float64; pictures should be \(N, H, W, 1 or 3\)"),
    "channels first": ({"arr_0": pixels(3).transpose(0, 3, 1, 2).copy()}, r"\(3, 3, 4, 4\) of uint8"),
    "another network's": (normal(2048), "of 2048 features, but .*=efficientnet_lite0 has 1280: give evaluation.extractor=inception"),
    "no such network": (normal(64), "of 64 features, but .* has 1280$"),
    "not a number": ({**normal(1280), "mu": np.full(1280, np.nan)}, "infinite or NaN"),
    "not symmetric": ({**normal(1280), "sigma": np.triu(np.ones((1280, 1280)))}, "not symmetric"),
}  # fmt: skip


@pytest.mark.parametrize("which", BAD)
def test_a_file_of_another_kind_is_refused_in_one_line(tmp_path, which):
    arrays, said = BAD[which]
    path = write(tmp_path / "x.npz", **arrays)
    with pytest.raises(ValueError, match=said) as refused:
        reference.open_file(path, "efficientnet_lite0", ["fd"])
    assert str(refused.value).startswith(f"evaluation.reference={path} ")
    assert "\n" not in str(refused.value)


def test_what_is_no_npz_is_refused_and_nothing_of_it_is_run(tmp_path):
    class Runs:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (tmp_path / "edm2.pkl").write_bytes(pickle.dumps({"fid": Runs()}))
    (tmp_path / "renamed.npz").write_bytes(pickle.dumps({"fid": Runs()}))
    (tmp_path / "page.npz").write_text("<html>")
    np.save(tmp_path / "one.npy", np.zeros(3))
    for name, said in (
        ("edm2.pkl", "is a pickle, which can run any code .*numpy.savez"),
        ("renamed.npz", "is a pickle"),
        ("page.npz", "cannot be read as .npz"),
        ("one.npy", "is a .npy, one array: give an .npz"),
        ("https://x.org/a.npz", "is not a file: download it first"),
    ):
        path = Path(name) if ":" in name else tmp_path / name
        with pytest.raises(ValueError, match=said) as refused:
            reference.open_file(path, "inception", ["fd"])
        assert "\n" not in str(refused.value)
    assert not (tmp_path / "ran").exists()


def test_a_damaged_file_is_named(tmp_path):
    path = write(tmp_path / "a.npz", arr_0=pixels(400))
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    file = reference.open_file(path, "inception", ["kd"])
    with pytest.raises(ValueError, match=r"a.npz is damaged \(.*CRC"):
        file.reference(extractor(), tmp_path, ["kd"])
    with (
        zipfile.ZipFile(tmp_path / "short.npz", "w") as archive,
        archive.open("arr_0.npy", "w") as f,
    ):
        np.lib.format.write_array_header_1_0(
            f, {"descr": "|u1", "fortran_order": False, "shape": (9, 4, 4, 3)}
        )
    short = reference.open_file(tmp_path / "short.npz", "inception", ["kd"])
    with pytest.raises(ValueError, match=r"short.npz is damaged"):
        list(short.blocks())


def test_statistics_alone_allow_the_frechet_distance_alone(tmp_path):
    path = write(tmp_path / "s.npz", **normal(1280))
    with pytest.raises(
        ValueError,
        match=r"kd and precision_recall would need pictures \(arr_0\): give evaluation.metrics=\[fd,colour\]",
    ):
        reference.open_file(path, "efficientnet_lite0", [*ALL, "colour"])


def test_the_files_digest_is_in_the_figures_name():
    protocol = {"count": 50_000, "reference": "1a2b3c4d" * 8, "extractor": "inception"}
    one = Measurement("fid", 2.9, {**protocol, "sampler": "ddim50", "weights": "ema", "step": 5})
    assert one.id == "fid@50k:reference-1a2b3c4d:inception:ddim50:ema:step5"


def test_a_reference_that_does_not_fit_the_network_is_refused(run_folder, refusal, tmp_path):
    words = [f"run={run_folder}", "evaluation.metrics=[kd]", "device=cpu"]
    wrong = write(tmp_path / "b.npz", arr_0=pixels(5, size=32))
    said = refusal(evaluate.main, *words, f"evaluation.reference={wrong}")
    assert "has pictures of 32x32 pixels, but this network draws" in said
    assert "nowhere.npz is not a file" in refusal(
        evaluate.main, *words, "evaluation.reference=nowhere.npz"
    )
    assert "already exists" in refusal(evaluate.main, *words, f"reference_to={wrong}")
    assert "does not end with .npz" in refusal(evaluate.main, *words, "reference_to=stats")
