"""Draws samples from an endless generator, either on demand or ahead of time in other processes."""

from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

import numpy as np
from torch.utils.data import DataLoader, Dataset

from fvlm_core.data.loader import identity, loader_processes

T = TypeVar("T")
U = TypeVar("U")


def generate(make: Callable[[np.random.Generator, T], U], wanted: Iterable[T], rng: np.random.Generator, workers: int) -> Iterator[U]:
    """Yield `make(rng, one)` for each item of `wanted`.

    Without `workers`, each sample is drawn when it is requested. With `workers`, that many processes draw ahead, and each sample has its
    own generator: the samples do not depend on the number of workers, but items of `wanted` are consumed `workers` samples early.
    """
    if not workers:
        yield from (make(rng, one) for one in wanted)
        return
    numbered = _Numbered(make, int(rng.integers(2**63)))
    yield from DataLoader(
        numbered,
        sampler=enumerate(wanted),
        batch_size=None,
        collate_fn=identity,
        num_workers=workers,
        prefetch_factor=1,  # waiting samples take up shared memory
        multiprocessing_context=loader_processes(),
    )


class _Numbered(Dataset[U], Generic[T, U]):
    """Draws samples by number, each with a generator from the seed and the number."""

    def __init__(self, make: Callable[[np.random.Generator, T], U], seed: int) -> None:
        self.make, self.seed = make, seed

    def __getitem__(self, index: tuple[int, T]) -> U:
        number, one = index
        return self.make(np.random.default_rng([self.seed, number]), one)
