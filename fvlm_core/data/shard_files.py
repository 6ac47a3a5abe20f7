"""The format of our shards: webdataset tars with an index that makes every sample reachable by one read.

A sample is consecutive members `KEY.000.jpg, KEY.001.jpg, ..., KEY.json` of a tar; any webdataset reader opens them.
`index.parquet` has a row per (sample, conversation) with the members' offsets. Files are equal byte for byte whenever and
wherever they are made of the same samples.
"""

import io
import json
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
"""Upper edges of the frame counts that are kept together in a shard."""
TAR_BLOCK_BYTES = 512
PARTS = ("question", "answer", "rejected")
"""Texts of a turn."""


@dataclass(frozen=True)
class ShardSample:
    """A sample before tokenisation; its frames are read only when they are written."""

    source: str
    kind: Kind
    split: Split
    origin: str
    """What it was made of (a URL, or the number of a generated sample): names the sample, with `source`."""
    conversations: list[list[dict[str, str]]]
    """Per conversation its turns, `{"question", "answer"}`, all about the same frames. The last turn of a preference also has a
    `rejected` answer, worse than `answer`."""
    probes: list[dict[str, Any] | None]
    """Per conversation what an evaluation asks of it (task, choices, answer_index, cells), or None."""
    caption: str = ""
    duration_s: float = 0.0
    num_frames: int = 0
    frames: Callable[[], Sequence[bytes]] = tuple
    """Reads the JPEG files."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further fields for the sample's JSON."""

    @property
    def key(self) -> str:
        """Depends on nothing but the sample itself."""
        return f"{self.source}-{blake2b(self.origin.encode(), digest_size=6).hexdigest()}"


def task_of(sample: ShardSample, conversation: int) -> str:
    """What a conversation asks for: its probe's task, else `caption` (the answer is the clip's caption), else `chat`."""
    probe, turns = sample.probes[conversation], sample.conversations[conversation]
    if probe:
        return probe["task"]
    return "caption" if sample.kind != "text" and len(turns) == 1 and turns[0]["answer"] == sample.caption else "chat"


def write_shards(
    output: Path,
    samples: Iterable[ShardSample],
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples_per_shard: int = 1000,
    max_text_tokens: int = 2048,
    on_sample: Callable[[int], None] = lambda done: None,
) -> tuple[list[SourceCounts], list[BadClip]]:
    """Write tars, index and tokenizer of `samples` (any order; keys must differ) into `output`.

    Conversations of more than `max_text_tokens` (chat format included) are dropped whole, never cut; a sample without any left too.
    Within a source, samples are sorted by (frames bucket, duration, key). `on_sample` gets the number of samples written.
    Returns the counts per source and split, and what was dropped.
    """
    chat = chat_format(tokenizer)
    for split in SPLITS:
        shutil.rmtree(output / split, ignore_errors=True)
    rows: list[dict[str, Any]] = []
    counts: list[SourceCounts] = []
    dropped: list[BadClip] = []
    done = 0
    for (source, split), group in groupby(sorted(samples, key=_order), key=lambda sample: (sample.source, sample.split)):
        kept = 0
        first_row = len(rows)
        writer: _TarWriter | None = None
        kind: Kind = "text"
        for sample in group:
            tokenised, sizes = _tokenise(sample, tokenizer, chat, max_text_tokens)
            if len(sizes) < len(sample.conversations):
                lost = len(sample.conversations) - len(sizes)
                dropped.append(BadClip(url=sample.origin, reason=f"{lost} conversations of more than {max_text_tokens} text tokens"))
            if sizes:
                if kept % samples_per_shard == 0:
                    if writer:
                        writer.close()
                    writer = _TarWriter(output, f"{split}/{source}-{kept // samples_per_shard:05d}.tar")
                assert writer is not None
                rows.extend(writer.add(sample, tokenised, sizes))
                kept, kind = kept + 1, sample.kind
            done += 1
            on_sample(done)
        if writer:
            writer.close()
            counts.append(_count(rows[first_row:], source, kind, split, kept))
    pq.write_table(pa.Table.from_pylist(rows, schema=INDEX_SCHEMA), output / INDEX_FILE, compression="zstd")
    tokenizer.save_pretrained(str(output / TOKENIZER_FOLDER))
    return counts, dropped


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
"""A row per (sample, conversation). Offsets are of the members' bytes in their tar. n_tokens: text with the chat format's;
n_answer_tokens: answers with their end-of-turn tokens. Of two answers, the longer one counts."""


class _TarWriter:
    """One tar; no time, owner or order of arrival gets into its bytes."""

    def __init__(self, output: Path, name: str) -> None:
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        self.name = name
        self.tar = tarfile.open(output / name, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115 -- closed by close()

    def close(self) -> None:
        self.tar.close()

    def add(self, sample: ShardSample, record: dict[str, Any], sizes: list[tuple[int, int, int]]) -> list[dict[str, Any]]:
        """Write a sample; returns its index rows. `sizes`: per conversation its number, text tokens and answer tokens."""
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
        return offset, len(content)


def _order(sample: ShardSample) -> tuple:
    bucket = next((edge for edge in FRAME_BUCKETS if sample.num_frames <= edge), sample.num_frames)
    return sample.source, sample.split, bucket, sample.duration_s, sample.key


def _tokenise(
    sample: ShardSample, tokenizer: PreTrainedTokenizerBase, chat: ChatFormat, max_text_tokens: int
) -> tuple[dict[str, Any], list[tuple[int, int, int]]]:
    """The sample's JSON record, and per kept conversation its number, text tokens and answer tokens."""
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
        "key": sample.key,
        "source": sample.source,
        "kind": sample.kind,
        "origin": sample.origin,
        "caption": sample.caption,
        "duration_s": sample.duration_s,
        "num_frames": sample.num_frames,
        "conversations": conversations,
        "probes": probes,
        **sample.extra,
    }
    return record, sizes


def _count(rows: list[dict[str, Any]], source: str, kind: Kind, split: Split, samples: int) -> SourceCounts:
    return SourceCounts(
        name=source,
        kind=kind,
        split=split,
        samples=samples,
        conversations=len(rows),
        frames=sum(row["n_frames"] for row in rows if row["conversation"] == 0),
        tokens=sum(row["n_tokens"] for row in rows),
    )
