"""A model of kernel fusion: which operations of a step become one kernel, and how many bytes it moves.

* Eager: every operation is a kernel. * Compiled: pointwise operations and reductions within a compiled part are fused into the kernel that
makes their inputs. The fused kernel reads
  only inputs from outside and writes only results that are used outside. Results that the backward needs are recomputed or kept, whichever
  moves fewer bytes, as in torch's partitioner. A sum over tokens (the gradient of a bias or a scale) reduces along the other dimension than
  the kernel that makes its input, so it is a kernel of its own that reads the input again. The exception is the sums for a norm's weights,
  which the compiler computes together with the norm's own sums (`mix_order_reduction` of torch._inductor.scheduler).
* Autotuned (`run.autotune`): activations are also fused into the matrix product that makes their input.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

Kind = Literal["eager", "compiled", "autotuned"]
_ATTENTION = ("_flash_attention", "scaled_dot_product")
_ANCHORS = ("mm", "convolution", "embedding", "index", "sort", "scatter", "gather", *_ATTENTION)
"""Substrings of the names of operations that are separate kernels even when compiled."""
_EPILOGUES = ("gelu", "silu")
"""Substrings of the names of operations that are fused as epilogues of a matrix product. A residual sum is not one of them: it moves fewer
bytes in the next norm's kernel."""

_REDUCTIONS = ("norm", "softmax", "sum", "mean")
"""Substrings of the names of operations that reduce over a row."""


@dataclass
class Operation:
    """One operation of the step."""

    name: str
    part: str
    group: int | None
    """The compiled call that it belongs to; None if it is not compiled."""
    backward: bool
    fused: bool
    """Whether eager PyTorch also has a single kernel for the group (RMSNorm on CUDA)."""
    flops: float
    reads: dict[int, int]
    writes: dict[int, int]
    """Bytes by storage."""
    numel: int
    """Elements of its largest result."""
    views: dict[int, dict[int, int]] = field(default_factory=dict)
    """Bytes read through views, by storage and by the view's offset in it."""
    over_tokens: bool = False
    """Whether it is a sum over dimensions other than the last."""

    @property
    def attention(self) -> bool:
        return any(part in self.name for part in _ATTENTION)

    @property
    def pointwise(self) -> bool:
        return not any(part in self.name for part in _ANCHORS)

    @property
    def epilogue(self) -> bool:
        return any(part in self.name for part in _EPILOGUES)

    @property
    def reduces(self) -> bool:
        """Whether it sums over the last dimension."""
        return not self.over_tokens and any(part in self.name for part in _REDUCTIONS)


@dataclass
class Kernel:
    """One kernel of the device."""

    part: str
    flops: float
    bytes: float
    attention: bool = False
    kept: float = 0.0
    """Bytes of its results that the backward reads: activations."""


@dataclass
class _Run:
    """Operations that are fused into one kernel."""

    operations: list[Operation]
    reads: dict[int, int] = field(default_factory=dict)
    """Bytes that it reads from outside, by storage."""
    written: set[int] = field(default_factory=set)
    """Storages that it writes."""
    inner: set[int] = field(default_factory=set)
    """Storages that it writes and also reads."""
    views: dict[int, dict[int, int]] = field(default_factory=lambda: defaultdict(dict))
    """As `Operation.views`; keys and values of one projection are two views."""

    reduced: set[int] = field(default_factory=set)
    """Storages that it derives from sums over the last dimension."""

    @property
    def first(self) -> Operation:
        return self.operations[0]

    @property
    def pointwise(self) -> bool:
        return self.first.pointwise

    @property
    def over_tokens(self) -> bool:
        """Whether it only sums over tokens."""
        return self.operations[-1].over_tokens and not self.reduced

    def add(self, operation: Operation) -> None:
        for storage, size in operation.reads.items():
            if storage in self.written:
                self.inner.add(storage)
            else:
                for start, part in operation.views.get(storage, {0: size}).items():
                    self.views[storage][start] = max(part, self.views[storage].get(start, 0))
                self.reads[storage] = sum(self.views[storage].values())
        self.written |= set(operation.writes) - set(operation.reads)  # an in-place operation also reads its storage
        if operation.reduces or self.reduced & set(operation.reads):
            self.reduced |= set(operation.writes)
        self.operations.append(operation)


def kernels(operations: list[Operation], *, kind: Kind) -> list[Kernel]:
    """Turn operations into kernels: one each if eager, else as few per group as the compiler can make."""
    runs: list[_Run] = []
    made: dict[int, int] = {}  # storage -> the run that wrote it last
    by_group: dict[tuple[int | None, bool], list[int]] = defaultdict(list)
    for chain in _chains(operations) if kind != "eager" else ([operation] for operation in operations):
        operation = chain[-1]
        place = operation.group, operation.backward
        inside = {storage for other in chain[:-1] for storage in other.writes}
        reads = {storage for other in chain for storage in other.reads} - inside
        latest = max((made.get(storage, -1) for storage in reads), default=-1)
        fits = _sums_with if operation.over_tokens and kind != "eager" else _joins
        later = islice(by_group[place], bisect_left(by_group[place], latest), None)
        joined = next((n for n in later if fits(operation, reads, runs, n, after=n > latest, kind=kind)), None)
        if joined is None:
            joined = len(runs)
            runs.append(_Run([]))
            by_group[place].append(joined)
        for other in chain:
            runs[joined].add(other)
            made |= dict.fromkeys(other.writes, joined)
    if kind != "eager":
        runs = _inlined(runs)
    return _with_bytes(runs, compiled=kind != "eager")


