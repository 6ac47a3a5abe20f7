"""fVLM for transformers: `AutoModel.from_pretrained(folder, trust_remote_code=True)`.

    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    model.answer("clip.mp4", "What is in the video?")

or in steps, with the processor:

    inputs = processor(text="What is in the video?", videos="clip.mp4")
    processor.batch_decode(model.generate(**inputs, mode="autoregressive"), skip_special_tokens=True)

Sequences are packed: the samples of a batch stand one after another, without padding.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import AutoProcessor, PreTrainedModel
from transformers.utils.generic import ModelOutput

from fvlm_core.data.batch import IGNORE, PackedBatch, _showings
from fvlm_core.model.encoder import PIXEL_MEAN, PIXEL_STD, Encoder
from fvlm_core.model.foveated import FoveatedVLM
from fvlm_core.model.inference import gaze, generate, read_batch
from fvlm_core.model.llama import Llama, RotaryEmbedding
from fvlm_core.release.hub.configuration_fvlm import FVLMConfig

CACHE_LINE_BYTES = 64


@dataclass
class FVLMOutput(ModelOutput):
    """What a forward returns."""

    loss: Tensor | None = None
    """Mean cross-entropy of the labels: of the mode, or in training the weighted mean of all passes."""
    logits: Tensor | None = None
    """[S, vocabulary] of all positions of the packed sequence; None in training."""


class FVLMModel(PreTrainedModel):
    """Encoder, connector and language model."""

    config_class = FVLMConfig
    base_model_prefix = ""
    main_input_name = "frames"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _tied_weights_keys: ClassVar[dict[str, str]] = {"model.llm.lm_head.weight": "model.llm.model.embed_tokens.weight"}
    _no_split_modules: ClassVar[list[str]] = ["EncoderLayer", "LlamaLayer"]

    def __init__(self, config: FVLMConfig) -> None:
        super().__init__(config)
        settings: Any = config.model_settings
        self.model = FoveatedVLM(settings, Encoder(config.vision_config), Llama(config.text_config))
        self.post_init()

    @classmethod
    def from_pretrained(cls, *arguments: Any, **options: Any) -> Any:
        """As `PreTrainedModel.from_pretrained`; weights that lie in the file's own memory are copied to where kernels like them.

        A file's tensors may start at any address, and CPU kernels add up in another order where that is not a multiple of a
        cache line: the last bits of the logits would depend on the length of the file's header.
        """
        loaded = super().from_pretrained(*arguments, **options)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.data_ptr() % CACHE_LINE_BYTES:
                tensor.data = tensor.data.clone()
        return loaded

    @property
    def modes(self) -> tuple[str, ...]:
        """The modes this model has."""
        return self.model.modes

    def forward(
        self,
        frames: Tensor,
        input_ids: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        shown_frames: Tensor,
        visual_positions: Tensor,
        query_sources: Tensor,
        labels: Tensor | None = None,
        mode: str | None = None,
    ) -> FVLMOutput:
        """Logits (and loss, with labels) of packed samples as the processor makes them; in training only the loss of all passes."""
        batch = packed_batch(frames, input_ids, position_ids, cu_seqlens, shown_frames, visual_positions, query_sources, labels)
        if self.training and labels is not None:
            return FVLMOutput(loss=self.model(batch, self.config.loss_settings).objective / max(1, batch.n_labels))
        hidden = read_batch(self.model, batch, self._mode(mode)).hidden
        loss = None if labels is None else self.model.logits_losses(hidden, batch).mean()
        return FVLMOutput(loss=loss, logits=self.model.llm.lm_head(hidden))

    @torch.no_grad()
    def generate(
        self,
        frames: Tensor,
        input_ids: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        shown_frames: Tensor,
        visual_positions: Tensor,
        query_sources: Tensor,
        labels: Tensor | None = None,
        mode: str | None = None,
        max_new_tokens: int = 64,
    ) -> Tensor:
        """Greedy answers [N, longest], padded on the right with the end-of-turn token."""
        batch = packed_batch(frames, input_ids, position_ids, cu_seqlens, shown_frames, visual_positions, query_sources, labels)
        stop = self.config.eos_token_id
        answers = generate(self.model, batch, self._mode(mode), max_new_tokens=max_new_tokens, stop_ids=[stop])
        padded = torch.full((len(answers), max(map(len, answers))), stop, dtype=torch.int64, device=input_ids.device)
        for row, answer in enumerate(answers):
            padded[row, : len(answer)] = torch.tensor(answer, dtype=torch.int64)
        return padded

    def answer(self, frames: Any, question: str, *, mode: str | None = None, question_first: bool = True, max_new_tokens: int = 64) -> str:
        """Answer a question about a video: the path of a file, an array [T, H, W, 3], or a list of pictures (one second apart).

        `question_first`: the model reads the question before the frames, and can look for what is asked.
        """
        inputs = self.processor(text=question, videos=frames, question_first=question_first).to(self.device)
        tokens = self.generate(**inputs, mode=mode, max_new_tokens=max_new_tokens)
        return self.processor.batch_decode(tokens, skip_special_tokens=True)[0].strip()

    def gaze(self, frames: Any, question: str, *, mode: str | None = None, question_first: bool = True) -> Tensor:
        """Where the model looks in each frame: [frames, tokens per frame, rows, columns], each adding up to 1."""
        inputs = self.processor(text=question, videos=frames, question_first=question_first).to(self.device)
        return gaze(self.model, packed_batch(**inputs), self._mode(mode))

    @cached_property
    def processor(self) -> Any:
        """The processor of the folder or repository that the model was loaded from."""
        return AutoProcessor.from_pretrained(self.config._name_or_path, trust_remote_code=True)

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.model.llm.model.embed_tokens

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.model.llm.lm_head

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        self.model.set_gradient_checkpointing(True)

    def gradient_checkpointing_disable(self) -> None:
        self.model.set_gradient_checkpointing(False)

    @torch.no_grad()
    def _init_weights(self, module: torch.nn.Module) -> None:
        """Buffers that no file holds; transformers loads models without running their constructors' arithmetic."""
        if isinstance(module, Encoder):
            for buffer, values in ((module.pixel_mean, PIXEL_MEAN), (module.pixel_std, PIXEL_STD)):
                buffer.copy_(torch.tensor(values, device="cpu").view(3, 1, 1) * 255)
        elif isinstance(module, RotaryEmbedding):
            module.reset()
        else:
            super()._init_weights(module)

    def _mode(self, mode: str | None) -> Any:
        return self.config.default_mode if mode is None else mode


