"""How far inference drifts from training as clips get longer: the loss in autoregressive mode against coarse->fine, by number of frames.

Training makes its queries of a parallel pass (coarse->fine), inference of what it has seen frame by frame (autoregressive): an error in one
query can grow in the next. The clips are generated (`fvlm_core.data.gaze`: which digits are in a cell of a grid that is redrawn in every
frame), so that there are some of every length, the same for every model. Where training never showed a length, the answer to it is not
learned and its loss says little; whether the queries still find the asked cell is then seen by the gaze.
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
    """Clips of one length."""

    frames: int
    losses: dict[Mode, Estimate]
    """Cross-entropy of the answer, nats per token."""
    difference: Estimate
    """Autoregressive minus coarse->fine, nats per token."""
    gap: Estimate
    """Mean over clips of its size: that one clip is better and another one worse does not cancel out."""
    on_target: dict[Mode, Estimate] = {}
    """Share of frames whose attention peaks in the asked cell; by chance 1 in 9."""
    on_target_last: dict[Mode, Estimate] = {}
    """The same of the last quarter of the frames."""


class DriftResult(PartResult):
    """The gap by number of frames."""

    title = "Gap between training and inference"

    clips: int
    """Of each length."""
    points: list[DriftPoint]
    figure: Figure | None = None

    def count(self) -> int:
        """Clips, of all lengths."""
        return self.clips * len(self.points)

    def tables(self) -> list[Table]:
        """A row per number of frames."""
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
        note = f"Loss of the answer, nats per token, question first; {self.clips} generated clips of each length. Gap: mean size of a "
        note += f"clip's difference between {STEPWISE} (inference) and {PARALLEL} (training). The answer is a digit a frame: a loss of "
        note += "2.3 or more is guessing, such a length was not learned, and its gap says little. Gaze: share of frames whose attention "
        note += "peaks in the asked cell, and of the last quarter of them; 0.111 by chance."
        head = [
            "frames",
            *modes,
            f"{STEPWISE} − {PARALLEL}",
            "gap",
            *(f"{what}, {mode}" for what in ("gaze", "gaze at the end") for mode in looks),
        ]
        return [Table(title=self.title, head=head, rows=rows, note=note)]

    def figures(self) -> list[Figure]:
        """The gap over the number of frames."""
        return [self.figure] if self.figure else []


class Drift(Part):
    """The gap between training's and inference's queries, by number of frames."""

    result = DriftResult
    needs_queries = True

    clips: Count = 16
    """Generated clips of each length; 0 leaves it out."""
    frames: list[Positive] = [4, 8, 16, 32, 64]
    """Lengths in frames."""

    def measure(self, context: Context) -> DriftResult:
        """The loss of the same clips in every mode, length by length."""
        if not self.clips or not self.frames:
            raise NotMeasuredError("switched off")
        if lacking := [mode for mode in COMPARED if mode not in context.modes]:
            raise NotMeasuredError(f"mode {', '.join(lacking)} was not asked for")
        return drift_of(context.answerer, context.modes, context.bootstrap, context.output, clips=self.clips, frames=self.frames)


def drift_of(
    answerer: "FoveatedAnswerer", modes: Sequence[Mode], bootstrap: "Bootstrap", output: "Path", *, clips: int, frames: Sequence[int]
) -> DriftResult:
    """The loss of the same clips in `modes` (both compared ones among them), length by length; the picture goes to `output`."""
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
                on_target={mode: bootstrap.mean(rows.mean(1), names) for mode, rows in hits.items()},
                on_target_last={mode: bootstrap.mean(rows[:, 3 * length // 4 :].mean(1), names) for mode, rows in hits.items()},
            )
        )
    output.mkdir(parents=True, exist_ok=True)
    _draw(output / PICTURE, points)
    caption = f"How much the loss differs between {STEPWISE} and {PARALLEL}, by frames of a clip, with 95 % intervals."
    return DriftResult(clips=clips, points=points, figure=Figure(file=PICTURE, caption=caption))


def _hits(subject: "Subject", made: "Sequence[tuple[Sample, np.ndarray]]", mode: Mode) -> np.ndarray:
    """Whether each frame's attention peaks in the asked cell: bool [clips, frames]."""
    from fvlm_core.eval.questions import without_answer  # needs torch

    maps = subject.gaze([without_answer(sample, question_first=True) for sample, _ in made], mode)
    return np.stack([gaze_hits(attention, path.tolist()) for attention, (_, path) in zip(maps, made, strict=True)])


def _sample(answerer: "FoveatedAnswerer", place: int, frames: int) -> "tuple[Sample, np.ndarray]":
    """A generated clip, with the question about one cell and its answer; and that cell in each frame, int [frames, 2]."""
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

    with matplotlib.rc_context({"font.family": "DejaVu Sans", "font.size": 8}):  # matplotlib's own font: the same everywhere
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
