"""Convert still images to the form in which training decodes them: upright, RGB, 8 bits per channel, square."""

import numpy as np
from PIL import ExifTags, Image

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The operation that makes an image upright, by its EXIF orientation."""


def as_shown(image: Image.Image) -> Image.Image:
    """The image as a viewer shows it: upright RGB, 8 bits per channel."""
    image.load()  # a PNG may have its EXIF data at the end
    # not ImageOps.exif_transpose: it rewrites the other tags too, and fails if one of them is damaged
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except SyntaxError:  # invalid EXIF data
        turn = None
    if turn is not None:
        image = image.transpose(turn)
    if image.mode.startswith("I;16"):  # Pillow would clip all values above 255 to white; round as ffmpeg does
        levels = (np.asarray(image).astype(np.uint32) + 128) >> 8
        image = Image.fromarray(np.minimum(levels, 255).astype(np.uint8))
    return image.convert("RGB")


def square(image: Image.Image, side: int) -> np.ndarray:
    """Resize the short side to `side` and center-crop, as `fvlm_core.data.frames` does for videos: uint8 [side, side, 3].

    ffmpeg's `area` scaling, which training uses, averages areas when it shrinks a picture and interpolates linearly when it enlarges one.
    """
    scale = side / min(image.size)
    width, height = (max(side, round(length * scale)) for length in image.size)
    scaled = image.resize((width, height), Image.Resampling.BOX if scale < 1 else Image.Resampling.BILINEAR)
    left, top = (width - side) // 2, (height - side) // 2
    return np.asarray(scaled.crop((left, top, left + side, top + side)))
