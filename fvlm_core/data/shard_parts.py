"""What is known about a finished shard, kept until the folder is complete: its rows of the index and its counts."""

from collections.abc import Iterable
from pathlib import Path
from typing import Self

import pyarrow as pa
import pyarrow.parquet as pq

from fvlm_core.data.jobs import BadClip, SourceCounts
from fvlm_core.data.shard_files import INDEX_SCHEMA, Shard
from fvlm_core.settings import Settings

GROUP_ROWS = 1 << 16
"""Rows of the index that are held in memory, and rows per row group."""
KEY = b"shard"


class ShardPart(Settings):
    """A finished shard, without its rows of the index."""

    counts: SourceCounts | None
    sha256: str
    dropped: list[BadClip]
    """Samples of which conversations were dropped."""
    unusable: list[str]
    """Keys of samples of which all conversations were dropped."""

    @classmethod
    def write(cls, shard: Shard, path: Path) -> Self:
        """Write what is known about a shard, atomically."""
        part = cls(counts=shard.counts, sha256=shard.sha256, dropped=shard.dropped, unusable=shard.unusable)
        schema = INDEX_SCHEMA.with_metadata({KEY: part.model_dump_json()})
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".part")
        pq.write_table(pa.Table.from_pylist(shard.rows, schema=schema), temporary)
        temporary.rename(path)
        return part

    @classmethod
    def read(cls, path: Path, tar: Path) -> Self | None:
        """Read what was written about the shard `tar`; None if either file is missing or incomplete."""
        try:
            part = cls.model_validate_json((pq.read_schema(path).metadata or {})[KEY])
            there = tar.stat().st_size if part.counts else 0
        except (OSError, ValueError, KeyError):
            return None
        return part if there == (part.counts.bytes if part.counts else 0) else None


def write_index(parts: Iterable[Path], path: Path) -> None:
    """Join the rows of the shards, in order, into one index. Its bytes do not depend on when the shards become ready."""
    with pq.ParquetWriter(path, INDEX_SCHEMA, compression="zstd") as writer:
        waiting = INDEX_SCHEMA.empty_table()
        for part in parts:
            waiting = pa.concat_tables([waiting, pq.read_table(part).replace_schema_metadata(None)])
            while waiting.num_rows >= GROUP_ROWS:
                writer.write_table(waiting.slice(0, GROUP_ROWS).combine_chunks(), row_group_size=GROUP_ROWS)
                waiting = waiting.slice(GROUP_ROWS)
        if waiting.num_rows:
            writer.write_table(waiting.combine_chunks(), row_group_size=GROUP_ROWS)
