"""Jobs and manifests of run comparisons. This module imports neither torch nor SciPy, so flows and the release can use it cheaply."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, JsonValue

from fvlm_core.config import Recipe
from fvlm_core.figures import Figure
from fvlm_core.manifest import Manifest
from fvlm_core.settings import Settings
from fvlm_core.tables import signed

Variant = Literal["foveated", "baseline"]
Weights = Literal["relative", "unit"]
"""The errors that a fit minimises: relative errors of the losses, or absolute errors in nats."""
VARIANTS: tuple[Variant, ...] = ("foveated", "baseline")

ABLATIONS_TABLE, ABLATIONS_TEXT, ABLATIONS_PLOT = "ablations.csv", "ablations.md", "ablations.png"
POINTS_FILE, FITS_FILE, SCALING_TEXT = "points.csv", "fits.json", "scaling.md"
SCALING_FIGURES = (
    Figure(file="iso_flop.png", caption="Loss over model size, a curve per FLOP budget; stars are the best sizes."),
    Figure(file="crossover.png", caption="Foveated against the baseline with pooled tokens, per budget."),
    Figure(file="token_efficiency.png", caption="Loss against the visual tokens that the language model read in training."),
    Figure(file="data_scaling.png", caption="Loss over labelled tokens, a curve per size."),
    Figure(file="allocation.png", caption="Best size over the training budget."),
)
PLOTS = tuple(figure.file for figure in SCALING_FIGURES)
VECTOR_PLOTS = tuple(name.replace(".png", ".svg") for name in PLOTS)


class Quantity(Settings):
    """A fitted number with its 95 % interval, or the reason why it is missing."""

    value: float | None
    low: float | None = None
    """Lower end of the 95 % interval; None if the interval is open below, or if there is none."""
    high: float | None = None
    """Upper end of the 95 % interval; None if the interval is open above, or if there is none."""
    reason: str = ""
    """Why the value, the interval, or one of its ends is missing."""


class AblationRun(Settings):
    """One run of the comparison."""

    name: str
    change: str = ""
    """Dotted path of the one setting that differs from the baseline; empty for the baseline."""
    value: JsonValue = None
    """Value of that setting in this run."""
    hypothesis: str = ""
    """The expected effect, and why."""
    seed: int = 0
    """Runs with the same name are repetitions with different seeds; runs with the same seed are compared as pairs."""
    run: Path
    """Folder of the finished run."""
    control: bool = False
    """Whether this is a control, which is compared but can never win."""


class AblationJob(Settings):
    """Compare runs with a baseline."""

    output: Path
    baseline: str
    """Name of the run that the others are compared with."""
    runs: Annotated[list[AblationRun], Field(min_length=2)]
    relevance: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """A difference below this share of the baseline's loss counts as neither better nor worse, even if it is significant."""
    min_gain: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """A better run wins only if it lowers the loss by more than this share of the baseline's."""
    shards: Path | None = None
    """Shards of the runs, for questions about places; None measures no outcomes other than the loss."""
    questions: Annotated[int, Field(gt=0)] = 64
    """Number of questions about places in videos; the same questions for every run."""


Verdict = Literal["baseline", "better", "worse", "no evidence", "no verdict", "diverged", "other validation"]
"""no evidence: the difference is not significant, or below `relevance`; no verdict: the noise was not measured."""


class Outcome(Settings):
    """A measurement other than the loss: the mean over seeds, and the difference to the baseline."""

    value: float
    delta: float | None = None
    """None for the baseline, or if the baseline lacks this outcome."""
    low: float | None = None
    """Lower end of the difference's 95 % interval; None if the noise was not measured."""
    high: float | None = None


