"""Each format and mode that Pillow opens gives its pixels, or the reason to leave it out."""

import importlib.util
import io
import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from ddpm import run
from ddpm.data import sources
from ddpm.data.cache import see
from ddpm.data.decoding import Decoding, looks_like_a_picture
from ddpm.data.image_set import image_set
from ddpm.data.shards import Item

SIZE, HALF = 16, 8
LIME, RED, BLUE = (0, 255, 0), (255, 0, 0), (0, 0, 255)
DECODING = Decoding(SIZE, SIZE, 3, "center", "lime", max_pixels=10**6)
ORIENTATION = 0x0112
MAX_SAMPLE = 281


def halves(mode, top, bottom):
    """Returns a picture with one value in its top half and another below."""
    image = Image.new(mode, (SIZE, SIZE), bottom)
    image.paste(top, (0, 0, SIZE, HALF))
    return image


def deep(kind, top, bottom):
    values = np.full((SIZE, SIZE), bottom, dtype=kind)
    values[:HALF] = top
    return Image.fromarray(values)


def palette(top, bottom):
    image = halves("P", 0, 1)
    image.putpalette([*top, *bottom])
    return image


MODES = {  # mode -> (picture, expected top, expected bottom)
    "1": (halves("1", 1, 0), 255, 0),
    "L": (halves("L", 200, 29), 200, 29),
    "LA": (halves("LA", (200, 0), (29, 255)), LIME, 29),
    "P": (palette(RED, BLUE), RED, BLUE),
    "RGB": (halves("RGB", RED, BLUE), RED, BLUE),
    "RGBA": (halves("RGBA", (*RED, 0), (*BLUE, 255)), LIME, BLUE),
    "CMYK": (halves("CMYK", (0, 255, 255, 0), (255, 255, 0, 0)), RED, BLUE),
    "YCbCr": (halves("RGB", RED, BLUE).convert("YCbCr"), RED, BLUE),
    "I;16": (deep(np.uint16, 200 * 257, 29 * 257), 200, 29),
}
FORMATS = [  # format, modes, options to save with, allowed loss in levels
    ("PNG", "1 L LA P RGB RGBA I;16", {}, 0),
    ("PNG", "P", {"bits": 1}, 0),
    ("GIF", "L P RGB", {}, 0),
    ("BMP", "1 L P RGB", {}, 0),
    ("DIB", "RGB", {}, 0),
    ("WEBP", "RGB RGBA", {"lossless": True}, 0),
    ("AVIF", "RGB RGBA", {"quality": 100, "subsampling": "4:4:4"}, 2),
    ("HEIF", "RGB RGBA", {"quality": -1, "chroma": 444, "matrix_coefficients": 0}, 1),
    ("JPEG", "L RGB CMYK YCbCr", {"quality": 100, "subsampling": 0}, 2),
    ("JPEG", "RGB", {"quality": 100, "subsampling": 0, "progressive": True}, 2),
    ("MPO", "RGB", {"quality": 100, "subsampling": 0}, 2),
    ("JPEG2000", "L LA RGB RGBA I;16", {}, 0),
    ("JPEG2000", "RGB", {"no_jp2": True}, 0),
    ("TIFF", "1 L LA P RGB RGBA CMYK YCbCr I;16", {}, 1),
    ("TIFF", "L RGB I;16", {"compression": "tiff_lzw"}, 0),
    ("TIFF", "L RGB I;16", {"compression": "tiff_adobe_deflate"}, 0),
    ("TIFF", "L RGB", {"compression": "packbits"}, 0),
    ("TGA", "1 L LA P RGB RGBA", {}, 0),
    ("TGA", "L RGB RGBA", {"compression": "tga_rle"}, 0),
    ("PPM", "1 L RGB I;16", {}, 0),
    ("PCX", "1 L P RGB", {}, 0),
    ("SGI", "L RGB RGBA", {}, 0),
    ("DDS", "L LA RGB RGBA", {}, 0),
    ("IM", "1 L P RGB CMYK YCbCr", {}, 1),
    ("ICO", "RGB RGBA", {"sizes": [(SIZE, SIZE)]}, 0),
    ("XBM", "1", {}, 0),
    ("MSP", "1", {}, 0),
]
KINDS = [
    (form, mode, options, lost) for form, modes, options, lost in FORMATS for mode in modes.split()
]


