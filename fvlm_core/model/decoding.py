"""Sampling and beam search from a KV cache, for packed batches of samples with different lengths."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fvlm_core.model.attention import PackedCache, PackedLayout
from fvlm_core.model.foveated import FoveatedVLM


def branch(cache: PackedCache, rows: Sequence[int], room: Sequence[int]) -> PackedCache:
    """Copy samples of a cache into a new one: sample n is `rows[n]` of `cache`, with capacity for `room[n]` further tokens."""
    return joined([(cache, row) for row in rows], room)


def joined(parts: Sequence[tuple[PackedCache, int]], room: Sequence[int]) -> PackedCache:
    """Copy samples of several caches into a new one.

    `parts[n]`: cache and row to copy sample n from. `room[n]`: its capacity for further tokens.
    """
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
    """Sample answers, given a cache and the last hidden states [N, llm width] of its samples. Answers exclude the stop token.

    `top_p`: nucleus sampling from the most likely tokens whose probabilities add up to this share (Holtzman et al. 2020,
    https://arxiv.org/abs/1904.09751). `seeds`: one per sample; each sample has its own generator, so its answer does not depend on the rest
    of the batch. Raises ValueError unless `temperature` > 0 and 0 < `top_p` <= 1.
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
    """Beam search, given a cache and the last hidden states [N, llm width] of its samples. Return the best answer of each sample.

    An answer's score is its log-likelihood divided by its number of tokens to the power of `length_penalty`; both include the stop token.
    The search ends when `beams` answers are finished, or after `max_new_tokens`, where unfinished answers compete with the finished ones.
    """
    return [_search(model, cache, row, hidden[row], max_new_tokens, set(stop_ids), beams, length_penalty) for row in range(len(hidden))]


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Zero the probabilities [N, V] outside the most likely tokens of total probability `top_p`, and renormalise."""
    ordered, places = probabilities.sort(-1, descending=True)
    kept = ordered.cumsum(-1) - ordered < top_p  # keeps the token that crosses `top_p`
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
    """Run the language model on one more token of each sample in `rows`; return the hidden states [n, llm width]."""
    device = model.connector.visual_proj.weight.device
    positions = torch.tensor([cache.lengths[row] for row in rows], device=device)
    return model.run_llm(model.embed(torch.tensor(tokens, device=device)), positions, PackedLayout([1] * len(rows), cache, list(rows)))
