"""The row format that every source is read into. Tables, records of sources, downloads and the identity of a sample use it.

Needs only pyarrow, because video2dataset's environment imports it too.
"""

from dataclasses import dataclass, fields
from typing import Literal, get_args

import pyarrow as pa

Kind = Literal["video", "image", "text"]
Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = get_args(Split)
SOURCE_PATTERN = r"^[a-z0-9_]+$"
"""Pattern of source names. They are part of file names and keys, and webdataset splits a key at its first dot."""


@dataclass(frozen=True)
class Row:
    """One video, image or chat."""

    url: str
    """Address or path of the video; for several images of one sample, a JSON list of them; empty for text."""
    caption: str
    """Empty for text."""
    source: str
    """Name of the source that the sample belongs to."""
    kind: str
    """One of Kind; an image is a video of one frame."""
    split: str
    """train, val, or empty: a hash decides."""
    conversations: str
    """JSON: a list of conversations, each a list of {question, answer}; the last turn may also have {rejected}."""
    probes: str
    """JSON: a list with null or {task, choices, answer_index, cells} for each conversation."""
    extra: str
    """JSON: an object with further fields of the sample."""


SCHEMA = pa.schema([(field.name, pa.string()) for field in fields(Row)])
COLUMNS: tuple[str, ...] = tuple(SCHEMA.names)
REQUIRED = ("url", "caption")
"""Columns that every video needs."""
JSON_COLUMNS = ("conversations", "probes", "extra")
SAMPLE_FIELDS = ("key", "source", "kind", "origin", "caption", "duration_s", "num_frames", "conversations", "probes")
"""Fields of a sample in a shard; all others come from `extra`."""

ROW, ORIGIN = "row", "origin"
"""Columns of a download: the row's number in the record of its source, and the address as given by the source."""
LOCAL = "local:"
"""Prefix of references to local media (`fvlm_core.data.media`) in the column `url` of video2dataset's input."""
STORES = ("s3://",)
"""Prefixes of addresses in object stores."""
DOWNLOAD_SCHEMA = pa.schema([(ROW, pa.int64()), (ORIGIN, pa.string()), *SCHEMA])
"""Input of video2dataset: `url` is the address to fetch, `origin` the address as given by the source."""
PASSTHROUGH_COLUMNS = [name for name in DOWNLOAD_SCHEMA.names if name not in REQUIRED]
"""Columns copied into the samples' JSON, besides url and caption."""
IDENTITY_FIELDS = (ORIGIN, *COLUMNS[1:], "num_frames", "duration_s")
"""Fields that identify a downloaded sample, besides its frames; `origin` takes the place of `url`."""
