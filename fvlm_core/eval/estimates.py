"""What measurements are made of: estimates with intervals, paired tests, and the numbers that a part puts into the result table.

Nothing here needs torch, so flows and reports can read results cheaply.
"""

from typing import Literal

from fvlm_core.model.names import Mode
from fvlm_core.settings import Settings

CLIP, TASK = "clip", "task"
"""Groups that every question has: the unit of resampling, and its kind."""


class Estimate(Settings):
    """A measured number with its 95 % interval (over clips: questions about one clip are not independent)."""

    value: float
    low: float
    high: float
    n: int
    """Independent units that were resampled: clips (or texts)."""
    count: int
    """What was averaged or pooled: labelled tokens, captions, questions, answer words or frames."""
    exact: bool = False
    """Whether the interval is exact (few clips) instead of a bootstrap."""


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
    """Two-sided sign-flip test by clip, adjusted for the tests beside it by Holm's method (accuracy only)."""


class Dataset(Settings):
    """What a part measures on, as the model card's metadata name it."""

    type: str
    """Hub identifier of the dataset, or a slug."""
    name: str
    split: str = "validation"


class Metric(Settings):
    """One number of the result table in every mode, and what it has to be compared with."""

    name: str
    """As a person reads it, with its unit: `loss (nats/token)`."""
    values: dict[str, Estimate | float]
    """By mode: `MODES`, or those of another architecture."""
    baselines: dict[str, Estimate | float] = {}
    """What a model that sees nothing, guesses, or always says the same gets, by name."""
    decimals: int = 3
    hub_type: str = ""
    """The metric's identifier in the model card's metadata, e.g. `accuracy`; empty leaves it out of the card."""
    dataset: Dataset | None = None
    """What it was measured on, where that is not the part's own dataset."""
