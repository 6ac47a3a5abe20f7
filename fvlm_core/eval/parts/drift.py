"""Drift between training and inference on longer clips: the loss in autoregressive mode minus that in coarse->fine, by number of frames.

In training, queries come from a parallel pass (coarse->fine); at inference, they come from the frames seen so far (autoregressive), so an
error in one query can grow in the next. The clips are generated (`fvlm_core.data.gaze`: which digits appear in one cell of a grid that is
redrawn in every frame), so every length is available and all models get the same clips. If training had no clips of some length, the
model has not learned to answer at that length, and its loss says little; the gaze still shows whether the queries find the asked cell.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fvlm_core.config import Positive
from fvlm_core.eval.estimates import Estimate
from fvlm_core.eval.part import Context, Count, NotMeasuredError, Part, PartResult
from fvlm_core.eval.parts.question_order import gaze_hits
from fvlm_core.figures import Figure
from fvlm_core.model.names import Mode
from fvlm_core.settings import Settings
from fvlm_core.tables import Table, difference, number

if TYPE_CHECKING:  # it needs torch
    from pathlib import Path

    from fvlm_core.data.batch import Sample
    from fvlm_core.eval.answerers.foveated import FoveatedAnswerer
    from fvlm_core.eval.stats import Bootstrap
    from fvlm_core.eval.subject import Subject

PARALLEL: Mode = "coarse_fine"
STEPWISE: Mode = "autoregressive"
COMPARED: tuple[Mode, ...] = (PARALLEL, STEPWISE)
SEED = 20_262
PICTURE = "drift.png"


class DriftPoint(Settings):
    """Results on clips of one length."""

    frames: int
    losses: dict[Mode, Estimate]
    """Cross-entropy of the answer, in nats per token."""
    difference: Estimate
    """Loss in mode autoregressive minus loss in coarse->fine, in nats per token."""
    gap: Estimate
    """Mean absolute difference per clip, in which differences of opposite sign do not cancel."""
    on_target: dict[Mode, Estimate] = {}
    """Share of frames whose attention peak is in the asked cell; 1/9 by chance."""
    on_target_last: dict[Mode, Estimate] = {}
    """The same for the last quarter of the frames."""


class DriftResult(PartResult):
    """The gap by number of frames."""

    title = "Gap between training and inference"

    clips: int
    """Number of clips of each length."""
    points: list[DriftPoint]
    figure: Figure | None = None

    def count(self) -> int:
        """Number of clips of all lengths."""
        return self.clips * len(self.points)

    def tables(self) -> list[Table]:
        """A table with one row per number of frames."""
        modes = list(self.points[0].losses)
        looks = list(self.points[0].on_target)
        rows = [
            [
                str(one.frames),
                *(number(one.losses[mode]) for mode in modes),
                difference(one.difference),
                number(one.gap),
                *(number(of[mode]) for of in (one.on_target, one.on_target_last) for mode in looks),
            ]
            for one in self.points
        ]
        note = f"Loss of the answer, nats per token, question first; {self.clips} generated clips of each length. Gap: mean absolute "
        note += f"difference per clip between {STEPWISE} (inference) and {PARALLEL} (training). The answer has one digit per frame: a loss "
        note += "of 2.3 or more is guessing, so that length was not learned and its gap says little. Gaze: share of frames whose attention "
        note += "peak is in the asked cell, over all frames and over the last quarter; 0.111 by chance."
        head = [
            "frames",
            *modes,
            f"{STEPWISE} − {PARALLEL}",
            "gap",
            *(f"{what}, {mode}" for what in ("gaze", "gaze at the end") for mode in looks),
        ]
        return [Table(title=self.title, head=head, rows=rows, note=note)]

    def figures(self) -> list[Figure]:
        """A plot of the gap over the number of frames."""
        return [self.figure] if self.figure else []


class Drift(Part):
    """The gap between the queries of training and of inference, by number of frames."""

    result = DriftResult
    needs_queries = True

    clips: Count = 16
    """Number of generated clips of each length; 0 skips this part."""
    frames: list[Positive] = [4, 8, 16, 32, 64]
    """Clip lengths, in frames."""

    def measure(self, context: Context) -> DriftResult:
        """Measure the loss of the same clips in every mode, for each length."""
        if not self.clips or not self.frames:
            raise NotMeasuredError("switched off")
        if lacking := [mode for mode in COMPARED if mode not in context.modes]:
            raise NotMeasuredError(f"mode {', '.join(lacking)} was not asked for")
        return drift_of(context.answerer, context.modes, context.bootstrap, context.output, clips=self.clips, frames=self.frames)


def drift_of(
    answerer: "FoveatedAnswerer", modes: Sequence[Mode], bootstrap: "Bootstrap", output: "Path", *, clips: int, frames: Sequence[int]
) -> DriftResult:
    """Measure the loss of the same clips in `modes`, which must include `COMPARED`, for each length; save the figure to `output`."""
    subject, points = answerer.subject, []
    for length in sorted(set(frames)):
        made = [_sample(answerer, place, length) for place in range(clips)]
        samples, names = [sample for sample, _ in made], [sample.key for sample, _ in made]
        sums = subject.sample_losses(samples, modes)
        per_token = sums[STEPWISE][:, 0] / sums[STEPWISE][:, 1] - sums[PARALLEL][:, 0] / sums[PARALLEL][:, 1]
        hits: dict[Mode, np.ndarray] = {mode: _hits(subject, made, mode) for mode in COMPARED}
        points.append(
            DriftPoint(
                frames=length,
                losses={mode: bootstrap.weighted_mean(rows, names) for mode, rows in sums.items()},
                difference=bootstrap.mean(per_token, names),
                gap=bootstrap.mean(np.abs(per_token), names),
                on_target={mode: _share(rows, names, bootstrap) for mode, rows in hits.items()},
                on_target_last={mode: _share(rows[:, 3 * length // 4 :], names, bootstrap) for mode, rows in hits.items()},
            )
        )
    output.mkdir(parents=True, exist_ok=True)
    _draw(output / PICTURE, points)
    caption = f"How much the loss differs between {STEPWISE} and {PARALLEL}, by frames of a clip, with 95 % intervals."
    return DriftResult(clips=clips, points=points, figure=Figure(file=PICTURE, caption=caption))


def _share(hits: np.ndarray, clips: Sequence[str], bootstrap: "Bootstrap") -> Estimate:
    """Share of true values over all frames, for hits of shape [clips, frames]."""
    return bootstrap.share(hits.ravel(), np.repeat(clips, hits.shape[1]).tolist())


def _hits(subject: "Subject", made: "Sequence[tuple[Sample, np.ndarray]]", mode: Mode) -> np.ndarray:
    """Whether the attention peak of each frame is in the asked cell: bool [clips, frames]."""
    from fvlm_core.eval.questions import without_answer  # needs torch

    maps = subject.gaze([without_answer(sample, question_first=True) for sample, _ in made], mode)
    return np.stack([gaze_hits(attention, path.tolist()) for attention, (_, path) in zip(maps, made, strict=True)])


def _sample(answerer: "FoveatedAnswerer", place: int, frames: int) -> "tuple[Sample, np.ndarray]":
    """A generated clip with a question about one cell and its answer; and that cell's row and column in each frame, int [frames, 2]."""
    from fvlm_core.data import gaze
    from fvlm_core.data.batch import Sample, Turn
    from fvlm_core.eval.media import Media

    side, encode = answerer.rule.frame_px, answerer.subject.encode
    rng = np.random.default_rng([SEED, frames, place])
    clip = gaze.render(rng, "val", frames=frames, scale=gaze.largest_scale(side))
    media = Media(clip.frames, [list(range(frames))]).load(answerer.rule, 1)
    turn = Turn(encode(gaze.question(clip)), encode(clip.answer))
    return Sample(f"drift-{frames}-{place}", "drift", media.frames, media.shown, [turn], question_first=True), clip.path


def _draw(path: "Path", points: list[DriftPoint]) -> None:
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    with matplotlib.rc_context({"font.family": "DejaVu Sans", "font.size": 8}):  # ships with matplotlib, so it is the same everywhere
        canvas = Canvas(figsize=(4.2, 3.0), dpi=110, layout="constrained")
        axes = canvas.subplots()
        frames = [one.frames for one in points]
        for label, marker, values in (
            ("size of a clip's difference", "o", [one.gap for one in points]),
            (f"{STEPWISE} − {PARALLEL}", "s", [one.difference for one in points]),
        ):
            spread = [[one.value - one.low for one in values], [one.high - one.value for one in values]]
            axes.errorbar(frames, [one.value for one in values], yerr=spread, fmt=f"{marker}-", capsize=2, label=label)
        axes.axhline(0, color="0.7", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_xticks(frames, [str(one) for one in frames])
        axes.set(xlabel="frames", ylabel="nats per token")
        axes.legend(fontsize=7)
        canvas.savefig(path, metadata={"Software": None})
