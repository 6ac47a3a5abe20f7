"""The schema of `results.json`, the single source of every number a table, card or report prints; and the step's manifest.

Nothing here needs torch, so flows and reports can read results cheaply. Every number that is measured on samples is an
`Estimate`: value, 95 % interval and how many independent units it rests on.
"""

from pathlib import Path
from typing import Literal, Self

from pydantic import ValidationError

from fvlm_core.errors import UserError
from fvlm_core.manifest import Manifest, write_atomically
from fvlm_core.model.names import Mode
from fvlm_core.settings import Settings

FILE_NAME = "results.json"
LATENCY_FILE = "latency.json"
TABLES_FILE = "tables.md"
GAZE_PICTURE = "gaze.png"
"""The composite picture for a README; made where the run's model looks at all (not for pooled baselines)."""

Order = Literal["question_first", "question_after"]
ORDERS: tuple[Order, ...] = ("question_first", "question_after")


class Estimate(Settings):
    """A measured number with its 95 % bootstrap interval (over clips: questions about one clip are not independent)."""

    value: float
    low: float
    high: float
    n: int
    """Independent units that were resampled: clips (or texts)."""
    count: int
    """What was averaged or pooled: labelled tokens, captions, questions, answer words or frames."""


class CaptionScores(Settings):
    """Greedy captions against the references, on the scales of the COCO tools (BLEU and ROUGE in 0..1, CIDEr-D in 0..10)."""

    cider_d: Estimate
    bleu_1: Estimate
    bleu_2: Estimate
    bleu_3: Estimate
    bleu_4: Estimate
    rouge_l: Estimate
    meteor: float | None = None
    """Only where java and pycocoevalcap are installed; see `Results.absent`."""


class ChoiceScores(Settings):
    """Multiple choice by mean log-likelihood per token of each option's text (no letters), question first."""

    accuracy: Estimate
    by_task: dict[str, Estimate]
    predicted_positions: list[int]
    """How often each option position was chosen: far from `ChoiceBaselines.gold_positions` means position bias."""
    shuffled_frames: Estimate
    """Accuracy with each clip's frames in another order."""


class ChoiceBaselines(Settings):
    """What multiple-choice accuracy has to be compared with."""

    chance: float
    majority: float
    """Always the most frequent gold position."""
    blind: Estimate
    """The model without frames (the same in every mode)."""
    gold_positions: list[int]
    """How often each option position is right."""
    questions: int
    clips: int


class ModeResults(Settings):
    """Everything measured in one mode. None where the shards have no samples of that kind."""

    loss: Estimate
    """Cross-entropy in nats per labelled token, over all sources."""
    loss_by_source: dict[str, Estimate]
    captions: CaptionScores | None = None
    multiple_choice: ChoiceScores | None = None
    attention_entropy: Estimate | None = None
    """Of the query's attention over patches in the last layer (mean of heads), as a share of the uniform's: 1 is looking everywhere."""


class PairedTest(Settings):
    """Two modes on the same samples."""

    a: Mode
    b: Mode
    metric: Literal["loss", "multiple_choice_accuracy"]
    difference: Estimate
    """a minus b; its interval comes from resampling clips with both modes together."""
    only_a: int | None = None
    """Questions only `a` answers rightly (accuracy only)."""
    only_b: int | None = None
    p_value: float | None = None
    """Two-sided exact McNemar test (accuracy only)."""


class OrderCell(Settings):
    """One cell of the question-order table: an order in a mode, on questions about places in the clip.

    Accuracy is over the words of the generated answer that stand for a frame each. The first frame is apart: with the
    question after the frames no mode can know where to look in it.
    """

    order: Order
    mode: Mode
    accuracy: Estimate
    first_frame: Estimate
    later_frames: Estimate | None = None
    """None where clips have a single frame."""
    by_frame: list[Estimate]
    loss: Estimate
    """Nats per labelled answer token."""
    gaze_hit_rate: Estimate | None = None
    """Share of frames after the first whose attention peak lies in the asked cell (random looking: `Results.gaze_chance`)."""
    gaze_hit_rate_first_frame: Estimate | None = None


class HeatMap(Settings):
    """A picture of where the model looks in one clip."""

    file: str
    key: str
    source: str
    question: str
    answer: str


class CaptionExample(Settings):
    """One clip's caption and what each mode says."""

    key: str
    source: str
    reference: str
    generated: dict[Mode, str]


class Results(Settings):
    """`results.json`: equal for equal checkpoint, shards and job (latencies are in `latency.json`)."""

    run: str
    """Name of the training run's recipe."""
    checkpoint: str
    """sha256 of the run's `model/model.safetensors`."""
    shards: str
    """Digest of the shards' manifest."""
    seed: int
    resamples: int
    """Bootstrap resamples behind every interval."""
    frame_px: int
    tokens_per_frame: int
    modes: dict[Mode, ModeResults]
    """The modes the model has, in the order of `MODES`."""
    train_inference_gap: PairedTest | None = None
    """Loss of autoregressive inference minus loss of coarse->fine; None for models without them."""
    foveation_gain: PairedTest | None = None
    """Loss of coarse-only minus loss of coarse->fine: above 0, looking helps."""
    multiple_choice: ChoiceBaselines | None = None
    paired_tests: list[PairedTest] = []
    """Multiple-choice accuracy, every pair of modes."""
    question_order: list[OrderCell] = []
    """Order x mode; the first two modes are the 2x2."""
    gaze_chance: float | None = None
    """Hit rate of a random look: 1 / number of cells."""
    caption_examples: list[CaptionExample] = []
    heatmaps: list[HeatMap] = []
    absent: dict[str, str] = {}
    """What was not measured, and why."""

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read `folder/results.json`. Raises UserError if there is none or it does not fit."""
        path = folder / FILE_NAME
        try:
            return cls.model_validate_json(path.read_text())
        except FileNotFoundError as error:
            raise UserError("no evaluation results", where=str(path), fix="run `python -m fvlm_core.eval` first") from error
        except ValidationError as error:
            raise UserError(f"the results are damaged: {error}", where=str(path), fix="evaluate again") from error

    def write(self, folder: Path) -> None:
        """Write `folder/results.json` atomically."""
        write_atomically(folder / FILE_NAME, self.model_dump_json(indent=2).encode())


class ModeLatency(Settings):
    """Wall-clock time from a clip's frames to the first token of the answer, one clip at a time."""

    median_ms: float
    low_ms: float
    """Lower quartile."""
    high_ms: float
    """Upper quartile."""
    clips: int


class Latency(Settings):
    """`latency.json`: the modes side by side on the same clips, in turns."""

    device: str
    threads: int
    frames: int
    """Frames of the longest clip timed."""
    modes: dict[Mode, ModeLatency]


class Headline(Settings):
    """One mode's line of the result table."""

    loss: float
    cider_d: float | None = None
    bleu_4: float | None = None
    multiple_choice_accuracy: float | None = None
    latency_ms: float | None = None


class EvalReport(Manifest):
    """What the evaluation step made: `results.json`, `latency.json` (not part of its identity), `tables.md`, pictures."""

    headline: dict[Mode, Headline]
    """Copied from the two files, for progress displays; numbers for print come from `results.json`."""
