"""Export the model for onnxruntime: its parts, and the complete coarse and fine modes for one sample.

| file | inputs | outputs |
|---|---|---|
| `read.onnx` | `frames` uint8 [F, H, W, 3], `queries` float [F, k, D] | `tokens` float [F, k, llm width] |
| `queries.onnx` | `hidden` float [F, k, llm width] | `queries` float [F, k, D]; `static`, `first` float [k, D] |
| `coarse.onnx` | `frames` uint8 [F, H, W, 3], `input_ids` int64 [S], `visual_positions` int64 [F * k] | `logits` float [S, vocabulary] |
| `fine.onnx` | the same, and `query_sources` int64 [F, k], as in `PackedBatch` | `logits` float [S, vocabulary] |

F and S are dynamic; `static` are the coarse mode's queries, `first` those of a first frame without a question. Loops over a KV cache
are left to other runtimes: decoding, and the autoregressive mode, whose parts are `read.onnx`, `queries.onnx` and the language model
(`fvlm_core.release.gguf_export`). Not exported: packed batches of several samples, models with a glance (which patches are encoded depends
on the data), and the controls (pooled patches and random queries). Needs the extra `onnx`.
"""

import logging
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fvlm_core.errors import UserError
from fvlm_core.model.attention import PackedLayout
from fvlm_core.model.encoder import FrameFeatures
from fvlm_core.model.foveated import FoveatedVLM

READ_FILE, QUERIES_FILE, COARSE_FILE, FINE_FILE = "read.onnx", "queries.onnx", "coarse.onnx", "fine.onnx"
OPSET = 20
LARGEST_FILE_BYTES = 1_900_000_000
"""ONNX files are limited to 2 GiB; larger models store their weights in files beside the graphs."""
UNSUPPORTED = {"pooled": "pools its patches", "random": "queries at random"}
"""Values of `query` that are controls, and what such a model does."""
ANY_LENGTH = -1
"""Length of a layout's only sample, inferred at run time; a number would become a constant in the graph."""


class ReadFrames(nn.Module):
    """Encoder, query attention and projection: from frames and queries to visual tokens."""

    def __init__(self, model: FoveatedVLM) -> None:
        super().__init__()
        self.model = model

    def encode(self, frames: Tensor) -> FrameFeatures:
        """Like `FoveatedVLM.encode`, but without splitting frames into chunks, because their number is dynamic in the graph."""
        features = self.model.encoder._encode(frames, self.model.settings.query == "shallow")
        return features if self.model.connector.shallow is None else self.model.connector.shallow.keys_values(features)

    def forward(self, frames: Tensor, queries: Tensor) -> Tensor:
        """uint8 [F, H, W, 3], [F, k, D] -> [F, k, llm width]."""
        return self.model.read(self.encode(frames), queries).tokens


