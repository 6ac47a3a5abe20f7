"""The model under evaluation with its tokenizer: all scorers run the model through `Subject`.

Samples are processed in packed batches. A batch encodes equal frames once, so all options of all questions about a clip in one batch
share the encoding. The numbers of a sample do not depend on the other samples in its batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from fvlm_core.data.batch import ChatFormat, PackedBatch, Sample, pack
from fvlm_core.data.tiles import tiles_of
from fvlm_core.data.tokenizer import encode
from fvlm_core.eval.generation import GREEDY, Generation, continue_prompts
from fvlm_core.model import inference
from fvlm_core.model.foveated import FoveatedVLM
from fvlm_core.model.glance import encode_downscaled
from fvlm_core.model.names import Mode


@dataclass(frozen=True)
class Subject:
    """A model in eval mode on its device, with its tokenizer."""

    model: FoveatedVLM
    tokenizer: PreTrainedTokenizerBase
    chat: ChatFormat
    device: torch.device
    batch_samples: int
    """Number of sequences in a packed batch."""

    @property
    def gazes(self) -> bool:
        """Whether the model has queries, and so attention maps; a model that pools its patches does not."""
        return len(self.model.modes) > 1

    def autocast(self) -> torch.autocast:
        """Autocast context for forward passes: bf16 on a GPU, which the packed attention kernel needs; fp32 on a CPU."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, without chat template or special tokens."""
        return encode(self.tokenizer, text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated tokens, without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def pack(self, samples: Sequence[Sample]) -> PackedBatch:
        """Pack samples into one batch on the model's device."""
        batch = pack(samples, self.chat, tokens_per_frame=self.model.settings.tokens_per_frame)
        return (batch.pin_memory() if self.device.type == "cuda" else batch).to(self.device)

    def batches(self, samples: Sequence[Sample]) -> Iterator[PackedBatch]:
        """All samples in order, `batch_samples` at a time."""
        for start in range(0, len(samples), self.batch_samples):
            yield self.pack(samples[start : start + self.batch_samples])

    @torch.inference_mode()
    def losses(self, batch: PackedBatch, modes: Sequence[Mode]) -> dict[Mode, np.ndarray]:
        """Summed cross-entropy and number of labelled tokens of each sample, per mode: float64 [N, 2].

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
            losses = self.model.label_losses(hidden, batch).double().cpu().numpy()  # logits in fp32
            result[mode] = np.stack([np.bincount(samples, weights=losses, minlength=batch.n_samples), counts], 1)
        return result

    def sample_losses(self, samples: Sequence[Sample], modes: Sequence[Mode]) -> dict[Mode, np.ndarray]:
        """`losses` for any number of samples, in batches."""
        parts = [self.losses(batch, modes) for batch in self.batches(samples)]
        return {mode: np.concatenate([np.zeros((0, 2)), *(part[mode] for part in parts)]) for mode in modes}

    @torch.inference_mode()
    def generate(self, samples: Sequence[Sample], mode: Mode, *, max_new_tokens: int, generation: Generation = GREEDY) -> list[str]:
        """Generate the missing answers of the samples' last turns, as text."""
        tokens: list[list[int]] = []
        for start in range(0, len(samples), self.batch_samples):
            some = samples[start : start + self.batch_samples]
            with self.autocast():
                batch = self.pack(some)
                tiles = tiles_of(some)  # if there are tiles, the batch's frames are the small ones
                features = encode_downscaled(self.model.encoder, batch.frames, tiles.to(self.device)) if tiles else None
                context = inference.read_batch(self.model, batch, mode, features=features, room=max_new_tokens)
                assert context.cache is not None
                tokens += continue_prompts(
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
        """Attention maps over the shown frames of each sample: float64 [frames, rows, columns]; each sums to 1 (mean of the k queries)."""
        maps: list[np.ndarray] = []
        for batch in self.batches(samples):
            with self.autocast():
                weights = inference.gaze(self.model, batch, mode)
            weights = weights.double().mean(1).cpu().numpy()
            maps.extend(np.split(weights, np.cumsum(batch.shown_counts)[:-1]))
        return maps
