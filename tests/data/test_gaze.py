import json
import re
from difflib import SequenceMatcher
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import SVC

from fvlm_core.data import digits, gaze
from fvlm_core.data.clips import TABLE, encode_mp4, make_clips
from fvlm_core.data.frames import FrameRule, extract_frames
from fvlm_core.data.jobs import ClipJob, GazeSource

CLIPS = {
    "seed": st.integers(0, 2**32 - 1),
    "task": st.sampled_from(gaze.TASKS),
    "frames": st.integers(1, 8),
    "grid": st.integers(2, 5),
    "clutter": st.sampled_from([0.0, 0.4, 1.0]),
    "split": st.sampled_from(["train", "val"]),
}


def solve(clip: gaze.GazeClip, question: str) -> str:
    """Answers a question from what stands on the clip, by the rules in the words of the question; it does not see the path."""
    grid = clip.digits.shape[-1]
    names = {gaze.cell_name(row, column, grid): (row, column) for row in range(grid) for column in range(grid)}
    named = next((cell for name, cell in names.items() if re.search(rf"\b{name}\b", question)), None)
    colours = np.where(clip.digits >= 0, clip.colours, -1)

    def only(frame: int, colour: str) -> tuple[int, int]:
        [cell] = np.argwhere(colours[frame] == list(gaze.COLOURS).index(colour)).tolist()
        return tuple(cell)

    cells = []
    for t in range(len(clip.digits)):
        if "white, and where" in question:
            cells.append(only(t, "white"))
        elif "cross" in question and t:
            [cell] = np.argwhere(clip.digits[t - 1] == gaze.CROSS).tolist()
            assert divmod(clip.crosses[t - 1], clip.digits.shape[-1]) == tuple(cell)
            cells.append(tuple(cell))
        elif "follow its colour" in question:
            assert named is not None
            cells.append(only(t, list(gaze.COLOURS)[clip.colours[0, *named]]))
        elif named is not None:
            cells.append(named)
        else:
            [colour] = [name for name in gaze.COLOURS if name in question]
            cells.append(only(t, colour))
    text = "".join(str(clip.digits[t, row, column]) for t, (row, column) in enumerate(cells))
    return f"{text} at the {gaze.cell_name(*cells[0], grid)}" if "where?" in question else text


def test_distorted_copies_are_of_the_same_digits_and_others_pixels():
    """Each copy is most like digits of its own kind, and none is the digit itself; without copies nothing changes."""
    images, labels = digits.digits_of("train", 12)
    more, their = digits.digits_of("train", 12, 2)
    count = len(labels)
    assert (more[:count] == images).all()
    assert (their == np.tile(labels, 3)).all()
    assert not any((copy == images).all((1, 2)).any() for copy in more[count : count + 50])
    flat = images.reshape(count, -1).astype(float)
    nearest = [labels[((flat - copy.reshape(-1)) ** 2).sum(1).argmin()] for copy in more[count : count + 200].astype(float)]
    assert np.mean(nearest == their[count : count + 200]) > 0.95
    assert abs(more[count:].mean() / images.mean() - 1) < 0.1, "nothing is cut off"


@settings(max_examples=60, deadline=None)
@given(**CLIPS)
def test_every_question_can_be_answered_from_the_clip(seed, task, frames, grid, clutter, split):
    rng = np.random.default_rng(seed)
    clip = gaze.render(rng, split, task=task, frames=frames, grid=grid, clutter=clutter)
    conversations, probes = gaze.questions(clip, rng)
    assert len(conversations) == len(probes) >= 1
    for [turn], probe in zip(conversations, probes, strict=True):
        assert solve(clip, turn["question"]) == turn["answer"]
        if probe is None:
            assert task == "caption"
            continue
        assert turn["answer"] == "".join(str(clip.digits[t, row, column]) for t, (row, column) in enumerate(probe["cells"]))
        assert probe["choices"][probe["answer_index"]] == turn["answer"]
        assert len(set(probe["choices"])) == gaze.N_CHOICES


