"""Train the model on one task of the generated gaze benchmark, on clips that are rendered on the fly.

Model, packing, losses, optimizer and schedule are those of `fvlm_core`. Two things differ from training on shards. No clip is shown twice.
And clutter follows a curriculum: a distractor digit appears with a probability that starts at 0 and rises a little in every step in which
the loss with the question first is low enough. With full clutter from the start, nothing is learned.

At laptop size the encoder learns at a fifth of the others' rate. At the full rate it forgets within 50 steps what the first clips do not
require (in *hunt*: where the cross is), and seldom learns it again.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from benchmarks.shapes import DINOV2_SMALL, FRAME_PX, SMOLLM2
from fvlm_core.config import LLMSettings, LLMShape, LossSettings, ModelSettings, OptimizerSettings, VisionSettings, VisionShape
from fvlm_core.data import gaze
from fvlm_core.data.batch import ChatFormat, PackedBatch, Sample, Turn, pack
from fvlm_core.data.generate import generate
from fvlm_core.data.tokenizer import chat_format, encode, load_tokenizer, render_chat, train_tokenizer
from fvlm_core.errors import UserError
from fvlm_core.eval.subject import Subject
from fvlm_core.model.build import build_model, init_std
from fvlm_core.model.encoder import Encoder
from fvlm_core.model.names import Mode
from fvlm_core.train.cost import Cost
from fvlm_core.train.jobs import VisionTrainingSettings
from fvlm_core.train.metrics import peak_flops
from fvlm_core.train.objective import TokenLoss
from fvlm_core.train.optimizer import build_optimizer, clip_gradients, gradient_norms, set_learning_rates
from fvlm_core.train.schedules import learning_rates
from fvlm_core.train.vision import pretrained

Size = Literal["laptop", "production"]
VISION: dict[Size, VisionSettings] = {
    "laptop": VisionSettings(shape=VisionShape(width=64, layers=2, heads=4, patch_px=gaze.CELL_PX), frame_px=gaze.FRAME_PX),
    "production": VisionSettings(shape=DINOV2_SMALL, frame_px=FRAME_PX),
}
LLM: dict[Size, LLMShape] = {
    "laptop": LLMShape(width=96, layers=2, heads=4, kv_heads=4, mlp_width=256, context=512),
    "production": SMOLLM2["135M"],
}
"""Shapes used if no checkpoint is given."""
VOCABULARY = 400
"""Vocabulary size of the tokenizer that is trained on the questions if no checkpoint is given."""
EVAL_BATCH: dict[Size, int] = {"laptop": 128, "production": 64}
SAID_EVERY = 25
"""Steps between log lines."""
RUNNING = 0.9
"""Decay of the running loss per step."""


@dataclass(frozen=True)
class Plan:
    """Settings of one training."""

    task: gaze.Task = "cell"
    size: Size = "laptop"
    frame_px: int | None = None
    """Side of the frames, a multiple of 14; the size's own by default."""
    seed: int = 0
    steps: int = 1400
    """1,400 steps take five to seven minutes of one core, including the encoder's pre-training."""
    batch_samples: int = 96
    """Half of them with the question before the video, half after it."""
    frames: int = 3
    noise: float = 0.1
    encoder_steps: int = 2000
    """Steps of the encoder's pre-training; 0 starts from random weights."""
    copies: int = 8
    """Distorted copies of each training digit, for the encoder and for the model."""
    learning_rate: float = 2e-3
    """Of the connector, and of the language model unless `llm_learning_rate` is given."""
    llm_learning_rate: float | None = None
    """Of the language model."""
    vision_learning_rate: float = 4e-4
    """Of the encoder."""
    encoder_learning_rate: float = 2e-3
    """Of the encoder's pre-training."""
    init_std: float | None = None
    """Standard deviation of the language model's initial weights; by default one over the square root of its width."""
    warmup_steps: int = 40
    first_clutter: float = 0.0
    clutter_step: float = 0.01
    """Increase of the clutter per step, while the running loss of the last pass, question first, is below `clutter_gate`."""
    clutter_gate: float = 1.1
    """Nats per digit; chance is 2.30."""
    model: dict[str, Any] = field(default_factory=dict)
    """Changes to `model_settings`."""
    llm_checkpoint: str | None = None
    """Language model to start from, with its tokenizer."""
    wording: Literal["words", "sentence"] = "words"
    """words: only the words in which questions differ, no system prompt; sentence: the pipeline's questions and chat format."""
    max_cpu_s: float = float("inf")
    """CPU time after which training stops early."""
    device: str = "cpu"
    workers: int = 0
    """Processes that render clips in advance, for devices faster than one process. The clutter then lags by as many steps."""

    @property
    def encoder(self) -> VisionTrainingSettings | None:
        """Settings of the encoder's pre-training, or None. Its targets are digits, their neighbours, and what the task requires."""
        if not self.encoder_steps:
            return None
        return VisionTrainingSettings(
            steps=self.encoder_steps,
            optimizer=OptimizerSettings(lr_vision=self.encoder_learning_rate, warmup_steps=self.warmup_steps),
            seed=self.seed,
            copies=self.copies,
            colours=gaze.usual_colours(self.task) if self.task in gaze.OF_A_COLOUR else None,
            crosses=self.task == "hunt",
        )

    @property
    def loss(self) -> LossSettings:
        """Equal weights on all passes, so that queries from fine hidden states are trained too."""
        return LossSettings(fine=[1.0] * self.model_settings.fine_iterations)

    @property
    def vision(self) -> VisionSettings:
        """The encoder's shape and the side of its frames."""
        usual = VISION[self.size]
        return usual if self.frame_px is None else VisionSettings(shape=usual.shape, frame_px=self.frame_px)

    @property
    def model_settings(self) -> ModelSettings:
        """Settings of the model, with two fine passes: 0.4 million parameters, or DINOv2-small and SmolLM2-135M at 224 px."""
        llm = LLMSettings(checkpoint=self.llm_checkpoint) if self.llm_checkpoint else LLMSettings(shape=LLM[self.size])
        base = {"vision": self.vision, "llm": llm}
        usual = {"temperature": 4.0, "visual_scale": 0.5, "fine_iterations": 2}
        return ModelSettings.model_validate(base | usual | self.model)


