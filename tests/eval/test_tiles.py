"""Captions of frames stored as tiles: what is not opened is not decoded, and the answers are those of the same frames decoded in full."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fvlm_core.config import GlanceSettings, LLMSettings, LLMShape, ModelSettings, VisionSettings, VisionShape
from fvlm_core.data.batch import Sample, pack
from fvlm_core.data.shard_set import ShardSet
from fvlm_core.data.tiles import TiledFrame, TiledSample, tiles_of
from fvlm_core.eval.questions import without_answer
from fvlm_core.eval.subject import Subject
from fvlm_core.eval.validation import ValidationSplit
from fvlm_core.model.build import build_model
from fvlm_core.model.glance import encode_downscaled
from fvlm_core.model.inference import read_batch
from tests.tiny import tiled_shards


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> ValidationSplit:
    return ValidationSplit(ShardSet(tiled_shards(tmp_path_factory.mktemp("tiled"))), image_repeats=2, seed=0)


@pytest.fixture(scope="module")
def subject(split: ValidationSplit) -> Subject:
    vision = VisionSettings(shape=VisionShape(width=32, layers=2, heads=2), frame_px=84)
    llm = LLMSettings(shape=LLMShape(width=48, layers=2, heads=2, kv_heads=1, mlp_width=96))
    settings = ModelSettings(vision=vision, llm=llm, glance=GlanceSettings(px=42, zoom=2, open=1))
    model = build_model(settings, vocab_size=split.shards.manifest.vocab_size, seed=3).eval()
    return Subject(model, split.shards.tokenizer, split.shards.chat, torch.device("cpu"), batch_samples=3)


def asked(split: ValidationSplit) -> list[Sample]:
    return [without_answer(question.sample, question_first=False) for question in split.captions(4, small_px=42)]


def in_full(sample: Sample) -> np.ndarray:
    """All tiles of its frames, uint8 [F, 84, 84, 3]."""
    assert isinstance(sample, TiledSample)
    assert sample.tiles is not None
    out = np.empty((len(sample.tiles), 84, 84, 3), np.uint8)
    for into, frame in zip(out, sample.tiles.frames, strict=True):
        frame.decode(into)
    return out


@pytest.mark.parametrize("mode", ["coarse_only", "coarse_fine", "autoregressive"])
@torch.no_grad()
def test_a_mode_reads_the_same_from_tiles_as_from_complete_frames(split: ValidationSplit, subject: Subject, mode) -> None:
    """To the bit, with the same glance: pixels of opened patches are the same whoever cuts them out."""
    samples = asked(split)
    small, model = subject.pack(samples), subject.model
    complete = torch.from_numpy(np.concatenate([in_full(sample) for sample in samples]))
    tiles = tiles_of(samples)
    assert tiles is not None
    found = read_batch(model, small, mode, features=encode_downscaled(model.encoder, small.frames, tiles))
    expected = read_batch(model, small, mode, features=encode_downscaled(model.encoder, small.frames, complete))
    assert torch.equal(found.tokens, expected.tokens)
    assert len(tiles.decoded) == (0 if mode == "coarse_only" else len(complete)), "of 9 tiles of a frame, the one that is opened"
    large = pack([replace(sample, frames=in_full(sample)) for sample in samples], subject.chat)
    nearly = read_batch(model, large, mode).tokens
    assert (found.tokens - nearly).norm() < 0.2 * nearly.norm(), "the small frame is a JPEG of its own"


def test_captions_are_generated_from_tiles(split: ValidationSplit, subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    samples, decoded = asked(split), []
    tile = TiledFrame.tile
    monkeypatch.setattr(TiledFrame, "tile", lambda frame, number: decoded.append(number) or tile(frame, number))
    texts = subject.generate(samples, "autoregressive", max_new_tokens=4)
    n_frames = sum(len(sample.frames) for sample in samples)
    assert len(texts) == len(samples)
    assert len(decoded) == n_frames
    bare = [replace(sample, frames=np.zeros((0, 1, 1, 3), np.uint8), media=[]) for sample in samples]
    assert len(subject.generate(bare, "coarse_only", max_new_tokens=2)) == len(samples)