@settings(max_examples=30, deadline=None)
@given(**CLIPS, copies=st.sampled_from([0, 2]))
def test_a_clip_knows_the_handwritten_digits_that_it_shows(seed, task, frames, grid, clutter, split, copies):
    """By label in every cell; of an undistorted clip also by its pixels in the target cell, up to colour and shift."""
    clip = gaze.render(np.random.default_rng(seed), split, task=task, frames=frames, grid=grid, clutter=clutter, noise=0.0, copies=copies)
    images, labels = digits.digits_of(split, gaze.DIGIT_PX)
    shown = clip.digits >= 0
    assert (labels[clip.originals[shown]] == clip.digits[shown]).all()
    assert (clip.originals[~shown] == gaze.EMPTY).all()
    assert (labels[clip.asked_originals] == [int(digit) for digit in clip.answer]).all()
    if copies:
        return
    cells = clip.frames.reshape(frames, grid, gaze.CELL_PX, grid, gaze.CELL_PX, 3).swapaxes(2, 3)
    for t, (row, column) in enumerate(clip.path.tolist()):
        colour = gaze.COLOURS[list(gaze.COLOURS)[clip.colours[t, row, column]]]
        cell, brightest = cells[t, row, column, ..., int(np.argmax(colour))], max(colour)
        image = images[clip.asked_originals[t]] * brightest // 255
        windows = np.lib.stride_tricks.sliding_window_view(cell, image.shape)
        assert (windows == image).all((2, 3)).any()


def test_each_digit_has_the_form_that_it_was_collected_in():
    sizes = np.diff([*digits.FORM_STARTS, len(load_digits().target)])
    val, train = digits.forms_of("val"), digits.forms_of("train")
    assert val.tolist() == [form for form in digits.VAL_FORMS for _ in range(sizes[form])]
    assert len(val) == len(digits.digits_of("val", 8)[1]) == 380
    assert train.tolist() == [form for form in range(14) if form not in digits.VAL_FORMS for _ in range(sizes[form])]


@settings(max_examples=40, deadline=None)
@given(**CLIPS)
def test_what_is_on_a_clip_stands_in_its_pixels(seed, task, frames, grid, clutter, split):
    """Cells with a digit have its colour, empty ones are dark, a cross is white."""
    clip = gaze.render(np.random.default_rng(seed), split, task=task, frames=frames, grid=grid, clutter=clutter, noise=0.0)
    cells = clip.frames.reshape(frames, grid, gaze.CELL_PX, grid, gaze.CELL_PX, 3).max((2, 4)).astype(float)  # the brightest pixel
    palette = np.array(list(gaze.COLOURS.values()), float)
    for t, row, column in np.ndindex(clip.digits.shape):
        seen, digit = cells[t, row, column], clip.digits[t, row, column]
        if digit == gaze.EMPTY:
            assert not seen.any()
        else:
            colour = gaze.WHITE if digit == gaze.CROSS else clip.colours[t, row, column]
            assert np.allclose(seen / seen.max(), palette[colour] / palette[colour].max(), atol=0.03)


@pytest.mark.parametrize("task", gaze.TASKS)
def test_clip_is_a_function_of_the_generator(task):
    one, two = (gaze.render(np.random.default_rng(3), "train", task=task, frames=3, scale=3) for _ in range(2))
    assert (one.frames == two.frames).all()
    assert (one.digits == two.digits).all()
    assert one.frames.shape == (3, 126, 126, 3)
    other = gaze.render(np.random.default_rng(4), "train", task=task, frames=3, scale=3)
    assert (one.frames != other.frames).any()


@pytest.mark.parametrize("task", gaze.TASKS)
def test_without_clutter_a_clip_keeps_the_digits_that_count(task):
    """The control that takes all distraction away shows the very same digits in the same places."""
    full, bare = (gaze.render(np.random.default_rng(7), "val", task=task, frames=4, clutter=clutter) for clutter in (1.0, 0.0))
    assert (full.path == bare.path).all()
    assert full.answer == bare.answer
    assert ((bare.digits >= 0).sum((1, 2)) == 1).all()
    for t, (row, column) in enumerate(full.path):
        here = np.s_[t, row * 14 : row * 14 + 14, column * 14 : column * 14 + 14]
        assert (full.frames[here] == bare.frames[here]).all()


def test_clutter_is_the_share_of_filled_cells():
    rng = np.random.default_rng(0)
    filled = np.mean([(gaze.render(rng, "train", frames=2, clutter=0.25).digits != gaze.EMPTY).mean() for _ in range(400)])
    assert filled == pytest.approx(1 / 9 + 8 / 9 * 0.25, abs=0.02)


