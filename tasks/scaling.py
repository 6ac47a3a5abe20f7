"""The part of a profile that says what the scaling grid is: `scaling`. Its runs are made of it in `tasks.grid`."""

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
    """Those of the grid's budgets at which it is run; None: all. A large size has too few steps at a small budget."""
    lr_scale: Annotated[float, Field(gt=0)] | None = None
    """Of the language model's learning rate over the base's; None: the base's width over its own (see `tasks.grid`)."""


class Scaling(Settings):
    """The grid: sizes at budgets, foveated and as the baseline with pooled tokens."""

    sizes: Annotated[list[Size], Field(min_length=1)]
    budgets_flops: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)]
    """Training FLOPs of each run."""
    baseline_tokens_per_frame: Literal[1, 4, 9, 16] = 16
    """Of the baseline, averages of the same patches: each of equally many, so its square root divides the patches along a side."""
    warmup_share: Annotated[float, Field(gt=0, lt=0.5)] = 0.1
    """Warm-up of every run, as a share of its steps."""
    min_steps: Positive = 20
    """A run of fewer steps is refused before anything starts: it would say how warm-up goes, not what the size can do."""
    eval_every: Positive | None = None
    """Steps between validation losses of a run, whose point is the last one; None: the base's."""
    corner_seeds: Positive = 1
    """Seeds of the smallest and the largest size, each at its smallest and its largest budget: they measure the noise."""
    batch_samples: Positive | None = None
    """Samples per step at the largest budget; None: the base's."""
    batch_exponent: Annotated[float, Field(ge=0, lt=1)] = 0.3271
    """Samples per step grow as budget^exponent, up to `batch_samples` at the largest; DeepSeek LLM's (https://arxiv.org/abs/2401.02954)."""
    samples: dict[str, MeanSample] = Field(default_factory=dict)
    """A mean sample of each source of the base's mixture, from which a run's steps are known before there are shards; where it is empty,
    `machine.rental.assumed.samples`."""
    target_flops: Annotated[float, Field(gt=0)] | None = None
    """Budget of the final training that the size is chosen for; None is the grid's largest."""
    weights: Weights = "relative"
    """What the fits make small: errors as shares of the losses, or in nats (`unit`)."""
    undecided: Name | None = None
    """The size to train where the grid does not decide: where the best stays ahead in fewer than `decided` of the resamples, or nothing
    could be resampled. None: the best all the same."""
    decided: Annotated[float, Field(ge=0, le=1)] = 0.9
    """Share of the resamples in which the best must stay ahead for the grid to decide."""

    @model_validator(mode="after")
    def _a_size_of_the_grid(self) -> Self:
        names = [size.name for size in self.sizes]
        if self.undecided is not None and self.undecided not in names:
            raise ValueError(f"undecided: there is no size {self.undecided}, only {', '.join(names)}")
        return self
