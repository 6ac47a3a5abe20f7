"""The multiple-choice questions of a fixed validation set: the validation split of shards, which is not used in training."""

from collections.abc import Iterator
from pathlib import Path

from fvlm_core.eval.benchmarks.benchmark import Benchmark
from fvlm_core.eval.items import Item

ALL = 10**9


def items(folder: Path | None, limit: int) -> Iterator[Item]:
    """Questions of the validation split, spread evenly over its sources."""
    from fvlm_core.data.shard_set import ShardSet  # both need torch
    from fvlm_core.eval.validation import ValidationSplit

    assert folder is not None
    yield from ValidationSplit(ShardSet(folder), image_repeats=1, seed=0).items(limit or ALL)


BENCHMARK = Benchmark(
    name="validation",
    title="Validation set",
    generate=items,
    split="validation",
    scorer="mean",
)
