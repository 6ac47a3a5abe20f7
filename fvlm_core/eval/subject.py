"""The model under evaluation and what turns text and frames into its input: every scorer talks to the model through this.

Samples go through in packed batches; a batch encodes equal frames once, so all options of all questions about a clip that
fall into one batch share its encoding. A sample's numbers do not depend on what else is in its batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from fvlm_core.data.batch import ChatFormat, PackedBatch, Sample, pack
from fvlm_core.data.tiles import tiles_of
from fvlm_core.data.tokenizer import encode
from fvlm_core.eval.generation import GREEDY, Generation, go_on
from fvlm_core.model import inference
from fvlm_core.model.foveated import FoveatedVLM
from fvlm_core.model.glance import look_at
from fvlm_core.model.names import Mode


@dataclass(frozen=True)
class Subject:
    """A model in eval mode on its device, with its tokenizer."""

    model: FoveatedVLM
    tokenizer: PreTrainedTokenizerBase
    chat: ChatFormat
    device: torch.device
    batch_samples: int
    """Sequences in a packed batch."""

    @property
    def gazes(self) -> bool:
        """Whether the model looks anywhere: pooled patches are not queried."""
        return len(self.model.modes) > 1

    def autocast(self) -> torch.autocast:
        """Around the model's passes: bf16 on a GPU, as in training, which the packed attention kernel needs; fp32 on a CPU."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, without any template or control token."""
        return encode(self.tokenizer, text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def pack(self, samples: Sequence[Sample]) -> PackedBatch:
        """One packed batch on the model's device."""
        batch = pack(samples, self.chat, tokens_per_frame=self.model.settings.tokens_per_frame)
        return (batch.pin_memory() if self.device.type == "cuda" else batch).to(self.device)

    def batches(self, samples: Sequence[Sample]) -> Iterator[PackedBatch]:
        """All samples in order, `batch_samples` at a time."""
        for start in range(0, len(samples), self.batch_samples):
            yield self.pack(samples[start : start + self.batch_samples])

    @torch.inference_mode()
    def losses(self, batch: PackedBatch, modes: Sequence[Mode]) -> dict[Mode, np.ndarray]:
        """Per mode and sample of a batch, the summed cross-entropy and the number of labelled tokens: float64 [N, 2].

        The frames are encoded once for all modes.
        """
        with self.autocast():
            features = self.model.encode(batch.frames) if len(batch.shown_frames) else None
        samples = np.arange(batch.n_samples).repeat(batch.lengths)[batch.labelled]
        counts = np.bincount(samples, minlength=batch.n_samples)
        result: dict[Mode, np.ndarray] = {}
        for mode in modes:
            with self.autocast():
                hidden = inference.read_batch(self.model, batch, mode, features=features).hidden
            losses = self.model.logits_losses(hidden, batch).double().cpu().numpy()  # logits in fp32
            result[mode] = np.stack([np.bincount(samples, weights=losses, minlength=batch.n_samples), counts], 1)
        return result

    def sample_losses(self, samples: Sequence[Sample], modes: Sequence[Mode]) -> dict[Mode, np.ndarray]:
        """`losses` of any number of samples."""
        parts = [self.losses(batch, modes) for batch in self.batches(samples)]
        return {mode: np.concatenate([np.zeros((0, 2)), *(part[mode] for part in parts)]) for mode in modes}

    @torch.inference_mode()
    def generate(self, samples: Sequence[Sample], mode: Mode, *, max_new_tokens: int, generation: Generation = GREEDY) -> list[str]:
        """Answers, as text, to samples whose last turn has none."""
        tokens: list[list[int]] = []
        for start in range(0, len(samples), self.batch_samples):
            some = samples[start : start + self.batch_samples]
            with self.autocast():
                batch = self.pack(some)
                tiles = tiles_of(some)  # then the batch's frames are the small ones
                features = look_at(self.model.encoder, batch.frames, tiles.to(self.device)) if tiles else None
                context = inference.read_batch(self.model, batch, mode, features=features, room=max_new_tokens)
                assert context.cache is not None
                tokens += go_on(
                    self.model,
                    context.cache,
                    context.hidden[batch.cu_seqlens[1:].long() - 1],
                    generation,
                    max_new_tokens=max_new_tokens,
                    stop_ids=self.chat.assistant_close[:1],
                    seeds=[generation.seed_of(sample.key, sample.turns[-1].question_ids) for sample in some],
                )
        return [self.decode(ids) for ids in tokens]

    @torch.inference_mode()
    def gaze(self, samples: Sequence[Sample], mode: Mode) -> list[np.ndarray]:
        """Per sample, where each shown frame is looked at: float64 [frames, rows, columns], each adding up to 1 (mean of the k queries)."""
        maps: list[np.ndarray] = []
        for batch in self.batches(samples):
            with self.autocast():
                weights = inference.gaze(self.model, batch, mode)
            weights = weights.double().mean(1).cpu().numpy()
            maps.extend(np.split(weights, np.cumsum(batch.shown_counts)[:-1]))
        return maps
