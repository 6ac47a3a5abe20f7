"""Cuts a step's samples into micro-batches and deals them to the ranks.

Longest processing time first (Graham 1969, https://doi.org/10.1137/0117039), for several budgets at once: the costliest item goes first,
each to the micro-batch that holds least of what the item takes and still has place for it. Frames and tokens so come out even each by
itself, whatever a frame costs beside a token.
"""

from collections.abc import Sequence

import numpy as np

SLACK = 1e-9
"""Sums of shares that are equal up to rounding are equal."""


def deal(costs: Sequence[Sequence[float]] | np.ndarray, ranks: int) -> list[list[list[int]]]:
    """Items (at least one per rank) by rank and micro-batch: `[rank][micro-batch]` is a list of ascending indexes.

    `costs` is [N, B]: what each item takes of B budgets, 1 being a micro-batch's full budget. Every rank gets the same number of
    micro-batches, the fewest with which none is above a budget, but for an item that alone is; none is empty. All take nearly the same of
    every budget, and those that the ranks compute at the same time are nearest to each other.
    """
    shares = np.asarray(costs, np.float64)
    order = np.lexsort((np.arange(len(shares)), -shares.sum(1)))
    most = len(shares) // ranks
    each = min(most, max(1, int(np.ceil(shares.clip(max=1).sum(0).max() / ranks - SLACK))))
    while (bins := _fill(shares, order, each * ranks)) is None:
        each += 1
        if each > most:  # even one item per micro-batch leaves some over: those go where there is least
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
    """The items in so many bins; None where they do not fit."""
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