def _chains(operations: list[Operation]) -> Iterator[list[Operation]]:
    """Yield the operations in order; those whose results are read only by a sum over tokens are grouped with it."""
    readers: dict[int, list[int]] = defaultdict(list)
    for number, operation in enumerate(operations):
        for storage in operation.reads:
            readers[storage].append(number)
    into: dict[int, int] = {}
    for number in reversed(range(len(operations))):
        operation = operations[number]
        reading = {into.get(reader, reader) for storage in operation.writes for reader in readers[storage] if reader > number}
        if len(reading) != 1 or not operation.pointwise or operation.group is None or operation.over_tokens or operation.reduces:
            continue
        other = operations[next(iter(reading))]
        if other.over_tokens and (other.group, other.backward) == (operation.group, operation.backward):
            into[number] = next(iter(reading))
    chains: dict[int, list[Operation]] = defaultdict(list)
    for number, operation in enumerate(operations):
        if number in into:
            chains[into[number]].append(operation)
        else:
            yield [*chains.pop(number, []), operation]


def _sums_with(operation: Operation, reads: set[int], runs: list[_Run], number: int, *, after: bool, kind: Kind) -> bool:
    """Whether a sum over tokens joins a run: a run of other such sums, or of a norm whose own sums it does not need."""
    del after, kind
    run = runs[number]
    touched = run.written | set(run.reads)
    if operation.group is None or not run.pointwise or not reads & touched:
        return False
    return run.over_tokens or (bool(run.reduced) and not reads & run.reduced)


def _inlined(runs: list[_Run]) -> list[_Run]:
    """Merge each run into its reader, if that is its only reader and has the same group and direction."""
    readers: dict[int, set[int]] = defaultdict(set)
    for number, run in enumerate(runs):
        for storage in run.reads:
            readers[storage].add(number)
    for number in reversed(range(len(runs))):
        run = runs[number]
        reading = set().union(*(readers[storage] for storage in run.written)) - {number}
        in_place = any(set(operation.writes) - run.written for operation in run.operations)
        if not run.pointwise or run.first.group is None or len(reading) != 1 or in_place:
            continue
        (other,) = reading
        reader = runs[other]
        apart = (reader.first.group, reader.first.backward) != (run.first.group, run.first.backward)
        if apart or not reader.pointwise or reader.over_tokens or run.over_tokens:
            continue
        merged = _Run([])
        for operation in [*run.operations, *reader.operations]:
            merged.add(operation)
        for storage in run.reads:
            readers[storage] = readers[storage] - {number} | {other}
        runs[number], runs[other] = _Run([]), merged
    return [run for run in runs if run.operations]


def _joins(operation: Operation, reads: set[int], runs: list[_Run], number: int, *, after: bool, kind: Kind) -> bool:
    """Whether an operation joins the kernel of a run that makes its inputs or, with `after`, of a later run."""
    run = runs[number]
    if operation.group is None or not operation.pointwise or (kind != "eager" and run.over_tokens):
        return False
    if kind == "eager":
        return operation.fused and run.first.fused and run.pointwise and number == len(runs) - 1
    if run.pointwise:
        touched = run.written | set(run.reads)
        return not after or bool(reads & touched)
    return kind == "autotuned" and not after and "mm" in run.first.name and operation.epilogue and operation.numel == run.first.numel


def _with_bytes(runs: list[_Run], *, compiled: bool) -> list[Kernel]:
    """Turn runs into kernels. The backward recomputes pointwise results of the forward if that moves fewer bytes than keeping them."""
    readers: dict[int, set[int]] = defaultdict(set)
    made: dict[int, int] = {}
    for number, run in enumerate(runs):
        for storage in run.reads:
            readers[storage].add(number)
        made |= dict.fromkeys((storage for operation in run.operations for storage in operation.writes), number)

    def again(storage: int, reader: int) -> bool:
        maker, other = runs[made[storage]] if storage in made else None, runs[reader]
        if not compiled or maker is None or maker is other or maker.first.group is None or maker.first.group != other.first.group:
            return False
        forward = all(operation.pointwise and not operation.backward for operation in maker.operations)
        return forward and other.pointwise and other.first.backward

    kept = {storage for storage, numbers in readers.items() if any(not again(storage, number) for number in numbers)}

    def sources(storage: int, size: int, reader: int) -> dict[int, int]:
        """Return the bytes by storage that `reader` reads to obtain `storage`."""
        if not again(storage, reader):
            return {storage: size}
        inputs: dict[int, int] = {}
        for other, other_size in runs[made[storage]].reads.items():
            inputs |= sources(other, other_size, reader)
        extra = sum(other_size for other, other_size in inputs.items() if other not in runs[reader].reads)
        return inputs if extra < size * (1 if storage in kept else 2) else {storage: size}

    found = []
    reads: list[dict[int, int]] = []
    for number, run in enumerate(runs):
        read: dict[int, int] = {}
        for storage, size in run.reads.items():
            read |= sources(storage, size, number)
        kept |= set(read)
        reads.append(read)
    for_backward = {storage for run, read in zip(runs, reads, strict=True) if run.first.backward for storage in read}
    for run, read in zip(runs, reads, strict=True):
        sizes: dict[int, int] = {}
        for operation in run.operations:
            for storage, size in operation.writes.items():
                unread = storage not in readers and storage not in run.inner
                if storage in kept or unread or storage not in run.written:
                    sizes[storage] = max(size, sizes.get(storage, 0))
        flops = sum(operation.flops for operation in run.operations)
        kept_bytes = 0.0 if run.first.backward else sum(size for storage, size in sizes.items() if storage in for_backward)
        found.append(Kernel(run.first.part, flops, sum(read.values()) + sum(sizes.values()), run.first.attention, kept_bytes))
    return found
