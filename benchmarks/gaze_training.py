"""Trains the project's model on one task of the generated benchmark of gaze, on clips that are drawn as they are needed.

Model, packing, losses, optimizer and schedule are those of `fvlm_core`. What a run of shards cannot do is here: no clip is shown twice, and
the clutter grows as fast as the model learns. A digit beside the asked one appears with a probability that starts at 0 and rises a
little in every step in which questions before the video are answered well enough; dense from the start, nothing is learned.

*hunt* is learned with three helps. A second turn asks for the places of the digits: those hang on the crosses, which the answer to the
first turn says nothing of until somebody looks where they point. A third of the clips are *cell* clips, where the question names the
place in all frames: so looking where one is sent is learned before it is known who sends. And an attempt that has learned one of the
two turns and stays at chance in the other is given up, and begun again from other random weights: none of those was seen to learn
the other in as many steps as another attempt takes (docs/research.md).
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fvlm_core.config import LLMSettings, LLMShape, LossSettings, ModelSettings, OptimizerSettings, VisionSettings, VisionShape
from fvlm_core.data import gaze
from fvlm_core.data.batch import ChatFormat, PackedBatch, Sample, Turn, pack
from fvlm_core.data.tokenizer import chat_format, encode, render_chat, train_tokenizer
from fvlm_core.eval.subject import Subject
from fvlm_core.model.build import build_model
from fvlm_core.model.encoder import Encoder
from fvlm_core.model.names import Mode
from fvlm_core.train.cost import Cost
from fvlm_core.train.jobs import VisionTrainingSettings
from fvlm_core.train.objective import TokenLoss
from fvlm_core.train.optimizer import build_optimizer, clip_gradients, gradient_norms, set_learning_rates
from fvlm_core.train.schedules import learning_rates
from fvlm_core.train.vision import pretrained

VISION = VisionShape(width=64, layers=2, heads=4, patch_px=gaze.CELL_PX)
LLM = LLMShape(width=96, layers=2, heads=4, kv_heads=4, mlp_width=256, context=512)
VOCABULARY = 400
EVAL_BATCH = 128
RUNNING = 0.9
"""How much of the running loss is kept at a step."""
WHERE = "where"
"""Asks for the places."""
KNOWN, AT_CHANCE = 1.0, 1.3
"""Nats per character: below the first, digits or places count as learned; above the second, places do not. Where no cross is seen a place
costs 1.4, because the question says the first."""
LOOK_EVERY = 25
"""Steps between two looks at what is learned first."""


@dataclass(frozen=True)
class Part:
    """Samples of a step that are alike."""

    task: gaze.Task
    question_first: bool
    samples: int


@dataclass(frozen=True)
class Plan:
    """One training."""

    task: gaze.Task = "cell"
    seed: int = 0
    steps: int = 1600
    """What six minutes of one core allow, about."""
    batch_samples: int = 96
    """Half of them with the question before the video, half after it; with `cell_too` half, a sixth and a third of *cell*."""
    frames: int = 3
    noise: float = 0.1
    encoder_steps: int = 2000
    """Of the stand-in encoder's own training before; 0 starts from random weights."""
    copies: int = 8
    """Distorted copies of each training digit, for the encoder and for the model."""
    learning_rate: float = 2e-3
    """Of all roles."""
    warmup_steps: int = 40
    first_clutter: float = 0.0
    clutter_step: float = 0.01
    """What a step adds to the clutter while the running loss of the last pass, question first, is below `clutter_gate`."""
    clutter_gate: float | None = None
    """Nats per digit, where chance is 2.30; None: 1.1, or 0.6 where places are asked for, which are certain once they are known."""
    model: dict[str, Any] = field(default_factory=dict)
    """Changes of `model_settings`."""
    wording: Literal["words", "sentence"] = "words"
    """words: only what differs between questions, without a system prompt; sentence: the questions and the chat format of the pipeline."""
    places: bool | None = None
    """Training asks for the places of the digits too; None: in *hunt*."""
    cell_too: bool | None = None
    """Training shows clips of *cell* too; None: in *hunt*."""
    attempts: int = 12
    """At most, where places are asked for: one that learns only the digits, or is not done with both in time, is given up for another."""
    patience: int = 200
    """Steps in which an attempt that is not the last has to learn digits and places, without clutter."""
    max_cpu_s: float = float("inf")
    """Processor time after which the training stops early."""

    @property
    def encoder(self) -> VisionTrainingSettings | None:
        """The encoder's own training, where there is one: beside digits and their neighbours it asks for what the task needs to see."""
        if not self.encoder_steps:
            return None
        return VisionTrainingSettings(
            steps=self.encoder_steps,
            seed=self.seed,
            copies=self.copies,
            colours=self.task in ("colour", "track"),
            crosses=self.task == "hunt",
        )

    @property
    def asks_places(self) -> bool:
        """`places`, decided."""
        return self.task == "hunt" if self.places is None else self.places

    @property
    def gate(self) -> float:
        """`clutter_gate`, decided."""
        return self.clutter_gate if self.clutter_gate is not None else 0.6 if self.asks_places else 1.1

    @property
    def parts(self) -> list[Part]:
        """What a step is made of; how well the first part is answered decides on the clutter."""
        half, sixth = self.batch_samples // 2, self.batch_samples // 6
        if self.task == "hunt" if self.cell_too is None else self.cell_too:
            return [Part(self.task, True, half), Part(self.task, False, sixth), Part("cell", True, self.batch_samples - half - sixth)]
        return [Part(self.task, True, half), Part(self.task, False, half)]

    @property
    def loss(self) -> LossSettings:
        """Equal weights on all passes, so that queries are made of fine hidden states too."""
        return LossSettings(fine=[1.0] * self.model_settings.fine_iterations)

    @property
    def model_settings(self) -> ModelSettings:
        """The model: 0.4 million parameters, two fine passes."""
        base = {"vision": VisionSettings(shape=VISION, frame_px=gaze.FRAME_PX), "llm": LLMSettings(shape=LLM)}
        usual = {"temperature": 4.0, "visual_scale": 0.5, "fine_iterations": 2}
        return ModelSettings.model_validate(base | usual | self.model)


