"""Decodes a picture of a source into an array at the run's resolution."""

import contextlib
import io
import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageColor, ImageFile, ImageOps, TiffImagePlugin

with contextlib.suppress(ImportError):  # the extra heic
    from pillow_heif import register_heif_opener

    register_heif_opener()

Image.MAX_IMAGE_PIXELS = None  # Decoding.max_pixels is the bound, and users can set it
Image.init()
Resize = Literal["bicubic", "bilinear", "lanczos", "box", "box_bicubic"]
FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "box_bicubic": Image.Resampling.BICUBIC,
}
STUBS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # formats that Pillow lists but cannot read
SUFFIXES = {
    suffix
    for suffix, form in Image.registered_extensions().items()
    if form in Image.OPEN and form not in STUBS
}
HEIC_BRANDS = {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"}
HEIC_SUFFIXES = {".heic", ".heif", ".hif"}
NO_HEIC = "HEIC needs the extra heic: pip install -e '.[heic]'"
TURNS = {  # EXIF orientation -> the transpose that undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
DEEP_GREY = {
    "PNG",
    "PPM",
    "JPEG2000",
}  # Pillow scales these to 16 bits, whatever they declare
ORIENTATION, BITS, MAX_SAMPLE, SMAX_SAMPLE = 0x0112, 258, 281, 341  # EXIF and TIFF tags


class NotUsable(ValueError):
    """Raised for a picture that is left out; its message tells the user why."""


def looks_like_a_picture(start: bytes) -> bool:
    """Returns whether a file's first bytes are the signature of a picture format."""
    if _is_heic(start):
        return True
    for form, (_, accept) in Image.OPEN.items():
        if form not in STUBS and accept is not None:
            with contextlib.suppress(Exception):
                if accept(start) is True:
                    return True
    return False


def reason_of(error: Exception) -> str:
    """Returns why a picture does not decode, in a few words."""
    words = str(error).splitlines()[0] if str(error) else ""
    if isinstance(error, Image.UnidentifiedImageError):
        return "not a picture"
    if isinstance(error, NotUsable):
        return words
    if "truncated" in words.lower() or isinstance(error, EOFError):
        return "truncated"
    return f"damaged ({words or type(error).__name__})"


@dataclass(frozen=True)
class Decoding:
    """How a picture is decoded and resized.

    Attributes:
        height: Height of the result in pixels.
        width: Width of the result in pixels.
        channels: 3 for color, 1 for gray.
        crop: "center" crops to the target aspect ratio, "none" stretches to it.
        background: Color that shows through transparent pixels, a name or code that Pillow knows.
        white: Sample value of white in pictures of more than 8 bits; None for the value that each
            file declares.
        max_pixels: Larger pictures are left out: a file of a few bytes can claim to be huge.
        resize: Filter and order of cropping; see `resized`.

    Raises:
        ValueError: If Pillow does not know the background color.
    """

    height: int
    width: int
    channels: Literal[1, 3]
    crop: Literal["center", "none"]
    background: str
    white: float | None = None
    max_pixels: int = 89_478_485
    resize: Resize = "bicubic"

    def __post_init__(self) -> None:
        try:
            ImageColor.getrgb(self.background)
        except ValueError:
            raise ValueError(
                f"data.background={self.background} is not a color: "
                "give a name such as white, or #rrggbb"
            ) from None

    def __call__(self, content: bytes | Image.Image) -> np.ndarray:
        """Decodes a picture, rotated as its EXIF data says; an animation yields its first frame.

        Returns:
            (C, H, W) uint8.

        Raises:
            Exception: NotUsable, or whatever Pillow raises for a broken file; see `reason_of`.
        """
        image = resized(self.whole(content), (self.width, self.height), self.crop, self.resize)
        pixels = np.asarray(image, dtype=np.uint8)
        return pixels[None] if self.channels == 1 else pixels.transpose(2, 0, 1)

    def whole(self, content: bytes | Image.Image) -> Image.Image:
        """Returns the picture at its original size, upright, in mode "L" or "RGB".

        Raises:
            Exception: As for a call.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of broken metadata
            image = content if isinstance(content, Image.Image) else _opened(content)
            if image.width * image.height > self.max_pixels:
                raise NotUsable(
                    f"too large: {image.width}x{image.height} pixels, "
                    f"needs data.max_pixels={image.width * image.height}"
                )
            image.load()
            turn = TURNS.get(_orientation(image))
            white = self._white(image)
        if white is not None:
            image = _shallow(image, white)
        image = self._flat(image)
        return image if turn is None else image.transpose(turn)

    def _white(self, image: Image.Image) -> float | None:
        """The sample value of white; None for 8-bit pictures, where it is 255."""
        if image.mode != "F" and not image.mode.startswith("I"):
            return None
        if self.white is not None:
            return self.white
        declared = _declared_white(image)
        if declared is None:
            kind = "floating point" if image.mode == "F" else "more than 8 bits"
            raise NotUsable(f"samples of {kind}, and no white declared: give data.white")
        return declared

    def _flat(self, image: Image.Image) -> Image.Image:
        """The image in mode "L" or "RGB", its transparent parts over the background."""
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(
                Image.new("RGBA", image.size, ImageColor.getrgb(self.background)), image
            )
        return image.convert("L" if self.channels == 1 else "RGB")


def resized(
    image: Image.Image, size: tuple[int, int], crop: Literal["center", "none"], resize: Resize
) -> Image.Image:
    """Resizes a picture; each filter averages over the area that a new pixel covers.

    Args:
        image: In any mode that Pillow resizes.
        size: (width, height).
        crop: "none" stretches, whatever the filter. "center" keeps the aspect ratio and crops the
            middle: "bicubic" and "bilinear" crop to fractions of a pixel, then resize; "lanczos"
            crops whole pixels, then resizes (StyleGAN2, create_lsun of dataset_tool.py); "box" and
            "box_bicubic" resize, then crop whole pixels (OpenAI's datasets/lsun_bedroom.py and
            center_crop_arr of guided-diffusion).
        resize: "box_bicubic" halves the picture by averaging 2x2 pixels while it is at least twice
            the target size, then resizes bicubically.
    """
    width, height = size
    used = FILTERS[resize]
    if resize == "box_bicubic":
        while image.width >= 2 * width and image.height >= 2 * height:
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    if crop == "none":
        return image.resize(size, used)
    if resize in ("bicubic", "bilinear"):
        return ImageOps.fit(image, size, used)
    if resize == "lanczos":
        shape = (
            max(1, min(image.width, image.height * width // height)),
            max(1, min(image.height, image.width * height // width)),
        )
        return _middle(image, shape).resize(size, used)
    scale = max(width / image.width, height / image.height)
    return _middle(
        image.resize((round(image.width * scale), round(image.height * scale)), used), size
    )


def _middle(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The middle of a picture in whole pixels; an odd margin is wider at the right and bottom."""
    left, top = (image.width - size[0]) // 2, (image.height - size[1]) // 2
    return image.crop((left, top, left + size[0], top + size[1]))


def _opened(content: bytes) -> ImageFile.ImageFile:
    try:
        return Image.open(io.BytesIO(content))
    except Image.UnidentifiedImageError:
        if _is_heic(content[:64]):
            raise NotUsable(NO_HEIC) from None
        raise


def _is_heic(start: bytes) -> bool:
    return start[4:8] == b"ftyp" and start[8:12] in HEIC_BRANDS


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation; 1 if it cannot be read."""
    with contextlib.suppress(Exception):
        value = image.getexif().get(ORIENTATION, 1)
        return int(value[0] if isinstance(value, tuple) else value)
    return 1


def _shallow(image: Image.Image, white: float) -> Image.Image:
    """Scales samples to 8 bits; the value that means transparent stays transparent."""
    numbers = np.asarray(image, dtype=np.float64)
    levels = (numbers * (255 / white)).clip(0, 255).round().astype(np.uint8)
    clear = image.info.get("transparency")
    if not isinstance(clear, int):
        return Image.fromarray(levels)
    return Image.fromarray(
        np.stack([levels, np.where(numbers == clear, 0, 255).astype(np.uint8)], 2)
    )


def _declared_white(image: Image.Image) -> float | None:
    """The sample value of white that a file declares or its format implies; None if neither."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        for tag in (MAX_SAMPLE, SMAX_SAMPLE):
            with contextlib.suppress(Exception):
                value = image.tag_v2[tag]
                return float(value[0] if isinstance(value, tuple) else value)
        bits = image.tag_v2.get(BITS, (0,))  # 12 or 16 in mode "I;16"; signed samples have "I"
        return 2 ** bits[0] - 1 if image.mode.startswith("I;16") and len(bits) == 1 else None
    return 65535 if image.mode.startswith("I") and image.format in DEEP_GREY else None
