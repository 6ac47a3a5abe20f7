"""The training step on a card that is not here: the least time that its own operations need, eager and compiled, per part.

The step (forward, backward, gradient norm, AdamW) runs on `FakeTensor`s, which have shapes and no numbers; every operation is recorded.
Each kernel takes the longest of its FLOPs at the card's tensor-core peak, its bytes at the card's bandwidth, both times the share of
them that kernels reach (`RATES`), and the shortest time of a kernel. Which operations are one kernel: `benchmarks.kernels`.
The host has to launch them all. MFU is that of `metrics.csv`: FLOPs of the configuration over time and the data sheet's peak.

It also proves that no operation of the step asks the device for a number: FakeTensors have none to give.
"""

import contextlib
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args
from unittest.mock import patch

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import Dinov2Config, LlamaConfig

from benchmarks.kernels import Kernel, Kind, Operation, kernels
from benchmarks.report import arguments
from benchmarks.shapes import FRAME_PX, NO_TEMPLATE, SMOLLM2, VOCABULARY, model_settings, text_sample
from benchmarks.train_step import LOSS
from fvlm_core.config import ModelSettings
from fvlm_core.data.batch import PackedBatch, pack
from fvlm_core.model import linear, llama
from fvlm_core.model.encoder import Encoder
from fvlm_core.model.foveated import FoveatedVLM
from fvlm_core.model.llama import Llama, RMSNorm
from fvlm_core.train.cost import Cost
from fvlm_core.train.metrics import PEAK_TFLOPS

BANDWIDTH_TB_S = {"A100": 2.04, "H100": 3.35, "H200": 4.8}
"""Of the SXM cards (A100: 80 GB), NVIDIA's data sheets."""
KERNEL_US = 2.0
"""The shortest time that a kernel takes of the device."""


@dataclass(frozen=True)
class Rates:
    """What of a card's peaks kernels reach, and what the host needs to start them."""

    matmul: float
    attention: float
    """Of the frames."""
    packed_attention: float
    """Of the texts."""
    bandwidth: float
    launch_us: dict[Kind, float]
    """Per kernel of the model, with all that Python, autograd and the compiler's checks do for it."""


RATES = {
    "measured": Rates(0.6, 0.15, 0.05, 0.55, {"eager": 39.0, "compiled": 67.0, "autotuned": 67.0}),
    "large": Rates(0.75, 0.5, 0.5, 0.85, {"eager": 6.0, "compiled": 4.0, "autotuned": 4.0}),
}
"""measured: by the step's own kernels at 135M, compiled, and by the host, on a rented H200 (`benchmarks.gpu_checks`, 2026-11-27). large: by
large products, long attention and copies, and by a host that does nothing else, so what better kernels could come to."""
GOAL_MFU = {"135M": 0.40, "1.7B": 0.50}
FRAMES, TEXTS = (4, 8, 8, 16), (24, 48, 96, 200)
"""Of each four samples, as in `benchmarks.train_step`."""
GROUPS = 14
"""Of four samples: 504 frames and 5,656 tokens, what fits into the default budget of a micro-batch."""
MICRO_BATCHES = 4
"""Of a step: 2,016 frames, as many as 64 clips of 32."""
ADAMW_BYTES = 28 + 4 + 4
"""Per fp32 parameter: AdamW reads four numbers and writes three, the norm reads the gradient, and AdamW writes it back when it clips it."""
STATE_BYTES: dict[Kind, int] = {"eager": 16, "compiled": 18, "autotuned": 18}
"""Per parameter: fp32 weight, gradient and two moments; compiled, the weight in bf16."""

_FREE = ("empty", "new_empty", "detach", "lift_fresh", "alias", "device", "_unsafe_view", "sym_size", "set_")
"""Operations that run no kernel."""


@dataclass(frozen=True)
class Row:
    """A part of the step on a card."""

    size: str
    card: str
    kind: str
    part: str
    gflop: float
    gbyte: float
    launches: int
    ms: float
    bound: str
    """What its time is mostly: `matmul`, `attention`, `bytes`, `kernels` (their least time), or of the step `host` (launching)."""
    mfu: float | None = None
    """Of the step."""
    memory_gb: float | None = None
    """Of the step: weights, their copies in bf16 where compiled, gradients, AdamW's state, and what the backward needs of the forward. What
    the allocator and the libraries need besides is not counted."""


