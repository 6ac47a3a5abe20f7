"""What the compiler makes of a step's operations: which of them are one kernel, and the bytes that it moves.

Eager, every operation is a kernel. Compiled, pointwise operations and reductions of a compiled part join the kernel that makes their
inputs, which reads what was made outside and writes what is used outside; what the backward needs of their results is computed again or
kept, whichever moves fewer bytes, as torch's partitioner does. Autotuned (`run.autotune`), activations are also computed at the
end of the matrix product that makes their input.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["eager", "compiled", "autotuned"]
_ATTENTION = ("_varlen_attn", "scaled_dot_product", "_flash_attention")
_ANCHORS = ("mm", "convolution", "embedding", "index", "sort", "scatter", "gather", *_ATTENTION)
"""Parts of names of the operations that are kernels of their own also when compiled."""
_EPILOGUES = ("gelu", "silu")
"""Parts of names of the operations that end a matrix product. A residual sum moves fewer bytes in the next norm's kernel."""


@dataclass
class Operation:
    """One operation of the step."""

    name: str
    part: str
    group: int | None
    """The compiled call that it belongs to; None outside."""
    backward: bool
    fused: bool
    """Whether eager PyTorch too has one kernel for the group (RMSNorm on CUDA)."""
    flops: float
    reads: dict[int, int]
    writes: dict[int, int]
    """Bytes by storage."""
    numel: int
    """Numbers of its largest result."""
    views: dict[int, dict[int, int]] = field(default_factory=dict)
    """Of what it reads, by storage: bytes by where in it a view begins, where there are views."""

    @property
    def attention(self) -> bool:
        return any(part in self.name for part in _ATTENTION)

    @property
    def pointwise(self) -> bool:
        return not any(part in self.name for part in _ANCHORS)

    @property
    def epilogue(self) -> bool:
        return any(part in self.name for part in _EPILOGUES)


@dataclass
class Kernel:
    """What the device runs at once."""

    part: str
    flops: float
    bytes: float
    attention: bool = False


@dataclass
class _Run:
    """Operations that one kernel computes."""

    operations: list[Operation]
    reads: dict[int, int] = field(default_factory=dict)
    """Bytes of what it reads that was made outside, by storage."""
    written: set[int] = field(default_factory=set)
    """Storages it makes."""
    inner: set[int] = field(default_factory=set)
    """Those of them that it also reads."""
    views: dict[int, dict[int, int]] = field(default_factory=lambda: defaultdict(dict))
    """As `Operation.views`: keys and values of one projection are two."""

    @property
    def first(self) -> Operation:
        return self.operations[0]

    @property
    def pointwise(self) -> bool:
        return self.first.pointwise

    def add(self, operation: Operation) -> None:
        for storage, size in operation.reads.items():
            if storage in self.written:
                self.inner.add(storage)
            else:
                for start, part in operation.views.get(storage, {0: size}).items():
                    self.views[storage][start] = max(part, self.views[storage].get(start, 0))
                self.reads[storage] = sum(self.views[storage].values())
        self.written |= set(operation.writes) - set(operation.reads)  # in place, it reads what was there
        self.operations.append(operation)


def kernels(operations: list[Operation], *, kind: Kind) -> list[Kernel]:
    """What the operations become: one kernel each, or as few as the compiler may make of those of a group."""
    runs: list[_Run] = []
    made: dict[int, int] = {}  # by storage, the run that wrote it last
    by_group: dict[tuple[int | None, bool], list[int]] = defaultdict(list)
    for operation in operations:
        place = operation.group, operation.backward
        latest = max((made.get(storage, -1) for storage in operation.reads), default=-1)
        joined = next((n for n in by_group[place] if n >= latest and _joins(operation, runs, n, after=n > latest, kind=kind)), None)
        if joined is None:
            joined = len(runs)
            runs.append(_Run([]))
            by_group[place].append(joined)
        runs[joined].add(operation)
        made |= dict.fromkeys(operation.writes, joined)
    if kind != "eager":
        runs = _inlined(runs)
    return _with_bytes(runs, compiled=kind != "eager")


def _inlined(runs: list[_Run]) -> list[_Run]:
    """The runs, but each that only one other of its group and direction reads is computed there."""
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
        if not reader.pointwise or (reader.first.group, reader.first.backward) != (run.first.group, run.first.backward):
            continue
        merged = _Run([])
        for operation in [*run.operations, *reader.operations]:
            merged.add(operation)
        for storage in run.reads:
            readers[storage] = readers[storage] - {number} | {other}
        runs[number], runs[other] = _Run([]), merged
    return [run for run in runs if run.operations]


def _joins(operation: Operation, runs: list[_Run], number: int, *, after: bool, kind: Kind) -> bool:
    """Whether an operation is computed by the kernel of a run that its inputs are made in, or (`after`) before."""
    run = runs[number]
    if operation.group is None or not operation.pointwise:
        return False
    if kind == "eager":
        return operation.fused and run.first.fused and run.pointwise and number == len(runs) - 1
    if run.pointwise:
        touched = run.written | set(run.reads)
        return not after or any(storage in touched for storage in operation.reads)
    return kind == "autotuned" and not after and "mm" in run.first.name and operation.epilogue and operation.numel == run.first.numel


def _with_bytes(runs: list[_Run], *, compiled: bool) -> list[Kernel]:
    """The runs as kernels. A backward computes a forward's pointwise result again where that needs fewer bytes than to keep it."""
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
        """What `reader` reads for it."""
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
    for run, read in zip(runs, reads, strict=True):
        sizes: dict[int, int] = {}
        for operation in run.operations:
            for storage, size in operation.writes.items():
                unread = storage not in readers and storage not in run.inner
                if storage in kept or unread or storage not in run.written:
                    sizes[storage] = max(size, sizes.get(storage, 0))
        flops = sum(operation.flops for operation in run.operations)
        found.append(Kernel(run.first.part, flops, sum(read.values()) + sum(sizes.values()), run.first.attention))
    return found
