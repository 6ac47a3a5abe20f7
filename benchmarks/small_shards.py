"""Write small sets of shards, with a tokenizer trained on their text, for benchmarks and tests."""

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
    """Write shards to `folder`. No sample may exceed the length limit.

    `tokens` is the maximal vocabulary size of the tokenizer. `vocab_size` is the number of rows of the model's embedding, if larger.
    `identity` becomes the manifest's settings hash and distinguishes sets of shards.
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