@dataclass(frozen=True)
class Trained:
    """A trained model, and how it came about."""

    asker: "Asker"
    subject: Subject
    steps: int
    """Of the last attempt; fewer than planned where the time was up."""
    given_up: list[int]
    """Steps of the attempts before it."""
    clutter: float
    """At the last step."""
    full_at: int | None
    """The step at which the clutter reached 1."""
    flops: float
    """Of all attempts, from the configuration, without the encoder's own."""
    cpu_s: float
    """Processor time of all attempts, without the encoder's."""
    encoder_cpu_s: float
    encoder_accuracy: dict[str, float]
    """On validation digits: own, right neighbour's, lower neighbour's; empty where there was no training."""
    entropy: dict[str, float]
    """`entropy_at_start`."""


@dataclass(frozen=True)
class Asker:
    """Makes samples of clips."""

    plan: Plan
    tokenizer: Any
    chat: ChatFormat

    @classmethod
    def of(cls, plan: Plan) -> "Asker":
        """With a tokenizer that knows the questions of all tasks, so that a training can go on with another task."""
        rng = np.random.default_rng(0)
        clips = [gaze.render(rng, "train", task=task, frames=plan.frames) for task in gaze.TASKS for _ in range(100)]
        words = (render_chat([{"question": _question(plan, clip), "answer": _answer(clip)}]) for clip in clips)
        tokenizer = train_tokenizer(words, VOCABULARY)
        chat = chat_format(tokenizer)
        if plan.wording == "words":
            chat = ChatFormat([], chat.user_open[:1], chat.user_close[:1], chat.assistant_open[:1], chat.assistant_close[:1])
        return cls(plan, tokenizer, chat)

    def sample(self, clip: gaze.GazeClip, *, question_first: bool, answered: bool = True) -> Sample:
        """The question about a clip's path, with its answer (and where that is asked for, the places) or up to where it begins."""
        turns = [Turn(self.ids(_question(self.plan, clip)), self.ids(_answer(clip)) if answered else [])]
        if answered and self.asks_places(clip.task):
            turns.append(Turn(self.ids(WHERE), self.ids(_places(clip))))
        shown = list(range(len(clip.frames)))
        return Sample("gaze", "gaze", clip.frames, [shown], turns, question_first=question_first)

    def asks_places(self, task: gaze.Task) -> bool:
        """Whether clips of the task are asked for the places too: the plan's own, not those beside them."""
        return self.plan.asks_places and task == self.plan.task

    def samples(self, rng: np.random.Generator, part: Part, clutter: float) -> list[Sample]:
        """New clips and their questions."""
        plan = self.plan
        clips = [
            gaze.render(rng, "train", task=part.task, frames=plan.frames, clutter=clutter, noise=plan.noise, copies=plan.copies)
            for _ in range(part.samples)
        ]
        return [self.sample(clip, question_first=part.question_first) for clip in clips]

    def pack(self, samples: Sequence[Sample], settings: ModelSettings) -> PackedBatch:
        """A batch of samples for a model with these settings."""
        return pack(samples, self.chat, tokens_per_frame=settings.tokens_per_frame)

    def ids(self, text: str) -> list[int]:
        """Token ids of a text."""
        return encode(self.tokenizer, text)