def saved(image, form, **options):
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def chunk(kind, content):
    check = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)


def png(rows, depth, colours, clear):
    """Returns a PNG with one transparent value, at bit depths that Pillow cannot write."""
    head = struct.pack(">IIBBBBB", SIZE, SIZE, depth, colours, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = [chunk(b"IHDR", head), chunk(b"tRNS", clear), chunk(b"IDAT", body), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def of(name, content, problem=None):
    return see(Item(name, content, None, problem), DECODING)


def check(content, top, bottom, lost=0):
    pixels = DECODING(content).astype(int)
    expected = np.empty((SIZE, SIZE, 3), dtype=int)
    expected[:HALF], expected[HALF:] = top, bottom
    assert np.abs(pixels - expected.transpose(2, 0, 1)).max() <= lost


@pytest.mark.parametrize(
    ("form", "mode", "options", "lost"),
    KINDS,
    ids=[f"{form} {mode} {'-'.join(options)}" for form, mode, options, _ in KINDS],
)
def test_each_kind_shows_its_pixels(form, mode, options, lost):
    image, top, bottom = MODES[mode]
    content = saved(image, form, **options)
    check(content, top, bottom, lost)
    # these three have no signature, so only their suffix tells
    assert looks_like_a_picture(content[:64]) or form in ("TGA", "IM", "XBM")


@pytest.mark.parametrize(
    ("rows", "depth", "colours", "clear", "bottom"),
    [
        ([b"\x00\x00"] * HALF + [b"\xff\xff"] * HALF, 1, 0, b"\0\0", 255),
        ([bytes(SIZE)] * HALF + [bytes([150]) * SIZE] * HALF, 8, 0, b"\0\0", 150),
        ([bytes(2 * SIZE)] * HALF + [b"\x96\x96" * SIZE] * HALF, 16, 0, b"\0\0", 0x96),
        ([bytes(RED) * SIZE] * HALF + [bytes(BLUE) * SIZE] * HALF, 8, 2, b"\0\xff\0\0\0\0", BLUE),
    ],
    ids=["1 bit", "8 bits", "16 bits", "colour"],
)
def test_one_transparent_value_is_transparent_in_each_depth(rows, depth, colours, clear, bottom):
    check(png(rows, depth, colours, clear), LIME, bottom)


def test_a_palettes_transparent_entries_are_transparent():
    check(saved(palette(RED, BLUE), "PNG", transparency=0), LIME, BLUE)
    check(saved(palette(RED, BLUE), "GIF", transparency=0), LIME, BLUE)
    check(saved(palette(RED, BLUE), "PNG", transparency=bytes([0, 255])), LIME, BLUE)


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_a_moving_picture_the_first_image_is_taken(form):
    more = [halves("RGB", BLUE, RED)] * 2
    options = {"lossless": True} if form == "WEBP" else {}
    content = saved(MODES["RGB"][0], form, save_all=True, append_images=more, **options)
    check(content, RED, BLUE)


@pytest.mark.parametrize("held", range(1, 9))
def test_a_picture_is_turned_as_its_camera_was_held(held):
    undone = {  # EXIF 2.32, 4.6.4: in 1, row 0 is the top, column 0 the left, and so on
        **{1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud},
        **{5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, 1)},
        **{7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: lambda a: np.rot90(a, 3)},
    }[held]
    upright = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[ORIENTATION] = held
    content = saved(Image.fromarray(np.ascontiguousarray(undone(upright))), "PNG", exif=exif)
    assert np.array_equal(DECODING(content).transpose(1, 2, 0), upright)


@pytest.mark.parametrize(
    ("image", "form", "options"),
    [
        (deep(np.float32, 200 / 255, 29 / 255), "TIFF", {}),
        (deep(np.float32, 200, 29), "TIFF", {}),
        (deep(np.int32, 200, 29), "TIFF", {}),
        (deep(np.int32, 200 * 257, 29 * 257), "TIFF", {}),
        (deep(np.float32, 0.8, 0.1), "PPM", {}),
        (deep(np.float32, 0.8, 0.1), "SPIDER", {}),
    ],
    ids=["float of 1", "float of 255", "32 bits of 8", "32 bits of 16", "PFM", "SPIDER"],
)
def test_numbers_whose_white_nobody_declares_are_left_out_and_the_key_is_named(
    image, form, options
):
    assert "give data.white" in of("x", saved(image, form, **options)).reason


@pytest.mark.parametrize(("white", "kind"), [(1.0, np.float32), (255, np.int32), (4095, np.uint16)])
def test_white_is_as_declared_or_as_told_and_never_the_pictures_own(white, kind):
    values = deep(kind, kind(white * 200 / 255), kind(white * 29 / 255))
    told = Decoding(SIZE, SIZE, 3, "center", "lime", white=white)
    pixels = told(saved(values, "TIFF"))[0].astype(int)
    assert abs(pixels[0, 0] - 200) <= 1
    assert abs(pixels[-1, 0] - 29) <= 1
    if kind is not np.float32:  # TIFF has a tag for the white level
        check(saved(values, "TIFF", tiffinfo={MAX_SAMPLE: int(white)}), 200, 29, lost=1)


def tiff(bits, sample_format, rows):
    """Returns a gray TIFF with a bit depth or sign that Pillow does not write."""
    body = b"".join(rows)
    values = {256: SIZE, 257: SIZE, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: SIZE}
    values |= {279: len(body), 339: sample_format}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in values.items())
    directory = struct.pack("<H", len(values)) + entries + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(body)) + body + directory


