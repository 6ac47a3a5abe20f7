"""Ways to go on from a KV cache other than greedily: sampling, and beam search; all samples of a batch together, each at its own length."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fvlm_core.model.attention import PackedCache, PackedLayout
from fvlm_core.model.foveated import FoveatedVLM


def branch(cache: PackedCache, rows: Sequence[int], room: Sequence[int]) -> PackedCache:
    """A cache whose sample n holds what sample `rows[n]` of `cache` holds, with room for `room[n]` tokens more; `cache` stays as it is."""
    return joined([(cache, row) for row in rows], room)


def joined(parts: Sequence[tuple[PackedCache, int]], room: Sequence[int]) -> PackedCache:
    """A cache whose sample n holds what `parts[n]`, a sample of any cache, holds, with room for `room[n]` tokens more."""
    lengths = [cache.lengths[row] for cache, row in parts]
    made = PackedCache([length + more for length, more in zip(lengths, room, strict=True)])
    for layer, buffers in parts[0][0].layers.items() if parts else ():
        keys, values = (part.new_zeros((made.starts[-1], *part.shape[1:])) for part in buffers)
        for (cache, row), length, start in zip(parts, lengths, made.starts[:-1], strict=True):
            source = slice(cache.starts[row], cache.starts[row] + length)
            keys[start : start + length] = cache.layers[layer][0][source]
            values[start : start + length] = cache.layers[layer][1][source]
        made.layers[layer] = (keys, values)
    made.lengths = lengths
    return made


@torch.no_grad()
def continue_sampling(
    model: FoveatedVLM,
    cache: PackedCache,
    hidden: Tensor,
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    temperature: float = 1.0,
    top_p: float = 1.0,
    seeds: Sequence[int],
) -> list[list[int]]:
    """Draw answers from the last hidden states [N, llm width] of the samples in a cache; the stop token is left out.

    `top_p` keeps the likeliest tokens whose probabilities add up to that (Holtzman et al. 2020, https://arxiv.org/abs/1904.09751). Every
    sample has a generator of its own (`seeds`), so its answer does not depend on what else is in the batch. Raises ValueError for a
    temperature or share that is not above 0.
    """
    if temperature <= 0 or not 0 < top_p <= 1:
        raise ValueError(f"temperature {temperature} and top_p {top_p} must be above 0, top_p at most 1")
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    answers: list[list[int]] = [[] for _ in range(len(hidden))]
    rows = list(range(len(hidden)))
    for step in range(max_new_tokens):
        probabilities = nucleus((model.llm.lm_head(hidden).float() / temperature).softmax(-1), top_p).cpu()
        drawn = [int(torch.multinomial(p, 1, generator=generators[row])) for row, p in zip(rows, probabilities, strict=True)]
        going = [place for place, token in enumerate(drawn) if token not in stop_ids]
        rows, drawn = [rows[place] for place in going], [drawn[place] for place in going]
        for row, token in zip(rows, drawn, strict=True):
            answers[row].append(token)
        if not rows or step == max_new_tokens - 1:
            break
        hidden = _read(model, cache, rows, drawn)
    return answers


@torch.no_grad()
def continue_with_beams(
    model: FoveatedVLM,
    cache: PackedCache,
    hidden: Tensor,
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    beams: int = 4,
    length_penalty: float = 1.0,
) -> list[list[int]]:
    """The best of `beams` answers that are followed at a time, per sample of a cache with last hidden states [N, llm width].

    A finished answer's score is its log-likelihood, the stop token's included, over its number of tokens to the power of `length_penalty`.
    The search of a sample ends when `beams` answers are finished, or at `max_new_tokens`, where those that are not count as they stand.
    """
    return [_search(model, cache, row, hidden[row], max_new_tokens, set(stop_ids), beams, length_penalty) for row in range(len(hidden))]


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Probabilities [N, V] with those outside the likeliest `top_p` at 0, adding up to 1."""
    ordered, places = probabilities.sort(-1, descending=True)
    kept = ordered.cumsum(-1) - ordered < top_p  # the token that crosses the share is kept
    masked = torch.zeros_like(probabilities).scatter(-1, places, ordered * kept)
    return masked / masked.sum(-1, keepdim=True)


def _search(
    model: FoveatedVLM, cache: PackedCache, row: int, hidden: Tensor, most: int, stop: set[int], beams: int, penalty: float
) -> list[int]:
    alive: list[tuple[float, list[int]]] = [(0.0, [])]
    finished: list[tuple[float, list[int]]] = []
    states, held, held_rows = hidden[None], cache, [row]
    for step in range(most):
        scores = model.llm.lm_head(states).float().log_softmax(-1).double()
        total = scores + torch.tensor([score for score, _ in alive], device=scores.device, dtype=scores.dtype)[:, None]
        best = total.flatten().topk(min(2 * beams, total.numel()))
        going: list[tuple[float, list[int], int]] = []
        for score, place in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            parent, token = divmod(place, total.shape[-1])
            if token in stop:
                finished.append((score / (len(alive[parent][1]) + 1) ** penalty, alive[parent][1]))
            elif len(going) < beams:
                going.append((score, [*alive[parent][1], token], parent))
        alive = [(score, tokens) for score, tokens, _ in going]
        if len(finished) >= beams or step == most - 1:
            break
        held = branch(held, [held_rows[parent] for *_, parent in going], [1] * len(going))
        held_rows = list(range(len(going)))
        states = _read(model, held, held_rows, [tokens[-1] for _, tokens in alive])
    cut = [] if len(finished) >= beams else [(score / max(1, len(tokens)) ** penalty, tokens) for score, tokens in alive]
    return max([*finished, *cut], key=lambda one: one[0])[1]


def _read(model: FoveatedVLM, cache: PackedCache, rows: Sequence[int], tokens: Sequence[int]) -> Tensor:
    """Last hidden states [n, llm width] after one more token for each of some samples."""
    device = model.connector.visual_proj.weight.device
    positions = torch.tensor([cache.lengths[row] for row in rows], device=device)
    return model.contextualise(
        model.embed(torch.tensor(tokens, device=device)), positions, PackedLayout([1] * len(rows), cache, list(rows))
    )
