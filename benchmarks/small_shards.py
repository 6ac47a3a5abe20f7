"""Shards of a few samples with a tokenizer trained on them: data for benchmarks and tests that do not ask how it came about."""

from collections.abc import Sequence
from pathlib import Path

from fvlm_core.data.jobs import SHARD_FILES, ShardManifest
from fvlm_core.data.shard_files import ShardSample, write_shards
from fvlm_core.data.tokenizer import render_chat, train_tokenizer
from fvlm_core.manifest import file_entries


def write_small(
    folder: Path,
    samples: Sequence[ShardSample],
    *,
    identity: str,
    frame_px: int,
    tokens: int,
    vocab_size: int | None = None,
    samples_per_shard: int = 16,
) -> Path:
    """Shards in `folder`, none of whose samples may be too long.

    `tokens`: of the tokenizer, at most; `vocab_size`: what a model's embedding is to have, where that is more. `identity`: the settings'
    hash of the manifest, by which one set differs from another.
    """
    tokenizer = train_tokenizer((render_chat(turns) for sample in samples for turns in sample.conversations), tokens)
    sources, dropped = write_shards(folder, samples, tokenizer, samples_per_shard=samples_per_shard)
    assert not dropped
    ShardManifest(
        name="shards",
        settings_hash=identity,
        counts={"samples": len(samples)},
        files=file_entries(folder, SHARD_FILES),
        sources=sources,
        frame_px=frame_px,
        fps=1.0,
        max_frames=64,
        vocab_size=vocab_size or len(tokenizer),
    ).write(folder)
    return folder
