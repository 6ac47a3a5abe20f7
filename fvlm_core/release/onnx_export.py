"""The model for onnxruntime: reading frames with given queries, and the complete coarse mode of one sample.

| file | inputs | outputs |
|---|---|---|
| `read.onnx` | `frames` uint8 [F, H, W, 3], `queries` float [F, k, D] | `tokens` float [F, k, llm width] |
| `coarse.onnx` | `frames` uint8 [F, H, W, 3], `input_ids` int64 [S], `visual_positions` int64 [F * k] | `logits` float [S, vocabulary] |

F and S are free. What stays with torch: the fine and the autoregressive mode (a loop in which the language model's states become
queries, over a KV cache; its parts are `read.onnx` and the language model), packed batches of several samples, and models with a glance
(which patches are encoded depends on the data). Needs the extra `onnx`.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from fvlm_core.errors import UserError
from fvlm_core.model.attention import PackedLayout
from fvlm_core.model.foveated import FoveatedVLM

READ_FILE, COARSE_FILE = "read.onnx", "coarse.onnx"
OPSET = 20
LARGEST_FILE_BYTES = 1_900_000_000
"""ONNX files hold less than 2 GiB; weights of larger ones are in files beside them."""
ANY_LENGTH = -1
"""Length of the only sample of a layout, inferred when it runs: a number would be fixed in the graph."""


class ReadFrames(nn.Module):
    """Encoder, query attention and projection: frames and queries to visual tokens."""

    def __init__(self, model: FoveatedVLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, frames: Tensor, queries: Tensor) -> Tensor:
        """uint8 [F, H, W, 3], [F, k, D] -> [F, k, llm width]."""
        # not `Encoder.encode`, which cuts many frames into parts: how many is the graph's to know
        features = self.model.encoder._encode(frames, self.model.settings.query == "shallow")
        if self.model.connector.shallow is not None:
            features = self.model.connector.shallow.keys_values(features)
        return self.model.read(features, queries).tokens


class Coarse(nn.Module):
    """The coarse mode of one sample: its frames and tokens to the logits of every position."""

    def __init__(self, model: FoveatedVLM) -> None:
        super().__init__()
        self.model, self.reading = model, ReadFrames(model)

    def forward(self, frames: Tensor, input_ids: Tensor, visual_positions: Tensor) -> Tensor:
        """uint8 [F, H, W, 3], int64 [S], int64 [F * k] -> [S, vocabulary]."""
        tokens = self.reading(frames, self.model.connector.q_static.expand(frames.shape[0], -1, -1))
        embedded = self.model.embed(input_ids).index_copy(0, visual_positions, tokens.flatten(0, 1))
        positions = torch.arange(input_ids.shape[0], device=input_ids.device)
        hidden = self.model.contextualise(embedded, positions, PackedLayout([ANY_LENGTH]))
        return self.model.llm.lm_head(hidden)


def export_onnx(model: FoveatedVLM, folder: Path) -> list[Path]:
    """Write both graphs; returns their paths. Raises UserError for a model that has none, or without the extra."""
    try:
        import onnxscript  # noqa: F401 -- torch's exporter needs it
    except ImportError as error:
        raise UserError("ONNX is not installed", where="onnxscript", fix='pip install "fvlm[onnx]"') from error
    if model.settings.query == "pooled" or model.settings.glance is not None:
        kind = "pools its patches" if model.settings.query == "pooled" else "chooses which patches to encode"
        raise UserError(f"a model that {kind} is not exported", where="model settings", fix="export one with queries and without a glance")
    folder.mkdir(parents=True, exist_ok=True)
    k, width, side = model.settings.tokens_per_frame, model.encoder.config.hidden_size, model.encoder.image_px
    frames = torch.zeros(2, side, side, 3, dtype=torch.uint8)
    n_frames, length = torch.export.Dim("frames", min=1), torch.export.Dim("tokens", min=2)
    n_visual = torch.export.Dim("visual_tokens", min=1) if k == 1 else torch.export.Dim.AUTO
    large = sum(tensor.nbytes for tensor in model.parameters()) > LARGEST_FILE_BYTES
    graphs = {
        READ_FILE: (ReadFrames(model), {"frames": frames, "queries": torch.zeros(2, k, width)}, [{0: n_frames}, {0: n_frames}], "tokens"),
        COARSE_FILE: (
            Coarse(model),
            {"frames": frames, "input_ids": torch.zeros(7 + 2 * k, dtype=torch.int64), "visual_positions": torch.arange(2 * k) + 3},
            [{0: n_frames}, {0: length}, {0: n_frames if k == 1 else n_visual}],
            "logits",
        ),
    }
    for name, (module, inputs, shapes, output) in graphs.items():
        with torch.no_grad():
            # in two steps: the exporter alone would fix a dimension that the code makes a number of, without a word
            program = torch.export.export(module.eval(), tuple(inputs.values()), dynamic_shapes=tuple(shapes))
            torch.onnx.export(
                program,
                (),
                str(folder / name),
                dynamo=True,
                input_names=list(inputs),
                output_names=[output],
                opset_version=OPSET,
                external_data=large,
                verbose=False,
            )
    return [folder / name for name in graphs]
