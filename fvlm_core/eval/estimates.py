"""The building blocks of results: estimates with intervals, paired tests, and the metrics in the result table.

This module does not import torch, so flows and reports can read results cheaply.
"""

from typing import Literal

from fvlm_core.model.names import Mode
from fvlm_core.settings import Settings

CLIP, TASK = "clip", "task"
"""Groups that every question has: `clip`, the resampling unit, and `task`, the kind of question."""


class Estimate(Settings):
    """A measured number with its 95 % confidence interval, by clip because questions about one clip are not independent."""

    value: float
    low: float
    high: float
    n: int
    """Number of independent units: clips (or texts)."""
    count: int
    """Number of averaged values: labelled tokens, captions, questions, answer words or frames."""
    exact: bool = False
    """Whether the interval is exact (few clips) instead of bootstrapped."""


class PairedTest(Settings):
    """Comparison of two modes on the same samples."""

    a: Mode
    b: Mode
    metric: Literal["loss", "multiple_choice_accuracy"]
    difference: Estimate
    """a minus b; the interval comes from resampling clips, with both modes together."""
    only_a: int | None = None
    """Number of questions that only `a` answers correctly (accuracy only)."""
    only_b: int | None = None
    p_value: float | None = None
    """Holm-adjusted p-value of a two-sided sign-flip test by clip (accuracy only)."""


class Dataset(Settings):
    """The dataset of a measurement, as named in the model card's metadata."""

    type: str
    """Hub identifier of the dataset, or a slug."""
    name: str
    split: str = "validation"


class Metric(Settings):
    """One row of the result table: a metric in every mode, with its baselines."""

    name: str
    """Display name with unit, e.g. `loss (nats/token)`."""
    values: dict[str, Estimate | float]
    """Values by mode (`MODES`, or the modes of another architecture)."""
    baselines: dict[str, Estimate | float] = {}
    """Scores, by name, of a model that sees nothing, guesses, or always gives the same answer."""
    decimals: int = 3
    hub_type: str = ""
    """Identifier of the metric in the model card's metadata, e.g. `accuracy`; empty leaves it out of the card."""
    dataset: Dataset | None = None
    """Dataset of the metric, if it differs from the part's."""
