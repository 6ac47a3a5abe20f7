"""fVLM for transformers: `AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)`.

    inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    model.generate(**inputs, mode="autoregressive", max_new_tokens=64)

or in one line

    model.answer("clip.mp4", "What is in the video?")

Batches are padded for transformers and packed for the model (`padded.py`), whose passes see no padding.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import AutoProcessor, GenerationMixin, PreTrainedModel
from transformers.utils.generic import ModelOutput

from fvlm_core.data.batch import PackedBatch
from fvlm_core.model.attention import PackedLayout
from fvlm_core.model.encoder import PIXEL_MEAN, PIXEL_STD, Encoder
from fvlm_core.model.foveated import FoveatedVLM
from fvlm_core.model.inference import gaze, read_batch
from fvlm_core.model.llama import Llama, RotaryEmbedding
from fvlm_core.model.names import SHORT_MODES
from fvlm_core.release.hub.cache import ROOM, FVLMCache
from fvlm_core.release.hub.configuration_fvlm import FVLMConfig
from fvlm_core.release.hub.padded import packed_batch, padded

CACHE_LINE_BYTES = 64


VISUAL_INPUTS = ("frames", "frame_ids", "query_offsets")
"""Inputs that are read only with the prompt."""


@dataclass
class FVLMOutput(ModelOutput):
    """Output of `FVLMModel.forward`."""

    loss: Tensor | None = None
    """Mean cross-entropy of the labels in the given mode; in training, the weighted mean of all passes."""
    logits: Tensor | None = None
    """[B, S, vocabulary], or only the last `logits_to_keep` columns; 0 at padding. None in training."""
    past_key_values: FVLMCache | None = None


class FVLMModel(PreTrainedModel, GenerationMixin):
    """Encoder, connector and language model."""

    config_class = FVLMConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    accepts_loss_kwargs = True
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _tied_weights_keys = {"model.llm.lm_head.weight": "model.llm.model.embed_tokens.weight"}
    _no_split_modules = ["EncoderLayer", "LlamaLayer"]

    def __init__(self, config: FVLMConfig) -> None:
        super().__init__(config)
        settings: Any = config.model_settings
        self.model = FoveatedVLM(settings, Encoder(config.vision_config), Llama(config.text_config))
        self.post_init()

    @classmethod
    def from_pretrained(cls, *arguments: Any, **options: Any) -> Any:
        """Like `PreTrainedModel.from_pretrained`, but copies memory-mapped weights to aligned memory.

        A tensor in a file may start at any address, and CPU kernels sum in another order if it is not aligned to a cache line: the last
        bits of the logits would depend on the length of the file's header.
        """
        loaded = super().from_pretrained(*arguments, **options)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.data_ptr() % CACHE_LINE_BYTES:
                tensor.data = tensor.data.clone()
        return loaded

    @property
    def modes(self) -> tuple[str, ...]:
        """The modes of this model."""
        return self.model.modes

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        frames: Tensor | None = None,
        frame_ids: Tensor | None = None,
        query_offsets: Tensor | None = None,
        labels: Tensor | None = None,
        mode: str | None = None,
        past_key_values: FVLMCache | None = None,
        logits_to_keep: int = 0,
        num_items_in_batch: Tensor | int | None = None,
        **_unused: Any,
    ) -> FVLMOutput:
        """Compute logits (and, with labels, the loss) for the processor's outputs; in training with labels, only the loss of all passes.

        Args:
            input_ids: int64 [B, S].
            attention_mask: int64 [B, S], 0 at padding.
            frames: uint8 [F, H, W, 3], the distinct frames of all rows.
            frame_ids: int64 [B, S], see `padded.py`.
            query_offsets: int64 [B, S], see `padded.py`.
            labels: int64 [B, S], the target tokens in their own (unshifted) positions, -100 elsewhere.
            mode: `coarse`, `fine` or `autoregressive`; by default the configuration's.
            past_key_values: An empty cache to fill, or a filled one to continue with text tokens.
            logits_to_keep: Number of last columns to return logits for; 0 for all.
            num_items_in_batch: Number of labels in the global batch, by which the summed loss is divided.
            **_unused: Other arguments that transformers passes to every model.
        """
        if past_key_values is not None and past_key_values.get_seq_length():
            _check_continuation(past_key_values.get_seq_length(), attention_mask, frame_ids, labels)
            return self._go_on(input_ids, past_key_values)
        batch = self._packed(input_ids, attention_mask, frames, frame_ids, query_offsets, labels)
        count = max(1, batch.n_labels) if num_items_in_batch is None else num_items_in_batch
        if self.training and labels is not None:
            return FVLMOutput(loss=self.model(batch, self.config.loss_settings).objective / count)
        room = None if past_key_values is None else past_key_values.room
        context = read_batch(self.model, batch, self._mode(mode), room=room)
        if past_key_values is not None and context.cache is not None:
            past_key_values.fill(context.cache, input_ids.shape[1])
        loss = None if labels is None else self.model.label_losses(context.hidden, batch).sum() / count
        if logits_to_keep:
            last = padded(context.hidden, attention_mask, (input_ids.shape[0], input_ids.shape[1]))[:, -logits_to_keep:]
            return FVLMOutput(loss=loss, logits=self.model.llm.lm_head(last), past_key_values=past_key_values)
        logits = padded(self.model.llm.lm_head(context.hidden), attention_mask, (input_ids.shape[0], input_ids.shape[1]))
        return FVLMOutput(loss=loss, logits=logits, past_key_values=past_key_values)

    def prepare_inputs_for_generation(  # ty: ignore[incompatible-method-override] -- transformers names what it gives
        self, input_ids: Tensor, past_key_values: FVLMCache | None = None, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """The inputs of a generation step: first the prompt with its frames, then one token at a time."""
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        passed = ("mode", "logits_to_keep", *(VISUAL_INPUTS if not seen else ()))
        if seen and input_ids.shape[1] - seen > 1:  # a user's next turn, not a generated token
            frame_ids = kwargs.get("frame_ids")
            _check_continuation(seen, attention_mask, None if frame_ids is None else frame_ids[:, seen:], None)
        inputs = {"input_ids": input_ids[:, seen:], "attention_mask": attention_mask, "past_key_values": past_key_values}
        return inputs | {name: kwargs[name] for name in passed if name in kwargs}

    def answer(self, frames: Any, question: str, *, mode: str | None = None, question_first: bool = True, max_new_tokens: int = 64) -> str:
        """Answer a question about a video: the path of a file, an array [T, H, W, 3], or a list of pictures (1 / `processor.fps` s apart).

        With `question_first`, the model reads the question before the frames, and can look for what is asked.
        """
        inputs = self.processor(text=question, videos=frames, question_first=question_first).to(self.device)
        options = {"mode": mode, "max_new_tokens": max_new_tokens, "do_sample": False}
        tokens = self.generate(**inputs, **options)  # ty: ignore[invalid-argument-type] -- a protocol that no model fits
        return self.processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    def gaze(self, frames: Any, question: str, *, mode: str | None = None, question_first: bool = True) -> Tensor:
        """Return where the model looks: attention [frames, tokens per frame, rows, columns], summing to 1 over rows and columns."""
        inputs = self.processor(text=question, videos=frames, question_first=question_first).to(self.device)
        return gaze(self.model, self._packed(**inputs), self._mode(mode))

    @cached_property
    def processor(self) -> Any:
        """The processor from the folder, or from the repository and revision, that the model was loaded from."""
        commit = getattr(self.config, "_commit_hash", None)
        same = {"revision": commit, "code_revision": commit} if commit else {}
        return AutoProcessor.from_pretrained(self.config._name_or_path, trust_remote_code=True, **same)

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.model.llm.model.embed_tokens

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.model.llm.lm_head

    def gradient_checkpointing_enable(self, *_options: Any, **_more: Any) -> None:
        """Recompute every layer's activations in the backward pass. Options are ignored: they differ between transformers releases."""
        self.model.set_gradient_checkpointing(True)

    def gradient_checkpointing_disable(self) -> None:
        self.model.set_gradient_checkpointing(False)

    @torch.no_grad()
    def _init_weights(self, module: torch.nn.Module) -> None:
        """Initialise buffers that are in no file: transformers constructs models on the meta device, without computing them."""
        if isinstance(module, Encoder):
            for buffer, values in ((module.pixel_mean, PIXEL_MEAN), (module.pixel_std, PIXEL_STD)):
                buffer.copy_(torch.tensor(values, device="cpu").view(3, 1, 1) * 255)
        elif isinstance(module, RotaryEmbedding):
            module.reset()
        else:
            super()._init_weights(module)

    def _mode(self, mode: str | None) -> Any:
        named = mode or self.config.default_mode
        return SHORT_MODES.get(named, named)

    def _packed(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        frames: Tensor | None = None,
        frame_ids: Tensor | None = None,
        query_offsets: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> PackedBatch:
        k, context = self.config.tokens_per_frame, self.config.text_config.max_position_embeddings
        longest = input_ids.shape[1] if attention_mask is None else int(attention_mask.sum(1).max())
        if longest > context:
            raise ValueError(f"a conversation of {longest} tokens; the model's context has {context}")
        return packed_batch(input_ids, attention_mask, frames, frame_ids, query_offsets, labels, tokens_per_frame=k)

    @torch.no_grad()
    def _go_on(self, input_ids: Tensor, cache: FVLMCache) -> FVLMOutput:
        """Continue every sequence by n tokens [B, n]; returns their logits [B, n, vocabulary]."""
        rows, new = input_ids.shape
        packed = cache.reserve(new)
        positions = torch.tensor([length + step for length in packed.lengths for step in range(new)], device=input_ids.device)
        hidden = self.model.run_llm(self.model.embed(input_ids.flatten()), positions, PackedLayout([new] * rows, packed))
        cache.columns += new
        return FVLMOutput(logits=self.model.llm.lm_head(hidden).unflatten(0, (rows, new)), past_key_values=cache)

    def _prepare_cache_for_generation(  # ty: ignore[incompatible-method-override] -- what it returns depends on the release
        self, generation_config: Any, model_kwargs: dict[str, Any], *_: Any
    ) -> None:
        """Hook of transformers: create the cache for generation."""
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = FVLMCache(generation_config.max_new_tokens or ROOM)

    def _expand_inputs_for_generation(  # ty: ignore[incompatible-method-override] -- by name, too
        self, expand_size: int = 1, **inputs: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """Hook of transformers: repeat rows for beams, but not frames."""
        frames = inputs.pop("frames", None)
        input_ids, expanded = super()._expand_inputs_for_generation(expand_size=expand_size, **inputs)  # ty: ignore[invalid-argument-type]
        return input_ids, expanded | {"frames": frames}


def _check_continuation(seen: int, attention_mask: Tensor | None, frame_ids: Tensor | None, labels: Tensor | None) -> None:
    """Raise ValueError if the inputs after the `seen` columns of a cache are not only text; `frame_ids` covers only the new columns."""
    if frame_ids is not None and bool((frame_ids >= 0).any()):
        raise ValueError("a cache can be continued with text only: for another video, give the complete conversation and no cache")
    if attention_mask is not None and bool((attention_mask[:, seen:] == 0).any()):
        raise ValueError("rows that continue a cache must be equally long: give the complete conversations and no cache")
    if labels is not None:
        raise ValueError("there is no loss when a cache is continued: give the complete conversation and no cache")
