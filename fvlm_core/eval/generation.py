"""Text generation for the evaluation: greedy, seeded sampling, or beam search. Importing this module does not import torch."""

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
    """Decoding method: greedy, sampling, or beam search."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Sampling temperature: logits are divided by it."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling: sample from the most likely tokens whose probabilities add up to this."""
    seed: int = 0
    """Seed for sampling. A question's samples do not depend on the other questions asked."""
    beams: Positive = 4
    """Number of beams in beam search."""
    length_penalty: float = 1.0
    """Beam search divides an answer's log-likelihood by its number of tokens to this power."""

    def seed_of(self, name: str, question: Sequence[int]) -> int:
        """The sampling seed of one question, from the name of its media and its token ids."""
        return crc32(f"{self.seed} {name} {list(question)}".encode())


GREEDY = Generation()


def continue_prompts(
    model: "FoveatedVLM",
    cache: "PackedCache",
    hidden: "Tensor",
    generation: Generation,
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    seeds: Sequence[int],
) -> list[list[int]]:
    """Continue N samples in a KV cache from their last hidden states [N, llm width]; return token ids without the stop token.

    `seeds` holds one seed per sample.
    """
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
