"""The foveated model as an `Answerer`. Frames are encoded once for all questions, modes and controls, and a question's tokens once for all
its options.

Options continue from copies of the question's KV cache, in one packed pass, so an option costs only its own tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import cast, get_args

import numpy as np
import torch
from torch import Tensor

from fvlm_core.data.batch import PackedBatch, Sample
from fvlm_core.data.frames import FrameRule
from fvlm_core.errors import UserError
from fvlm_core.eval.answerers.answerer import Ask, Condition, Order, Reply
from fvlm_core.eval.generation import Method, continue_prompts
from fvlm_core.eval.media import NO_MEDIA, Media, Source
from fvlm_core.eval.questions import question_sample
from fvlm_core.eval.subject import Subject
from fvlm_core.model import inference
from fvlm_core.model.attention import PackedCache, PackedLayout
from fvlm_core.model.decoding import branch
from fvlm_core.model.encoder import FrameFeatures
from fvlm_core.model.names import Mode


@dataclass
class FoveatedAnswerer:
    """An `Answerer` around a `Subject`."""

    subject: Subject
    name: str
    checkpoint: str
    rule: FrameRule
    image_repeats: int = 8
    seed: int = 0
    tokens_per_frame: int = field(init=False)
    methods: tuple[Method, ...] = get_args(Method)
    native_order: Order = "question_first"

    def __post_init__(self) -> None:
        self.tokens_per_frame = self.subject.model.settings.tokens_per_frame

    @property
    def device(self) -> torch.device:
        """The subject's device."""
        return self.subject.device

    def conditions(self, orders: Sequence[Order], modes: Sequence[str] | None, *, controls: bool) -> list[Condition]:
        """Every mode in every order. Controls: shuffled frames in every mode, no frames, random queries, one query from the question."""
        model = self.subject.model
        if unknown := [mode for mode in modes or () if mode not in model.modes]:
            fix = f"leave modes empty, or choose of: {', '.join(model.modes)}"
            raise UserError(f"the model (query {model.settings.query!r}) has no mode {', '.join(unknown)}", where="modes", fix=fix)
        chosen = [mode for mode in model.modes if mode in (modes or model.modes)]
        conditions = [Condition(mode, order) for order in orders for mode in chosen]
        if controls:
            conditions += [Condition(mode, orders[0], "shuffled") for mode in chosen]
            conditions += [Condition("coarse_only", orders[0], "blind")]
            if self.subject.gazes:
                conditions += [Condition("coarse_fine", orders[0], "random_query")]
            if self.subject.gazes and model.settings.query != "random":
                conditions += [Condition("coarse_fine", orders[0], "question_query")]
        return conditions

    def load_media(self, source: Source) -> Media:
        """Decode media to square frames."""
        return source.load(self.rule, self.image_repeats)

    @torch.inference_mode()
    def open(self, media: Media, name: str) -> "OpenedMedia":
        """Open media; their frames are encoded when first needed."""
        return OpenedMedia(self, media, name)

    def unconditional(self, texts: Sequence[str]) -> list[Reply]:
        """Score texts as answers without media and without a question."""
        return self.open(NO_MEDIA, "").replies([Ask("", (text,)) for text in texts], Condition("coarse_only", view="blind"))


