"""Broken pictures and caches are left out and named, or cause one clear error.

They never yield a wrong picture silently.
"""

import io
import logging
import os
import re
import resource
import signal
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ddpm import run
from ddpm.data import sources
from ddpm.data.decoding import Decoding
from ddpm.data.image_set import image_set

# the size of the generated pictures, so nothing is resized
COLOUR = Decoding(10, 12, 3, "center", "white")


def encoded(image: Image.Image, form: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def decode(folder, cache, max_unreadable=0.9, decoding=COLOUR, workers=1):
    return image_set(sources.folder(str(folder)), decoding, cache, workers, max_unreadable)


def noise(mode: str = "RGB", seed: int = 0) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (60, 72, 3), dtype=np.uint8)
    ).convert(mode)


FORMS = {
    **{
        "png": ("PNG", {}),
        "jpg": ("JPEG", {}),
        "progressive.jpg": ("JPEG", {"progressive": True}),
        "bmp": ("BMP", {}),
        "ppm": ("PPM", {}),
    },
    **{
        "webp": ("WEBP", {}),
        "lossless.webp": ("WEBP", {"lossless": True}),
        "gif": ("GIF", {}),
        "tif": ("TIFF", {}),
        "lzw.tif": ("TIFF", {"compression": "tiff_lzw"}),
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_a_picture_cut_short_anywhere_is_left_out_and_named(tmp_path, form):
    content = encoded(noise(), FORMS[form][0], **FORMS[form][1])
    (tmp_path / "set").mkdir()
    whole = f"whole.{form}"
    (tmp_path / "set" / whole).write_bytes(content)
    cut = [
        *(int(len(content) * tenth / 10) for tenth in range(10)),
        len(content) - len(content) // 50,
    ]
    for length in cut:
        (tmp_path / "set" / f"cut{length:06d}.{form}").write_bytes(content[:length])
    found = decode(tmp_path / "set", tmp_path / "cache", max_unreadable=0.99)
    assert found.unreadable == sorted(f"cut{length:06d}.{form}" for length in cut)
    assert np.array_equal(found.images, COLOUR(content)[None])


def test_what_is_no_picture_is_left_out_and_named(tmp_path, pictures):
    folder = pictures("set", ["good.png"])
    (folder / "empty.png").touch()
    (folder / "page.jpg").write_text("<html>404</html>")
    (folder / "nowhere.png").symlink_to(tmp_path / "gone.png")
    (folder / "floats.tif").write_bytes(
        encoded(
            Image.fromarray(np.random.default_rng(0).random((10, 12)).astype(np.float32)), "TIFF"
        )
    )
    (folder / "deep.tif").write_bytes(
        encoded(Image.fromarray(np.full((10, 12), 70_000, dtype=np.int32)), "TIFF")
    )
    (folder / "below.tif").write_bytes(
        encoded(Image.fromarray(np.full((10, 12), -3, dtype=np.int32)), "TIFF")
    )
    Image.new("1", (10_000, 9_000)).save(folder / "bomb.png")
    (folder / "folder.png").mkdir()
    found = decode(folder, tmp_path / "cache")
    assert found.unreadable == sorted(
        ["below.tif", "bomb.png", "deep.tif", "empty.png", "floats.tif", "nowhere.png", "page.jpg"]
    )
    assert np.array_equal(
        found.images[0].transpose(1, 2, 0), np.asarray(Image.open(folder / "good.png"))
    )


def test_a_picture_that_vanishes_before_it_is_read_is_left_out_and_named(tmp_path, pictures):
    folder = pictures("set", ["1.png", "2.png", "3.png"])
    source = sources.folder(str(folder))
    (folder / "2.png").unlink()
    assert image_set(source, COLOUR, tmp_path / "cache", 1, 0.5).unreadable == ["2.png"]


def test_a_picture_of_one_pixel_fills_the_whole():
    found = COLOUR(encoded(Image.new("RGB", (1, 1), (10, 20, 30)), "PNG"))
    assert found.shape == (3, 10, 12)
    assert (found == np.array([10, 20, 30])[:, None, None]).all()


@pytest.mark.parametrize("shape", [(1, 50), (50, 1)])
def test_a_picture_of_one_line_fills_the_whole(shape):
    assert (
        COLOUR(encoded(Image.new("RGB", shape, (10, 20, 30)), "PNG"))
        == np.array([10, 20, 30])[:, None, None]
    ).all()


def test_a_photo_in_printing_colours_becomes_screen_colours():
    """A CMYK JPEG with inverted inks, as Photoshop writes it."""
    cmyk = np.zeros((10, 12, 4), dtype=np.uint8)
    # full cyan, then full magenta and yellow
    cmyk[:, :6], cmyk[:, 6:] = (255, 0, 0, 0), (0, 255, 255, 0)
    found = COLOUR(encoded(Image.fromarray(cmyk, "CMYK"), "JPEG", quality=95)).astype(int)
    assert np.abs(found[:, 5, 2] - [0, 255, 255]).max() <= 8
    assert np.abs(found[:, 5, 9] - [255, 0, 0]).max() <= 8


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP"])
def test_of_a_moving_picture_the_first_is_taken(form):
    first, *others = [Image.new("RGB", (12, 10), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if form == "WEBP" else {}
    assert COLOUR(
        encoded(first, form, save_all=True, append_images=others, duration=10, **options)
    )[:, 5, 5].tolist() == [255, 0, 0]


def test_class_folders_without_a_picture_are_named(tmp_path, pictures):
    folder = pictures("set", ["cat/1.png", "dog/2.png", "fox/3.png"])
    (folder / "bird").mkdir()
    (folder / "fish").mkdir()
    (folder / "fish" / "notes.txt").touch()
    (folder / "fox" / "3.png").write_bytes(b"no picture")
    found = decode(folder, tmp_path / "cache")
    assert found.classes == ["cat", "dog", "fox"]
    notes = "; ".join(found.notes)
    assert "no pictures in bird, fish" in notes
    assert "1 .txt, not pictures (fish/notes.txt)" in notes
    assert "fox/3.png (not a picture)" in notes
    assert "1 of 3 classes have no pictures: fox" in notes


def write_rows(path, labels):
    path.parent.mkdir(exist_ok=True)
    pq.write_table(
        pa.table(
            {
                "image": [
                    {"bytes": encoded(noise(seed=row), "PNG"), "path": None}
                    for row in range(len(labels))
                ],
                "label": labels,
            }
        ),
        path,
    )
    return path


@pytest.mark.parametrize(
    ("labels", "strange"), [([0, 123_456_789], "123456789"), ([0.5, 1.0], "0.5"), ([0, -7], "-7")]
)
def test_a_column_that_holds_no_classes_is_refused(tmp_path, labels, strange):
    write_rows(tmp_path / "set" / "train.parquet", labels)
    with pytest.raises(ValueError, match=f"label_column has .*{re.escape(strange)}"):
        sources.folder(str(tmp_path / "set"))


def test_a_label_that_is_none_of_the_classes_is_refused_with_its_row(tmp_path):
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    rows = pa.table(
        {
            "image": pa.array([{"bytes": encoded(noise(), "PNG"), "path": None}] * 2),
            "label": pa.array([1, 2]),
        }
    )
    datasets.Dataset(rows.cast(features.arrow_schema)).save_to_disk(str(tmp_path / "set"))
    with pytest.raises(ValueError, match="row 1 has the label 2, but the classes are cat, dog"):
        decode(tmp_path / "set", tmp_path / "cache")


def test_training_with_classes_needs_one_for_each_picture(tmp_path, tiny):
    write_rows(tmp_path / "set" / "train.parquet", [0, 1, -1, 0, 1, 0, 1, 0, None])
    found = decode(tmp_path / "set", tmp_path / "cache")
    assert found.labels.tolist() == [0, 1, -1, 0, 1, 0, 1, 0, -1]
    with pytest.raises(ValueError, match=r"training\.conditional=true .* 2 of 9 have none"):
        run(
            [
                *tiny,
                "data=folder",
                f"data.path={tmp_path / 'set'}",
                "training.conditional=true",
                "training.steps=1",
                f"outputs={tmp_path}",
            ]
        )


@pytest.mark.parametrize("damage", ["empty", "cut", "middle"])
def test_a_damaged_parquet_file_is_refused_by_its_name(tmp_path, damage):
    file = write_rows(tmp_path / "set" / "train.parquet", [0, 1, 0])
    content = file.read_bytes()
    file.write_bytes(
        {"empty": b"", "cut": content[:-20], "middle": content[:4] + bytes(60) + content[64:]}[
            damage
        ]
    )
    with pytest.raises(
        ValueError,
        match=rf"{re.escape(str(file))} is (not a complete parquet file|damaged in row group 0)",
    ) as refused:
        decode(tmp_path / "set", tmp_path / "cache")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("damage", ["arrow", "state"])
def test_a_damaged_folder_of_datasets_is_refused_by_its_path(tmp_path, damage):
    datasets.Dataset.from_dict({"image": [encoded(noise(), "PNG")] * 3}).save_to_disk(
        str(tmp_path / "set")
    )
    file = (
        next((tmp_path / "set").glob("*.arrow"))
        if damage == "arrow"
        else tmp_path / "set" / "state.json"
    )
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(
        ValueError,
        match=rf"data\.path={re.escape(str(tmp_path / 'set'))} is not a complete folder saved by datasets",
    ):
        sources.folder(str(tmp_path / "set"))


@pytest.mark.parametrize("change", ["content", "name", "more", "fewer"])
def test_files_that_changed_since_the_cache_was_made_are_decoded_anew(tmp_path, pictures, change):
    folder = pictures("set", ["1.png", "2.png"])
    before = decode(folder, tmp_path / "cache")
    if change == "content":
        Image.new("RGB", (12, 10), "red").save(folder / "2.png")
    elif change == "name":
        (folder / "2.png").rename(folder / "0.png")
    elif change == "more":
        Image.new("RGB", (12, 10), "red").save(folder / "3.png")
    else:
        (folder / "2.png").unlink()
    after = decode(folder, tmp_path / "cache")
    expected = [
        np.asarray(Image.open(file)).transpose(2, 0, 1) for file in sorted(folder.iterdir())
    ]
    assert np.array_equal(after.images, np.stack(expected))
    assert after.fingerprint != before.fingerprint


def cut(file):
    file.write_bytes(file.read_bytes()[:-100])


def flip(file):
    content = bytearray(file.read_bytes())
    content[-10] ^= 1
    file.write_bytes(bytes(content))


@pytest.mark.parametrize("name", ["images.npy", "labels.npy", "digests.npy", "about.json"])
@pytest.mark.parametrize(
    "harm",
    [cut, flip, lambda file: file.unlink(), lambda file: file.write_bytes(b"")],
    ids=["cut", "flipped", "missing", "empty"],
)
def test_a_cache_that_is_not_what_was_written_is_made_again(tmp_path, pictures, caplog, name, harm):
    folder = pictures("set", ["cat/1.png", "dog/2.png"])
    expected = decode(folder, tmp_path / "cache")
    images, labels = np.array(expected.images), expected.labels
    harm(next((tmp_path / "cache").glob(f"*/{name}")))
    with caplog.at_level(logging.WARNING):
        found = decode(folder, tmp_path / "cache")
    assert "decoding again" in caplog.text
    assert np.array_equal(found.images, images)
    assert np.array_equal(found.labels, labels)
    assert (found.fingerprint, found.classes) == (expected.fingerprint, expected.classes)


def in_child(what) -> int:
    """Runs a function in a child process. Returns its process id."""
    child = os.fork()
    if child:
        return child
    try:
        what()
        os._exit(0)
    except BaseException as error:
        print(error, flush=True)
        os._exit(1)


class Recording(Decoding):
    """A slow decoding that records each picture in a file."""

    trace = ""
    die_at = 0

    def __call__(self, content):
        with Path(self.trace).open("a") as file:
            file.write("x")
        if self.die_at and Path(self.trace).stat().st_size >= self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.01)
        return super().__call__(content)


def recording(trace, die_at=0) -> Decoding:
    decoding = Recording(10, 12, 3, "center", "white")
    Recording.trace, Recording.die_at = str(trace), die_at
    return decoding


def test_a_cache_cut_short_by_a_kill_is_started_anew_and_leaves_nothing_behind(tmp_path, pictures):
    folder = pictures("set", [f"{index}.png" for index in range(8)])
    child = in_child(
        lambda: decode(folder, tmp_path / "cache", decoding=recording(tmp_path / "trace", die_at=5))
    )
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert [path.is_dir() for path in (tmp_path / "cache").glob(".*.[0-9]*")] == [True]
    found = decode(folder, tmp_path / "cache")
    assert np.array_equal(found.images, decode(folder, tmp_path / "other").images)
    assert {path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()} == {
        "digests",
        next((tmp_path / "other").glob("*/about.json")).parent.name,
    }


def test_of_two_processes_that_want_one_cache_one_makes_it(tmp_path, pictures):
    folder = pictures("set", [f"{index}.png" for index in range(8)])
    children = [
        in_child(lambda: decode(folder, tmp_path / "cache", decoding=recording(tmp_path / "trace")))
        for _ in range(3)
    ]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]
    assert (tmp_path / "trace").read_text() == "x" * 8
    assert np.array_equal(
        decode(folder, tmp_path / "cache").images, decode(folder, tmp_path / "other").images
    )


def test_a_cache_that_finds_no_room_is_refused_by_its_key(tmp_path, pictures, capfd):
    """The error comes before decoding, since a full file system would kill the process midway."""
    folder = pictures("set", ["1.png", "2.png"])

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
        decode(folder, tmp_path / "cache")

    assert os.waitstatus_to_exitcode(os.waitpid(in_child(limited), 0)[1]) == 1
    assert (
        f"data.cache={tmp_path / 'cache'} cannot store pictures (File too large)"
        in capfd.readouterr().out
    )
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()] == ["digests"]


def test_a_cache_where_no_folder_can_be_is_refused_by_its_key(tmp_path, pictures):
    folder = pictures("set", ["1.png", "2.png"])
    (tmp_path / "cache").touch()
    with pytest.raises(ValueError, match=r"data\.cache=.* cannot store pictures"):
        decode(folder, tmp_path / "cache")
