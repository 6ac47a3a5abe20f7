"""How far inference drifts from training as clips get longer: the loss in autoregressive mode against coarse->fine, by number of frames.

Training makes its queries of a parallel pass (coarse->fine), inference of what it has seen frame by frame (autoregressive): an error in one
query can grow in the next. The clips are generated (`fvlm_core.data.gaze`: which digits are in a cell of a grid that is redrawn in every
frame), so that there are some of every length, the same for every model.
"""

from typing import TYPE_CHECKING

import numpy as np

from fvlm_core.config import Positive
from fvlm_core.eval.estimates import Estimate
from fvlm_core.eval.part import Context, Count, NotMeasuredError, Part, PartResult
from fvlm_core.figures import Figure
from fvlm_core.model.names import Mode
from fvlm_core.settings import Settings
from fvlm_core.tables import Table, difference, number

if TYPE_CHECKING:  # it needs torch
    from pathlib import Path

    from fvlm_core.data.batch import Sample

PARALLEL, STEPWISE = "coarse_fine", "autoregressive"
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
        rows = [
            [str(one.frames), *(number(one.losses[mode]) for mode in modes), difference(one.difference), number(one.gap)]
            for one in self.points
        ]
        note = (
            f"Loss of the answer, nats per token, question first; {self.clips} generated clips of each length. Gap: mean size of a clip's "
        )
        note += f"difference between {STEPWISE} (inference) and {PARALLEL} (training)."
        return [Table(title=self.title, head=["frames", *modes, f"{STEPWISE} − {PARALLEL}", "gap"], rows=rows, note=note)]

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
        if lacking := [mode for mode in (PARALLEL, STEPWISE) if mode not in context.modes]:
            raise NotMeasuredError(f"mode {', '.join(lacking)} was not asked for")
        points = []
        for frames in sorted(set(self.frames)):
            samples = [_sample(context, place, frames) for place in range(self.clips)]
            clips = [sample.key for sample in samples]
            sums = context.subject.sample_losses(samples, context.modes)
            per_token = sums[STEPWISE][:, 0] / sums[STEPWISE][:, 1] - sums[PARALLEL][:, 0] / sums[PARALLEL][:, 1]
            points.append(
                DriftPoint(
                    frames=frames,
                    losses={mode: context.bootstrap.weighted_mean(rows, clips) for mode, rows in sums.items()},
                    difference=context.bootstrap.mean(per_token, clips),
                    gap=context.bootstrap.mean(np.abs(per_token), clips),
                )
            )
        context.output.mkdir(parents=True, exist_ok=True)
        _draw(context.output / PICTURE, points)
        caption = f"How much the loss differs between {STEPWISE} and {PARALLEL}, by frames of a clip, with 95 % intervals."
        return DriftResult(clips=self.clips, points=points, figure=Figure(file=PICTURE, caption=caption))


def _sample(context: Context, place: int, frames: int) -> "Sample":
    """A generated clip, with the question about one cell and its answer."""
    from fvlm_core.data import gaze
    from fvlm_core.data.batch import Sample, Turn
    from fvlm_core.eval.media import Media

    side, encode = context.answerer.rule.frame_px, context.subject.encode
    rng = np.random.default_rng([SEED, frames, place])
    clip = gaze.render(rng, "val", frames=frames, scale=max(1, side // gaze.FRAME_PX))
    media = Media(clip.frames, [list(range(frames))]).load(context.answerer.rule, 1)
    turn = Turn(encode(gaze.question(clip)), encode(clip.answer))
    return Sample(f"drift-{frames}-{place}", "drift", media.frames, media.shown, [turn], question_first=True)


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
