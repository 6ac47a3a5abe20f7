"""The KV cache for transformers' generation, a wrapper around the model's packed cache."""

from torch import Tensor

from fvlm_core.model.attention import PackedCache
from fvlm_core.model.decoding import branch

ROOM = 64
"""Default number of tokens by which the capacity of a cache grows."""


class FVLMCache:
    """Keys and values of B growing sequences without their padding; empty until a prompt was read.

    transformers counts columns of its padded batch, which are the same for all sequences; each sequence holds only its own tokens.
    """

    is_compileable = False
    """Read by transformers; only caches of fixed size can be compiled."""

    def __init__(self, room: int = ROOM) -> None:
        """`room`: number of new tokens that are expected."""
        self.room = room
        self.packed: PackedCache | None = None
        self.columns = 0

    def fill(self, packed: PackedCache, columns: int) -> None:
        """Store the packed cache of a prompt of `columns` columns; it has room for `room` more tokens."""
        self.packed, self.columns = packed, columns

    def reserve(self, tokens: int) -> PackedCache:
        """Return the packed cache, grown if necessary to hold `tokens` new tokens in every sequence."""
        assert self.packed is not None
        capacities = [end - start for start, end in zip(self.packed.starts, self.packed.starts[1:], strict=False)]
        if any(length + tokens > capacity for length, capacity in zip(self.packed.lengths, capacities, strict=True)):
            rows = range(len(self.packed.lengths))
            self.packed = branch(self.packed, rows, [tokens + self.room] * len(rows))
        return self.packed

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns read so far."""
        return self.columns

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder for beam search: sequence n becomes a copy of sequence `beam_idx[n]`."""
        assert self.packed is not None
        self.packed = branch(self.packed, beam_idx.tolist(), [self.room] * len(beam_idx))
