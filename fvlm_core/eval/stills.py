"""Still pictures as training decodes them: upright, in RGB, 8 bits a channel."""

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
"""What makes a picture upright, by its EXIF orientation: phones store what the sensor saw and say how it was held."""


def as_shown(image: Image.Image) -> Image.Image:
    """A picture as viewers show it."""
    image.load()  # a PNG may say at its end how it was held
    # not ImageOps.exif_transpose: it writes the other tags anew, and fails where one of them is damaged
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except SyntaxError:  # what stands there is no EXIF
        turn = None
    if turn is not None:
        image = image.transpose(turn)
    if image.mode.startswith("I;16"):  # Pillow would make all above 255 white; rounded as ffmpeg does
        levels = (np.asarray(image).astype(np.uint32) + 128) >> 8
        image = Image.fromarray(np.minimum(levels, 255).astype(np.uint8))
    return image.convert("RGB")