class Recorder(TorchDispatchMode):
    """Records every operation, with the part of the model that it belongs to, also in the backward."""

    def __init__(self, layout_flops: Callable[[Tensor], float]) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.stack: list[tuple[str, int | None, bool]] = [("other", None, False)]
        self.place_of_node: dict[int, tuple[str, int | None, bool]] = {}
        self.storages: list[Any] = []
        """Kept, so that no two of them have the same address."""
        self.layout_flops = layout_flops
        self.groups = 0

    @contextlib.contextmanager
    def within(self, part: str | None, *, compiled: bool = False, fused: bool = False) -> Generator[None]:
        """The operations inside belong to `part` (None: the one around), and to a compiled call of its own where asked for."""
        around = self.stack[-1]
        self.groups += 1
        group = self.groups if compiled or (fused and around[1] is None) else around[1]
        self.stack.append((part or around[0], group, fused))
        try:
            yield
        finally:
            self.stack.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        node = torch._C._current_autograd_node()
        if node is not None and "AccumulateGrad" in node.name():
            place = "gradients", None, False
        elif node is None:
            place = self.stack[-1]
            # the first operation after a node was made is its own; later ones may have none
            self.place_of_node.setdefault(torch.autograd._get_sequence_nr() - 1, place)
        else:
            place = self.place_of_node.get(node._sequence_nr(), ("other", None, False))
        name = str(func)
        operation = name.split(".")[1] if "." in name else name
        if any(operation.startswith(free) for free in _FREE) or func.is_view:
            return out
        views, written = self._views((args, kwargs)), self._views(out)
        if operation.startswith("_foreach") and operation.endswith("_"):  # in place, it returns nothing
            views, written = self._views(args[1:] if "copy" in operation else args), self._views(args[0])
        writes = {storage: sum(of.values()) if operation.startswith("_foreach") else max(of.values()) for storage, of in written.items()}
        if writes:
            reads = {storage: sum(of.values()) for storage, of in views.items()}
            flops = self._flops(func, args, kwargs or {}, out)
            numel = max((tensor.numel() for tensor in tree_leaves(out) if isinstance(tensor, Tensor)), default=0)
            across = func.overloadpacket is torch.ops.aten.sum and args[0].ndim > 1 and not _over_last(args)
            at = place[0], place[1], node is not None, place[2]
            self.operations.append(Operation(operation, *at, flops, reads, writes, numel, views, over_tokens=across))
        return out

    def _views(self, values: Any) -> dict[int, dict[int, int]]:
        """Bytes by storage and by where in it a view begins."""
        found: dict[int, dict[int, int]] = defaultdict(dict)
        for tensor in tree_leaves(values):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.storages.append(storage)
                distinct = tensor.element_size()
                for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
                    distinct *= size if stride else 1
                views, start = found[storage._cdata], int(tensor.storage_offset())
                views[start] = max(distinct, views.get(start, 0))
        return found

    def _flops(self, func: Any, args: Any, kwargs: Any, out: Any) -> float:
        name = str(func)
        if "aten._flash_attention" in name:
            backward = "backward" in name
            query = args[1] if backward else args[0]
            return (2.5 if backward else 1.0) * self.layout_flops(query)
        if "scaled_dot_product" in name:  # of the frames, which attend to themselves or are queried: the square is needed
            backward = "backward" in name
            query, key = (args[1], args[2]) if backward else (args[0], args[1])
            return (2.5 if backward else 1.0) * 4.0 * query.numel() * key.shape[-2]
        packet = func.overloadpacket
        return float(flop_registry[packet](*args, **kwargs, out_val=out)) if packet in flop_registry else 0.0


@dataclass(frozen=True)
class Traced:
    """The forward and backward of a micro-batch."""

    operations: list[Operation]
    """Of a step's first micro-batch."""
    later: list[Operation]
    """Of each of those after it, which adds its gradients to those before."""
    model_flops: float
    """Needed for it by the configuration."""
    parameters: int


