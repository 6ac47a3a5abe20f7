"""A clip of where the model looks: each frame beside its coarse attention and its gaze, and the entropy of the query's attention.

The colours are those of the evaluation's heat maps: dark without attention, tinted at a frame's attention peaks. For a model with a glance,
outlines on the gaze mark the patches that were opened; the rest of the frame was encoded at low resolution only.
"""

from collections.abc import Iterator
from fractions import Fraction
from io import BytesIO
from math import log
from pathlib import Path
from tempfile import TemporaryFile
from textwrap import shorten

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fvlm_core.errors import UserError
from fvlm_core.eval.pictures import HEAT_COLOUR, HEAT_OPACITY, SHADE_OPACITY
from fvlm_core.manifest import write_atomically
from fvlm_core.serve.session import Gaze

PANEL_PX, MARGIN_PX, TITLE_PX, CURVE_PX = 288, 16, 76, 72
SUFFIXES = (".mp4", ".gif")
BACKGROUND, INK, FAINT, CURVE = (18, 20, 24), (235, 235, 235), (120, 124, 132), (255, 140, 40)
CRF = "18"


def check_output(path: Path) -> None:
    """Raise UserError if the file cannot be written; call this before computing anything."""
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"a clip cannot be written as {path.suffix or 'a file without a suffix'}", where=str(path), fix="use .mp4 or .gif")
    if not path.absolute().parent.is_dir():
        raise UserError("there is no such folder", where=str(path.absolute().parent), fix="make it, or name another")
    try:
        with TemporaryFile(dir=path.absolute().parent):
            pass
    except OSError as error:
        what = f"the folder cannot be written into: {error.strerror}"
        raise UserError(what, where=str(path.absolute().parent), fix="name another") from error


def write_clip(path: Path, gaze: Gaze, *, title: str, fps: float = 1.0) -> None:
    """Write a clip as H.264 or GIF, `fps` pictures per second."""
    check_output(path)
    encode = _mp4 if path.suffix.lower() == ".mp4" else _gif
    write_atomically(path, encode(list(pictures(gaze, title)), fps))


def pictures(gaze: Gaze, title: str) -> Iterator[Image.Image]:
    """Yield one picture per frame: the frame, its coarse attention and its gaze; below, the entropy up to this frame."""
    width = 3 * PANEL_PX + 4 * MARGIN_PX
    height = TITLE_PX + PANEL_PX + CURVE_PX + 3 * MARGIN_PX
    heading, label = ImageFont.load_default(20), ImageFont.load_default(15)
    for t, frame in enumerate(gaze.frames):
        picture = Image.new("RGB", (width, height), BACKGROUND)
        pen = ImageDraw.Draw(picture)
        pen.text((MARGIN_PX, MARGIN_PX), shorten(title, 90, placeholder=" ..."), fill=INK, font=heading)
        panels = (("frame", None), ("coarse attention", gaze.coarse[t]), ("gaze", gaze.fine[t]))
        for column, (name, attention) in enumerate(panels):
            left = MARGIN_PX + column * (PANEL_PX + MARGIN_PX)
            text = f"{name} {t + 1} of {len(gaze.frames)}" if attention is None else name
            pen.text((left, TITLE_PX - 24), text, fill=FAINT if attention is None else INK, font=label)
            picture.paste(_tinted(frame, attention), (left, TITLE_PX))
            if name == "gaze" and gaze.opened is not None:
                _outline(pen, gaze.opened[t], gaze.fine[t].shape, left)
        _entropy(pen, gaze.entropy, t, most=log(gaze.fine[t].size + 1), top=TITLE_PX + PANEL_PX + MARGIN_PX, right=width - MARGIN_PX)
        yield picture


def _tinted(frame: np.ndarray, attention: np.ndarray | None) -> Image.Image:
    """A frame [H, W, 3] at the panel's size, coloured by attention [rows, columns]."""
    image = Image.fromarray(frame).resize((PANEL_PX, PANEL_PX), Image.Resampling.BICUBIC)
    if attention is None:
        return image
    weight = Image.fromarray((attention / attention.max()).astype(np.float32)).resize(image.size, Image.Resampling.NEAREST)
    strength = np.asarray(weight)[..., None]
    dark = np.asarray(image) * (1 - SHADE_OPACITY * (1 - strength))
    tint = HEAT_OPACITY * strength
    return Image.fromarray((dark * (1 - tint) + 255 * np.array(HEAT_COLOUR) * tint).astype(np.uint8))


def _outline(pen: ImageDraw.ImageDraw, opened: np.ndarray, grid: tuple[int, ...], left: int) -> None:
    """Outline every opened patch of the grid, on the panel at `left`."""
    rows, columns = grid
    for place in opened.tolist():
        row, column = divmod(place, columns)
        x, y = left + column * PANEL_PX / columns, TITLE_PX + row * PANEL_PX / rows
        pen.rectangle((x, y, x + PANEL_PX / columns - 1, y + PANEL_PX / rows - 1), outline=INK, width=2)


def _entropy(pen: ImageDraw.ImageDraw, entropy: np.ndarray, t: int, *, most: float, top: int, right: int) -> None:
    """Draw the entropy up to frame t, on a scale from 0 to `most`, the entropy of uniform attention."""
    small = ImageFont.load_default(13)
    pen.text((MARGIN_PX, top), f"entropy of the gaze {entropy[t]:.2f} nats (even attention: {most:.2f})", fill=INK, font=small)
    bottom, left, high = top + CURVE_PX, MARGIN_PX, CURVE_PX - 22
    pen.line([(left, bottom), (right, bottom)], fill=FAINT)
    pen.line([(left, bottom - high), (right, bottom - high)], fill=FAINT)
    step = (right - left) / max(len(entropy) - 1, 1)
    points = [(left + n * step, bottom - high * min(float(value) / most, 1.0)) for n, value in enumerate(entropy[: t + 1])]
    if len(points) > 1:
        pen.line(points, fill=CURVE, width=2)
    x, y = points[-1]
    pen.ellipse([x - 4, y - 4, x + 4, y + 4], fill=CURVE)


def _mp4(shown: list[Image.Image], fps: float) -> bytes:
    buffer = BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000), options={"crf": CRF})
        stream.width, stream.height = shown[0].size
        stream.pix_fmt = "yuv420p"
        for picture in shown:
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())
    return buffer.getvalue()


def _gif(shown: list[Image.Image], fps: float) -> bytes:
    buffer = BytesIO()
    first, *rest = (_in_few_colours(picture) for picture in shown)
    first.save(buffer, "GIF", save_all=True, append_images=rest, duration=round(1000 / fps), loop=0, optimize=True)
    return buffer.getvalue()


def _in_few_colours(picture: Image.Image) -> Image.Image:
    """Quantize to 256 colours with dithering; without it, smooth digits get spurious outlines."""
    palette = picture.quantize(256, method=Image.Quantize.FASTOCTREE)
    return picture.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)
