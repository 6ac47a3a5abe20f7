"""The world of cells: what is drawn is what is said, and the question names a cell that has it."""

import numpy as np
import pytest

from fvlm_core.data.cells_world import CHAT, DIGIT_PX, FIRST_PLACE, JITTER_PX, NOISE, render, samples, vocabulary
from fvlm_core.data.gaze import CELL_PX, EMPTY, digits_of


def cells_of(frames: np.ndarray, grid: int) -> np.ndarray:
    """uint8 [B, T, S, S, 3] -> brightness [B, T, G, G, cell, cell]."""
    return frames[..., 0].reshape(*frames.shape[:2], grid, CELL_PX, grid, CELL_PX).swapaxes(3, 4)


@pytest.mark.parametrize(("grid", "clutter"), [(6, 0.0), (6, 0.5), (9, 1.0)])
def test_a_cell_shows_the_digit_that_it_is_said_to_show(grid, clutter):
    world = render(np.random.default_rng(1), "val", grid=grid, clips=4, clutter=clutter)
    cells = cells_of(world.frames, grid)
    empty = world.digits == EMPTY
    assert (cells[empty] < NOISE).all()
    assert empty.mean() == pytest.approx((1 - clutter) * (1 - 1 / grid**2), abs=0.1)
    images, labels = digits_of("val", DIGIT_PX)
    margin = (CELL_PX - DIGIT_PX) // 2
    for cell, digit in list(zip(cells[~empty], world.digits[~empty], strict=True))[:20]:
        here = [
            cell[margin + y : margin + y + DIGIT_PX, margin + x : margin + x + DIGIT_PX].astype(int)
            for y in range(-JITTER_PX, JITTER_PX + 1)
            for x in range(-JITTER_PX, JITTER_PX + 1)
        ]
        off = [np.where(images >= NOISE, np.abs(images.astype(int) - window), 0).sum((1, 2)) for window in here]
        assert labels[np.argmin(np.min(off, axis=0))] == digit


def test_the_question_names_the_cell_and_the_answer_is_what_it_shows():
    world = render(np.random.default_rng(2), "train", grid=6, clips=3, frames=4)
    for sample, digits, (row, column) in zip(samples(world), world.digits, world.cells, strict=True):
        (turn,) = sample.turns
        assert turn.question_ids == [FIRST_PLACE + row, FIRST_PLACE + 6 + column]
        assert turn.answer_ids == digits[:, row, column].tolist()
        assert sample.question_first
        assert max(turn.question_ids) < vocabulary(6)
    assert max(*CHAT.assistant_open, *CHAT.assistant_close) < FIRST_PLACE
