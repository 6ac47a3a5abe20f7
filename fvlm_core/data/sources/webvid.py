"""WebVid-10M: csv or parquet with `contentUrl` and `name` (columns are found by name; partitions differ in their order).

Most of its addresses have been dead since 2024; if you have a copy of the videos, point `contentUrl` at it. Filters see `duration` in
seconds; it is published as `PT00H00M17S`.
"""

from collections.abc import Collection, Iterator
from pathlib import Path

import pyarrow as pa

from fvlm_core.data.arrow import pc
from fvlm_core.data.sources.adapter import Adapter, Published, read_table, renamed

COLUMNS = {"contentUrl": "url", "name": "caption"}
DURATION = r"^PT(?P<h>\d+)H(?P<m>\d+)M(?P<s>\d+(?:\.\d+)?)S$"


def read(path: Path, columns: Collection[str], embedded: Collection[str] = ()) -> Iterator[pa.RecordBatch]:
    """Like `read_table`, with `duration` in seconds (null if it is not a duration)."""
    for batch in read_table(path, columns):
        if (place := batch.schema.get_field_index("duration")) >= 0:
            batch = batch.set_column(place, "duration", _seconds(batch.column(place).cast(pa.string())))
        yield batch


def _seconds(durations: pa.Array) -> pa.Array:
    parts = pc.extract_regex(durations, DURATION)
    hours, minutes, seconds = (pc.struct_field(parts, name).cast(pa.float64()) for name in ("h", "m", "s"))
    return pc.add(pc.add(pc.multiply(hours, 3600.0), pc.multiply(minutes, 60.0)), seconds)


ADAPTER = Adapter(
    name="webvid",
    title="WebVid-10M",
    kind="video",
    prompt="What would be the WebVid caption for this video?",
    homepage="https://github.com/m-bain/webvid",
    licence="non-commercial research only",
    citation="Bain, Nagrani, Varol and Zisserman 2021, Frozen in Time: A Joint Video and Image Encoder for End-to-End Retrieval",
    required=tuple(COLUMNS),
    rows=renamed(COLUMNS),
    read=read,
    published=Published(samples=10_727_582, gigabytes=None, hours=52_000.0, source="the dataset's page: 10.7M clips, 52K hours"),
)
