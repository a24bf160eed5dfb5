"""From a picture as it lies in its source to an array at the run's resolution."""

import io
import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageColor, ImageOps

FILTER = Image.Resampling.BICUBIC
# what a picture that does not decode raises
UNREADABLE = (
    OSError,
    ValueError,
    SyntaxError,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


@dataclass(frozen=True)
class Decoding:
    """What is done to a picture.

    Attributes:
        height: Pixels.
        width: Pixels.
        channels: 3 colour, 1 grey.
        crop: "center" cuts to the wanted shape before resizing, "none" gives the shape up.
        background: Colour that shows through transparent pixels, as Pillow spells it.

    Raises:
        ValueError: If the background is no colour.
    """

    height: int
    width: int
    channels: Literal[1, 3]
    crop: Literal["center", "none"]
    background: str

    def __post_init__(self) -> None:
        try:
            ImageColor.getrgb(self.background)
        except ValueError:
            raise ValueError(
                f"background={self.background} is no colour: give a name such as white, or #rrggbb"
            ) from None

    def __call__(self, content: bytes | Image.Image) -> np.ndarray:
        """Decodes a picture, turned as its EXIF says; of a moving one, the first image.

        It is resized with an antialiasing bicubic filter.

        Returns:
            (C, H, W) uint8.

        Raises:
            OSError, ValueError, SyntaxError: Pillow's, if the picture does not decode.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = content if isinstance(content, Image.Image) else Image.open(io.BytesIO(content))
            image.load()
        image = self._flat(ImageOps.exif_transpose(image))
        size = (self.width, self.height)
        image = (
            ImageOps.fit(image, size, FILTER)
            if self.crop == "center"
            else image.resize(size, FILTER)
        )
        pixels = np.asarray(image, dtype=np.uint8)
        return pixels[None] if self.channels == 1 else pixels.transpose(2, 0, 1)

    def _flat(self, image: Image.Image) -> Image.Image:
        """The image in the wanted mode: 16-bit grey scaled to 8, transparency on the background.

        Raises ValueError for numbers whose black and white nobody knows.
        """
        if image.mode == "F":
            raise ValueError("floating point numbers have no known white")
        if image.mode.startswith("I"):
            deep = np.asarray(image, dtype=np.float64)
            if deep.min() < 0 or deep.max() > 65535:
                raise ValueError("numbers of more than 16 bits have no known white")
            image = Image.fromarray((deep / 257).round().astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(
                Image.new("RGBA", image.size, ImageColor.getrgb(self.background)), image
            )
        return image.convert("L" if self.channels == 1 else "RGB")