@lru_cache(maxsize=8)
def encoder_of(settings: VisionTrainingSettings) -> tuple[Encoder, dict[str, float], float]:
    """A pre-trained encoder, its accuracy, and the processor time that it took; several trainings of one process share it."""
    started = time.process_time()
    encoder, accuracy = pretrained(settings, VISION)
    return encoder, accuracy, time.process_time() - started


def train(plan: Plan, say: Callable[[str], None] = lambda _: None, start: Mapping[str, Tensor] | None = None) -> Trained:
    """Train to the end of the plan, or of its time; from the weights `start`, which another task may have made, where they are given."""
    asker = Asker.of(plan)
    accuracy, encoder_s = {}, 0.0
    if start is None and plan.encoder:
        encoder, accuracy, encoder_s = encoder_of(plan.encoder)  # pyright: ignore[reportArgumentType]: frozen settings are hashable
        start = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
        say(f"encoder: {accuracy}, {encoder_s:.0f} s")
    given_up, flops, started = [], 0.0, time.process_time()
    while True:
        attempt = Attempt(asker, len(given_up), start)
        say(f"attention entropy at step 0: {attempt.entropy}")
        attempt.run(say, plan.max_cpu_s - (time.process_time() - started), may_end=len(given_up) + 1 < plan.attempts)
        flops += attempt.flops
        if not attempt.given_up:
            break
        given_up.append(attempt.done)
        say(f"given up at step {attempt.done}")
    cpu_s = time.process_time() - started
    attempt.model.eval()
    ended = attempt.done, given_up, attempt.clutter, attempt.full_at
    return Trained(asker, attempt.subject, *ended, flops, cpu_s, encoder_s, accuracy, attempt.entropy)


