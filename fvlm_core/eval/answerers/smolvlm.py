"""SmolVLM2 (Marafioti et al. 2025, https://arxiv.org/abs/2504.05299) as an `Answerer`, using the implementation in transformers.

It is asked as its authors ask it: the media come before the question, in its published prompt format. Images go through its own image
processor, which splits them into tiles. Videos are the same square frames as fVLM's, at SmolVLM2's resolution, with a line with a timestamp
per frame. A tile or a frame takes about 64 tokens. Media are encoded once for all questions; options continue from the question's KV cache,
one after the other.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer, DynamicCache, PreTrainedTokenizerBase, SmolVLMForConditionalGeneration

from fvlm_core.data.frames import TIME_TOLERANCE_S, FrameRule
from fvlm_core.errors import UserError
from fvlm_core.eval.answerers.answerer import Ask, Condition, Order, Reply
from fvlm_core.eval.generation import Method
from fvlm_core.eval.media import NO_MEDIA, Images, Media, Source
from fvlm_core.manifest import sha256_file

MODE = "all_tokens"
"""The only mode of SmolVLM2: the language model reads all tokens of every frame."""
INTRO = "You are provided the following series of {count} frames from a {duration} [H:MM:SS] video.\n"
FRAME = "\nFrame from {time}:"
OUTRO = "\n\n"
TURN_END = "<end_of_utterance>"
FAKE, GLOBAL, IMAGE = "<fake_token_around_image>", "<global-img>", "<image>"
TILE = "<row_{row}_col_{column}>"
ENCODED_TOGETHER = 16
"""Most tiles or frames in one pass of the vision encoder. It limits memory: seven pages in a question are 119 tiles."""
# fmt: off
SMALL_NUMBERS = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen", "fourteen",
    "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]
# fmt: on
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


class Tiles(NamedTuple):
    """An image as SmolVLM2's image processor splits it."""

    pixels: Tensor
    """float32 [rows * columns + 1, 3, S, S]: the tiles, then the whole image at the size of a tile; only the latter if it is not split."""
    rows: int
    columns: int
    """Both 0 if the image is not split."""


@dataclass(frozen=True)
class TiledMedia(Media):
    """Media whose images are split into tiles."""

    tiles: dict[int, Tiles] = field(default_factory=dict)
    """By index into `frames`; the other frames are those of videos."""


