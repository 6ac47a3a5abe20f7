"""SmolVLM2 (Marafioti et al. 2025, https://arxiv.org/abs/2504.05299) as an `Answerer`, using the implementation in transformers.

It gets the same square frames as fVLM, at SmolVLM2's resolution, in its published prompt format (one line with a timestamp per frame, about
64 tokens each). Frames are encoded once for all questions; options continue from the question's KV cache, one after the other.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, DynamicCache, PreTrainedTokenizerBase, SmolVLMForConditionalGeneration

from fvlm_core.data.frames import FrameRule
from fvlm_core.errors import UserError
from fvlm_core.eval.answerers.answerer import Ask, Condition, Order, Reply
from fvlm_core.eval.generation import Method
from fvlm_core.eval.media import NO_MEDIA, Media
from fvlm_core.manifest import sha256_file

MODE = "all_tokens"
"""The only mode of SmolVLM2: the language model reads all tokens of every frame."""
INTRO = "You are provided the following series of {count} frames from a {duration} [H:MM:SS] video.\n"
FRAME = "\nFrame from {time}:"
OUTRO = "\n\n"
TURN_END = "<end_of_utterance>"
FAKE, GLOBAL, IMAGE = "<fake_token_around_image>", "<global-img>", "<image>"


@dataclass
class SmolVLMAnswerer:
    """A SmolVLM2 model."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    name: str
    checkpoint: str
    rule: FrameRule
    device: torch.device
    seed: int = 0
    image_repeats: int = 1
    tokens_per_frame: int = field(init=False)
    methods: tuple[Method, ...] = ("greedy",)

    def __post_init__(self) -> None:
        config = self.model.config
        patches = config.vision_config.image_size // config.vision_config.patch_size
        self.tokens_per_frame = patches**2 // config.scale_factor**2

    @classmethod
    def load(cls, folder: Path, device: torch.device, *, seed: int = 0) -> "SmolVLMAnswerer":
        """Load a folder in the hub's format. Raises UserError if it cannot be loaded or lacks weights or special tokens."""
        try:
            loaded: Any = SmolVLMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
            model, report = loaded
            tokenizer: Any = AutoTokenizer.from_pretrained(str(folder))
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"the SmolVLM2 folder does not load: {reason}", where=str(folder), fix="download it again") from error
        missing = sorted(set(report["missing_keys"]) - {"lm_head.weight"})
        absent = [token for token in (FAKE, GLOBAL, IMAGE, TURN_END) if token not in tokenizer.get_vocab()]
        if missing or absent:
            raise UserError(f"the SmolVLM2 folder lacks {', '.join([*missing[:3], *absent])}", where=str(folder), fix="download it again")
        weights = hashlib.sha256("".join(sha256_file(file) for file in sorted(folder.glob("*.safetensors"))).encode()).hexdigest()
        side = model.config.vision_config.image_size
        return cls(model.eval().requires_grad_(False).to(device), tokenizer, folder.name, weights, FrameRule(side), device, seed)

    def conditions(self, orders: Sequence[Order], modes: Sequence[str] | None, *, controls: bool) -> list[Condition]:
        """Every order. Controls: shuffled frames, no frames."""
        if modes is not None and list(modes) != [MODE]:
            raise UserError(f"SmolVLM2 has no mode {', '.join(modes)}", where="modes", fix="leave modes empty (--mode all)")
        shown = [Condition(MODE, order) for order in orders]
        return shown + ([Condition(MODE, orders[0], "shuffled"), Condition(MODE, orders[0], "blind")] if controls else [])

    def open(self, media: Media, name: str) -> "OpenedForSmolVLM":
        """Open media; their frames are encoded once, when first needed."""
        return OpenedForSmolVLM(self, media, name)

    def unconditional(self, texts: Sequence[str]) -> list[Reply]:
        """Score texts as answers without media and without a question."""
        return self.open(NO_MEDIA, "").replies([Ask("", (text,)) for text in texts], Condition(MODE, view="blind"))

    def encode(self, text: str) -> list[int]:
        """Token ids of text that may contain special tokens."""
        return self.tokenizer.encode(text, add_special_tokens=False)


