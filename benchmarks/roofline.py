"""A roofline model of the training step on a GPU, computed without one: time and memory by part, eager and compiled.

The step (forward, backward, gradient norm, AdamW) runs on `FakeTensor`s, which have shapes but no values, and every operation is recorded.
The time of a kernel is the longest of three: its FLOPs at the card's tensor-core peak, its bytes at the card's bandwidth (both multiplied
by the share of the peak that kernels reach, `RATES`), and the minimum time of a kernel. `benchmarks.kernels` decides which operations are
fused into one kernel. The host's time to launch all kernels is a further bound. MFU is defined as in `metrics.csv`: FLOPs of the
configuration over time and the data sheet's peak.

The trace also proves that no operation of the step reads a value from the device, because FakeTensors have no values.
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
"""Memory bandwidth of the SXM cards (A100: 80 GB), from NVIDIA's data sheets."""
KERNEL_US = 2.0
"""The minimum time of a kernel on the device."""


@dataclass(frozen=True)
class Rates:
    """The shares of a card's peaks that kernels reach, and the host's time per launch."""

    matmul: float
    attention: float
    """Of attention within frames."""
    packed_attention: float
    """Of attention within packed texts."""
    bandwidth: float
    launch_us: dict[Kind, float]
    """Host microseconds per kernel of this model, including Python, autograd and the compiler's guards."""


RATES = {
    "measured": Rates(0.6, 0.15, 0.05, 0.55, {"eager": 39.0, "compiled": 67.0, "autotuned": 67.0}),
    "large": Rates(0.75, 0.5, 0.5, 0.85, {"eager": 6.0, "compiled": 4.0, "autotuned": 4.0}),
}
"""measured: reached by the step's own compiled kernels at 135M and by the host, on a rented H200 (`benchmarks.gpu_checks`, 2026-11-27).
large: reached by large matrix products, long attention and copies, and by an otherwise idle host; an upper bound for better kernels."""
GOAL_MFU = {"135M": 0.40, "1.7B": 0.50}
FRAMES, TEXTS = (4, 8, 8, 16), (24, 48, 96, 200)
"""Frames and text tokens of each group of four samples, as in `benchmarks.train_step`."""
GROUPS = 14
"""Groups of four samples per micro-batch: 504 frames and 5,656 tokens, which fit into the default budget."""
MICRO_BATCHES = 4
"""Per step: 2,016 frames, about as many as 64 clips of 32 frames."""
ADAMW_BYTES = 28 + 4 + 4
"""Bytes per fp32 parameter: AdamW reads four values and writes three, the norm reads the gradient, and clipping writes it back."""
STATE_BYTES: dict[Kind, int] = {"eager": 16, "compiled": 18, "autotuned": 18}
"""Bytes per parameter: weight, gradient and two moments in fp32; if compiled, also the weight in bf16."""

_FREE = ("empty", "new_empty", "detach", "lift_fresh", "alias", "device", "_unsafe_view", "sym_size", "set_")
"""Operations that run no kernel."""


@dataclass(frozen=True)
class Row:
    """One part of the step on one card."""

    size: str
    card: str
    kind: str
    part: str
    gflop: float
    gbyte: float
    launches: int
    ms: float
    bound: str
    """What bounds most of its time: `matmul`, `attention`, `bytes`, `kernels` (their minimum time) or, for the step, `host` (launches)."""
    mfu: float | None = None
    """Of the complete step only."""
    memory_gb: float | None = None
    """Of the complete step only: weights (and their bf16 copies if compiled), gradients, AdamW state and activations. Overhead of the
    allocator and of libraries is not counted."""


class Recorder(TorchDispatchMode):
    """Records every operation of forward and backward with the part of the model that it belongs to."""

    def __init__(self, layout_flops: Callable[[Tensor], float]) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.stack: list[tuple[str, int | None, bool]] = [("other", None, False)]
        self.place_of_node: dict[int, tuple[str, int | None, bool]] = {}
        self.storages: list[Any] = []
        """Keeps storages alive, so that no two have the same address."""
        self.layout_flops = layout_flops
        self.groups = 0

    @contextlib.contextmanager
    def within(self, part: str | None, *, compiled: bool = False, fused: bool = False) -> Generator[None]:
        """Assign the operations inside to `part` (None: the enclosing part) and, with `compiled`, to a compiled call of their own."""
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
            # the first operation after a node was created belongs to it; later ones may have no node
            self.place_of_node.setdefault(torch.autograd._get_sequence_nr() - 1, place)
        else:
            place = self.place_of_node.get(node._sequence_nr(), ("other", None, False))
        name = str(func)
        operation = name.split(".")[1] if "." in name else name
        if any(operation.startswith(free) for free in _FREE) or func.is_view:
            return out
        views, written = self._views((args, kwargs)), self._views(out)
        if operation.startswith("_foreach") and operation.endswith("_"):  # in-place operations return nothing
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
        """Return bytes by storage and by the offset of each view in it."""
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
        if "scaled_dot_product" in name:  # attention within frames is not causal, so it costs the full square
            backward = "backward" in name
            query, key = (args[1], args[2]) if backward else (args[0], args[1])
            return (2.5 if backward else 1.0) * 4.0 * query.numel() * key.shape[-2]
        packet = func.overloadpacket
        return float(flop_registry[packet](*args, **kwargs, out_val=out)) if packet in flop_registry else 0.0