PLANS: dict[Size, Plan] = {
    "laptop": Plan(),
    "production": Plan(
        size="production",
        wording="sentence",
        learning_rate=1e-3,
        llm_learning_rate=1e-4,
        vision_learning_rate=1e-4,
        encoder_learning_rate=5e-4,
        warmup_steps=100,
        device="cuda",
        workers=12,
    ),
}
"""Default plan by size. The learning rates of production are a first guess: no GPU has run it yet."""


@dataclass(frozen=True)
class Trained:
    """A trained model and statistics of its training."""

    asker: "Asker"
    subject: Subject
    steps: int
    """Fewer than planned if the time limit was reached."""
    clutter: float
    """At the last step."""
    full_at: int | None
    """The step at which the clutter reached 1; None if it did not."""
    flops: float
    """Training FLOPs, computed from the configuration, without the encoder's pre-training."""
    cpu_s: float
    """CPU seconds of the training, without the encoder's pre-training and without processes that render clips."""
    seconds: float
    """Wall time of the same."""
    encoder_cpu_s: float
    encoder_accuracy: dict[str, float]
    """Accuracy on validation digits: own, right neighbour's, lower neighbour's and the other targets. Empty without pre-training."""
    entropy: dict[str, float]
    """Result of `entropy_at_start`."""
    curve: list[dict[str, float]]
    """Every `SAID_EVERY` steps: step, clutter, and nats per digit with the question before and after the video."""

    @property
    def mfu(self) -> float | None:
        """Share of the device's peak FLOP/s that training achieved, including rendering; None if the peak is not known."""
        peak = peak_flops(self.subject.device)
        return self.flops / self.seconds / peak if peak and self.seconds else None


