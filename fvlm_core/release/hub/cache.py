"""The KV cache that transformers' generation hands from step to step, around the packed cache that the model's passes fill."""

from torch import Tensor

from fvlm_core.model.attention import PackedCache
from fvlm_core.model.decoding import branch

ROOM = 64
"""Tokens that a cache has room for beyond those it is made with; as many again whenever they are used up."""


class FVLMCache:
    """Keys and values of B growing sequences without their padding; empty until a prompt was read.

    transformers counts the columns of its padded batch, which all sequences have in common; each has read only its own tokens.
    """

    is_compileable = False
    """transformers asks; only its caches of fixed size are."""

    def __init__(self, room: int = ROOM) -> None:
        """`room`: the new tokens that are expected."""
        self.room = room
        self.packed: PackedCache | None = None
        self.columns = 0

    def fill(self, packed: PackedCache, columns: int) -> None:
        """Take over what was read of a prompt of that many columns; `packed` has room for `room` tokens more."""
        self.packed, self.columns = packed, columns

    def reserve(self, tokens: int) -> PackedCache:
        """The packed cache, with room for that many new tokens in every sequence."""
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
        """Let sequence n go on from what sequence `beam_idx[n]` has read."""
        assert self.packed is not None
        self.packed = branch(self.packed, beam_idx.tolist(), [self.room] * len(beam_idx))
