"""The settings of a profile for the scaling grid (`scaling`). `tasks.grid` makes its runs from them."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from fvlm_core.config import LLMSettings, Positive
from fvlm_core.scaling.jobs import Weights
from fvlm_core.settings import Settings
from fvlm_core.train.expected import MeanSample
from tasks.recipes import Name


class Size(Settings):
    """A size of the language model in the scaling grid."""

    name: Name
    """Names the size in runs, tables and `scaling.undecided`."""
    llm: LLMSettings
    budgets_flops: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)] | None = None
    """Budgets of the grid at which this size is trained; None: all. A large size gets too few steps at a small budget."""
    lr_scale: Annotated[float, Field(gt=0)] | None = None
    """Ratio of this size's learning rate to the base model's; None: the base model's width / this size's width (see `tasks.grid`)."""


class Scaling(Settings):
    """The scaling grid: each size at each budget, foveated and as the baseline with pooled tokens."""

    sizes: Annotated[list[Size], Field(min_length=1)]
    budgets_flops: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)]
    """Training FLOPs of each run."""
    baseline_tokens_per_frame: Literal[1, 4, 9, 16] = 16
    """Tokens per frame of the baseline, each the average of equally many patches: its square root must divide the patches along a side."""
    warmup_share: Annotated[float, Field(gt=0, lt=0.5)] = 0.1
    """Warm-up of every run, as a share of its steps."""
    min_steps: Positive = 20
    """Runs with fewer steps are refused before anything starts: they would measure the warm-up, not the size."""
    eval_every: Positive | None = None
    """Steps between validations of a run, of which the last one gives its data point; None: the base's."""
    corner_seeds: Positive = 1
    """Number of seeds of the smallest and the largest size, each at its smallest and its largest budget, to measure the noise."""
    batch_samples: Positive | None = None
    """Samples per step at the largest budget; None: the base's."""
    batch_exponent: Annotated[float, Field(ge=0, lt=1)] = 0.3271
    """Samples per step grow with budget^exponent, up to `batch_samples` at the largest; DeepSeek LLM (https://arxiv.org/abs/2401.02954)."""
    samples: dict[str, MeanSample] = Field(default_factory=dict)
    """Mean sample of each source in the base's mixture, to estimate a run's steps before there are shards. If it is empty,
    `machine.rental.assumed.samples` is used."""
    target_flops: Annotated[float, Field(gt=0)] | None = None
    """Budget of the final training that the size is chosen for; None: the grid's largest budget."""
    weights: Weights = "relative"
    """Errors that the fits minimize: relative to the losses (`relative`), or in nats (`unit`)."""
    undecided: Name | None = None
    """The size to train if the grid is not conclusive: the best size is ahead in less than `decided` of the resamples, or nothing
    could be resampled. None: the best size in any case."""
    decided: Annotated[float, Field(ge=0, le=1)] = 0.9
    """Share of the bootstrap resamples in which the best size must be ahead for the grid to be conclusive."""

    @model_validator(mode="after")
    def _a_size_of_the_grid(self) -> Self:
        names = [size.name for size in self.sizes]
        if self.undecided is not None and self.undecided not in names:
            raise ValueError(f"undecided: there is no size {self.undecided}, only {', '.join(names)}")
        return self
