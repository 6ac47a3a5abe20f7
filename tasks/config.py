"""The profile: one typed tree of settings for all phases of the pipeline, which is also the form in the UI.

A phase gets its part of the tree; training phases combine parts of it into a recipe (`fvlm_core.config`). Results of earlier phases
(chosen speed settings, winning ablation, chosen size) are applied as changes of dotted paths, see `tasks.recipes`. The parts are defined
in modules of the same name: `tasks.precompute`, `tasks.ablations`, `tasks.scaling`, `tasks.machine`, with `base` and `stages` in
`tasks.recipes`. Settings that a job reads unchanged are defined next to the job in `fvlm_core`. None of these modules imports this one.
"""

from typing import Annotated, Self

from pydantic import Field, model_validator

from fvlm_core.config import ModelSettings
from fvlm_core.eval.jobs import EvalSettings
from fvlm_core.release.jobs import ReleaseSettings
from fvlm_core.settings import Settings
from fvlm_core.train.jobs import SpeedSettings
from tasks.ablations import BASELINE, Ablation, AblationSeeds, check_ablations
from tasks.grid import Grid, check_grid
from tasks.machine import Machine
from tasks.precompute import Precompute
from tasks.recipes import Base, Name, Stages
from tasks.scaling import Scaling


class PipelineConfig(Settings):
    """All settings of the pipeline."""

    name: Name
    """The profile's name; appears in the names of runs."""
    precompute: Precompute
    model: ModelSettings
    base: Base
    speed: SpeedSettings
    ablations: Annotated[list[Ablation], Field(min_length=1)]
    ablation_seeds: AblationSeeds = AblationSeeds()
    ablation_relevance: Annotated[float, Field(ge=0, lt=1)] = 0.003
    """A difference smaller than this share of the baseline's loss counts as neither better nor worse, however certain it is."""
    ablation_min_gain: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """A better ablation is adopted by later phases only if its loss is below the baseline's by more than this share."""
    scaling: Scaling
    stages: Stages
    evaluation: EvalSettings
    release: ReleaseSettings
    machine: Machine = Machine()

    @model_validator(mode="after")
    def _unique_names(self) -> Self:
        for what, names in (
            ("ablations", [one.name for one in self.ablations]),
            ("scaling.sizes", [one.name for one in self.scaling.sizes]),
        ):
            if what == "ablations" and BASELINE in names:
                raise ValueError(f"{what}: {BASELINE!r} is the run that they are compared with; take another name")
            if twice := {name for name in names if names.count(name) > 1}:
                raise ValueError(f"{what}: the name {', '.join(sorted(twice))} appears twice")
        return self

    @model_validator(mode="after")
    def _vision_shape(self) -> Self:
        if self.precompute.vision and not self.model.vision.shape:
            raise ValueError("precompute.vision trains an encoder of model.vision.shape: give that, not a checkpoint")
        return self

    @model_validator(mode="after")
    def _tiles_of_a_frame(self) -> Self:
        tiles, side = self.precompute.shards.tiles, self.model.vision.frame_px
        if tiles and (side % tiles.px or side % tiles.small_px):
            raise ValueError(f"shards.tiles: px {tiles.px} and small_px {tiles.small_px} do not divide model.vision.frame_px {side}")
        return self

    @model_validator(mode="after")
    def _a_grid_that_can_be_compared(self) -> Self:
        """Check that every run of the grid leaves warm-up, ends decayed and has enough steps, as far as known before there are shards."""
        check_grid(self.grid)
        return self

    @model_validator(mode="after")
    def _one_change_each(self) -> Self:
        """An ablation must name a setting that exists, and change it."""
        check_ablations(self.ablations, self.model, self.base)
        return self

    @property
    def grid(self) -> Grid:
        """The scaling grid, with the parts of the profile that its runs need."""
        rental = self.machine.rental
        samples = self.scaling.samples or (rental.assumed.samples if rental else {})
        return Grid(self.scaling, self.model, self.base, samples, self.precompute.shards.vocab_size)
