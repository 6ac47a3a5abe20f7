"""The gap between training and inference by number of frames, against losses of each clip alone."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fvlm_core.data import gaze
from fvlm_core.data.batch import Sample, Turn
from fvlm_core.eval.part import Context, NotMeasuredError
from fvlm_core.eval.parts.drift import SEED, Drift
from fvlm_core.eval.questions import without_answer
from tests.eval.test_scoring import direct_losses


def test_the_gap_is_the_difference_of_each_clips_losses(context: Context):
    result = Drift(clips=3, frames=[8, 4]).measure(context)
    assert [one.frames for one in result.points] == [4, 8]
    for point in result.points:
        losses = {mode: [] for mode in ("coarse_fine", "autoregressive")}
        hits = {mode: [] for mode in losses}
        for place in range(3):
            clip = gaze.render(np.random.default_rng([SEED, point.frames, place]), "val", frames=point.frames)
            turn = Turn(context.subject.encode(gaze.question(clip)), context.subject.encode(clip.answer))
            sample = Sample("one", "", clip.frames, [list(range(point.frames))], [turn], question_first=True)
            for mode, found in losses.items():
                found.append(np.mean(direct_losses(context.subject, sample, mode)))
                (attention,) = context.subject.gaze([without_answer(sample, question_first=True)], mode)
                peaks = [divmod(int(frame.argmax()), 3) for frame in attention]
                hits[mode].append([peak == tuple(cell) for peak, cell in zip(peaks, clip.path.tolist(), strict=True)])
        differences = np.subtract(losses["autoregressive"], losses["coarse_fine"])
        assert abs(differences).max() > 1e-5, "the modes differ"
        assert point.difference.value == pytest.approx(differences.mean(), abs=1e-5)
        assert point.gap.value == pytest.approx(abs(differences).mean(), abs=1e-5)
        assert point.gap.low <= point.gap.value <= point.gap.high
        for mode, shares in hits.items():
            assert point.on_target[mode].value == pytest.approx(np.mean(shares), abs=1e-6)
            last = np.mean([hit[3 * point.frames // 4 :] for hit in shares])
            assert point.on_target_last[mode].value == pytest.approx(last, abs=1e-6)
            for share, count in ((point.on_target[mode], point.frames), (point.on_target_last[mode], point.frames // 4)):
                assert (share.n, share.count, share.exact) == (3, 3 * count, True), "three clips are few"
                assert share.low < share.high
    (table,) = result.tables()
    assert [row[0] for row in table.rows] == ["4", "8"]
    (figure,) = result.figures()
    assert Image.open(Path(context.output) / figure.file).size[0] > 100


def test_it_says_why_there_is_no_gap(context: Context):
    with pytest.raises(NotMeasuredError, match="switched off"):
        Drift(clips=0).measure(context)
    coarse = Context(**{**vars(context), "modes": ["coarse_only", "coarse_fine"]})
    with pytest.raises(NotMeasuredError, match="mode autoregressive was not asked for"):
        Drift(clips=1).measure(coarse)
