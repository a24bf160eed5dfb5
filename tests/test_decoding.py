import io
import shutil

import numpy as np
import pytest
from PIL import Image

from ddpm.data import sources
from ddpm.data.decoding import Decoding
from ddpm.data.image_set import image_set

# the size of the generated pictures, so nothing is resized
COLOUR = Decoding(10, 12, 3, "center", "white")


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def decode(folder, cache, decoding=COLOUR, workers=1, max_unreadable=0.1):
    return image_set(sources.folder(str(folder)), decoding, cache, workers, max_unreadable)


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_colour_pixels_stay_as_they_are_channels_first():
    image = pixels(10, 12, 3)
    assert np.array_equal(COLOUR(encoded(Image.fromarray(image))), image.transpose(2, 0, 1))


def test_grey_becomes_three_equal_channels_and_colour_its_luma():
    grey = pixels(10, 12)
    assert np.array_equal(COLOUR(encoded(Image.fromarray(grey))), np.stack([grey] * 3))
    colour = pixels(10, 12, 3)
    luma = Decoding(10, 12, 1, "center", "white")(encoded(Image.fromarray(colour)))
    assert luma.shape == (1, 10, 12)
    assert np.abs(luma[0] - colour @ [0.299, 0.587, 0.114]).max() <= 1  # ITU-R 601


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_16_bits_of_grey_are_scaled_down_to_8(form):
    deep = np.linspace(0, 65535, 120).round().astype(np.uint16).reshape(10, 12)
    assert np.abs(COLOUR(encoded(Image.fromarray(deep), form))[0] - deep / 257).max() <= 0.5


@pytest.mark.parametrize(
    ("background", "colour"), [("white", (255, 255, 255)), ("#ff0080", (255, 0, 128))]
)
def test_transparent_pixels_show_the_background_through(background, colour):
    rgba = pixels(10, 12, 4)
    share = rgba[..., 3:] / 255
    expected = rgba[..., :3] * share + np.array(colour) * (1 - share)
    found = Decoding(10, 12, 3, "center", background)(encoded(Image.fromarray(rgba)))
    assert np.abs(found.transpose(1, 2, 0) - expected).max() <= 1


def test_a_palette_is_looked_up_and_its_transparent_entry_shows_the_background():
    image = Image.new("P", (12, 10), 1)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((0, 0), 0)
    for transparency, corner in ((None, [10, 20, 30]), (0, [255, 255, 255])):
        found = COLOUR(
            encoded(image, **({} if transparency is None else {"transparency": transparency}))
        )
        assert found[:, 0, 0].tolist() == corner
        assert found[:, 9, 11].tolist() == [200, 100, 50]


def test_printing_colours_become_screen_colours():
    cmyk = np.zeros((10, 12, 4), dtype=np.uint8)
    cmyk[:, :6] = (255, 0, 0, 0)  # full cyan
    cmyk[:, 6:] = (0, 0, 0, 255)  # full black
    found = COLOUR(encoded(Image.fromarray(cmyk, "CMYK"), "TIFF"))
    assert found[:, 0, 0].tolist() == [0, 255, 255]
    assert found[:, 0, 11].tolist() == [0, 0, 0]


