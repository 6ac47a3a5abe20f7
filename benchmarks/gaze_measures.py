"""Accuracy and gaze of a trained model on held-out clips, with baselines and controls.

Every condition answers the same questions, one per clip, so conditions are compared in pairs. The clip is the unit of tests and intervals.
These hold the digits fixed, although the clips draw the same few hundred handwritten digits again and again. So every accuracy also has an
interval over both clips and digits, and is reported for each held-out form of handwriting. With three forms, there is no interval over
writers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from benchmarks.gaze_training import Plan, Trained
from fvlm_core.data import gaze
from fvlm_core.data.batch import Sample
from fvlm_core.data.digits import forms_of
from fvlm_core.eval.estimates import Estimate
from fvlm_core.eval.parts.question_order import gaze_hits
from fvlm_core.eval.stats import Bootstrap, holm, sign_flip
from fvlm_core.model.inference import continue_greedily, read_batch
from fvlm_core.model.names import Mode

SEED = 20_266
"""Seed of the evaluation clips. Training uses other seeds, and none of the held-out digits."""
SHORT: dict[Mode, str] = {"coarse_only": "coarse", "coarse_fine": "fine", "autoregressive": "autoregressive"}
MAIN = "fine, question first"
CONTROLS: dict[str, dict[str, object]] = {
    "trained with random queries": {"query": "random"},
    "9 pooled tokens": {"query": "pooled", "fine_iterations": 0, "tokens_per_frame": 9},
    "16 pooled tokens": {"query": "pooled", "fine_iterations": 0, "tokens_per_frame": 16},
    "mean of patches, modulated by the question": {"query": "shallow", "temperature": 1e6, "film_head_width": 128},
}
"""Trained controls, as changes of the model's settings. At laptop size 9 tokens are the 9 patches of the grid; 16 are four of the patches
and averages of neighbours. At a temperature of 1e6 a shallow query weights all patches equally, and the FiLM head still sees the query."""
VARIANTS: dict[str, dict[str, object]] = {"attention at temperature 1": {"temperature": 1.0}}
"""The model with one setting changed that was suspected of preventing it from learning to look."""


@dataclass(frozen=True)
class Answers:
    """The answers of one condition."""

    right: np.ndarray
    """bool [clips, frames]."""
    hits: np.ndarray | None = None
    """bool [clips, frames]: whether attention peaks on the target cell."""


@dataclass(frozen=True)
class Row:
    """A row of the table: one condition."""

    condition: str
    accuracy: Estimate
    by_frame: list[float]
    by_cell: list[float | None]
    """Cells in row-major order; None if no frame asks for the cell."""
    on_target: Estimate | None
    difference: Estimate | None = None
    """`MAIN` minus this condition, on the same clips."""
    p_value: float | None = None
    """Two-sided p-value of the difference, adjusted by Holm for all rows of the table."""
    over_clips_and_digits: Estimate | None = None
    """The accuracy with an interval over clips and the handwritten digits asked for (`Bootstrap.two_way`)."""
    by_form: dict[int, float] = field(default_factory=dict)
    """Accuracy by form of handwriting (`fvlm_core.data.digits.VAL_FORMS`)."""

    @property
    def worst_cell(self) -> float:
        """The lowest accuracy of any cell."""
        return min(share for share in self.by_cell if share is not None)


class Asked:
    """The held-out clips, all with a full grid."""

    def __init__(self, plan: Plan, clips: int) -> None:
        self.plan = plan
        self.clips = [self._clip(number, 1.0) for number in range(clips)]
        self.alone = [self._clip(number, 0.0) for number in range(clips)]
        """The same clips without the other digits: only the target digit is visible."""
        self.path = np.stack([clip.path for clip in self.clips])
        self.names = [str(number) for number in range(clips)]
        self.originals = np.stack([clip.asked_originals for clip in self.clips])
        """int [clips, frames]: the held-out handwritten digit that is asked for."""
        self.forms = forms_of("val")[self.originals]

    def _clip(self, number: int, clutter: float) -> gaze.GazeClip:
        rng, plan = np.random.default_rng([SEED, number]), self.plan
        options = {"task": plan.task, "frames": plan.frames, "clutter": clutter, "noise": plan.noise}
        return gaze.render_to_fit(rng, "val", plan.vision.frame_px, **options)

    @property
    def constant(self) -> float:
        """Accuracy of always answering the most frequent digit."""
        digits = "".join(clip.answer for clip in self.clips)
        return max(map(digits.count, set(digits))) / len(digits)

    @property
    def bag_ceiling(self) -> float:
        """Accuracy of knowing every digit of a frame but not which one is asked for: the best guess is the most frequent digit.

        In tasks that select by colour, only digits whose colour occurs once are candidates, and the guesser knows that too.
        """
        shares = []
        for clip in self.clips:
            for digits, colours in zip(clip.digits, clip.colours, strict=True):
                possible = digits >= 0
                if clip.task in gaze.OF_A_COLOUR:
                    possible &= np.bincount(colours[possible], minlength=len(gaze.COLOURS))[colours] == 1
                counts = np.bincount(digits[possible])
                shares.append(counts.max() / counts.sum())
        return float(np.mean(shares))


def answers(trained: Trained, asked: Asked) -> dict[str, Answers]:
    """Answer in every mode with the question first and after, and with random queries, without distractors, and with black frames."""
    model = trained.subject.model
    found = {}
    for order, first in (("first", True), ("after", False)):
        samples = _samples(trained, asked.clips, first=first)
        for mode in model.modes:
            found[f"{SHORT[mode]}, question {order}"] = _ask(trained, asked, samples, mode)
    samples = _samples(trained, asked.clips, first=True)
    mode = model.modes[min(1, len(model.modes) - 1)]
    if trained.subject.gazes:
        found["fine, random queries"] = Answers(_right(_ask_at_random(trained, samples), asked))
        found["fine, only the digit that counts"] = _ask(trained, asked, _samples(trained, asked.alone, first=True), mode)
    found["fine, black frames"] = _ask(trained, asked, [replace(one, frames=np.zeros_like(one.frames)) for one in samples], mode)
    return found


def table(found: dict[str, Answers], asked: Asked, bootstrap: Bootstrap) -> list[Row]:
    """Return a row per condition, compared with `MAIN` if that is among them."""
    rows, main = [], found.get(MAIN)
    others = [name for name in found if name != MAIN and main is not None]
    gains = {name: main.right.mean(1) - found[name].right.mean(1) for name in others} if main else {}
    p_values = dict(zip(others, holm([sign_flip(gains[name], asked.names) for name in others]), strict=True))
    cells = asked.path @ (gaze.GRID, 1)
    clips_of_frames = np.repeat(asked.names, asked.plan.frames).tolist()
    digits_of_frames = asked.originals.ravel().astype(str).tolist()
    for name, one in found.items():
        rows.append(
            Row(
                condition=name,
                accuracy=bootstrap.share(one.right.ravel(), clips_of_frames),
                by_frame=one.right.mean(0).round(4).tolist(),
                by_cell=[float(one.right[cells == cell].mean()) if (cells == cell).any() else None for cell in range(gaze.GRID**2)],
                on_target=None if one.hits is None else bootstrap.share(one.hits.ravel(), clips_of_frames),
                difference=bootstrap.mean(gains[name], asked.names) if name in gains else None,
                p_value=p_values.get(name),
                over_clips_and_digits=bootstrap.two_way(one.right.ravel(), clips_of_frames, digits_of_frames),
                by_form={int(form): round(float(one.right[asked.forms == form].mean()), 4) for form in np.unique(asked.forms)},
            )
        )
    return rows


def _samples(trained: Trained, clips: Sequence[gaze.GazeClip], *, first: bool) -> list[Sample]:
    return [trained.asker.sample(clip, question_first=first, answered=False) for clip in clips]


def _ask(trained: Trained, asked: Asked, samples: Sequence[Sample], mode: Mode) -> Answers:
    """Return the answers in a mode and, if the model attends, where it looked."""
    said = trained.subject.generate(samples, mode, max_new_tokens=asked.plan.frames + 1)
    hits = None
    if trained.subject.gazes:
        maps = trained.subject.gaze(samples, mode)
        hits = np.stack([gaze_hits(attention, path.tolist()) for attention, path in zip(maps, asked.path, strict=True)])
    return Answers(_right(said, asked), hits)


@torch.inference_mode()
def _ask_at_random(trained: Trained, samples: Sequence[Sample]) -> list[str]:
    """Return fine-mode answers with random queries, drawn from a normal distribution with the standard deviation of `q_init`."""
    subject = trained.subject
    model, stop = subject.model, trained.asker.chat.assistant_close[:1]
    generator = torch.Generator().manual_seed(SEED)
    said = []
    for batch in subject.batches(samples):
        shape = (len(batch.shown_frames), *model.connector.q_init.shape)
        queries = torch.randn(shape, generator=generator).to(subject.device) * model.connector.q_init.std()
        with subject.autocast():
            context = read_batch(model, batch, "coarse_fine", queries=queries, room=trained.asker.plan.frames + 1)
            assert context.cache is not None
            hidden = context.hidden[batch.cu_seqlens[1:].long() - 1]
            ids = continue_greedily(model, context.cache, hidden, max_new_tokens=trained.asker.plan.frames + 1, stop_ids=stop)
        said.extend(subject.decode(one) for one in ids)
    return said


def _right(said: Sequence[str], asked: Asked) -> np.ndarray:
    """Return which characters are correct, bool [clips, frames]. An answer of the wrong length has none correct."""
    frames = asked.plan.frames
    rows = [
        [given == wanted for given, wanted in zip(text, clip.answer, strict=True)] if len(text) == frames else [False] * frames
        for text, clip in zip(said, asked.clips, strict=True)
    ]
    return np.array(rows)