class OpenedForSmolVLM:
    """Opened media; their frames are encoded when first needed."""

    def __init__(self, answerer: SmolVLMAnswerer, media: Media, name: str) -> None:
        self.answerer, self.media, self.name = answerer, media, name
        self._features: Tensor | None = None

    @torch.inference_mode()
    def replies(self, asks: Sequence[Ask], condition: Condition) -> list[Reply]:
        """Answer each question independently, one after the other."""
        media = {"blind": NO_MEDIA, "shuffled": self.media.shuffled(self.answerer.seed, self.name)}.get(condition.view, self.media)
        return [self._reply(ask, media, condition.order) for ask in asks]

    def _reply(self, ask: Ask, media: Media, order: Order) -> Reply:
        answerer, model = self.answerer, self.answerer.model
        ids, frames = self._prompt(ask.text, media, order)
        cache = DynamicCache(config=model.config.text_config)
        logits = self._run(self._embed(ids, frames), cache)[-1].log_softmax(-1)
        (end,) = answerer.encode(TURN_END)
        sums = np.zeros((len(ask.continuations), 3))
        for row, text in zip(sums, ask.continuations, strict=True):
            tokens = answerer.encode(f" {text}")
            row[:2] = float(logits[tokens[0]]), 1
            if not ask.first_token:
                scores = self._run(model.get_input_embeddings()(torch.tensor([tokens], device=answerer.device)), cache).log_softmax(-1)
                row[0] += sum(float(scores[place, token]) for place, token in enumerate(tokens[1:]))
                row[1:] = len(tokens), float(scores[-1, end])
                cache.crop(-len(tokens))
        return Reply(sums, self._generate(logits, cache, end, ask.max_new_tokens) if ask.max_new_tokens else "")

    def _generate(self, logits: Tensor, cache: DynamicCache, end: int, most: int) -> str:
        """Generate an answer greedily."""
        said: list[int] = []
        while len(said) < most and (token := int(logits.argmax())) != end:
            said.append(token)
            if len(said) < most:
                embedded = self.answerer.model.get_input_embeddings()(torch.tensor([[token]], device=self.answerer.device))
                logits = self._run(embedded, cache)[-1]
        return str(self.answerer.tokenizer.decode(said, skip_special_tokens=True)).strip()

    def _run(self, embedded: Tensor, cache: DynamicCache) -> Tensor:
        """Logits float32 [n, vocabulary] of embeddings [1, n, width] that follow the cached tokens."""
        model = self.answerer.model
        states = model.model.text_model(inputs_embeds=embedded, past_key_values=cache, use_cache=True).last_hidden_state
        return model.lm_head(states)[0].float()

    def _prompt(self, question: str, media: Media, order: Order) -> tuple[list[int], list[int]]:
        """Token ids of the prompt, and the indices of the media's frames whose image tokens it contains, in order."""
        parts: list[str] = []
        shown: list[int] = []
        mark = f"{FAKE}{GLOBAL}{IMAGE * self.answerer.tokens_per_frame}{FAKE}"
        for indexes in media.shown:
            if len(set(indexes)) == 1:
                parts.append(mark)
                shown.append(indexes[0])
                continue
            seconds = len(indexes) / self.answerer.rule.fps
            parts.append(INTRO.format(count=len(indexes), duration=f"{int(seconds) // 3600}:{_clock(seconds % 3600)}"))
            parts += [FRAME.format(time=_clock(place / self.answerer.rule.fps)) + mark for place in range(len(indexes))]
            parts.append(OUTRO)
            shown += indexes
        seen = "".join(parts)
        text = f"{question}\n{seen}" if order == "question_first" and seen else f"{seen}{question}"
        return self.answerer.encode(f"<|im_start|>User:{'' if seen.startswith(FAKE) else ' '}{text}{TURN_END}\nAssistant:"), shown

    def _embed(self, ids: Sequence[int], shown: Sequence[int]) -> Tensor:
        """Token embeddings [1, n, width], with the frames' features at the image tokens."""
        model, device = self.answerer.model, self.answerer.device
        tokens = torch.tensor(ids, device=device)
        embedded = model.get_input_embeddings()(tokens)
        if shown:
            if self._features is None:
                pixels = torch.from_numpy(self.media.frames).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
                found = model.model.get_image_features(pixels[None])
                pooled = getattr(found, "pooler_output", found)  # depending on transformers' version: an output object, a tensor or a list
                flat = torch.cat(list(pooled)) if isinstance(pooled, list) else pooled.flatten(0, 1)
                self._features = flat.unflatten(0, (len(pixels), -1))
            assert self._features is not None
            places = (tokens == model.config.image_token_id).nonzero().flatten()
            features = self._features[list(shown)].flatten(0, 1).to(embedded.dtype)
            embedded = embedded.index_copy(0, places, features)
        return embedded[None]


def _clock(seconds: float) -> str:
    """MM:SS."""
    return f"{int(seconds) // 60:02d}:{int(seconds) % 60:02d}"
