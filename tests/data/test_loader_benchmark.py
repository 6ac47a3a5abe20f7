"""The loader's benchmark on a few small samples: what it counts, not how fast."""

from benchmarks.loader import measure
from benchmarks.mixed_shards import write_mixed
from fvlm_core.data.shard_set import ShardSet


def test_what_is_counted(tmp_path):
    shards = ShardSet(write_mixed(tmp_path / "shards", clips=8, frame_px=56, samples_per_shard=8))
    found = {one.metric: one for one in measure(shards, frames=40, workers=0, rounds=1)}
    assert {"vs_webdataset", "vs_decode_limit", "peak_memory_ours", "with_0_processes"} <= found.keys()
    assert found["padded_token_share"].value == 0
    assert found["rank_cost_spread"].value <= 0.03
    assert found["rank_flops_spread_mean"].value <= 0.03
    assert found["largest_micro_batch_frames"].value <= 512
    assert found["largest_micro_batch_tokens"].value <= 8192
