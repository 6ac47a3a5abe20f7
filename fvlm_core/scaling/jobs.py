"""Jobs and manifests of the comparisons of runs: light to import, so flows and the release read them without torch or SciPy."""

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
"""What a fit makes small: errors as shares of the losses, or errors in nats."""
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
    """A fitted number, or plainly why there is none."""

    value: float | None
    low: float | None = None
    """Lower end of the 95 % interval; None where it has none, and where there is no interval."""
    high: float | None = None
    reason: str = ""
    """Why there is no value, or no interval, or no end of it."""


class AblationRun(Settings):
    """One run of the comparison."""

    name: str
    change: str = ""
    """Dotted path of the one setting that differs from the baseline's; empty for the baseline."""
    value: JsonValue = None
    """Its value in this run."""
    hypothesis: str = ""
    """What was expected of it, and why."""
    seed: int = 0
    """A name may have several seeds; runs of equal seeds are pairs."""
    run: Path
    """Folder of the finished run."""
    control: bool = False
    """A control: compared, but never the winner."""


class AblationJob(Settings):
    """Compare runs with a baseline."""

    output: Path
    baseline: str
    """Name of the run that the others are compared with."""
    runs: Annotated[list[AblationRun], Field(min_length=2)]
    relevance: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """A difference below this share of the baseline's loss is called neither better nor worse, however sure it is."""
    min_gain: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """A run that is better is adopted only with a loss below the baseline's by more than this share."""
    shards: Path | None = None
    """Those of the runs, for questions about places; None: outcomes beside the loss are not measured."""
    questions: Annotated[int, Field(gt=0)] = 64
    """About places in videos, the same for every run."""


Verdict = Literal["baseline", "better", "worse", "no evidence", "no verdict", "diverged", "other validation"]
"""no evidence: the difference is within the threshold, or below what is relevant; no verdict: the noise was not measured."""


class Outcome(Settings):
    """Something beside the loss, as the runs of one name have it: the mean over seeds, and the difference to the baseline."""

    value: float
    delta: float | None = None
    """None for the baseline, and where the baseline has no such outcome."""
    low: float | None = None
    """95 % interval of the difference; None where the noise was not measured."""
    high: float | None = None


class AblationRow(Settings):
    """A line of the table: the runs of one name."""

    name: str
    hypothesis: str = ""
    change: str
    value: JsonValue
    seeds: int
    """Runs behind the numbers."""
    loss: float
    """Validation loss of the last pass, in nats per labelled token; the mean over seeds."""
    by_seed: dict[int, float]
    delta: float
    """Difference to the baseline over pairs of equal seeds: below 0 is better."""
    low: float | None = None
    """95 % interval of the difference; None where the noise was not measured."""
    high: float | None = None
    p_value: float | None = None
    """Two-sided t test of the difference, adjusted for all comparisons by Holm's method."""
    threshold: float | None = None
    """The smallest difference that would count with as many comparisons (Bonferroni's, Holm's first step)."""
    verdict: Verdict
    delta_equal_flops: float | None = None
    """Difference at the FLOPs of the cheaper of the two, along the validation curves; None where the curves do not reach it."""
    losses: dict[str, float]
    """Validation loss of every pass (`coarse`, `fine1`, ...), means over seeds."""
    mode_gain: float | None = None
    """Loss of the coarse pass minus that of the last fine one: what looking brings, with questions in both orders."""
    drift: float | None = None
    """Loss of the last pass minus that of the one before: queries made of fine instead of earlier hidden states."""
    order_gain: Outcome | None = None
    """Nats per answer token that fine passes gain over the coarse one with the question first, less the same with it after."""
    on_target: Outcome | None = None
    """Share of frames whose attention peak is on the asked place, fine, question first."""
    order_drift: Outcome | None = None
    """Nats per answer token, autoregressive less fine, question first."""
    params: int
    flops: float
    """Training FLOPs of a run."""
    samples: int
    frames_per_s: float | None
    """Median over the run's evaluation points; None where the run did not log it."""
    seconds: float
    """Of a run, the mean."""
    control: bool = False
    other_validation: bool = False
    """The change alters the validation set too (mixture, question order, labels), so the delta compares different questions."""
    also_changed: list[str] = Field(default_factory=list)
    """Other settings that differ from the baseline's, such as those that the change implies."""
    divergences: int = 0

    @property
    def can_win(self) -> bool:
        """Whether the row's loss is comparable with the baseline's and meant to be adopted."""
        return not (self.control or self.other_validation or self.divergences)


