"""The row that every source is read into, written once: tables, records of sources, downloads and the identity of a sample use it.

Needs nothing but pyarrow, since video2dataset's environment imports it too.
"""

from dataclasses import dataclass, fields
from typing import Literal, get_args

import pyarrow as pa

Kind = Literal["video", "image", "text"]
Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = get_args(Split)
SOURCE_PATTERN = r"^[a-z0-9_]+$"
"""Names of sources: part of file names and keys; webdataset splits a key at its first dot."""


@dataclass(frozen=True)
class Row:
    """One video, image or chat."""

    url: str
    """Address or path of the video; several images of one sample are a JSON list of them; empty for text."""
    caption: str
    """Empty for text."""
    source: str
    """Name of the source it is a sample of."""
    kind: str
    """One of Kind; an image is a video of one frame."""
    split: str
    """train, val, or empty: decided by a hash."""
    conversations: str
    """JSON: a list of conversations, each a list of {question, answer}; the last may have {rejected} too."""
    probes: str
    """JSON: per conversation null or {task, choices, answer_index, cells}."""
    extra: str
    """JSON: further fields of the sample."""


SCHEMA = pa.schema([(field.name, pa.string()) for field in fields(Row)])
COLUMNS: tuple[str, ...] = tuple(SCHEMA.names)
REQUIRED = ("url", "caption")
"""Columns that a video cannot do without."""
JSON_COLUMNS = ("conversations", "probes", "extra")
SAMPLE_FIELDS = ("key", "source", "kind", "origin", "caption", "duration_s", "num_frames", "conversations", "probes")
"""Of a sample in a shard; what else it has comes from `extra`."""

ROW, ORIGIN = "row", "origin"
"""Of a download: the row's number in the record of its source, and the address as its source gives it."""
LOCAL = "local:"
"""Before a reference to local media (`fvlm_core.data.media`) in the column `url` of what is given to video2dataset."""
STORES = ("s3://",)
"""How addresses of object stores begin."""
DOWNLOAD_SCHEMA = pa.schema([(ROW, pa.int64()), (ORIGIN, pa.string()), *SCHEMA])
"""What is given to video2dataset; `url` is where it fetches, `origin` what stands in the source."""
CARRIED = [name for name in DOWNLOAD_SCHEMA.names if name not in REQUIRED]
"""Columns that go into the samples' JSON beside url and caption."""
IDENTITY_FIELDS = (ORIGIN, *COLUMNS[1:], "num_frames", "duration_s")
"""What a downloaded sample is, beside its frames: `origin` stands for the address."""