def test_twelve_bits_of_a_tiff_declare_their_white_and_signed_numbers_none():
    def packed(value):  # two 12-bit numbers in three bytes
        return bytes([value >> 4, (value & 15) << 4 | value >> 8, value & 255]) * (SIZE // 2)

    grey, dark = 200 * 4095 // 255, 29 * 4095 // 255
    check(tiff(12, 1, [packed(grey)] * HALF + [packed(dark)] * HALF), 200, 29, lost=1)
    signed = [struct.pack("<h", 9000) * SIZE] * SIZE
    assert "give data.white" in of("x", tiff(16, 2, signed)).reason


def test_a_grey_map_declares_its_white():
    values = np.full((SIZE, SIZE), 29 * 4095 // 255, dtype=">u2")
    values[:HALF] = 200 * 4095 // 255
    check(b"P5\n16 16\n4095\n" + values.tobytes(), 200, 29, lost=1)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not a picture"),
        (b"no picture at all", "not a picture"),
        (saved(MODES["RGB"][0], "PNG")[:60], "truncated"),
        (saved(MODES["RGB"][0], "JPEG")[:-40], "truncated"),
        (saved(Image.new("1", (2000, 2000)), "PNG"), "needs data.max_pixels=4000000"),
    ],
)
def test_what_is_left_out_says_why(content, reason):
    assert reason in of("x", content).reason


def test_a_phones_pictures_name_the_extra_that_reads_them(monkeypatch):
    if importlib.util.find_spec("pillow_heif"):
        content = saved(MODES["RGB"][0], "HEIF")
        monkeypatch.delitem(Image.OPEN, "HEIF")
        monkeypatch.setattr(Image, "ID", [form for form in Image.ID if form != "HEIF"])
    else:
        content = b"\0\0\0\x18ftypheic\0\0\0\0" + bytes(8)
    assert of("x", content).reason == "HEIC needs the extra heic: pip install -e '.[heic]'"
    assert looks_like_a_picture(content[:64])


def damaged(content, random):
    """Returns a file with bytes changed, a piece cut out or its end missing."""
    changed = bytearray(content)
    match random.integers(3):
        case 0:
            for place in random.integers(len(changed), size=random.integers(1, 9)):
                changed[place] = random.integers(256)
        case 1:
            start = random.integers(len(changed))
            del changed[start : start + random.integers(1, 32)]
        case _:
            del changed[random.integers(len(changed)) :]
    return bytes(changed)


def test_damaged_bytes_of_any_kind_are_a_picture_or_a_reason():
    random = np.random.default_rng(0)
    reasons = 0
    for form, mode, options, _ in KINDS:
        content = saved(MODES[mode][0], form, **options)
        for _ in range(40):
            seen = of("x", damaged(content, random))
            assert seen.reason is None or (seen.reason and "\n" not in seen.reason)
            reasons += seen.reason is not None
    assert reasons > 1000