class OpenedMedia:
    """Opened media; their frames are encoded when first needed."""

    def __init__(self, answerer: FoveatedAnswerer, media: Media, name: str) -> None:
        self.answerer, self.media, self.name = answerer, media, name
        self.subject = answerer.subject
        self._features: FrameFeatures | None = None

    @torch.inference_mode()
    def replies(self, asks: Sequence[Ask], condition: Condition) -> list[Reply]:
        """Answer each question independently, `batch_samples` questions at a time."""
        media = self.media
        if condition.view == "blind":
            media = NO_MEDIA
        elif condition.view == "shuffled":
            media = media.shuffled(self.answerer.seed, self.name)
        first = condition.order == "question_first"
        samples = [question_sample(self.name, media, self.subject.encode(ask.text), question_first=first) for ask in asks]
        replies: dict[int, Reply] = {}
        for generating in (False, True):
            places = [place for place, ask in enumerate(asks) if bool(ask.max_new_tokens) == generating]
            for start in range(0, len(places), self.subject.batch_samples):
                some = places[start : start + self.subject.batch_samples]
                with self.subject.autocast():
                    found = self._replies([samples[place] for place in some], [asks[place] for place in some], condition)
                replies |= dict(zip(some, found, strict=True))
        return [replies[place] for place in range(len(asks))]

    def _replies(self, samples: Sequence[Sample], asks: Sequence[Ask], condition: Condition) -> list[Reply]:
        subject, model = self.subject, self.subject.model
        batch = subject.pack(samples)
        mode: Mode = "coarse_only" if condition.view == "blind" else cast(Mode, condition.mode)
        room = max(ask.max_new_tokens for ask in asks)
        features, queries = self._encoded(batch), None
        if features is not None and condition.view == "random_query":
            queries = self._random_queries(batch)
        elif features is not None and condition.view == "question_query":
            queries = self._question_queries(batch, samples)
        context = inference.read_batch(model, batch, mode, features=features, room=room, queries=queries)
        assert context.cache is not None
        ends = batch.cu_seqlens[1:].long() - 1
        hidden = context.hidden[ends]
        sums = self._continuations(asks, hidden, context.cache)
        said = [""] * len(asks)
        if room:
            said = self._said(samples, asks, hidden, context.cache)
        return [Reply(rows, text) for rows, text in zip(sums, said, strict=True)]

    def _said(self, samples: Sequence[Sample], asks: Sequence[Ask], hidden: Tensor, cache: PackedCache) -> list[str]:
        """Generate answers; questions with the same generation settings and length limit are batched."""
        subject, said = self.subject, [""] * len(asks)
        kinds = dict.fromkeys((ask.max_new_tokens, ask.generation) for ask in asks if ask.max_new_tokens)
        for most, generation in kinds:
            rows = [row for row, ask in enumerate(asks) if (ask.max_new_tokens, ask.generation) == (most, generation)]
            alone = len(rows) == len(asks)
            answers = continue_prompts(
                subject.model,
                cache if alone else branch(cache, rows, [most] * len(rows)),
                hidden if alone else hidden[rows],
                generation,
                max_new_tokens=most,
                stop_ids=subject.chat.assistant_close[:1],
                seeds=[generation.seed_of(self.name, samples[row].turns[-1].question_ids) for row in rows],
            )
            for row, ids in zip(rows, answers, strict=True):
                said[row] = subject.decode(ids)
        return said

    def _continuations(self, asks: Sequence[Ask], hidden: Tensor, cache: PackedCache) -> list[np.ndarray]:
        """Score the continuations: per question, float64 [continuations, 3] as in `Reply.sums`.

        `hidden` [N, llm width] are the hidden states at the end of each question.
        """
        subject = self.subject
        ids = [[subject.encode(text) for text in ask.continuations] for ask in asks]
        first = self._log_likelihoods(hidden)
        sums = [np.zeros((len(of_ask), 3)) for of_ask in ids]
        branches: list[tuple[int, int]] = []
        for row, (of_ask, ask) in enumerate(zip(ids, asks, strict=True)):
            for place, tokens in enumerate(of_ask):
                if not tokens:
                    raise ValueError(f"continuation {ask.continuations[place]!r} has no tokens")
                sums[row][place] = (float(first[row, tokens[0]]), 1, 0)
                if not ask.first_token:
                    branches.append((row, place))
        for start in range(0, len(branches), subject.batch_samples):
            some = branches[start : start + subject.batch_samples]
            self._go_on(some, [ids[row][place] for row, place in some], cache, sums)
        return sums

    def _go_on(self, branches: Sequence[tuple[int, int]], tokens: Sequence[list[int]], cache: PackedCache, sums: list[np.ndarray]) -> None:
        """Run continuations from the ends of their questions.

        Adds the log-likelihoods of their tokens after the first, and of the end of the turn, to `sums` in place.
        """
        model, end = self.subject.model, self.subject.chat.assistant_close[0]
        branched = branch(cache, [row for row, _ in branches], [len(ids) for ids in tokens])
        starts = [cache.lengths[row] for row, _ in branches]
        device = model.connector.visual_proj.weight.device
        positions = torch.cat([torch.arange(start, start + len(ids)) for start, ids in zip(starts, tokens, strict=True)]).to(device)
        flat = torch.tensor([token for ids in tokens for token in ids], device=device)
        layout = PackedLayout([len(ids) for ids in tokens], branched)
        states = model.run_llm(model.embed(flat), positions, layout)
        following = torch.tensor([token for ids in tokens for token in [*ids[1:], end]], device=device)
        scores = self._log_likelihoods(states).gather(1, following[:, None])[:, 0].double().cpu().numpy()
        for (row, place), (begin, stop) in zip(branches, pairwise(layout.offsets), strict=True):
            sums[row][place] += (scores[begin : stop - 1].sum(), stop - begin - 1, scores[stop - 1])

    def _log_likelihoods(self, states: Tensor) -> Tensor:
        """Next-token log-likelihoods [n, vocabulary], computed in fp32 regardless of autocast, as in the loss."""
        with torch.autocast(states.device.type, enabled=False):
            return self.subject.model.llm.lm_head(states.float()).log_softmax(-1)

    def _encoded(self, batch: PackedBatch) -> FrameFeatures | None:
        if not len(batch.shown_frames):
            return None
        if self._features is None:
            self._features = self.subject.model.encode(batch.frames)
        return self._features

    def _random_queries(self, batch: PackedBatch) -> Tensor:
        """Random queries [V, k, D], drawn like the initial `q_static`; the same for all questions about these media."""
        static = self.subject.model.connector.q_static
        seed = int(np.random.SeedSequence([self.answerer.seed, *self.name.encode()]).generate_state(1)[0])
        frames = max(batch.shown_counts)
        drawn = torch.randn(frames, *static.shape, generator=torch.Generator().manual_seed(seed)).to(static)
        return torch.cat([drawn[:count] for count in batch.shown_counts])

    def _question_queries(self, batch: PackedBatch, samples: Sequence[Sample]) -> Tensor:
        """Queries [V, k, D] from the hidden state at each question's last token, read without frames; the same for all frames."""
        subject, model = self.subject, self.subject.model
        blind = subject.pack([question_sample(self.name, NO_MEDIA, one.turns[0].question_ids, question_first=True) for one in samples])
        hidden = inference.read_batch(model, blind, "coarse_only").hidden
        before = len(subject.chat.system) + len(subject.chat.user_open) - 1
        ends = [start + before + len(one.turns[0].question_ids) for start, one in zip(blind.cu_seqlens.tolist(), samples, strict=False)]
        made = model.connector.next_queries(hidden[ends][:, None].expand(-1, model.settings.tokens_per_frame, -1))
        return made.repeat_interleave(torch.tensor(batch.shown_counts, device=made.device), 0)