class NextQueries(nn.Module):
    """Queries from the language model's hidden states, and the two learned queries that need none."""

    def __init__(self, model: FoveatedVLM) -> None:
        super().__init__()
        self.connector = model.connector

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[F, k, llm width] -> [F, k, D], and `q_static` and `q_init` [k, D]."""
        return self.connector.next_queries(hidden), self.connector.q_static.clone(), self.connector.q_init.clone()


class OneSample(nn.Module):
    """Base class of a mode for one sample: from its frames and tokens to the logits at every position."""

    def __init__(self, model: FoveatedVLM) -> None:
        super().__init__()
        self.model, self.reading = model, ReadFrames(model)

    def static(self, frames: Tensor) -> Tensor:
        """The static queries, repeated for every frame: [F, k, D]."""
        return self.model.connector.q_static.expand(frames.shape[0], -1, -1)

    def states(self, tokens: Tensor, input_ids: Tensor, visual_positions: Tensor) -> Tensor:
        """Last hidden states [S, llm width] with visual tokens [F, k, llm width] in place."""
        embedded = self.model.embed(input_ids).index_copy(0, visual_positions, tokens.flatten(0, 1))
        positions = torch.arange(input_ids.shape[0], device=input_ids.device)
        return self.model.run_llm(embedded, positions, PackedLayout([ANY_LENGTH]))


class Coarse(OneSample):
    """The coarse mode."""

    def forward(self, frames: Tensor, input_ids: Tensor, visual_positions: Tensor) -> Tensor:
        """uint8 [F, H, W, 3], int64 [S], int64 [F * k] -> [S, vocabulary]."""
        tokens = self.reading(frames, self.static(frames))
        return self.model.llm.lm_head(self.states(tokens, input_ids, visual_positions))


class Fine(OneSample):
    """The fine mode: frames are encoded once, read with static queries, then read again with queries from the resulting hidden states."""

    def forward(self, frames: Tensor, input_ids: Tensor, visual_positions: Tensor, query_sources: Tensor) -> Tensor:
        """uint8 [F, H, W, 3], int64 [S], int64 [F * k], int64 [F, k] -> [S, vocabulary]."""
        features = self.reading.encode(frames)
        coarse = self.model.read(features, self.static(frames)).tokens
        hidden = self.states(coarse, input_ids, visual_positions)
        made = self.model.connector.next_queries(hidden[query_sources.clamp(min=0)])
        queries = torch.where((query_sources >= 0)[..., None], made, self.model.connector.q_init)
        fine = self.model.read(features, queries).tokens
        return self.model.llm.lm_head(self.states(fine, input_ids, visual_positions))


def export_onnx(model: FoveatedVLM, folder: Path) -> list[Path]:
    """Write the graphs; returns their paths. Raises UserError for an unsupported model, or if the extra is not installed."""
    try:
        import onnxscript  # noqa: F401 -- torch's exporter needs it
    except ImportError as error:
        raise UserError("ONNX is not installed", where="onnxscript", fix='pip install "fvlm[onnx]"') from error
    if model.settings.query in UNSUPPORTED or model.settings.glance is not None:
        kind = UNSUPPORTED.get(model.settings.query, "chooses which patches to encode")
        raise UserError(f"a model that {kind} is not exported", where="model settings", fix="export one with queries and without a glance")
    folder.mkdir(parents=True, exist_ok=True)
    k, width, side = model.settings.tokens_per_frame, model.encoder.config.hidden_size, model.encoder.image_px
    n_frames, length = torch.export.Dim("frames", min=1), torch.export.Dim("tokens", min=2)
    n_visual = n_frames if k == 1 else torch.export.Dim.AUTO
    frames = torch.zeros(2, side, side, 3, dtype=torch.uint8)
    sample = {"frames": frames, "input_ids": torch.zeros(7 + 2 * k, dtype=torch.int64), "visual_positions": torch.arange(2 * k) + 3}
    free = [{0: n_frames}, {0: length}, {0: n_visual}]
    queries, hidden = torch.zeros(2, k, width), torch.zeros(2, k, model.llm.config.hidden_size)
    sources = torch.arange(2 * k).unflatten(0, (2, k))
    graphs = {
        READ_FILE: Graph(ReadFrames(model), {"frames": frames, "queries": queries}, [{0: n_frames}] * 2, ["tokens"]),
        QUERIES_FILE: Graph(NextQueries(model), {"hidden": hidden}, [{0: n_frames}], ["queries", "static", "first"]),
        COARSE_FILE: Graph(Coarse(model), sample, free, ["logits"]),
        FINE_FILE: Graph(Fine(model), sample | {"query_sources": sources}, [*free, {0: n_frames}], ["logits"]),
    }
    large = sum(tensor.nbytes for tensor in model.parameters()) > LARGEST_FILE_BYTES
    for name, graph in graphs.items():
        with torch.no_grad(), _quiet():
            # in two steps: torch.onnx.export alone silently specializes a dynamic dimension that the code turns into a number
            program = torch.export.export(graph.module.eval(), tuple(graph.inputs.values()), dynamic_shapes=tuple(graph.free))
            torch.onnx.export(
                program,
                (),
                str(folder / name),
                dynamo=True,
                input_names=list(graph.inputs),
                output_names=graph.outputs,
                opset_version=OPSET,
                external_data=large,
                optimize=False,  # onnxruntime optimizes when it loads a graph, in a fraction of the time
                verbose=False,
            )
    return [folder / name for name in graphs]


@contextmanager
def _quiet() -> Generator[None]:
    """Silence warnings about torch's own code, which a user cannot act on."""
    exporter = logging.getLogger("torch.onnx._internal.exporter._registration")  # says that torchvision is not installed
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        exporter.setLevel(level)


@dataclass(frozen=True)
class Graph:
    """A graph to export: a module, example inputs, their dynamic dimensions, and the names of its outputs."""

    module: nn.Module
    inputs: dict[str, Tensor]
    free: list[dict]
    outputs: list[str]