@dataclass
class SmolVLMAnswerer:
    """A SmolVLM2 model."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    image_processor: Any
    name: str
    checkpoint: str
    rule: FrameRule
    device: torch.device
    seed: int = 0
    image_repeats: int = 1
    tokens_per_frame: int = field(init=False)
    methods: tuple[Method, ...] = ("greedy",)
    native_order: Order = "question_after"

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
            image_processor: Any = AutoImageProcessor.from_pretrained(str(folder))
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"the SmolVLM2 folder does not load: {reason}", where=str(folder), fix="download it again") from error
        missing = sorted(set(report["missing_keys"]) - {"lm_head.weight"})
        absent = [token for token in (FAKE, GLOBAL, IMAGE, TURN_END) if token not in tokenizer.get_vocab()]
        if missing or absent:
            raise UserError(f"the SmolVLM2 folder lacks {', '.join([*missing[:3], *absent])}", where=str(folder), fix="download it again")
        weights = hashlib.sha256("".join(sha256_file(file) for file in sorted(folder.glob("*.safetensors"))).encode()).hexdigest()
        side = model.config.vision_config.image_size
        model = model.eval().requires_grad_(False).to(device)
        return cls(model, tokenizer, image_processor, folder.name, weights, FrameRule(side), device, seed)

    def conditions(self, orders: Sequence[Order], modes: Sequence[str] | None, *, controls: bool) -> list[Condition]:
        """Every order. Controls: shuffled frames, no frames."""
        if modes is not None and list(modes) != [MODE]:
            raise UserError(f"SmolVLM2 has no mode {', '.join(modes)}", where="modes", fix="leave modes empty (--mode all)")
        shown = [Condition(MODE, order) for order in orders]
        return shown + ([Condition(MODE, orders[0], "shuffled"), Condition(MODE, orders[0], "blind")] if controls else [])

    def load_media(self, source: Source) -> TiledMedia:
        """Decode media. Images are split into tiles in their own size, not cut to squares."""
        return self._split(source.load(self.rule, self.image_repeats), source.whole() if isinstance(source, Images) else None)

    def open(self, media: Media, name: str) -> "OpenedForSmolVLM":
        """Open media; their frames are encoded once, when first needed."""
        return OpenedForSmolVLM(self, media if isinstance(media, TiledMedia) else self._split(media, None), name)

    def _split(self, media: Media, whole: list[Image.Image] | None) -> TiledMedia:
        """Split the images among the media; `whole`: the images in their own size, where the frames are squares."""
        tiles = {}
        for indexes in media.shown:
            if media.images or (len(indexes) > 1 and len(set(indexes)) == 1):
                image = Image.fromarray(media.frames[indexes[0]]) if whole is None else whole[indexes[0]]
                found = self.image_processor([[image]], return_row_col_info=True, return_tensors="pt")
                tiles[indexes[0]] = Tiles(found["pixel_values"][0], int(found["rows"][0][0]), int(found["cols"][0][0]))
        return TiledMedia(media.frames, media.shown, media.images, media.duration_s, tiles)

    def unconditional(self, texts: Sequence[str]) -> list[Reply]:
        """Score texts as answers without media and without a question."""
        return self.open(NO_MEDIA, "").replies([Ask("", (text,)) for text in texts], Condition(MODE, view="blind"))

    def encode(self, text: str) -> list[int]:
        """Token ids of text that may contain special tokens."""
        return self.tokenizer.encode(text, add_special_tokens=False)


class OpenedForSmolVLM:
    """Opened media; their frames are encoded when first needed."""

    def __init__(self, answerer: SmolVLMAnswerer, media: TiledMedia, name: str) -> None:
        self.answerer, self.media, self.name = answerer, media, name
        self._features: dict[int, Tensor] = {}
        """Features [tokens, width] by frame; of an image, those of all its tiles."""

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
        tokens = IMAGE * self.answerer.tokens_per_frame
        mark = f"{FAKE}{GLOBAL}{tokens}{FAKE}"
        for indexes in media.shown:
            if tiles := self.media.tiles.get(indexes[0]):
                for row in range(1, tiles.rows + 1):
                    columns = range(1, tiles.columns + 1)
                    parts += [*(FAKE + TILE.format(row=row, column=column) + tokens for column in columns), "\n"]
                parts.append(f"\n{mark}" if tiles.rows else mark)
                shown.append(indexes[0])
                continue
            times, seconds = self._times(len(indexes))
            parts.append(INTRO.format(count=_in_words(len(indexes)), duration=f"{seconds // 3600}:{_clock(seconds % 3600)}"))
            parts += [FRAME.format(time=_clock(time)) + mark for time in times]
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
            self._features = self._features or self._encode()
            places = (tokens == model.config.image_token_id).nonzero().flatten()
            features = torch.cat([self._features[index] for index in shown]).to(embedded.dtype)
            embedded = embedded.index_copy(0, places, features)
        return embedded[None]

    def _encode(self) -> dict[int, Tensor]:
        """Encode all images and frames, a few tiles or frames at a time."""
        model, tiles = self.answerer.model, self.media.tiles
        parts = [
            (index, part) for index in range(len(self.media.frames)) for part in range(len(tiles[index].pixels) if index in tiles else 1)
        ]
        encoded: dict[int, list[Tensor]] = {}
        for first in range(0, len(parts), ENCODED_TOGETHER):
            some = parts[first : first + ENCODED_TOGETHER]
            pixels = torch.stack([self._pixels(index, part) for index, part in some]).to(self.answerer.device)
            found = model.model.get_image_features(pixels[None])
            pooled = getattr(found, "pooler_output", found)  # depending on transformers' version: an output object, a tensor or a list
            flat = torch.cat(list(pooled)) if isinstance(pooled, list) else pooled.flatten(0, 1)
            for (index, _), features in zip(some, flat.unflatten(0, (len(pixels), -1)), strict=True):
                encoded.setdefault(index, []).append(features)
        return {index: torch.cat(features) for index, features in encoded.items()}

    def _pixels(self, index: int, part: int) -> Tensor:
        """A tile of an image, or a video's frame: float32 [3, S, S]."""
        if index in self.media.tiles:
            return self.media.tiles[index].pixels[part]
        return torch.from_numpy(self.media.frames[index]).permute(2, 0, 1).float() / 127.5 - 1

    def _times(self, frames: int) -> tuple[list[float], int]:
        """When the frames of a video are shown, and its length, in seconds."""
        rule, duration_s = self.answerer.rule, self.media.duration_s
        times = [] if duration_s is None else rule.times_s(duration_s)
        if duration_s is None or len(times) != frames:
            times, duration_s = [place / rule.fps for place in range(frames)], frames / rule.fps
        return times, int(duration_s + TIME_TOLERANCE_S)


def _in_words(number: int) -> str:
    """A number below 100 in English words, as SmolVLM2's prompts have it; digits if it is larger."""
    if number < len(SMALL_NUMBERS):
        return SMALL_NUMBERS[number]
    tens, ones = divmod(number, 10)
    return f"{TENS[tens - 2]}{f'-{SMALL_NUMBERS[ones]}' if ones else ''}" if number < 100 else str(number)


def _clock(seconds: float) -> str:
    """MM:SS."""
    return f"{int(seconds) // 60:02d}:{int(seconds) % 60:02d}"