class AblationReport(Manifest):
    """`ablations.csv`, and for reading `ablations.md` and `ablations.png`, which are no part of its identity."""

    figures: ClassVar[tuple[Figure, ...]] = (Figure(file=ABLATIONS_PLOT, caption="Difference in validation loss to the baseline."),)
    baseline: str
    rows: list[AblationRow]
    """In the order of the job."""
    method: str
    """How verdicts were made, or why there are none."""
    noise: Quantity
    """Standard deviation of a run's loss over seeds, nats."""
    noise_degrees: int = 0
    """Degrees of freedom of the noise; 0 where it was not measured."""
    questions: int = 0
    """Behind the outcomes beside the loss; 0: they were not measured."""
    winner: str
    """Name of the comparable run that is better by most; the baseline's where none is."""
    winner_change: str
    """The winner's changed setting; empty for the baseline."""
    winner_value: JsonValue


class ConfirmJob(Settings):
    """Train an ablation's winner and the baseline once more, with other seeds."""

    output: Path
    report: Path
    """Folder of the comparison."""
    recipes: dict[str, Recipe]
    """The baseline's and those of the ablations that could win, by name."""
    seeds: Annotated[list[int], Field(min_length=1)]
    """That the comparison did not use."""
    min_gain: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """As the comparison's."""


class Confirmation(Manifest):
    """What the new seeds say."""

    winner: str
    """The comparison's; where it is the baseline there was nothing to confirm."""
    losses: dict[str, dict[int, float | None]]
    """By run and seed, nats; None of a run that diverged."""
    delta: float | None = None
    """Winner less baseline, the mean over pairs of equal seeds; None where there was nothing to confirm, or the winner diverged."""
    low: float | None = None
    """95 % interval, by the comparison's noise."""
    high: float | None = None
    confirmed: bool = False
    """Whether the interval is below 0 and the gain above `min_gain`."""

    @property
    def text(self) -> str:
        """A sentence; empty where there was nothing to confirm."""
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
            f"On {pairs} seeds that did not choose it, **{self.winner}** differs by {signed(self.delta)}{interval} nats: {said}.{diverged}"
        )


class GridRun(Settings):
    """One run of the grid."""

    size: str
    """Name of the model size."""
    budget_flops: Annotated[float, Field(gt=0)]
    variant: Variant
    seed: int = 0
    """Of the run: a cell of the grid may have several, which show the noise."""
    run: Path
    """Folder of the finished run."""


class GridJob(Settings):
    """Fit, plot and choose from a grid of runs."""

    output: Path
    runs: Annotated[list[GridRun], Field(min_length=1)]
    target_flops: Annotated[float, Field(gt=0)] | None = None
    """Budget of the final training; None chooses for the grid's largest budget."""
    weights: Weights = "relative"
    """What the fits make small: errors as shares of the losses, or in nats (`unit`)."""


class GridPoint(Settings):
    """A finished run of the grid."""

    run_id: str
    """Name of the run."""
    size: str
    variant: Variant
    params: int
    budget_flops: float
    flops: float
    """Spent, from the configuration."""
    samples: int
    frames: int
    """Shown frames."""
    tokens_per_frame: int
    tokens: int
    """D of the scaling law: labelled text tokens."""
    loss: float
    """Validation loss of the last pass, in nats per labelled token."""
    seed: int = 0

    @property
    def visual_tokens(self) -> int:
        """Visual tokens that the language model read."""
        return self.frames * self.tokens_per_frame


class ScalingReport(Manifest):
    """`points.csv`, `fits.json`, and for reading five plots and `scaling.md`, which are no part of its identity."""

    figures: ClassVar[tuple[Figure, ...]] = SCALING_FIGURES
    points: list[GridPoint]
    exponents: dict[str, Quantity]
    """Headline exponents by `variant.name`, a copy of what `fits.json` holds."""
    crossover_flops: Quantity
    """Budget at which the better variant changes."""
    chosen: str
    """Name of the chosen size."""
    chosen_reason: str
    runner_up: str = ""
    margin_nats: float | None = None
    wins_share: float | None = None
    """As in `fits.json`."""


class CurvesJob(Settings):
    """Draw the training curves of runs that go on from each other."""

    output: Path
    runs: dict[str, Path]
    """Folders of finished runs by name, in order."""


class CurvesManifest(Manifest):
    """`curves.png`."""

    figures: ClassVar[tuple[Figure, ...]] = (
        Figure(file="curves.png", caption="The stages one after another: losses, gradient norms, learning rates, entropy, speed."),
    )