def test_a_picture_is_turned_as_its_camera_noted():
    image = pixels(12, 10, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # the first row is the right-hand side
    found = COLOUR(encoded(Image.fromarray(image), exif=exif))
    assert np.array_equal(found.transpose(1, 2, 0), np.rot90(image, k=-1))


def test_a_crop_keeps_the_shape_and_none_the_whole_picture():
    """A 4:1 picture of four gray squares is decoded at the size of one square."""
    levels = np.repeat(np.array([0, 100, 200, 60], dtype=np.uint8), 8)
    content = encoded(Image.fromarray(np.broadcast_to(levels, (8, 32)).copy()))
    middle = Decoding(8, 8, 1, "center", "white")(content)[0, 4]
    assert middle.tolist() == [100] * 4 + [200] * 4
    whole = Decoding(8, 8, 1, "none", "white")(content)[0, 4]
    assert [whole[0], whole[7]] == pytest.approx([0, 60], abs=8)


def test_shrinking_averages_what_it_leaves_out():
    """Stripes one pixel wide turn gray, since the filter is antialiased."""
    stripes = np.tile(np.array([0, 255], dtype=np.uint8), (64, 32))
    found = Decoding(16, 16, 1, "none", "white")(encoded(Image.fromarray(stripes)))
    assert np.abs(found[0, 2:-2, 2:-2] - 127.5).max() < 20


def test_a_background_that_is_no_colour_is_refused():
    with pytest.raises(ValueError, match=r"data\.background=wihte"):
        Decoding(8, 8, 3, "center", "wihte")


def test_a_folder_becomes_one_array_with_labels(tmp_path, pictures):
    folder = pictures("set", ["cat/1.png", "cat/2.png", "dog/3.png"])
    found = decode(folder, tmp_path / "cache")
    expected = [
        np.asarray(Image.open(folder / name)).transpose(2, 0, 1)
        for name in ("cat/1.png", "cat/2.png", "dog/3.png")
    ]
    assert np.array_equal(found.images, np.stack(expected))
    assert found.labels.tolist() == [0, 0, 1]
    assert found.classes == ["cat", "dog"]
    assert found.unreadable == []


def test_a_file_that_does_not_decode_is_named_and_left_out(tmp_path, pictures):
    folder = pictures("set", ["cat/1.png", "cat/2.png", "dog/3.png", "dog/4.png"])
    whole = decode(folder, tmp_path / "cache")
    (folder / "cat/2.png").write_bytes((folder / "cat/2.png").read_bytes()[:200])
    found = decode(folder, tmp_path / "cache")
    assert found.unreadable == ["cat/2.png"]
    assert np.array_equal(found.images, whole.images[[0, 2, 3]])
    assert found.labels.tolist() == [0, 1, 1]


def test_too_many_files_that_do_not_decode_stop_the_run(tmp_path, pictures):
    folder = pictures("set", [f"{index:02d}.png" for index in range(20)])
    for index in (3, 5):
        (folder / f"{index:02d}.png").write_bytes(b"no picture")
    assert len(decode(folder, tmp_path / "cache", max_unreadable=0.1)) == 18
    with pytest.raises(ValueError, match=r"2 of 20 .*data.max_unreadable=0.05.* 03.png, 05.png"):
        decode(folder, tmp_path / "other", max_unreadable=0.05)


def test_nothing_but_unreadable_files_stops_the_run(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "1.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"1 of 1 "):
        decode(tmp_path / "set", tmp_path / "cache", max_unreadable=0.9)


def test_a_picture_of_too_many_pixels_is_left_out(tmp_path, pictures):
    """Pillow warns from 89 million pixels on, where a small file would fill the memory."""
    folder = pictures("set", ["1.png", "2.png"])
    Image.new("1", (10_000, 9_000)).save(folder / "bomb.png")
    assert decode(folder, tmp_path / "cache").unreadable == ["bomb.png"]


def test_pictures_are_decoded_once(tmp_path, pictures):
    """The same files in another folder come from the cache."""
    folder = pictures("set", ["1.png", "2.png"])
    first = decode(folder, tmp_path / "cache")
    written = (first.folder / "images.npy").stat()
    folder.rename(tmp_path / "moved")
    again = decode(tmp_path / "moved", tmp_path / "cache")
    assert again.folder == first.folder
    assert (first.folder / "images.npy").stat() == written
    assert np.array_equal(again.images, first.images)
    assert again.fingerprint == first.fingerprint


def test_another_resolution_is_decoded_anew(tmp_path, pictures):
    folder = pictures("set", ["1.png", "2.png"])
    assert decode(folder, tmp_path / "cache").images.shape == (2, 3, 10, 12)
    assert decode(folder, tmp_path / "cache", Decoding(6, 4, 1, "none", "white")).images.shape == (
        2,
        1,
        6,
        4,
    )


def test_the_fingerprint_is_of_the_content_and_not_of_the_place(tmp_path, pictures):
    folder = pictures("set", ["1.png", "2.png"])
    fingerprint = decode(folder, tmp_path / "cache").fingerprint
    copy = shutil.copytree(folder, tmp_path / "elsewhere", copy_function=shutil.copyfile)
    assert decode(copy, tmp_path / "cache").fingerprint == fingerprint
    shutil.copyfile(copy / "1.png", copy / "2.png")
    assert decode(copy, tmp_path / "cache").fingerprint != fingerprint


def test_the_fingerprint_is_of_the_labels_too(tmp_path, pictures):
    sets = {
        "a": ["x/1.png", "y/2.png", "y/3.png"],
        "b": ["x/1.png", "x/2.png", "y/3.png"],
        "c": ["x/1.png", "z/2.png", "z/3.png"],
    }
    assert (
        len(
            {
                decode(pictures(name, files), tmp_path / "cache").fingerprint
                for name, files in sets.items()
            }
        )
        == 3
    )


def test_several_workers_give_the_array_that_one_gives(tmp_path, pictures):
    folder = pictures("set", [f"{index % 2}/{index:03d}.png" for index in range(150)])
    (folder / "1" / "077.png").write_bytes(b"no picture")
    one, several = decode(folder, tmp_path / "one"), decode(folder, tmp_path / "several", workers=2)
    assert np.array_equal(one.images, several.images)
    assert np.array_equal(one.labels, several.labels)
    assert (one.fingerprint, one.unreadable) == (several.fingerprint, several.unreadable)
