"""Pictures are resized as the makers of published sets did.

The default still gives the pixels, folders and runs from before there was a choice.
"""

import hashlib
import io
import json

import numpy as np
import pytest
from PIL import Image, ImageOps

from ddpm.config import build
from ddpm.config.compose import compose
from ddpm.config.schema import training_config
from ddpm.data import sources
from ddpm.data.decoding import Decoding
from ddpm.data.image_set import LAYOUT, folder_of, image_set
from ddpm.data.listing import listed


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def decoded(image: np.ndarray, size: int, resize: str, crop: str = "center") -> np.ndarray:
    """Encodes an image as PNG and returns the decoded (size, size, 3) pixels."""
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG")
    found = Decoding(size, size, 3, crop, "white", resize=resize)(out.getvalue())
    return found.transpose(1, 2, 0)


def halved(image: np.ndarray) -> np.ndarray:
    """Means of 2x2 pixels: of pairs in a row, then of two such means, each rounded to a level."""
    across = (image[:, 0::2].astype(int) + image[:, 1::2] + 1) // 2
    return (across[0::2] + across[1::2] + 1) // 2


def test_where_nothing_is_said_it_is_pillows_fit_with_a_bicubic_filter():
    image = picture(37, 50)
    found = Decoding(16, 16, 3, "center", "white")(Image.fromarray(image))
    expected = ImageOps.fit(Image.fromarray(image), (16, 16), Image.Resampling.BICUBIC)
    assert np.array_equal(found.transpose(1, 2, 0), np.asarray(expected))


def test_lanczos_cuts_whole_pixels_and_then_resizes_as_stylegan2s_tool_does():
    image = picture(37, 50)
    square = image[0:37, 6:43]  # (50 - 37) // 2 to (50 + 37) // 2
    expected = Image.fromarray(square).resize((16, 16), Image.Resampling.LANCZOS)
    assert np.array_equal(decoded(image, 16, "lanczos"), np.asarray(expected))
    assert (decoded(image, 16, "lanczos") != decoded(image, 16, "bicubic")).any()


def test_box_is_the_mean_of_the_pixels_covered_and_cuts_after_it():
    """96x64 becomes 24x16, and the crop removes 4 columns on each side."""
    image = picture(64, 96)
    means = image.reshape(16, 4, 24, 4, 3).astype(float).mean(axis=(1, 3))[:, 4:20]
    assert np.abs(decoded(image, 16, "box") - means).max() <= 1  # one rounding per direction


def test_box_bicubic_halves_while_it_can_as_openais_center_crop_does():
    """72x64 halved twice is 18x16, and the crop removes one column on each side.

    Bicubic resizing to the same size changes nothing.
    """
    image = picture(64, 72)
    assert np.array_equal(decoded(image, 16, "box_bicubic"), halved(halved(image))[:, 1:17])
    image = picture(31, 40)  # less than twice the size: only bicubic
    whole = Image.fromarray(image).resize((round(40 * 16 / 31), 16), Image.Resampling.BICUBIC)
    assert np.array_equal(decoded(image, 16, "box_bicubic"), np.asarray(whole)[:, 2:18])


def test_a_picture_of_the_wanted_size_is_left_as_it_is():
    image = picture(16, 16)
    for resize in ("bicubic", "bilinear", "lanczos", "box", "box_bicubic"):
        assert np.array_equal(decoded(image, 16, resize), image)


@pytest.mark.parametrize(
    ("resize", "used"),
    [("bilinear", Image.Resampling.BILINEAR), ("lanczos", Image.Resampling.LANCZOS)],
)
def test_without_a_crop_the_shape_is_given_up(resize, used):
    image = picture(20, 50)
    expected = Image.fromarray(image).resize((16, 16), used)
    assert np.array_equal(decoded(image, 16, resize, crop="none"), np.asarray(expected))


