"""Convert still images to the form in which training decodes them: upright, RGB, 8 bits per channel."""

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
