"""Squares of frames, cut out and made smaller."""

import numpy as np
import pytest
import torch

from fvlm_core.model.squares import SHRUNK_IN_PLACE_PX, shrunk_squares


@pytest.mark.parametrize("side", [SHRUNK_IN_PLACE_PX // 2, SHRUNK_IN_PLACE_PX])
@pytest.mark.parametrize("times", [1, 4])
def test_a_square_made_smaller_is_the_mean_of_its_pixels(side: int, times: int) -> None:
    rng = np.random.default_rng(side + times)
    frames = rng.integers(256, size=(3, 2 * side, 3 * side, 3), dtype=np.uint8)
    frame, down, right = np.array([2, 0]), np.array([[1, 0], [0, 1]]), np.array([[2, 0], [1, 1]])
    found = shrunk_squares(torch.from_numpy(frames), *map(torch.from_numpy, (frame, down, right)), side, times)
    places = [(number, y, x) for number, ys, xs in zip(frame, down, right, strict=True) for y, x in zip(ys, xs, strict=True)]
    cut = np.stack([frames[number, y * side : (y + 1) * side, x * side : (x + 1) * side] for number, y, x in places])
    wanted = cut.reshape(4, side // times, times, side // times, times, 3).mean((2, 4))
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-6)
