"""Handwritten digits, in two splits by different writers: scikit-learn's bundled set, which needs no download.

It is the test part of the UCI set "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak 1998,
https://doi.org/10.24432/C50P49), by thirteen writers who are not named. Their forms can be distinguished: the set is in the order
of collection, and every form is a copy of one text, so the labels repeat it fourteen times. A split at random would share the writers: a
nearest neighbour (on the 64 pixels) then reads 0.984 of the held-out digits, but 0.955 of the forms that are held out here.
"""

from functools import lru_cache
from importlib.metadata import distribution

import numpy as np
from PIL import Image

from fvlm_core.data.rows import Split

FILE = "sklearn/datasets/data/digits.csv.gz"
"""In scikit-learn's distribution. Read from there, because importing scikit-learn takes every process that renders a clip a second."""
FORM_STARTS = (0, 130, 256, 386, 516, 646, 776, 906, 1029, 1157, 1287, 1415, 1545, 1667)
"""Where the fourteen forms begin."""
VAL_FORMS = (9, 10, 12)
"""The forms of the validation split, 380 digits of 1797. One of the writers made two forms: the form that each of these is most like (where
most of its digits' nearest neighbours are) is one of them too, so that writer is most likely in one split."""


MOST_TURN, MOST_SHEAR, MOST_SCALE = 0.26, 0.2, 0.12
"""Of a distorted copy: radians, share of the height, share of the size."""


@lru_cache(maxsize=8)
def digits_of(split: Split, size_px: int, copies: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The split's digits: brightness uint16 [N, size_px, size_px] in 0..255 (room for a product with a colour) and labels int [N].

    After them `copies` of each, turned, sheared and scaled at random (the same every time): N is (1 + copies) times as many.
    """
    table = np.loadtxt(str(distribution("scikit-learn").locate_file(FILE)), delimiter=",", dtype=np.int64)
    pixels, labels = table[:, :-1], table[:, -1]
    form = np.searchsorted(FORM_STARTS, np.arange(len(labels)), side="right") - 1
    chosen = np.isin(form, VAL_FORMS) == (split == "val")
    bright = (pixels[chosen].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    scaled = [np.asarray(Image.fromarray(image).resize((size_px, size_px), Image.Resampling.BILINEAR)) for image in bright]
    rng = np.random.default_rng(0)
    scaled += [_distorted(image, size_px, rng) for _ in range(copies) for image in bright]
    return np.stack(scaled).astype(np.uint16), np.tile(labels[chosen], 1 + copies)


def _distorted(image: np.ndarray, size_px: int, rng: np.random.Generator) -> np.ndarray:
    """A turned, sheared and scaled copy: uint8 [size_px, size_px] of uint8 [8, 8]."""
    turn, shear = rng.uniform(-MOST_TURN, MOST_TURN), rng.uniform(-MOST_SHEAR, MOST_SHEAR)
    stretch = np.diag(rng.uniform(1 - MOST_SCALE, 1 + MOST_SCALE, 2)) * len(image) / size_px
    back = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) @ np.array([[1, shear], [0, 1]]) @ stretch
    border = 2  # what a turn moves past a side is kept
    offset = len(image) / 2 + border - back @ np.full(2, size_px / 2)
    coefficients = (*back[0], offset[0], *back[1], offset[1])
    padded = Image.fromarray(np.pad(image, border))
    return np.asarray(padded.transform((size_px, size_px), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR))
