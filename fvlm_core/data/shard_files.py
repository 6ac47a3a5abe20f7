"""The format of our shards: webdataset tars with an index, so that any sample can be read with one request.

A sample is a run of consecutive members `KEY.000.jpg, KEY.001.jpg, ..., KEY.json` of a tar; any webdataset reader can read them.
`index.parquet` has one row per (sample, conversation), with the members' offsets. The same samples always give byte-identical files.
"""

import hashlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from fvlm_core.data.batch import ChatFormat
from fvlm_core.data.jobs import INDEX_FILE, TOKENIZER_FOLDER, BadClip, SourceCounts
from fvlm_core.data.rows import SPLITS, Kind, Split
from fvlm_core.data.tokenizer import chat_format, encode

FRAME_BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
"""Upper edges of the frame-count buckets by which samples are sorted into shards."""
TAR_BLOCK_BYTES = 512
PARTS = ("question", "answer", "rejected")
"""Texts of a turn."""


@dataclass(frozen=True)
class ShardSample:
    """A sample before tokenisation. Its frames are read only when they are written."""

    source: str
    kind: Kind
    split: Split
    origin: str
    """What it was made from: a URL, or the number of a generated sample. Identifies the sample, together with `source`."""
    conversations: list[list[dict[str, str]]]
    """The turns of each conversation, `{"question", "answer"}`; all are about the same frames. The last turn of a preference also has a
    `rejected` answer, worse than `answer`."""
    probes: list[dict[str, Any] | None]
    """For each conversation, its multiple-choice question for evaluation (task, choices, answer_index, cells), or None."""
    caption: str = ""
    duration_s: float = 0.0
    num_frames: int = 0
    frames: Callable[[], Sequence[bytes]] = tuple
    """Reads the JPEG files."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further fields for the sample's JSON."""

    @property
    def key(self) -> str:
        """Key of the sample. Depends only on `source` and `origin`."""
        return key_of(self.source, self.origin)


def key_of(source: str, origin: str) -> str:
    """Return the key of the sample that a source made from `origin`."""
    return f"{source}-{blake2b(origin.encode(), digest_size=6).hexdigest()}"


def bucket_of(num_frames: int) -> int:
    """Return the upper edge of the bucket of a frame count."""
    return next((edge for edge in FRAME_BUCKETS if num_frames <= edge), num_frames)


def shard_name(split: Split, source: str, number: int) -> str:
    """Return the path of a source's tar, relative to the folder of shards."""
    return f"{split}/{source}-{number:05d}.tar"


def task_of(sample: ShardSample, conversation: int) -> str:
    """Return a conversation's task: that of its probe, else `caption` if the answer is the clip's caption, else `chat`."""
    probe, turns = sample.probes[conversation], sample.conversations[conversation]
    if probe:
        return probe["task"]
    return "caption" if sample.kind != "text" and len(turns) == 1 and turns[0]["answer"] == sample.caption else "chat"


@dataclass
class Shard:
    """A written tar, with what the folder's index and counts need."""

    name: str
    rows: list[dict[str, Any]]
    """Its rows of the index (INDEX_SCHEMA)."""
    dropped: list[BadClip]
    """Samples of which conversations were dropped."""
    unusable: list[str]
    """Keys of samples of which all conversations were dropped."""
    counts: SourceCounts | None
    """None if no sample was left, so that no tar was written."""
    sha256: str = ""