def test_shapes_that_are_not_square_come_out_as_wanted():
    for resize in ("bilinear", "lanczos", "box", "box_bicubic"):
        for height, width in ((100, 30), (30, 100), (7, 5), (1, 90)):
            decoding = Decoding(12, 20, 3, "center", "white", resize=resize)
            assert decoding(Image.fromarray(picture(height, width))).shape == (3, 12, 20)


def test_decoded_pictures_of_before_are_found_and_others_lie_elsewhere(tmp_path, pictures):
    source = listed(sources.folder(str(pictures("set", ["1.png", "2.png"]))), tmp_path, 1)
    before = Decoding(8, 6, 3, "center", "white")
    fields = {"height": 8, "width": 6, "channels": 3, "crop": "center", "background": "white"}
    key = [LAYOUT, source.stamp, source.counts, {**fields, "white": None, "max_pixels": 89_478_485}]
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    assert folder_of(source, before, tmp_path, decode_later=False).name == name
    folders = {
        folder_of(source, Decoding(8, 6, 3, "center", "white", resize=resize), tmp_path, False)
        for resize in ("bicubic", "bilinear", "lanczos", "box", "box_bicubic")
    }
    assert len(folders) == 5


def test_pictures_decoded_as_they_are_asked_for_are_the_same(tmp_path, pictures):
    source = sources.folder(str(pictures("set", ["1.png", "2.png"])))
    decoding = Decoding(6, 6, 3, "center", "white", resize="lanczos")
    now, later = (
        image_set(source, decoding, tmp_path / "cache", 1, 0.0, decode_later)
        for decode_later in (False, True)
    )
    assert np.array_equal(now.images, later.images)


def test_the_setting_reaches_the_pictures(tmp_path, pictures):
    folder = pictures("set", ["1.png"])  # 12 wide, 10 high
    typed = ["data=folder", f"data.path={folder}", "model=small32", "data.resize=lanczos"]
    found = build.load_images(training_config(compose(typed)), [str(folder / "1.png")], list)
    square = np.asarray(Image.open(folder / "1.png"))[:, 1:11]
    expected = Image.fromarray(square).resize((32, 32), Image.Resampling.LANCZOS)
    levels = ((found[0] + 1) * 127.5).round().permute(1, 2, 0).numpy()
    assert np.array_equal(levels, np.asarray(expected))


def test_an_unknown_filter_is_refused(complaint):
    said = complaint("data.resize=nearest")
    assert "data.resize=nearest should be 'bicubic', 'bilinear', 'lanczos', 'box'" in said


RECIPE = """
defaults:
  - /expect: linear
model: {base_channels: 8, norm_groups: 4, channel_multipliers: [1], attention_resolutions: []}
recipe:
  source: a paper
  note: Its second page is missing.
  differs: Its code sleeps.
  departs: {data.resize: lanczos, training.ema_decay: 0.0}
  expect:
    settings: {data.crop: center, training.grad_clip: 1.0, objective.loss: simple}
"""


def test_plan_names_what_the_source_has_otherwise_and_what_the_recipe_must_have(recipe, typed):
    words = [recipe(RECIPE), "probe=0", "schedule=linear"]
    plain = typed("plan", *words)
    assert plain.code == 0, plain.err
    assert "data.resize: published lanczos, the run has bicubic (data.resize=lanczos" in plain.out
    assert "training.ema_decay: published 0, the run has 0.9999" in plain.out
    assert "pass                settings.training.grad_clip: expected 1, found 1" in plain.out
    assert "note        Its second page is missing." in plain.out
    assert "differs     Its code sleeps." in plain.out
    as_there = typed("plan", *words, "data.resize=lanczos")
    assert as_there.code == 0
    assert "as published        data.resize=lanczos" in as_there.out
    other = typed("plan", *words, "data.crop=none")
    assert other.code == 1
    assert other.err == (
        "error: recipe.expect.settings.data.crop expects center, but the run has none "
        "(1 of 6 fail)\n"
    )
