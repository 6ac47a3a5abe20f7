"""Divides a step's samples into micro-batches and deals these to the ranks.

Longest processing time first (Graham 1969, https://doi.org/10.1137/0117039), for several budgets at once: items are placed from the most
to the least expensive, each into the micro-batch that holds the least of what the item needs and still has room for it. This balances
frames and tokens separately, regardless of the cost of a frame relative to a token.
"""

from collections.abc import Sequence

import numpy as np

SLACK = 1e-9
"""Tolerance for rounding errors in sums of shares."""


def balance(costs: Sequence[Sequence[float]] | np.ndarray, ranks: int) -> list[list[list[int]]]:
    """Deal items (at least one per rank) to ranks and micro-batches: `[rank][micro-batch]` is a list of ascending indexes.

    `costs` is [N, B]: each item's share of B budgets, 1 being the full budget of a micro-batch. Every rank gets the same number of
    micro-batches: the fewest for which none exceeds a budget, except for single items above one. None is empty. All use nearly the same
    share of every budget, and micro-batches that the ranks compute at the same time are the most similar.
    """
    shares = np.asarray(costs, np.float64)
    order = np.lexsort((np.arange(len(shares)), -shares.sum(1)))
    most = len(shares) // ranks
    each = min(most, max(1, int(np.ceil(shares.clip(max=1).sum(0).max() / ranks - SLACK))))
    while (bins := _fill(shares, order, each * ranks)) is None:
        each += 1
        if each > most:  # with more micro-batches, some would be empty: ignore the budgets
            bins = _fill(shares, order, most * ranks, bounded=False)
            break
    assert bins is not None
    bins.sort(key=lambda items: (-shares[items].sum(), items))
    dealt: list[list[list[int]]] = [[] for _ in range(ranks)]
    for place, items in enumerate(bins):
        turn, rank = divmod(place, ranks)
        dealt[rank if turn % 2 == 0 else ranks - 1 - rank].append(sorted(items))
    return dealt


def _fill(shares: np.ndarray, order: np.ndarray, bins: int, *, bounded: bool = True) -> list[list[int]] | None:
    """Put the items into `bins` bins; None if they do not fit."""
    filled: list[list[int]] = [[] for _ in range(bins)]
    loads, empty = np.zeros((bins, shares.shape[1])), np.ones(bins, bool)
    totals = np.maximum(shares.sum(0), SLACK)
    parts = shares / totals
    for item in order.tolist():
        held = np.where(empty, -1.0, loads @ parts[item])
        if bounded:
            fits = ((loads + parts[item]) * totals <= 1 + SLACK).all(1) | empty
            if not fits.any():
                return None
            held = np.where(fits, held, np.inf)
        chosen = int(held.argmin())
        filled[chosen].append(item)
        loads[chosen] += parts[item]
        empty[chosen] = False
    return filled
