import numpy as np
import torch
from PIL import Image

from ddpm.sample import images


def test_every_8_bit_level_survives_the_way_to_floats_and_back():
    levels = torch.arange(256, dtype=torch.float32)
    x = (levels / 127.5 - 1).reshape(1, 1, 16, 16)
    assert images.to_uint8(x).flatten().tolist() == list(range(256))


def test_values_outside_the_range_are_clipped_and_the_rest_rounded():
    x = torch.tensor([-3.0, -1 + 0.49 / 127.5, -1 + 0.51 / 127.5, 3.0]).reshape(1, 1, 2, 2)
    assert images.to_uint8(x).flatten().tolist() == [0, 0, 1, 255]


def test_channels_come_last():
    x = torch.tensor([-1.0, 0.0, 1.0]).reshape(1, 3, 1, 1).expand(2, 3, 4, 5)
    assert images.to_uint8(x).shape == (2, 4, 5, 3)
    assert images.to_uint8(x)[1, 3, 4].tolist() == [0, 128, 255]


def test_a_grid_shows_every_image_row_by_row_and_small_ones_magnified():
    batch = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones(
        (5, 16, 16, 3), dtype=np.uint8
    )
    sheet = images.grid(batch)  # 3 columns of 16 pixels fit 10 times in 512
    assert sheet.shape == (2 + 2 * (160 + 2), 2 + 3 * (160 + 2), 3)
    for index in range(5):
        top, left = 2 + index // 3 * 162, 2 + index % 3 * 162
        assert (sheet[top : top + 160, left : left + 160] == index).all()
    # the gaps and the empty place are white
    assert (sheet == 255).sum() == 3 * (326 * 488 - 5 * 160 * 160)


def test_a_grid_of_large_images_keeps_their_pixels_and_the_columns_asked_for():
    batch = np.random.default_rng(0).integers(0, 255, (2, 8, 600, 1), dtype=np.uint8)
    sheet = images.grid(batch, columns=1)
    assert sheet.shape == (2 + 2 * (8 + 2), 600 + 4, 1)
    assert np.array_equal(sheet[12:20, 2:602], batch[1])


def test_a_png_holds_the_pixels_in_grey_and_in_colour(tmp_path):
    for channels, mode in ((1, "L"), (3, "RGB")):
        pixels = np.random.default_rng(0).integers(0, 256, (4, 6, channels), dtype=np.uint8)
        images.save_png(tmp_path / "image.png", pixels)
        with Image.open(tmp_path / "image.png") as found:
            assert (found.mode, found.format) == (mode, "PNG")
            assert np.array_equal(np.asarray(found).reshape(4, 6, channels), pixels)
    assert [file.name for file in tmp_path.iterdir()] == ["image.png"]