@dataclass(frozen=True)
class Traced:
    """The operations of forward and backward of a micro-batch."""

    operations: list[Operation]
    """Operations of the first micro-batch of a step."""
    later: list[Operation]
    """Operations of each later micro-batch, which accumulates gradients."""
    model_flops: float
    """FLOPs of the micro-batch, computed from the configuration."""
    parameters: int


def trace(settings: ModelSettings, *, groups: int = GROUPS, compiled: bool = False) -> Traced:
    """Trace a micro-batch of `groups` groups of four samples on FakeTensors; with `compiled`, on the code path of compiled runs."""
    batch = videos(groups)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = FoveatedVLM(settings, *_backbones(settings))
        model.encoder.factored_gradients = compiled
        model.casts.parts = frozenset(["encoder", "llm"] if compiled else [])
        total = Cost(model, LOSS).batch(batch)
        recorders = [Recorder(lambda query: _packed_flops(query, batch)) for _ in range(2)]
        with patch.object(linear, "_compiles", lambda: compiled), model.casts.step(adds=True):
            for recorder in recorders:
                with _parts(model, recorder), recorder:
                    with torch.autocast("cpu", torch.bfloat16, cache_enabled=not compiled):  # a compiled graph does its own casts
                        objective = model(batch, LOSS).objective
                    objective.backward()
    first, later = (recorder.operations for recorder in recorders)
    return Traced(first, later, total, sum(parameter.numel() for parameter in model.parameters()))


def videos(groups: int, *, frame_px: int = FRAME_PX) -> PackedBatch:
    """Return a packed micro-batch of `groups` groups of four videos."""
    rng = np.random.default_rng(0)
    sizes = list(zip(FRAMES, TEXTS, strict=True)) * groups
    samples = [text_sample(rng, frames=f, shown=list(range(f)), text=t, labels=t // 2, frame_px=frame_px) for f, t in sizes]
    return pack(samples, NO_TEMPLATE)


def rows(
    size: str, card: str, traces: dict[Kind, Traced], *, micro_batches: int = MICRO_BATCHES, rates: Rates = RATES["measured"]
) -> Iterator[Row]:
    """Yield a row per part and one for the step, for each kind and its trace."""
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
    """Whether a sum is over all dimensions or includes the last one."""
    dims = args[1] if len(args) > 1 else None
    return not dims or any(dim % args[0].ndim == args[0].ndim - 1 for dim in dims)


@contextlib.contextmanager
def _parts(model: FoveatedVLM, recorder: Recorder) -> Generator[None]:
    """Tell the recorder which part runs. Each call of a function that `run.compile` compiles is a group. Uses the packed kernel, as on a
    GPU."""

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
        wrap(model, "run_llm", "llm")
        wrap(model, "_cross_entropy", "loss")
        wrap(model.cross_entropy, "forward", "loss", compiled=True)
        patches.enter_context(patch.object(llama, "has_packed_kernel", lambda *_: True))
        yield


def _packed_flops(query: Tensor, batch: PackedBatch) -> float:
    """Return the FLOPs of causal attention for a query [S, H, D]: half of each sample's square, scaled down if only prefixes run."""
    tokens, heads, width = query.shape[0], query.shape[-2], query.shape[-1]
    scale = tokens / sum(batch.lengths)
    return sum(2.0 * heads * width * (length * scale) ** 2 for length in batch.lengths)


def main() -> None:
    options = arguments(
        __doc__ or "",
        sizes={"nargs": "+", "choices": list(SMOLLM2), "default": list(SMOLLM2)},
        cards={"nargs": "+", "choices": list(BANDWIDTH_TB_S), "default": ["H100"]},
        groups={"type": int, "default": GROUPS, "help": "groups per micro-batch; a group is four videos with 36 frames in total"},
        micro_batches={"type": int, "default": MICRO_BATCHES, "help": "micro-batches per step"},
        rates={"choices": list(RATES), "default": "measured", "help": "kernel efficiency: as measured, or of large kernels"},
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