def test_a_folder_of_damaged_files_is_what_remains_of_it_however_it_is_fed(tmp_path):
    random = np.random.default_rng(1)
    (tmp_path / "set").mkdir()
    for number, (form, mode, options, _) in enumerate(KINDS):
        content = saved(MODES[mode][0], form, **options)
        for copy in range(2):
            name = f"{number:03d} {copy}{'.tga' if form == 'TGA' else ''}"
            (tmp_path / "set" / name).write_bytes(damaged(content, random) if copy else content)
    source = sources.folder(str(tmp_path / "set"))
    file, later = (
        image_set(source, DECODING, tmp_path / "cache", 1, 0.9, decode_later)
        for decode_later in (False, True)
    )
    assert len(file) + len(file.reasons) == len(source)
    assert len(file.reasons) > 20
    assert (file.reasons, file.fingerprint) == (later.reasons, later.fingerprint)
    assert np.array_equal(file.images, later.images)
    with pytest.raises(ValueError, match=r"do not decode \(data.max_unreadable=0.1\): "):
        image_set(source, DECODING, tmp_path / "other", 1, 0.1)


def test_a_folder_from_everywhere_trains_and_one_line_says_what_was_not_used(tmp_path, tiny):
    """About 200 files, as from a camera, a scanner, a phone and a web crawler."""
    place = tmp_path / "set"
    place.mkdir()
    for number, (form, mode, options, _) in enumerate(KINDS):
        content = saved(MODES[mode][0], form, **options)
        ending = {"JPEG2000": "jp2"}.get(form, form.lower())
        (place / f"{number:03d} scan.{ending.upper()}").write_bytes(content)
        (place / f"{number:03d}_web.{ending}").write_bytes(content)
    for held in range(1, 9):
        exif = Image.Exif()
        exif[ORIENTATION] = held
        content = saved(MODES["RGB"][0], "JPEG", exif=exif)
        (place / f"IMG_{held:04d}.jpg").write_bytes(content)
        (place / f"photo_ż_{held}").write_bytes(content)
    used = len(list(place.iterdir()))
    for name in ("notes.txt", "notes (1).txt", "page.html"):
        (place / name).write_text("<html>")
    (place / "cut.jpg").write_bytes(content[:300])
    (place / "denied.jpg").write_text("<html>403</html>")
    (place / "moved.png").symlink_to("nowhere.png")
    (place / "depth.tif").write_bytes(saved(deep(np.float32, 3.5, 0.1), "TIFF"))
    (place / "map.png").write_bytes(saved(Image.new("1", (2000, 2000)), "PNG"))
    assert 180 < used < 220
    folder = run(
        [
            *(*tiny, "data=folder", f"data.path={place}", "data.resolution=16", "training.steps=2"),
            *("data.max_pixels=1_000_000", f"outputs={tmp_path}"),
        ]
    )
    record = json.loads((folder.path / "run.json").read_text())
    assert record["data"]["notes"] == [
        f"using {used} of {used + 8} files; skipped: "
        "2 .txt, not pictures (notes (1).txt, notes.txt); 1 .html, not pictures (page.html); "
        "5 that do not decode: cut.jpg (truncated); denied.jpg (not a picture); "
        "depth.tif (samples of floating point, and no white declared: give data.white); "
        "map.png (too large: 2000x2000 pixels, needs data.max_pixels=4000000); "
        "moved.png (a broken link)",
        "half of the pictures are mirrored in training; data.flip=false turns this off",
    ]


def test_a_set_that_is_nearly_black_says_so_and_the_key(tmp_path):
    (tmp_path / "set").mkdir()
    for number in range(3):  # 12 bits stored in 16, which the file does not say
        content = saved(deep(np.uint16, 4095, 29), "PNG")
        (tmp_path / "set" / f"{number}.png").write_bytes(content)
    source = sources.folder(str(tmp_path / "set"))
    found = image_set(source, DECODING, tmp_path / "cache", 1, 0.0)
    assert "nearly black" in found.notes[0]
    assert "data.white=4095" in found.notes[0]
    told = Decoding(SIZE, SIZE, 3, "center", "lime", white=4095)
    found = image_set(source, told, tmp_path / "cache", 1, 0.0)
    assert found.notes == []
    assert found.images.max() == 255