class AblationRow(Settings):
    """One row of the table: all runs of one name."""

    name: str
    hypothesis: str = ""
    change: str
    value: JsonValue
    seeds: int
    """Number of runs (seeds)."""
    loss: float
    """Validation loss of the last pass, in nats per labelled token; mean over seeds."""
    by_seed: dict[int, float]
    delta: float
    """Difference to the baseline over pairs of equal seeds; below 0 is better."""
    low: float | None = None
    """Lower end of the difference's 95 % interval; None if the noise was not measured."""
    high: float | None = None
    p_value: float | None = None
    """p-value of a two-sided t test of the difference, Holm-adjusted over all comparisons."""
    threshold: float | None = None
    """Smallest significant difference with this number of comparisons (Bonferroni, which is Holm's first step)."""
    verdict: Verdict
    delta_equal_flops: float | None = None
    """Difference at the FLOPs of the cheaper run, from the validation curves; None if a curve does not reach them."""
    losses: dict[str, float]
    """Validation loss of each pass (`coarse`, `fine1`, ...), mean over seeds."""
    mode_gain: float | None = None
    """Loss of the coarse pass minus loss of the last fine pass: the gain from looking, with questions in both orders."""
    drift: float | None = None
    """Loss of the last pass minus loss of the second-to-last: the effect of queries made from the hidden states of a fine pass."""
    order_gain: Outcome | None = None
    """Gain of the fine over the coarse pass with the question first, minus that with the question after, in nats per answer token."""
    on_target: Outcome | None = None
    """Share of frames whose attention peak is on the asked place, in the fine pass with the question first."""
    order_drift: Outcome | None = None
    """Autoregressive loss minus loss of the fine pass, question first, in nats per answer token."""
    params: int
    flops: float
    """Training FLOPs of one run."""
    samples: int
    frames_per_s: float | None
    """Median over the evaluation points of one run; None if it was not logged."""
    seconds: float
    """Mean duration of a run."""
    control: bool = False
    other_validation: bool = False
    """Whether the change also alters the validation set (mixture, question order, labels), so that losses are not comparable."""
    also_changed: list[str] = Field(default_factory=list)
    """Other settings that differ from the baseline, e.g. because the change implies them."""
    divergences: int = 0

    @property
    def can_win(self) -> bool:
        """Whether the row may win: it is no control, its loss is comparable with the baseline's, and no run diverged."""
        return not (self.control or self.other_validation or self.divergences)


class AblationReport(Manifest):
    """Manifest of `ablations.csv`, and of `ablations.md` and `ablations.png`, which are excluded from its identity."""

    figures: ClassVar[tuple[Figure, ...]] = (Figure(file=ABLATIONS_PLOT, caption="Difference in validation loss to the baseline."),)
    baseline: str
    rows: list[AblationRow]
    """Rows in the order of the job."""
    method: str
    """Statistical method of the verdicts, or the reason why there are none."""
    noise: Quantity
    """Standard deviation of a run's loss over seeds, in nats."""
    noise_degrees: int = 0
    """Degrees of freedom of the noise estimate; 0 if it was not measured."""
    questions: int = 0
    """Number of questions behind the outcomes other than the loss; 0 if these were not measured."""
    winner: str
    """Name of the comparable run with the largest improvement; the baseline's name if there is none."""
    winner_change: str
    """The winner's changed setting; empty for the baseline."""
    winner_value: JsonValue


class ConfirmJob(Settings):
    """Train the winner of an ablation and the baseline again, with new seeds."""

    output: Path
    report: Path
    """Folder of the `AblationReport`."""
    recipes: dict[str, Recipe]
    """Recipes of the baseline and of the ablations that could win, by name."""
    seeds: Annotated[list[int], Field(min_length=1)]
    """Seeds that the comparison did not use."""
    min_gain: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """As `AblationJob.min_gain`."""