def write_shard(
    output: Path, name: str, samples: Iterable[ShardSample], tokenizer: PreTrainedTokenizerBase, chat: ChatFormat, *, max_text_tokens: int
) -> Shard:
    """Write the samples of one source and split to a tar, in the given order. The tar is written under a temporary name, then renamed.

    Conversations of more than `max_text_tokens` (chat format included) are dropped, never truncated; so are samples without any left.
    """
    shard = Shard(name, [], [], [], None)
    temporary = output / f"{name}.part"
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary.open("wb") as stream:
            _fill(shard, stream, samples, tokenizer, chat, max_text_tokens)
            stream.flush()
            os.fsync(stream.fileno())
        if shard.counts is None:
            temporary.unlink()
            return shard
        with temporary.open("rb") as stream:
            shard.sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        temporary.rename(output / name)
        return shard
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _fill(
    shard: Shard, stream: Any, samples: Iterable[ShardSample], tokenizer: PreTrainedTokenizerBase, chat: ChatFormat, max_text_tokens: int
) -> None:
    """Write the members to `stream`, and fill in `shard`."""
    writer = _TarWriter(stream, shard.name)
    kept, seconds, last = 0, 0.0, None
    for sample in samples:
        tokenised, sizes = _tokenise(sample, tokenizer, chat, max_text_tokens)
        if len(sizes) < len(sample.conversations):
            lost = len(sample.conversations) - len(sizes)
            reason = f"{lost} conversations of more than {max_text_tokens} text tokens"
            shard.dropped.append(BadClip(url=sample.origin, reason=reason, source=sample.source))
        if sizes:
            shard.rows.extend(writer.add(sample, tokenised, sizes))
            kept, seconds, last = kept + 1, seconds + sample.duration_s, sample
        else:
            shard.unusable.append(sample.key)
    writer.tar.close()
    if last is not None:
        shard.counts = SourceCounts(
            name=last.source,
            kind=last.kind,
            split=last.split,
            samples=kept,
            conversations=len(shard.rows),
            frames=sum(row["n_frames"] for row in shard.rows if row["conversation"] == 0),
            tokens=sum(row["n_tokens"] for row in shard.rows),
            hours=seconds / 3600,
            bytes=stream.tell(),
        )


def sum_counts(counts: Iterable[SourceCounts]) -> list[SourceCounts]:
    """Sum the counts by source and split, in order of first appearance."""
    sums: dict[tuple[str, Split], SourceCounts] = {}
    for one in counts:
        so_far = sums.get((one.name, one.split))
        numbers = ("samples", "conversations", "frames", "tokens", "hours", "bytes")
        total = {name: getattr(so_far, name) + getattr(one, name) for name in numbers} if so_far else {}
        sums[one.name, one.split] = one.model_copy(update=total)
    return list(sums.values())


def write_shards(
    output: Path,
    samples: Iterable[ShardSample],
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples_per_shard: int = 1000,
    max_text_tokens: int = 2048,
) -> tuple[list[SourceCounts], list[BadClip]]:
    """Write tars, index and tokenizer into `output`. All `samples` are held in memory; they come in any order, and their keys must differ.

    Within a source, samples are sorted by (frame bucket, duration, key). Returns the counts per source and split, and the dropped samples.
    """
    chat = chat_format(tokenizer)
    for split in SPLITS:
        shutil.rmtree(output / split, ignore_errors=True)
    shards = []
    for (source, split), group in groupby(sorted(samples, key=_order), key=lambda sample: (sample.source, sample.split)):
        mine = list(group)
        for number, first in enumerate(range(0, len(mine), samples_per_shard)):
            chosen = mine[first : first + samples_per_shard]
            name = shard_name(split, source, number)
            shards.append(write_shard(output, name, chosen, tokenizer, chat, max_text_tokens=max_text_tokens))
    rows = [row for shard in shards for row in shard.rows]
    pq.write_table(pa.Table.from_pylist(rows, schema=INDEX_SCHEMA), output / INDEX_FILE, compression="zstd")
    tokenizer.save_pretrained(str(output / TOKENIZER_FOLDER))
    return sum_counts(shard.counts for shard in shards if shard.counts), [clip for shard in shards for clip in shard.dropped]