def packed_batch(
    frames: Tensor,
    input_ids: Tensor,
    position_ids: Tensor,
    cu_seqlens: Tensor,
    shown_frames: Tensor,
    visual_positions: Tensor,
    query_sources: Tensor,
    labels: Tensor | None = None,
) -> PackedBatch:
    """The processor's tensors as one batch."""
    labels = torch.full_like(input_ids, IGNORE) if labels is None else labels
    samples = list(pairwise(cu_seqlens.tolist()))
    positions, sources = visual_positions.cpu().numpy(), query_sources.cpu().numpy()
    labelled = (labels != IGNORE).nonzero().flatten().cpu().numpy()
    batch = PackedBatch(
        frames=frames,
        input_ids=input_ids,
        labels=labels,
        position_ids=position_ids,
        cu_seqlens=cu_seqlens,
        shown_frames=shown_frames,
        visual_positions=visual_positions,
        query_sources=query_sources,
        showings=_showings(shown_frames.cpu().numpy(), len(frames)),
        lengths=[end - start for start, end in samples],
        shown_counts=[len(_within(positions[:, 0], start, end)) for start, end in samples],
        query_prefix=[int(_within(sources, start, end).max(initial=start - 1)) + 1 - start for start, end in samples],
        label_prefix=[int(_within(labelled, start, end).max(initial=start - 1)) + 1 - start for start, end in samples],
        labelled=labelled,
    )
    return batch.to(frames.device)


def _within(positions: np.ndarray, start: int, end: int) -> np.ndarray:
    """The positions in [start, end)."""
    return positions[(positions >= start) & (positions < end)]