@pytest.mark.parametrize("task", gaze.TASKS)
def test_every_cell_counts_equally_often(task):
    rng = np.random.default_rng(1)
    paths = np.concatenate([gaze.render(rng, "train", task=task, frames=3).path[:1] for _ in range(900)])
    counts = np.bincount(paths @ (3, 1), minlength=9)
    assert counts.min() > 60  # 100 expected, standard deviation 9.4
    assert counts.max() < 140


@pytest.mark.parametrize("task", gaze.OF_A_COLOUR)
@pytest.mark.parametrize("grid", [3, 5])
def test_the_colour_that_counts_is_one_of_many_that_stand_once(task, grid):
    """So a frame alone does not tell which of them is asked for; all of them are, over many clips."""
    rng, asked, count = np.random.default_rng(3), set(), gaze.usual_colours(task)
    for _ in range(100):
        clip = gaze.render(rng, "train", task=task, frames=4, grid=grid)
        colours = clip.colours[np.arange(4), *clip.path.T]
        assert len(set(colours)) == 1
        asked.add(int(colours[0]))
        for frame in clip.colours:
            times = np.bincount(frame.ravel(), minlength=count)
            assert times[colours[0]] == 1
            assert sorted(times)[:-1] == [1] * (count - 1)
    assert asked == set(range(count))


@pytest.mark.parametrize("count", [5, 10])
def test_a_clip_has_no_other_number_of_colours(count):
    with pytest.raises(ValueError, match=f"6 to 9 colours, not {count}"):
        gaze.render(np.random.default_rng(0), "train", frames=1, colours=count)


def test_paths_move_as_the_task_says():
    rng = np.random.default_rng(2)
    for _ in range(50):
        hunt = gaze.render(rng, "train", task="hunt", frames=6).path
        assert (np.abs(np.diff(hunt, axis=0)).max(1) > 0).all()
        track = gaze.render(rng, "train", task="track", frames=6).path
        assert (np.abs(np.diff(track, axis=0)).max(1) == 1).all()


def test_a_grid_of_one_cell_is_refused():
    with pytest.raises(ValueError, match="2 x 2"):
        gaze.render(np.random.default_rng(0), "train", frames=1, grid=1)


def test_every_form_is_in_one_split():
    """Every writer copied one text, so the labels tell where each form begins; a digit is missing here and there."""
    labels = "".join(map(str, load_digits().target))
    bounds = [*digits.FORM_STARTS, len(labels)]
    forms = [labels[start:end] for start, end in pairwise(bounds)]
    for form, before in zip(forms, ["", *forms], strict=False):
        assert SequenceMatcher(None, forms[0], form, autojunk=False).ratio() > 0.95
        assert form.startswith("0123456789") or (form.startswith("123456789") and not before.endswith("0"))
    val = [int(digit) for number in digits.VAL_FORMS for digit in forms[number]]
    train = [int(digit) for number, form in enumerate(forms) if number not in digits.VAL_FORMS for digit in form]
    assert digits.digits_of("val", 8)[1].tolist() == val
    assert digits.digits_of("train", 8)[1].tolist() == train
    assert (len(train), len(val)) == (1417, 380)
    images = (load_digits().images[np.isin(np.repeat(range(14), list(map(len, forms))), digits.VAL_FORMS)] * (255 / 16)).astype(np.uint16)
    assert np.array_equal(digits.digits_of("val", 8)[0], images)


def test_writers_of_the_splits_are_different():
    """A nearest neighbour reads unknown writers worse than held-out digits of known ones: what a random split would leak."""
    (train, train_labels), (val, val_labels) = (digits.digits_of(split, 8) for split in ("train", "val"))
    pixels, labels = np.concatenate([train, val]).reshape(-1, 64), np.concatenate([train_labels, val_labels])

    def nearest(held_out: np.ndarray) -> float:
        known = np.setdiff1d(np.arange(len(labels)), held_out)
        return KNeighborsClassifier(1).fit(pixels[known], labels[known]).score(pixels[held_out], labels[held_out])

    random = np.mean([nearest(np.random.default_rng(seed).permutation(len(labels))[: len(val)]) for seed in range(5)])
    by_writer = nearest(np.arange(len(train), len(labels)))
    assert random > 0.98
    assert by_writer < random - 0.015


