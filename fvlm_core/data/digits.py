"""Handwritten digits, in two splits by different writers: scikit-learn's bundled set, which needs no download.

It is the test set of "Optical Recognition of Handwritten Digits" in the UCI repository (Alpaydin and Kaynak 1998,
https://doi.org/10.24432/C50P49), by thirteen unnamed writers. Their forms can be told apart: the digits are in the order of collection,
and every form is a copy of the same text, so the labels repeat it fourteen times. In a random split, the same writers would be in both
splits: a nearest-neighbour classifier (on the 64 pixels) then has an accuracy of 0.984, against 0.955 on the forms held out here.
"""

from functools import lru_cache
from importlib.metadata import distribution

import numpy as np
from PIL import Image

from fvlm_core.data.rows import Split

FILE = "sklearn/datasets/data/digits.csv.gz"
"""Path in scikit-learn's distribution. The file is read directly, because importing scikit-learn costs every rendering process a second."""
FORM_STARTS = (0, 130, 256, 386, 516, 646, 776, 906, 1029, 1157, 1287, 1415, 1545, 1667)
"""Index of the first digit of each of the fourteen forms."""
VAL_FORMS = (9, 10, 12)
"""The forms of the validation split: 380 of the 1797 digits. One writer filled in two forms. For each of these forms, the most similar form
(the one with most of its digits' nearest neighbours) is also one of these, so that writer is most likely in one split only."""


MOST_TURN, MOST_SHEAR, MOST_SCALE = 0.26, 0.2, 0.12
"""Limits of the distortion of a copy: rotation in radians, shear as a share of the height, scaling as a share of the size."""


@lru_cache(maxsize=8)
def digits_of(split: Split, size_px: int, copies: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return the split's digits: brightness uint16 [N, size_px, size_px] in 0..255 and labels int [N].

    uint16 leaves room for a product with a colour. The originals are followed by `copies` copies of each, rotated, sheared and scaled at
    random with a fixed seed, so N is (1 + copies) times the number of originals.
    """
    table = np.loadtxt(str(distribution("scikit-learn").locate_file(FILE)), delimiter=",", dtype=np.int64)
    pixels, labels = table[:, :-1], table[:, -1]
    chosen = _in_split(_forms(len(labels)), split)
    bright = (pixels[chosen].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    scaled = [np.asarray(Image.fromarray(image).resize((size_px, size_px), Image.Resampling.BILINEAR)) for image in bright]
    rng = np.random.default_rng(0)
    scaled += [_distorted(image, size_px, rng) for _ in range(copies) for image in bright]
    return np.stack(scaled).astype(np.uint16), np.tile(labels[chosen], 1 + copies)


@lru_cache(maxsize=2)
def forms_of(split: Split) -> np.ndarray:
    """Return the form of each of the split's original digits: int [N], an index into FORM_STARTS, ordered as in `digits_of`."""
    table = np.loadtxt(str(distribution("scikit-learn").locate_file(FILE)), delimiter=",", dtype=np.int64)
    form = _forms(len(table))
    return form[_in_split(form, split)]


def _forms(count: int) -> np.ndarray:
    """Return the form of each of the first `count` digits of the file: int [count]."""
    return np.searchsorted(FORM_STARTS, np.arange(count), side="right") - 1


def _in_split(form: np.ndarray, split: Split) -> np.ndarray:
    return np.isin(form, VAL_FORMS) == (split == "val")


def _distorted(image: np.ndarray, size_px: int, rng: np.random.Generator) -> np.ndarray:
    """Return a randomly rotated, sheared and scaled copy, uint8 [size_px, size_px], of a digit, uint8 [8, 8]."""
    turn, shear = rng.uniform(-MOST_TURN, MOST_TURN), rng.uniform(-MOST_SHEAR, MOST_SHEAR)
    stretch = np.diag(rng.uniform(1 - MOST_SCALE, 1 + MOST_SCALE, 2)) * len(image) / size_px
    back = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) @ np.array([[1, shear], [0, 1]]) @ stretch
    border = 2  # keeps what a rotation moves past the edge
    offset = len(image) / 2 + border - back @ np.full(2, size_px / 2)
    coefficients = (*back[0], offset[0], *back[1], offset[1])
    padded = Image.fromarray(np.pad(image, border))
    return np.asarray(padded.transform((size_px, size_px), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR))
