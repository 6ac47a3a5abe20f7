"""Tiny models and batches that the model's tests share."""

import numpy as np
import torch

from fvlm_core.config import LLMSettings, LLMShape, LossSettings, ModelSettings, VisionSettings, VisionShape
from fvlm_core.data.batch import ChatFormat, PackedBatch, Sample, Turn
from fvlm_core.model.build import build_model
from fvlm_core.model.foveated import FoveatedVLM

CHAT = ChatFormat(system=[1, 2, 3], user_open=[4], user_close=[5], assistant_open=[6], assistant_close=[7, 8])
VOCAB = 97
FRAME_PX = 42
VARIANTS = [{"query": query, "tokens_per_frame": k} for query in ("deep", "shallow", "random", "pooled") for k in (1, 4)]
VARIANTS.append({"query": "deep", "film_head_width": 8, "temperature": 0.5})


def tiny_settings(**changes) -> ModelSettings:
    if changes.get("query") == "pooled":
        changes = {"fine_iterations": 0, **changes}
    vision = VisionSettings(shape=VisionShape(width=32, layers=3, heads=2), frame_px=FRAME_PX)
    llm = LLMSettings(shape=LLMShape(width=48, layers=2, heads=4, kv_heads=2, mlp_width=64, context=256))
    return ModelSettings(vision=vision, llm=llm, **changes)


def tiny_model(**changes) -> FoveatedVLM:
    return built(tiny_settings(**changes))


def built(settings: ModelSettings) -> FoveatedVLM:
    """In float64 with sizeable weights, those that start at zero too, so that comparisons can be strict and nothing is near zero."""
    model = build_model(settings, vocab_size=VOCAB, seed=3).double().eval()
    rng = np.random.default_rng(7)
    for parameter in model.parameters():
        parameter.data += parameter.new_tensor(rng.normal(0, 0.05, tuple(parameter.shape)))
    return model


def sample(
    rng: np.random.Generator,
    *,
    frames: int = 3,
    shown: list[list[int]] | None = None,
    question_first: bool = False,
    question: int = 4,
    answer: int = 3,
    label_questions: bool = False,
    turns: int = 1,
) -> Sample:
    """A random sample; by default one video of `frames` frames."""
    media = ([list(range(frames))] if frames else []) if shown is None else shown
    ids = lambda n: rng.integers(10, VOCAB, n).tolist()  # noqa: E731
    return Sample(
        key="k",
        source="s",
        frames=rng.integers(0, 256, (frames, FRAME_PX, FRAME_PX, 3), dtype=np.uint8),
        media=media,
        turns=[Turn(ids(question), ids(answer)) for _ in range(turns)],
        question_first=question_first,
        label_questions=label_questions,
    )


def mixed(rng: np.random.Generator):
    """A batch with everything in it: both orders, an image shown four times, two videos, several turns, text only."""
    return [
        sample(rng, frames=3, question_first=True),
        sample(rng, frames=5, question=7),
        sample(rng, frames=1, shown=[[0] * 4], question_first=True),
        sample(rng, frames=4, shown=[[0, 1], [2, 3, 2]], turns=2),
        sample(rng, frames=0, answer=9),
        sample(rng, frames=1, label_questions=True),
    ]


def losses(model) -> LossSettings:
    return LossSettings(coarse=1.0, fine=[0.5, 2.0][: model.settings.fine_iterations])


def checkpointing_changes_no_gradient(model: FoveatedVLM, batch: PackedBatch) -> None:
    """Or it raises AssertionError."""
    model.train()
    gradients = []
    for enabled in (False, True):
        model.set_gradient_checkpointing(enabled)
        model.zero_grad()
        model(batch, losses(model)).objective.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == dict(model.named_parameters()).keys()
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], msg=name)