@pytest.mark.parametrize("clutter", [0.0, 1.0])
def test_caption_names_digits_in_order_and_their_place(clutter):
    for seed in range(8):
        clip = gaze.render(np.random.default_rng(seed), "train", task="caption", frames=3, clutter=clutter)
        shown, place = gaze.caption(clip).split(" at the ")
        names = {gaze.cell_name(row, column): (row, column) for row in range(3) for column in range(3)}
        row, column = names[place]
        assert [int(digit) for digit in shown] == clip.digits[:, row, column].tolist()
        assert (clip.colours[:, row, column] == gaze.WHITE).all()


def test_digits_stay_readable_through_h264_and_scaling():
    """A classifier that has seen only clean digits reads those of other writers off the extracted frames."""
    images, labels = digits.digits_of("train", gaze.DIGIT_PX)
    classifier = SVC(C=10).fit(np.pad(images, ((0, 0), (1, 1), (1, 1))).reshape(len(images), -1) / 255, labels)
    rng = np.random.default_rng(0)
    cells, truth = [], []
    for _ in range(30):
        clip = gaze.render(rng, "val", frames=3, scale=3)
        pixels = extract_frames(encode_mp4(clip.frames), FrameRule(gaze.FRAME_PX)).pixels
        bright = pixels.max(axis=3) / 255.0
        grid = bright.reshape(3, 3, gaze.CELL_PX, 3, gaze.CELL_PX).transpose(0, 1, 3, 2, 4).reshape(27, gaze.CELL_PX, gaze.CELL_PX)
        for cell in grid:  # digits move by a pixel: centre them as the clean ones are
            mass = np.argwhere(cell > 0.25)
            shift = np.round((gaze.CELL_PX - 1) / 2 - (mass.min(0) + mass.max(0)) / 2).astype(int)
            cells.append(np.roll(cell, shift, (0, 1)).ravel())
        truth.extend(clip.digits.ravel())
    assert (classifier.predict(np.array(cells)) == truth).mean() > 0.87


@given(st.integers(42, 250))
@settings(max_examples=20)
def test_the_grid_fills_frames_of_any_side(side):
    """Every cell's share of the frame is as bright as before, whatever the side."""
    small = gaze.render(np.random.default_rng(0), "val", frames=1, scale=gaze.largest_scale(side), noise=0)
    clip = gaze.render_to_fit(np.random.default_rng(0), "val", side, frames=1, noise=0)
    assert clip.frames.shape == (1, side, side, 3)
    edges = [(side * number // 3, side * (number + 1) // 3) for number in range(3)]
    means = np.array([[clip.frames[0, a:b, c:d].mean() for c, d in edges] for a, b in edges])
    cell = small.frames.shape[1] // 3
    expected = small.frames[0].reshape(3, cell, 3, cell, 3).mean((1, 3, 4))
    assert np.allclose(means, expected, rtol=0.12, atol=2)


@pytest.mark.parametrize(("patches", "cells"), [(3, [1, 1, 1]), (6, [2, 2, 2]), (16, [5, 6, 5])])
def test_patches_belong_to_the_cell_of_their_middle(patches, cells):
    assert np.bincount(gaze.cells_of_patches(patches)).tolist() == cells
    assert (np.diff(gaze.cells_of_patches(patches)) >= 0).all()


def test_every_task_is_a_source_of_clips(tmp_path):
    sources = {f"gaze_{task}": GazeSource(task=task, train=1, val=1) for task in gaze.TASKS}
    make_clips(ClipJob(output=tmp_path, sources=sources, scale=2))
    rows = pd.read_parquet(tmp_path / TABLE).to_dict("records")
    assert len(rows) == 2 * len(gaze.TASKS)
    for row in rows:
        task = row["source"].removeprefix("gaze_")
        asked = list(zip(json.loads(row["conversations"]), json.loads(row["probes"]), strict=True))
        digits = np.array(json.loads(row["extra"])["digits"])
        for [turn], probe in asked:
            if task == "caption":
                assert (probe, turn["answer"]) == (None, row["caption"])
            else:
                assert probe["task"] == task
                assert turn["answer"] == "".join(str(digits[t, r, c]) for t, (r, c) in enumerate(probe["cells"]))
        if task not in gaze.OF_A_PLACE:
            assert row["caption"] == asked[0][0][0]["answer"]
