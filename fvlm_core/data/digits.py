"""Handwritten digits, in two splits by different writers: scikit-learn's bundled set, which needs no download.

It is the test part of the UCI set "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak 1998,
https://doi.org/10.24432/C50P49), by thirteen writers who are not named. Their forms can be told apart all the same: the set is in the order
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


@lru_cache(maxsize=4)
def digits_of(split: Split, size_px: int) -> tuple[np.ndarray, np.ndarray]:
    """The split's digits: brightness uint16 [N, size_px, size_px] in 0..255 (room for a product with a colour) and labels int [N]."""
    table = np.loadtxt(str(distribution("scikit-learn").locate_file(FILE)), delimiter=",", dtype=np.int64)
    pixels, labels = table[:, :-1], table[:, -1]
    form = np.searchsorted(FORM_STARTS, np.arange(len(labels)), side="right") - 1
    chosen = np.isin(form, VAL_FORMS) == (split == "val")
    bright = (pixels[chosen].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    scaled = [np.asarray(Image.fromarray(image).resize((size_px, size_px), Image.Resampling.BILINEAR)) for image in bright]
    return np.stack(scaled).astype(np.uint16), labels[chosen]
