import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.svm import SVC

from fvlm_core.data import gaze
from fvlm_core.data.clips import encode_mp4
from fvlm_core.data.frames import FrameRule, extract_frames


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 8), st.sampled_from([0.0, 0.4, 1.0]), st.sampled_from(["train", "val"]))
def test_questions_are_true_and_answerable(seed, frames, clutter, split):
    rng = np.random.default_rng(seed)
    clip = gaze.render(rng, split, frames=frames, clutter=clutter)
    conversations, probes = gaze.cell_questions(clip, rng)
    assert len(conversations) == len(probes) >= 1
    assert len(conversations) == 9 or clutter < 1
    for [turn], probe in zip(conversations, probes, strict=True):
        (row, column), *rest = probe["cells"]
        assert rest == [[row, column]] * (frames - 1)
        assert gaze.cell_name(row, column) in turn["question"]
        assert turn["answer"] == "".join(map(str, clip.digits[:, row, column]))
        assert probe["choices"][probe["answer_index"]] == turn["answer"]
        assert len(set(probe["choices"])) == gaze.N_CHOICES


def test_clip_is_a_function_of_the_generator():
    one, two = (gaze.render(np.random.default_rng(3), "train", frames=3, scale=3) for _ in range(2))
    assert (one.frames == two.frames).all()
    assert (one.digits == two.digits).all()
    assert one.frames.shape == (3, 126, 126, 3)
    other = gaze.render(np.random.default_rng(4), "train", frames=3, scale=3)
    assert (one.frames != other.frames).any()


def test_clutter_is_the_share_of_filled_cells():
    rng = np.random.default_rng(0)
    filled = np.mean([(gaze.render(rng, "train", frames=2, clutter=0.25).digits != gaze.EMPTY).mean() for _ in range(400)])
    assert filled == pytest.approx(1 / 9 + 8 / 9 * 0.25, abs=0.02)


def test_validation_digits_are_never_drawn_in_training():
    train, val = (gaze.digits_of(split, 8)[0] for split in ("train", "val"))
    assert (len(train), len(val)) == (1400, 397)
    assert not {image.tobytes() for image in train} & {image.tobytes() for image in val}


@pytest.mark.parametrize("clutter", [0.0, 1.0])
def test_caption_names_digits_in_order_and_their_place(clutter):
    for seed in range(8):
        clip = gaze.render(np.random.default_rng(seed), "train", frames=3, clutter=clutter)
        digits, place = gaze.caption(clip).split(" at the ")
        names = {gaze.cell_name(row, column): (row, column) for row in range(3) for column in range(3)}
        row, column = names[place]
        assert [int(digit) for digit in digits] == clip.digits[:, row, column].tolist()
        assert clutter == 0 or (row, column) == gaze.CENTRE


def test_digits_stay_readable_through_h264_and_scaling():
    """A classifier that has seen only clean digits reads held-out ones off the extracted frames."""
    images, labels = gaze.digits_of("train", gaze.DIGIT_PX)
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
    assert (classifier.predict(np.array(cells)) == truth).mean() > 0.9