class Attempt:
    """A model and its training from random weights, or from `start`, which may be a part of them. The first of a plan is number 0."""

    def __init__(self, asker: Asker, number: int, start: Mapping[str, Tensor] | None) -> None:
        plan = self.plan = asker.plan
        self.asker = asker
        model = self.model = build_model(plan.model_settings, vocab_size=len(asker.tokenizer), seed=plan.seed + 1000 * number)
        model.load_state_dict(model.state_dict() | dict(start or {}))
        self.subject = Subject(model, asker.tokenizer, asker.chat, torch.device("cpu"), EVAL_BATCH)
        self.entropy = entropy_at_start(self.subject, asker)
        self.rates = OptimizerSettings(
            lr_connector=plan.learning_rate, lr_vision=plan.learning_rate, lr_llm=plan.learning_rate, warmup_steps=plan.warmup_steps
        )
        self.optimizer = build_optimizer(model, self.rates)
        self.objective = TokenLoss(plan.loss, model.pass_names)
        self.cost = Cost(model, plan.loss)
        self.rng = np.random.default_rng([plan.seed, 1 + number])
        self.clutter, self.running = plan.first_clutter, 2.3
        self.full_at: int | None = None
        self.done, self.flops, self.given_up = 0, 0.0, False

    def run(self, say: Callable[[str], None], seconds: float, *, may_end: bool) -> None:
        """Train for as much processor time at most; `may_end`: give up where only the digits are learned, or not both in time."""
        plan, started = self.plan, time.process_time()
        undecided = may_end and plan.asks_places
        self.model.train()
        while self.done < plan.steps and time.process_time() - started < seconds:
            drawn = [self.asker.samples(self.rng, part, self.clutter) for part in plan.parts]
            nats = self.step(drawn)
            if self.done % LOOK_EVERY:
                continue
            orders = ["first" if part.question_first else "after" for part in plan.parts]
            heard = [f"{loss:.2f} {part.task}, question {order}" for loss, part, order in zip(nats, plan.parts, orders, strict=True)]
            taken = time.process_time() - started
            say(f"step {self.done}: clutter {self.clutter:.2f}; nats per character: {'; '.join(heard)}; {taken:.0f} s")
            if undecided:
                digits, places = self.by_turn(drawn[0])
                say(f"step {self.done}: digits {digits:.2f}, places {places:.2f}")
                undecided = max(digits, places) > KNOWN
                self.given_up = undecided and ((digits < KNOWN and places > AT_CHANCE) or self.done >= plan.patience)
                if self.given_up:
                    return

    def step(self, drawn: Sequence[Sequence[Sample]]) -> list[float]:
        """Learn from the samples of each part; nats per character of the last pass, before it."""
        plan = self.plan
        batches = [self.asker.pack(samples, self.model.settings) for samples in drawn]
        labels, nats = sum(batch.n_labels for batch in batches), []
        for part, batch in zip(plan.parts, batches, strict=True):
            sums = self.objective(self.model, batch, self.subject.device)
            (sums.objective / labels).backward()
            asked = part.samples * plan.frames * (1 + self.asker.asks_places(part.task))
            nats.append(sums.parts[self.objective.names[-1]].item() / asked)
            self.flops += self.cost.batch(batch)
        norm = torch.stack(list(gradient_norms(self.optimizer).values())).norm()
        clip_gradients(self.optimizer, self.rates.clip_norm, norm)
        set_learning_rates(self.optimizer, learning_rates(self.rates, self.done, plan.steps))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        self.running = RUNNING * self.running + (1 - RUNNING) * nats[0]
        if self.running < plan.gate:
            self.clutter = min(1.0, self.clutter + plan.clutter_step)
            self.full_at = self.done if self.full_at is None and self.clutter == 1.0 else self.full_at
        return nats

    @torch.no_grad()
    def by_turn(self, samples: Sequence[Sample]) -> tuple[float, float]:
        """Nats per character of the digits and of the places, in the last pass."""
        first = [replace(sample, turns=sample.turns[:1]) for sample in samples]
        digits, both = (
            self.objective(self.model, self.asker.pack(asked, self.model.settings), self.subject.device).parts[self.objective.names[-1]]
            for asked in (first, samples)
        )
        characters = len(samples) * self.plan.frames
        return digits.item() / characters, (both - digits).item() / characters


def step_flops(plan: Plan) -> float:
    """Training FLOPs of a step, from the configuration."""
    asker = Asker.of(plan)
    model = build_model(plan.model_settings, vocab_size=len(asker.tokenizer))
    rng, cost = np.random.default_rng(0), Cost(model, plan.loss)
    alone = [replace(part, samples=1) for part in plan.parts]
    costs = [cost.batch(asker.pack(asker.samples(rng, part, 1.0), model.settings)) for part in alone]
    return sum(one * part.samples for one, part in zip(costs, plan.parts, strict=True))


@torch.no_grad()
def entropy_at_start(subject: Subject, asker: Asker, *, clips: int = 64) -> dict[str, float]:
    """Entropy of the last layer's attention as a share of the uniform's, over full grids: of `q_static`, of the language model's queries.

    Near 0 every query is stuck at one patch and gets no gradient to move. Empty for a model that is not queried.
    """
    if not subject.gazes:
        return {}
    rng = np.random.default_rng(0)
    plan = asker.plan
    drawn = [gaze.render(rng, "train", task=plan.task, frames=plan.frames, noise=plan.noise, copies=plan.copies) for _ in range(clips)]
    samples = [asker.sample(clip, question_first=True) for clip in drawn]
    shares = {}
    modes: dict[str, Mode] = {"coarse": "coarse_only", "fine": "coarse_fine"}
    for name, mode in modes.items():
        attention = np.concatenate(subject.gaze(samples, mode)).reshape(clips * plan.frames, -1)
        shares[name] = round(float(-(attention * np.log(attention + 1e-12)).sum(1).mean() / np.log(attention.shape[1])), 3)
    return shares


def _question(plan: Plan, clip: gaze.GazeClip) -> str:
    if plan.wording == "sentence" or clip.task == "caption":
        return gaze.question(clip)
    return clip.colour if clip.task == "colour" else clip.place


def _places(clip: gaze.GazeClip) -> str:
    """Numbers of the cells that count, row by row from 1."""
    return "".join(str(1 + cell) for cell in clip.path @ (gaze.GRID, 1))


def _answer(clip: gaze.GazeClip) -> str:
    return gaze.caption(clip) if clip.task == "caption" else clip.answer
