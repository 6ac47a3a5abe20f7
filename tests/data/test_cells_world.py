"""The worlds of cells: what is drawn is what is said, and the cell that counts is where the world's rule says."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fvlm_core.data.cells_world import BLOCK, CHAT, DIGIT_PX, FIRST_PLACE, JITTER_PX, NOISE, WORLDS, render, samples, vocabulary
from fvlm_core.data.gaze import CELL_PX, EMPTY, digits_of


def cells_of(frames: np.ndarray, grid: int) -> np.ndarray:
    """uint8 [B, T, S, S, 3] -> brightness [B, T, G, G, cell, cell]."""
    return frames[..., 0].reshape(*frames.shape[:2], grid, CELL_PX, grid, CELL_PX).swapaxes(3, 4)


def reads_as(cell: np.ndarray) -> int:
    """The digit of the validation split that a cell shows, by its pixels."""
    images, labels = digits_of("val", DIGIT_PX)
    margin = (CELL_PX - DIGIT_PX) // 2
    here = [
        cell[margin + y : margin + y + DIGIT_PX, margin + x : margin + x + DIGIT_PX].astype(int)
        for y in range(-JITTER_PX, JITTER_PX + 1)
        for x in range(-JITTER_PX, JITTER_PX + 1)
    ]
    off = [np.where(images >= NOISE, np.abs(images.astype(int) - window), 0).sum((1, 2)) for window in here]
    return labels[np.argmin(np.min(off, axis=0))]


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize(("grid", "clutter"), [(6, 0.0), (6, 0.5), (9, 1.0)])
def test_a_cell_shows_the_digit_that_it_is_said_to_show(grid, clutter, name):
    world = render(np.random.default_rng(1), "val", grid=grid, clips=4, clutter=clutter, name=name)
    cells = cells_of(world.frames, grid)
    empty = world.digits == EMPTY
    assert (cells[empty] < NOISE).all()
    if name != "still":
        assert empty.mean() == pytest.approx((1 - clutter) * (1 - 1 / grid**2), abs=0.1)
    for cell, digit in list(zip(cells[~empty], world.digits[~empty], strict=True))[:20]:
        assert reads_as(cell) == digit


@given(seed=st.integers(0, 2**32 - 1), clutter=st.sampled_from([0.0, 0.5, 1.0]))
def test_of_a_still_scene_only_the_block_that_counts_changes(seed, clutter):
    world = render(np.random.default_rng(seed), "train", grid=9, clips=2, clutter=clutter, name="still")
    drawn = np.where(world.frames[..., 0] >= NOISE, world.frames[..., 0], 0)
    side = BLOCK * CELL_PX
    blocks = drawn.reshape(2, 3, 3, side, 3, side).swapaxes(3, 4)
    digits = world.digits.reshape(2, 3, 3, BLOCK, 3, BLOCK).swapaxes(3, 4)
    assert ((digits != EMPTY).sum((-1, -2)) <= 1).all()
    assert clutter < 1 or (digits != EMPTY).any((-1, -2)).all()
    assert clutter or (world.digits != EMPTY).sum((2, 3)).max() <= 2  # those that change in three frames
    for clip in range(2):
        for t in (1, 2):
            changed = {tuple(place) for place in np.argwhere((blocks[clip, t] != blocks[clip, t - 1]).any((-1, -2))).tolist()}
            assert changed <= {tuple((world.path[clip, t] // BLOCK).tolist())}
    (first, second) = samples(world)
    assert [first.turns[0].answer_ids, second.turns[0].answer_ids] == [
        [world.digits[clip, t, *world.path[clip, t]] for t in (1, 2)] for clip in range(2)
    ]
    assert first.turns[0].question_ids == second.turns[0].question_ids


@given(seed=st.integers(0, 2**32 - 1), grid=st.sampled_from([6, 9, 12]), clutter=st.sampled_from([0.0, 1.0]))
def test_in_the_hunt_a_digit_says_the_row_of_the_next(seed, grid, clutter):
    world = render(np.random.default_rng(seed), "train", grid=grid, clips=2, clutter=clutter, name="hunt")
    for sample, digits, path in zip(samples(world), world.digits, world.path.tolist(), strict=True):
        row, column = path[0]
        assert sample.turns[0].question_ids == [FIRST_PLACE + row, FIRST_PLACE + grid + column]
        for shown, answer in zip(digits, sample.turns[0].answer_ids, strict=True):
            assert shown[row, column] == answer
            row = answer % grid


def test_the_question_names_the_cell_and_the_answer_is_what_it_shows():
    world = render(np.random.default_rng(2), "train", grid=6, clips=3, frames=4)
    for sample, digits, (row, column) in zip(samples(world), world.digits, world.cells, strict=True):
        (turn,) = sample.turns
        assert turn.question_ids == [FIRST_PLACE + row, FIRST_PLACE + 6 + column]
        assert turn.answer_ids == digits[:, row, column].tolist()
        assert sample.question_first
        assert max(turn.question_ids) < vocabulary(6)
    assert max(*CHAT.assistant_open, *CHAT.assistant_close) < FIRST_PLACE