class Confirmation(Manifest):
    """Result of the confirmation with new seeds."""

    winner: str
    """Winner of the comparison; if it is the baseline, there was nothing to confirm."""
    losses: dict[str, dict[int, float | None]]
    """Loss by run and seed, in nats; None for a run that diverged."""
    delta: float | None = None
    """Winner minus baseline, mean over pairs of equal seeds; None if there was nothing to confirm or the winner diverged."""
    low: float | None = None
    """Lower end of the 95 % interval, which uses the comparison's noise estimate."""
    high: float | None = None
    confirmed: bool = False
    """Whether the interval is below 0 and the gain exceeds `min_gain`."""

    @property
    def text(self) -> str:
        """The result in a sentence or two; empty if there was nothing to confirm."""
        if not self.losses:
            return ""
        lost = [f"{name} with seed {seed}" for name, runs in self.losses.items() for seed, loss in runs.items() if loss is None]
        diverged = f" Diverged: {', '.join(lost)}." if lost else ""
        if self.delta is None:
            return f"New seeds do not confirm **{self.winner}**, so it is not adopted.{diverged}"
        interval = "" if self.low is None or self.high is None else f" [{signed(self.low)}, {signed(self.high)}]"
        said = "confirmed and adopted" if self.confirmed else "not confirmed, so not adopted"
        pairs = sum(None not in pair for pair in zip(*(runs.values() for runs in self.losses.values()), strict=True))
        return (
            f"On {pairs} new seeds, **{self.winner}** differs from the baseline by {signed(self.delta)}{interval} nats: {said}.{diverged}"
        )


class GridRun(Settings):
    """One run of the grid."""

    size: str
    """Name of the model size."""
    budget_flops: Annotated[float, Field(gt=0)]
    variant: Variant
    seed: int = 0
    """Seed of the run; several seeds in a cell of the grid measure the noise."""
    run: Path
    """Folder of the finished run."""


class GridJob(Settings):
    """Fit scaling laws to a grid of runs, plot them, and choose a size."""

    output: Path
    runs: Annotated[list[GridRun], Field(min_length=1)]
    target_flops: Annotated[float, Field(gt=0)] | None = None
    """FLOP budget of the final training; None uses the grid's largest budget."""
    weights: Weights = "relative"
    """The errors that the fits minimise: relative errors, or absolute errors in nats (`unit`)."""


class GridPoint(Settings):
    """A finished run of the grid."""

    run_id: str
    """Name of the run."""
    size: str
    variant: Variant
    params: int
    budget_flops: float
    flops: float
    """Training FLOPs spent, computed from the configuration."""
    samples: int
    frames: int
    """Number of shown frames."""
    tokens_per_frame: int
    tokens: int
    """D of the scaling law: labelled text tokens."""
    loss: float
    """Validation loss of the last pass, in nats per labelled token."""
    seed: int = 0

    @property
    def visual_tokens(self) -> int:
        """Number of visual tokens that the language model read."""
        return self.frames * self.tokens_per_frame


class ScalingReport(Manifest):
    """Manifest of `points.csv` and `fits.json`, and of five plots and `scaling.md`, which are excluded from its identity."""

    figures: ClassVar[tuple[Figure, ...]] = SCALING_FIGURES
    points: list[GridPoint]
    exponents: dict[str, Quantity]
    """Headline exponents by `variant.name`, copied from `fits.json`."""
    crossover_flops: Quantity
    """FLOP budget at which the better variant changes."""
    chosen: str
    """Name of the chosen size."""
    chosen_reason: str
    runner_up: str = ""
    margin_nats: float | None = None
    wins_share: float | None = None
    """As `Fits.wins_share`."""


class CurvesJob(Settings):
    """Draw the training curves of consecutive runs, each of which starts from the previous one."""

    output: Path
    runs: dict[str, Path]
    """Folders of finished runs, by name, in order."""


class CurvesManifest(Manifest):
    """Manifest of `curves.png`."""

    figures: ClassVar[tuple[Figure, ...]] = (
        Figure(file="curves.png", caption="The stages one after another: losses, gradient norms, learning rates, entropy, speed."),
    )