def trace(settings: ModelSettings, *, groups: int = GROUPS, compiled: bool = False) -> Traced:
    """Run a micro-batch of `groups` times four samples, without numbers, on a model of shapes; `compiled`: as its code runs compiled."""
    batch = videos(groups)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = FoveatedVLM(settings, *_backbones(settings))
        model.encoder.has_tickets = compiled
        model.casts.parts = frozenset(["encoder", "llm"] if compiled else [])
        total = Cost(model, LOSS).batch(batch)
        recorders = [Recorder(lambda query: _packed_flops(query, batch)) for _ in range(2)]
        with patch.object(linear, "_compiles", lambda: compiled), model.casts.step(adds=True):
            for recorder in recorders:
                with _parts(model, recorder), recorder:
                    with torch.autocast("cpu", torch.bfloat16, cache_enabled=not compiled):  # a graph casts for itself
                        objective = model(batch, LOSS).objective
                    objective.backward()
    first, later = (recorder.operations for recorder in recorders)
    return Traced(first, later, total, sum(parameter.numel() for parameter in model.parameters()))


def videos(groups: int, *, frame_px: int = FRAME_PX) -> PackedBatch:
    """A micro-batch of videos."""
    rng = np.random.default_rng(0)
    sizes = list(zip(FRAMES, TEXTS, strict=True)) * groups
    samples = [text_sample(rng, frames=f, shown=list(range(f)), text=t, labels=t // 2, frame_px=frame_px) for f, t in sizes]
    return pack(samples, NO_TEMPLATE)


def rows(
    size: str, card: str, traces: dict[Kind, Traced], *, micro_batches: int = MICRO_BATCHES, rates: Rates = RATES["measured"]
) -> Iterator[Row]:
    """Per part, and of the step, for each kind by its trace."""
    peak, bandwidth = PEAK_TFLOPS[card] * 1e12, BANDWIDTH_TB_S[card] * 1e12
    for kind, traced in traces.items():
        parts: dict[str, list[Kernel]] = defaultdict(list)
        for operations, times_run in ((traced.operations, 1), (traced.later, micro_batches - 1)):
            for kernel in kernels(operations, kind=kind):
                parts[kernel.part] += [kernel] * times_run
        parts["optimizer"].append(Kernel("optimizer", 0.0, ADAMW_BYTES * traced.parameters))
        total: dict[str, float] = defaultdict(float)
        made = []
        for part, members in sorted(parts.items()):
            times: dict[str, float] = defaultdict(float)
            for kernel in members:
                reached = rates.matmul
                if kernel.attention:
                    reached = rates.packed_attention if kernel.part.startswith("llm") else rates.attention
                limits = {
                    "attention" if kernel.attention else "matmul": kernel.flops / (peak * reached),
                    "bytes": kernel.bytes / (bandwidth * rates.bandwidth),
                    "kernels": KERNEL_US * 1e-6,
                }
                bound = max(limits, key=lambda name: limits[name])
                times[bound] += limits[bound]
            for bound, seconds in times.items():
                total[bound] += seconds
            made.append(_row(size, card, kind, part, members, times))
        every = [kernel for members in parts.values() for kernel in members]
        launching = len(every) * rates.launch_us[kind] * 1e-6
        step = _row(size, card, kind, "step", every, total)
        seconds = max(step.ms / 1e3, launching)
        bound = "host" if launching > step.ms / 1e3 else step.bound
        mfu = traced.model_flops * micro_batches / seconds / peak
        memory = STATE_BYTES[kind] * traced.parameters + sum(kernel.kept for kernel in kernels(traced.operations, kind=kind))
        made.append(replace(step, ms=seconds * 1e3, bound=bound, mfu=mfu, memory_gb=memory / 1e9))
        yield from made


def _row(size: str, card: str, kind: str, part: str, members: Iterable[Kernel], times: dict[str, float]) -> Row:
    members = list(members)
    flops, size_bytes = sum(k.flops for k in members), sum(k.bytes for k in members)
    bound = max(times, key=lambda name: times[name])
    return Row(size, card, kind, part, flops / 1e9, size_bytes / 1e9, len(members), sum(times.values()) * 1e3, bound)


def _backbones(settings: ModelSettings) -> tuple[Encoder, Llama]:
    vision, text = settings.vision.shape, settings.llm.shape
    assert vision is not None
    assert text is not None
    encoder = Encoder(
        Dinov2Config(
            hidden_size=vision.width,
            num_hidden_layers=vision.layers,
            num_attention_heads=vision.heads,
            patch_size=vision.patch_px,
            image_size=settings.vision.frame_px,
        )
    )
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=text.width,
        num_hidden_layers=text.layers,
        num_attention_heads=text.heads,
        num_key_value_heads=text.kv_heads,
        intermediate_size=text.mlp_width,
        tie_word_embeddings=True,
    )
    return encoder, Llama(config)


def _over_last(args: Sequence[Any]) -> bool:
    """Whether a sum's dimensions are all, or the last is one of them."""
    dims = args[1] if len(args) > 1 else None
    return not dims or any(dim % args[0].ndim == args[0].ndim - 1 for dim in dims)


@contextlib.contextmanager
def _parts(model: FoveatedVLM, recorder: Recorder) -> Generator[None]:
    """Lets the recorder know which part runs; calls of what `run.compile` compiles are groups. The packed kernel runs, as on a card."""

    def named(part: str | None, *, compiled: bool = False, fused: bool = False) -> Callable[[Any], Any]:
        def wrap(function: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                with recorder.within(part, compiled=compiled, fused=fused):
                    return function(*args, **kwargs)

            return call

        return wrap

    with contextlib.ExitStack() as patches:

        def wrap(target: Any, method: str, part: str | None, **kind: bool) -> None:
            patches.enter_context(patch.object(target, method, named(part, **kind)(getattr(target, method))))

        wrap(model.llm, "cast", "gradients")
        wrap(model, "encode", "encoder")
        wrap(model.encoder, "cast", "gradients")
        wrap(model.encoder, "embed", "encoder", compiled=True)
        wrap(model.encoder.layers[-1], "keys_values", "encoder", compiled=True)
        for layer in model.encoder.layers:
            wrap(layer, "forward", "encoder", compiled=True)
            wrap(layer, "query", "queries", compiled=True)
        wrap(model, "read", "queries")
        for layer in model.llm.model.layers:
            wrap(layer, "forward", "llm", compiled=True)
            wrap(layer.self_attn, "forward", "llm attention")
            wrap(layer.mlp, "forward", "llm mlp")
        for module in model.modules():
            if isinstance(module, RMSNorm):
                wrap(module, "forward", None, fused=True)
        wrap(model, "contextualise", "llm")
        wrap(model, "_cross_entropy", "loss")
        wrap(model.cross_entropy, "forward", "loss", compiled=True)
        patches.enter_context(patch.object(llama, "has_packed_kernel", lambda *_: True))
        yield


def _packed_flops(query: Tensor, batch: PackedBatch) -> float:
    """Of causal attention [S, H, D]: half of every sample's square, in the samples' proportions where only prefixes run."""
    tokens, heads, width = query.shape[0], query.shape[-2], query.shape[-1]
    scale = tokens / sum(batch.lengths)
    return sum(2.0 * heads * width * (length * scale) ** 2 for length in batch.lengths)


def main() -> None:
    options = arguments(
        __doc__ or "",
        sizes={"nargs": "+", "choices": list(SMOLLM2), "default": list(SMOLLM2)},
        cards={"nargs": "+", "choices": list(BANDWIDTH_TB_S), "default": ["H100"]},
        groups={"type": int, "default": GROUPS, "help": "four videos each, of 36 frames together, in a micro-batch"},
        micro_batches={"type": int, "default": MICRO_BATCHES, "help": "of a step"},
        rates={"choices": list(RATES), "default": "measured", "help": "of the step's own kernels, or of large ones"},
    )
    found = []
    for size in options.sizes:
        settings = model_settings(size)
        eager, compiled = (trace(settings, groups=options.groups, compiled=as_compiled) for as_compiled in (False, True))
        traces: dict[Kind, Traced] = {kind: eager if kind == "eager" else compiled for kind in get_args(Kind)}
        found += [
            row
            for card in options.cards
            for row in rows(size, card, traces, micro_batches=options.micro_batches, rates=RATES[options.rates])
        ]
    if options.json:
        for row in found:
            print(json.dumps(asdict(row)), flush=True)
        return
    table = Table("model", "card", "kind", "part", "GFLOP", "GB", "launches", "ms", "bound", "MFU", "goal", "GB held")
    for row in found:
        mfu, goal = ("" if row.mfu is None else f"{row.mfu:.1%}"), GOAL_MFU.get(row.size)
        values = f"{row.gflop:,.0f}", f"{row.gbyte:,.1f}", f"{row.launches:,}", f"{row.ms:,.1f}", row.bound, mfu
        ends = f"{goal:.0%}" if goal and mfu else "", "" if row.memory_gb is None else f"{row.memory_gb:,.0f}"
        table.add_row(row.size, row.card, row.kind, row.part, *values, *ends, end_section=row.part == "step")
    Console(width=None if sys.stdout.isatty() else 120).print(table)


if __name__ == "__main__":
    main()
