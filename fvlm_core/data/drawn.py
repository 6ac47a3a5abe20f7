"""Samples of a generator that has no end, drawn where they are used or, ahead, in other processes."""

from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

import numpy as np
from torch.utils.data import DataLoader, Dataset

from fvlm_core.data.loader import as_it_is, loader_processes

T = TypeVar("T")
U = TypeVar("U")


def drawn(make: Callable[[np.random.Generator, T], U], wanted: Iterable[T], rng: np.random.Generator, workers: int) -> Iterator[U]:
    """`make(rng, one)` for each of `wanted`.

    Without `workers` one after the other, each when it is asked for. With them, as many processes draw ahead, each sample from a generator
    of its own: equal `wanted` give equal samples however many there are, but each of `wanted` is taken `workers` samples early.
    """
    if not workers:
        yield from (make(rng, one) for one in wanted)
        return
    numbered = _Numbered(make, int(rng.integers(2**63)))
    yield from DataLoader(
        numbered,
        sampler=enumerate(wanted),
        batch_size=None,
        collate_fn=as_it_is,
        num_workers=workers,
        prefetch_factor=1,  # what waits is in shared memory
        multiprocessing_context=loader_processes(),
    )


class _Numbered(Dataset[U], Generic[T, U]):
    """Draws by number, from a seed."""

    def __init__(self, make: Callable[[np.random.Generator, T], U], seed: int) -> None:
        self.make, self.seed = make, seed

    def __getitem__(self, index: tuple[int, T]) -> U:
        number, one = index
        return self.make(np.random.default_rng([self.seed, number]), one)