@dataclass(frozen=True)
class Asker:
    """Makes training and evaluation samples from clips."""

    plan: Plan
    tokenizer: Any
    chat: ChatFormat

    @classmethod
    def of(cls, plan: Plan) -> "Asker":
        """Build with the checkpoint's tokenizer, or train one on the questions of all tasks, so that training can continue on another task.

        The names of all nine colours are included only if the task is *colour*.
        """
        tokenizer = load_tokenizer(plan.llm_checkpoint) if plan.llm_checkpoint else train_tokenizer(_words(plan), VOCABULARY)
        chat = chat_format(tokenizer)
        if plan.wording == "words":
            chat = ChatFormat([], chat.user_open[:1], chat.user_close[:1], chat.assistant_open[:1], chat.assistant_close[:1])
        return cls(plan, tokenizer, chat)

    def sample(self, clip: gaze.GazeClip, *, question_first: bool, answered: bool = True) -> Sample:
        """Return the sample of a clip's question, with its answer or, for generation, without."""
        turn = Turn(self.ids(_question(self.plan, clip)), self.ids(_answer(clip)) if answered else [])
        shown = list(range(len(clip.frames)))
        return Sample("gaze", "gaze", clip.frames, [shown], [turn], question_first=question_first)

    def clips(self, rng: np.random.Generator, count: int, clutter: float) -> list[gaze.GazeClip]:
        """Render new clips of training digits."""
        plan, px = self.plan, self.plan.vision.frame_px
        look: dict[str, Any] = {"frames": plan.frames, "noise": plan.noise, "copies": plan.copies}
        return [gaze.render_to_fit(rng, "train", px, task=plan.task, clutter=clutter, **look) for _ in range(count)]

    def batches(self, rng: np.random.Generator, clutter: float, *, samples: int) -> tuple[float, list[PackedBatch]]:
        """Return the clutter and two batches of new clips: one with the question before the video, one with the question after it."""
        tokens = self.plan.model_settings.tokens_per_frame
        return clutter, [
            pack(
                [self.sample(clip, question_first=first) for clip in self.clips(rng, samples, clutter)], self.chat, tokens_per_frame=tokens
            )
            for first in (True, False)
        ]

    def ids(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        return encode(self.tokenizer, text)


@lru_cache(maxsize=8)
def encoder_of(
    settings: VisionTrainingSettings, vision: VisionSettings, device: str, workers: int
) -> tuple[Encoder, dict[str, float], float]:
    """Return a pre-trained encoder, its accuracy and its CPU seconds. Cached, so that trainings in one process share it."""
    started = time.process_time()
    assert vision.shape is not None
    encoder, accuracy = pretrained(settings, vision.shape, frame_px=vision.frame_px, device=torch.device(device), workers=workers)
    return encoder, accuracy, time.process_time() - started


def train(plan: Plan, say: Callable[[str], None] = lambda _: None, start: Mapping[str, Tensor] | None = None) -> Trained:
    """Train to the end of the plan or its time limit, optionally from the weights `start`, which may come from another task.

    Raises UserError if both `init_std` and `llm_checkpoint` are given.
    """
    if plan.init_std is not None and plan.llm_checkpoint:
        fix = "leave one of the two out"
        raise UserError("a checkpoint's weights are not drawn, so they have no standard deviation to choose", where="init_std", fix=fix)
    asker, device = Asker.of(plan), torch.device(plan.device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # as the trainer does for bf16
    model = build_model(plan.model_settings, vocab_size=len(asker.tokenizer), seed=plan.seed)
    if plan.init_std is not None:
        with torch.no_grad():
            for weights in model.llm.parameters():
                if weights.ndim == 2:
                    weights *= plan.init_std / init_std(model.llm.config.hidden_size)
    accuracy, encoder_s = {}, 0.0
    if start is not None:
        model.load_state_dict(start)
    elif plan.encoder:
        encoder, accuracy, encoder_s = encoder_of(plan.encoder, plan.vision, plan.device, plan.workers)
        model.encoder.load_state_dict(encoder.state_dict())
        say(f"encoder: {accuracy}, {encoder_s:.0f} s")
    subject = Subject(model.to(device), asker.tokenizer, asker.chat, device, EVAL_BATCH[plan.size])
    entropy = entropy_at_start(subject, asker)
    say(f"attention entropy at step 0: {entropy}")
    rates = OptimizerSettings(
        lr_connector=plan.learning_rate,
        lr_vision=plan.vision_learning_rate,
        lr_llm=plan.learning_rate if plan.llm_learning_rate is None else plan.llm_learning_rate,
        warmup_steps=plan.warmup_steps,
    )
    optimizer = build_optimizer(model, rates)
    objective = TokenLoss(plan.loss, model.pass_names)
    cost, flops = Cost(model, plan.loss), 0.0
    clutter, running, full_at, started, clock = plan.first_clutter, 2.3, None, time.process_time(), time.monotonic()
    last, done, curve, half = objective.names[-1], 0, [], plan.batch_samples // 2

    def wanted() -> Iterator[float]:
        """Yield the clutter at the time when clips are rendered."""
        for _ in range(plan.steps):
            if time.process_time() - started > plan.max_cpu_s:
                return
            yield clutter

    model.train()
    rng = np.random.default_rng([plan.seed, 1])
    for shown, batches in generate(partial(asker.batches, samples=half), wanted(), rng, plan.workers):
        labels, nats = sum(batch.n_labels for batch in batches), []
        for batch in batches:
            with subject.autocast():
                sums = objective(model, batch, device)
            (sums.objective / labels).backward()
            nats.append(sums.parts[last].detach())
            flops += cost.batch(batch)
        norm = torch.stack(list(gradient_norms(optimizer).values())).norm()
        clip_gradients(optimizer, rates.clip_norm, norm)
        set_learning_rates(optimizer, learning_rates(rates, done, plan.steps))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done += 1
        first, after = (value / (half * plan.frames) for value in torch.stack(nats).tolist())
        running = RUNNING * running + (1 - RUNNING) * first
        if running < plan.clutter_gate:
            clutter = min(1.0, clutter + plan.clutter_step)
            full_at = done if full_at is None and clutter == 1.0 else full_at
        if done % SAID_EVERY == 0:
            curve.append({"step": done, "clutter": round(shown, 3), "first": round(first, 4), "after": round(after, 4)})
            heard = f"nats per digit {first:.2f}, with the question after {after:.2f}"
            say(f"step {done}: clutter {clutter:.2f}; {heard}; {time.monotonic() - clock:.0f} s")
    cpu_s, seconds = time.process_time() - started, time.monotonic() - clock
    model.eval()
    return Trained(asker, subject, done, clutter, full_at, flops, cpu_s, seconds, encoder_s, accuracy, entropy, curve)


def step_flops(plan: Plan) -> float:
    """Return the training FLOPs of a step, computed from the configuration."""
    asker = Asker.of(plan)
    model = build_model(plan.model_settings, vocab_size=len(asker.tokenizer))
    cost = Cost(model, plan.loss)
    return sum(map(cost.batch, asker.batches(np.random.default_rng(0), 1.0, samples=1)[1])) * plan.batch_samples / 2


@torch.no_grad()
def entropy_at_start(subject: Subject, asker: Asker, *, clips: int = 64) -> dict[str, float]:
    """Return the entropy of the last layer's attention on full grids, as a share of the uniform distribution's.

    For `q_static` and for the language model's queries. Near 0, every query is stuck at one patch and gets no gradient to move. Empty for a
    model without queries.
    """
    if not subject.gazes:
        return {}
    plan = asker.plan
    samples = [asker.sample(clip, question_first=True) for clip in asker.clips(np.random.default_rng(0), clips, 1.0)]
    shares = {}
    modes: dict[str, Mode] = {"coarse": "coarse_only", "fine": "coarse_fine"}
    for name, mode in modes.items():
        attention = np.concatenate(subject.gaze(samples, mode)).reshape(clips * plan.frames, -1)
        shares[name] = round(float(-(attention * np.log(attention + 1e-12)).sum(1).mean() / np.log(attention.shape[1])), 3)
    return shares


def _words(plan: Plan) -> Iterator[str]:
    """Return questions of all tasks with their answers, rendered as chats."""
    rng, colours = np.random.default_rng(0), gaze.usual_colours(plan.task)
    clips = (gaze.render(rng, "train", task=task, frames=plan.frames, colours=colours) for task in gaze.TASKS for _ in range(100))
    return (render_chat([{"question": _question(plan, clip), "answer": _answer(clip)}]) for clip in clips)


def _question(plan: Plan, clip: gaze.GazeClip) -> str:
    if plan.wording == "sentence" or clip.task == "caption":
        return gaze.question(clip)
    return clip.colour if clip.task == "colour" else clip.place


def _answer(clip: gaze.GazeClip) -> str:
    return gaze.caption(clip) if clip.task == "caption" else clip.answer
