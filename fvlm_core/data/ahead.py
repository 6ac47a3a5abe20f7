"""Computes results ahead of time in a thread."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Wanted = TypeVar("Wanted")
Item = TypeVar("Item")


def ahead(function: Callable[[Wanted], Item], wanted: Iterable[Wanted], depth: int) -> Iterator[Item]:
    """Yield `function` of each `wanted` item, in order, computed up to `depth` items ahead by a thread."""
    remaining = iter(wanted)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader") as pool:
        waiting = deque(pool.submit(function, one) for one in islice(remaining, depth))
        try:
            while waiting:
                result = waiting.popleft().result()
                waiting.extend(pool.submit(function, one) for one in islice(remaining, 1))
                yield result
        finally:
            pool.shutdown(cancel_futures=True)
