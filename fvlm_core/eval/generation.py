"""How the evaluation generates text: greedily, by sampling with a seed, or by beam search. Importing it imports no torch."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal
from zlib import crc32

from pydantic import Field

from fvlm_core.config import Positive
from fvlm_core.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

    from fvlm_core.model.attention import PackedCache
    from fvlm_core.model.foveated import FoveatedVLM

Method = Literal["greedy", "sample", "beams"]


class Generation(Settings):
    """How answers are generated."""

    method: Method = "greedy"
    """Always the likeliest token, a draw, or the likeliest of several answers that are followed at a time."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Of a draw: logits are divided by it."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Of a draw: from the likeliest tokens whose probabilities add up to that."""
    seed: int = 0
    """Of a draw. Every question has draws of its own, whatever is asked beside it."""
    beams: Positive = 4
    """Answers followed at a time."""
    length_penalty: float = 1.0
    """Of beam search: an answer's log-likelihood counts per (number of its tokens to that power)."""

    def seed_of(self, name: str, question: Sequence[int]) -> int:
        """The seed of one question's draws, by what it is about and its token ids."""
        return crc32(f"{self.seed} {name} {list(question)}".encode())


GREEDY = Generation()


def go_on(
    model: "FoveatedVLM",
    cache: "PackedCache",
    hidden: "Tensor",
    generation: Generation,
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    seeds: Sequence[int],
) -> list[list[int]]:
    """Answers from the last hidden states [N, llm width] of the samples in a cache, without the stop token; `seeds`: one a sample."""
    from fvlm_core.model.decoding import continue_sampling, continue_with_beams
    from fvlm_core.model.inference import continue_greedily

    if generation.method == "sample":
        return continue_sampling(
            model,
            cache,
            hidden,
            max_new_tokens=max_new_tokens,
            stop_ids=stop_ids,
            temperature=generation.temperature,
            top_p=generation.top_p,
            seeds=seeds,
        )
    if generation.method == "beams":
        return continue_with_beams(
            model,
            cache,
            hidden,
            max_new_tokens=max_new_tokens,
            stop_ids=stop_ids,
            beams=generation.beams,
            length_penalty=generation.length_penalty,
        )
    return continue_greedily(model, cache, hidden, max_new_tokens=max_new_tokens, stop_ids=stop_ids)