INDEX_SCHEMA = pa.schema(
    [
        ("split", pa.string()),
        ("source", pa.string()),
        ("kind", pa.string()),
        ("task", pa.string()),
        ("shard", pa.string()),
        ("key", pa.string()),
        ("conversation", pa.int32()),
        ("json_offset", pa.int64()),
        ("json_size", pa.int32()),
        ("frame_offsets", pa.list_(pa.int64())),
        ("frame_sizes", pa.list_(pa.int32())),
        ("n_frames", pa.int32()),
        ("n_tokens", pa.int32()),
        ("n_answer_tokens", pa.int32()),
        ("duration_s", pa.float64()),
    ]
)
"""One row per (sample, conversation). Offsets are those of the members' content in the tar. n_tokens: text tokens with the chat format;
n_answer_tokens: answer tokens with end-of-turn tokens. Of a chosen and a rejected answer, the longer one counts."""


class _TarWriter:
    """Writes one tar. Its bytes do not depend on time, owner or order of arrival."""

    def __init__(self, stream: Any, name: str) -> None:
        self.name = name
        self.tar = tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115 -- the caller closes it

    def add(self, sample: ShardSample, record: dict[str, Any], sizes: list[tuple[int, int, int]]) -> list[dict[str, Any]]:
        """Write a sample; returns its index rows. `sizes`: number, text tokens and answer tokens of each kept conversation."""
        key = record["key"]
        frames = [self._member(f"{key}.{number:03d}.jpg", jpeg) for number, jpeg in enumerate(sample.frames())]
        content = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode()
        json_offset, json_size = self._member(f"{key}.json", content)
        return [
            {
                "split": sample.split,
                "source": sample.source,
                "kind": sample.kind,
                "task": task_of(sample, original),
                "shard": self.name,
                "key": key,
                "conversation": place,
                "json_offset": json_offset,
                "json_size": json_size,
                "frame_offsets": [offset for offset, _ in frames],
                "frame_sizes": [size for _, size in frames],
                "n_frames": len(frames),
                "n_tokens": n_tokens,
                "n_answer_tokens": n_answer_tokens,
                "duration_s": sample.duration_s,
            }
            for place, (original, n_tokens, n_answer_tokens) in enumerate(sizes)
        ]

    def _member(self, name: str, content: bytes) -> tuple[int, int]:
        """Add a member; returns the offset and size of its bytes."""
        info = tarfile.TarInfo(name)
        info.size = len(content)
        offset = self.tar.offset + TAR_BLOCK_BYTES
        self.tar.addfile(info, io.BytesIO(content))
        self.tar.members = []  # ty: ignore[missing-attribute] -- tarfile would keep every member in memory
        return offset, len(content)


def _order(sample: ShardSample) -> tuple:
    return sample.source, sample.split, bucket_of(sample.num_frames), sample.duration_s, sample.key


def _tokenise(
    sample: ShardSample, tokenizer: PreTrainedTokenizerBase, chat: ChatFormat, max_text_tokens: int
) -> tuple[dict[str, Any], list[tuple[int, int, int]]]:
    """Return the sample's JSON record, and number, text tokens and answer tokens of each kept conversation."""
    template = len(chat.user_open) + len(chat.user_close) + len(chat.assistant_open) + len(chat.assistant_close)
    conversations, probes, sizes = [], [], []
    for number, turns in enumerate(sample.conversations):
        tokenised = [
            turn | {f"{part}_ids": encode(tokenizer, text) for part, text in turn.items()}
            for turn in ({part: turn[part].strip() for part in PARTS if part in turn} for turn in turns)
        ]
        answers = sum(max(len(turn["answer_ids"]), len(turn.get("rejected_ids", ()))) for turn in tokenised)
        n_tokens = len(chat.system) + answers + sum(len(turn["question_ids"]) + template for turn in tokenised)
        if n_tokens <= max_text_tokens:
            conversations.append(tokenised)
            probes.append(sample.probes[number])
            sizes.append((number, n_tokens, answers + len(turns)))
    record = {
        **sample.extra,
        "key": sample.key,
        "source": sample.source,
        "kind": sample.kind,
        "origin": sample.origin,
        "caption": sample.caption,
        "duration_s": sample.duration_s,
        "num_frames": sample.num_frames,
        "conversations": conversations,
        "probes": probes,
    }
    return record, sizes
