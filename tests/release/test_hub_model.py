"""The released wrapper in this process: its batches, answers, gaze and training equal the project's own."""

from dataclasses import fields
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig

from fvlm_core.config import Recipe
from fvlm_core.data.batch import IGNORE, ChatFormat, PackedBatch, Sample, Turn, pack
from fvlm_core.data.clips import encode_mp4
from fvlm_core.data.loader import val_batches
from fvlm_core.data.shard_set import ShardSet
from fvlm_core.data.tokenizer import chat_format
from fvlm_core.model.attention import PackedLayout
from fvlm_core.model.build import load_model
from fvlm_core.model.inference import gaze, generate, token_losses
from fvlm_core.release.hub.modeling_fvlm import FVLMModel
from fvlm_core.release.hub.padded import packed_batch
from fvlm_core.release.hub.processing_fvlm import FVLMProcessor
from fvlm_core.release.hub_folder import configuration
from fvlm_core.release.verify import padded_inputs
from tests.release.build import run, shards


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    shards(root / "shards")
    run(root / "run", root / "shards")
    return root


@pytest.fixture(scope="module")
def ours(folder):
    return load_model(folder / "run" / "model").eval()


@pytest.fixture(scope="module")
def wrapped(folder, ours) -> FVLMModel:
    recipe = Recipe.from_yaml(folder / "run" / "recipe.yaml")
    model = FVLMModel(configuration(ours, recipe)).eval()
    model.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=2)
    model.model.load_state_dict(ours.state_dict())
    return model


@pytest.fixture(scope="module")
def processor(folder) -> FVLMProcessor:
    tokenizer = AutoTokenizer.from_pretrained(str(folder / "run" / "model"))
    return FVLMProcessor(tokenizer, frame_px=42, max_frames=4, image_repeats=3)


@pytest.fixture(scope="module")
def batches(folder) -> list[PackedBatch]:
    recipe = Recipe.from_yaml(folder / "run" / "recipe.yaml")
    return list(val_batches(ShardSet(folder / "shards"), 9, recipe.data, tokens_per_frame=1, batch_samples=4))


def labels_of(batch: PackedBatch) -> Tensor:
    """A packed batch's labels as transformers has them: the tokens themselves, in padded rows."""
    rows = torch.full((batch.n_samples, max(batch.lengths)), IGNORE)
    for row, labels in zip(rows, batch.labels.split(batch.lengths), strict=True):
        row[len(row) - len(labels) + 1 :] = labels[:-1]
    return rows


def padded_on_the_right(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same rows with their padding on the other side."""
    lengths = inputs["attention_mask"].sum(1).tolist()
    return {
        name: values if name == "frames" else torch.stack([row.roll(length) for row, length in zip(values, lengths, strict=True)])
        for name, values in inputs.items()
    }


@pytest.mark.parametrize("right", [False, True])
def test_padded_batches_are_the_loaders(batches, right):
    assert any(len(group.shown[0]) > 1 for batch in batches for group in batch.showings)  # images shown often
    assert any(0 in batch.shown_counts for batch in batches)  # text only
    for batch in batches:
        inputs = padded_inputs(batch, placeholder=5) | {"labels": labels_of(batch)}
        rebuilt = packed_batch(**(padded_on_the_right(inputs) if right else inputs), tokens_per_frame=1)
        for one in fields(PackedBatch):
            if one.name in ("keys", "sources"):
                continue
            found, wanted = getattr(rebuilt, one.name), getattr(batch, one.name)
            if isinstance(wanted, Tensor):
                assert torch.equal(found, wanted), one.name
            elif one.name == "showings":
                assert [(g.frames.tolist(), g.shown.tolist()) for g in found] == [(g.frames.tolist(), g.shown.tolist()) for g in wanted]
            elif isinstance(wanted, np.ndarray):
                assert found.tolist() == wanted.tolist(), one.name
            else:
                assert found == wanted, one.name


def test_frames_of_several_tokens_need_all_of_them(batches):
    inputs = padded_inputs(batches[0])
    with pytest.raises(ValueError, match="tokens of frames, but 64 per frame"):
        packed_batch(**inputs, tokens_per_frame=64)


def test_training_loss_is_the_trainers(batches, wrapped, ours, folder):
    recipe = Recipe.from_yaml(folder / "run" / "recipe.yaml")
    batch = batches[0]
    inputs = padded_inputs(batch) | {"labels": labels_of(batch)}
    try:
        loss = wrapped.train()(**inputs).loss
        half = wrapped(**inputs, num_items_in_batch=2 * batch.n_labels).loss
    finally:
        wrapped.eval()
    torch.testing.assert_close(loss, ours.train()(batch, recipe.loss).objective / batch.n_labels)
    torch.testing.assert_close(half * 2, loss)
    ours.eval()
    loss.backward()
    assert wrapped.model.connector.q_static.grad is not None
    torch.testing.assert_close(wrapped(**inputs, mode="fine").loss, token_losses(ours, batch, "coarse_fine").mean())


def test_saved_and_loaded_again(wrapped, batches, tmp_path):
    """Same logits, and weights aligned wherever they lay in the file."""
    wrapped.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    content = weights.read_bytes()
    size = int.from_bytes(content[:8], "little")
    padding = (24 - 8 - size) % 64 or 64  # tensors now start 24 bytes past a cache line
    weights.write_bytes((size + padding).to_bytes(8, "little") + content[8 : 8 + size] + b" " * padding + content[8 + size :])
    again = FVLMModel.from_pretrained(tmp_path)
    assert all(parameter.data_ptr() % 64 == 0 for parameter in again.parameters())
    assert again.model.llm.lm_head.weight is again.model.llm.model.embed_tokens.weight
    inputs = padded_inputs(batches[0])
    with torch.no_grad():
        for mode in wrapped.modes:
            assert torch.equal(again(**inputs, mode=mode).logits, wrapped(**inputs, mode=mode).logits)


def test_the_padding_tokens_embedding_learns_in_fine_tuning(ours, folder, tmp_path):
    """With SmolLM2's configuration, whose padding token is the end-of-turn token; as loaded from a released folder."""
    config = configuration(ours, Recipe.from_yaml(folder / "run" / "recipe.yaml"))
    config.text_config.pad_token_id = 2
    FVLMModel(config).save_pretrained(tmp_path)
    model = FVLMModel.from_pretrained(tmp_path).train()
    batch = pack([Sample("k", "s", np.zeros((0, 42, 42, 3), np.uint8), [], [Turn([2, 5], [6, 7])])], ChatFormat([1], [3], [4], [8], [9]))
    model(**padded_inputs(batch), labels=labels_of(batch)).loss.backward()
    llm = model.model.llm
    table = llm.model.embed_tokens.weight.detach().clone().requires_grad_()
    hidden = model.model.run_llm(F.embedding(batch.input_ids, table), batch.position_ids, PackedLayout(batch.lengths))
    F.cross_entropy(F.linear(hidden, table), batch.labels, ignore_index=IGNORE).backward()
    assert (batch.input_ids == 2).sum() == 1
    torch.testing.assert_close(llm.model.embed_tokens.weight.grad, table.grad, atol=1e-5, rtol=1e-4)


def test_answers_equal_our_generation(wrapped, ours, processor):
    rng = np.random.default_rng(0)
    videos = [rng.integers(0, 256, (frames, 42, 42, 3), dtype=np.uint8) for frames in (3, 2)]
    questions = ["Which digits?", " Describe the centre of the video. "]
    inputs = processor(text=questions, videos=videos)
    for mode in wrapped.modes:
        tokens = wrapped.generate(**inputs, mode=mode, max_new_tokens=5)[:, inputs["input_ids"].shape[1] :]
        batch = packed_batch(**inputs, tokens_per_frame=1)
        expected = generate(ours, batch, mode, max_new_tokens=5, stop_ids=[2])
        assert [row[: len(answer)].tolist() for row, answer in zip(tokens, expected, strict=True)] == expected
        assert tokens.shape == (2, max(len(answer) + (len(answer) < 5) for answer in expected))  # with the token that ends it
    wrapped.processor = processor  # as loaded from the folder
    alone = processor(text=questions[0], videos=videos[0])
    (expected,) = generate(ours, packed_batch(**alone, tokens_per_frame=1), "coarse_fine", max_new_tokens=5, stop_ids=[2])
    assert wrapped.answer(videos[0], questions[0], max_new_tokens=5) == processor.decode(expected, skip_special_tokens=True).strip()
    torch.testing.assert_close(wrapped.gaze(videos[0], questions[0]), gaze(ours, packed_batch(**alone, tokens_per_frame=1), "coarse_fine"))


def test_inputs_are_the_loaders(folder, processor):
    """A question and a clip from the shards become what the loader makes of them, in both orders, with and without an answer."""
    loader = ShardSet(folder / "shards")
    row = int(loader.rows("val", "gaze_cell").index[0])
    turn = loader.record(row)["conversations"][0][0]
    for question_first in (True, False):
        sample = loader.read(row, image_repeats=1, question_first=question_first)
        made = processor(text=turn["question"], videos=sample.frames, answers=turn["answer"], question_first=question_first)
        wanted = pack([sample], chat_format(processor.tokenizer))
        rebuilt = packed_batch(**made, tokens_per_frame=1)
        for name in ("frames", "input_ids", "position_ids", "shown_frames", "visual_positions", "query_sources", "labels"):
            assert torch.equal(getattr(rebuilt, name), getattr(wanted, name)), name
        sample.turns[0] = Turn(sample.turns[0].question_ids, [])
        made = processor(text=turn["question"], videos=sample.frames, question_first=question_first)
        assert "labels" not in made
        assert torch.equal(packed_batch(**made, tokens_per_frame=1).input_ids, pack([sample], chat_format(processor.tokenizer)).input_ids)


def test_every_kind_of_video(processor, tmp_path):
    frames = np.repeat(np.arange(6, dtype=np.uint8)[:, None, None, None] * 40, 48, axis=1).repeat(64, axis=2).repeat(3, axis=3)
    path = tmp_path / "clip.mp4"
    path.write_bytes(encode_mp4(frames))
    with av.open(str(path)) as container:
        assert container.duration == 6_000_000
    arrays, pictures, file = (processor.frames(video) for video in (frames, [Image.fromarray(frame) for frame in frames], path))
    assert arrays.shape == file.shape == (4, 42, 42, 3)  # at most four frames, evenly spaced
    np.testing.assert_array_equal(arrays, pictures)
    assert arrays[:, 0, 0, 0].tolist() == [0, 40, 120, 160]
    assert np.abs(processor.frames(str(path))[0].astype(int) - arrays[0]).max() < 6


def test_images_and_text(processor):
    picture = np.full((42, 42, 3), 7, np.uint8)
    inputs = processor(text="What is it?", images=picture)
    assert inputs["frames"].shape == (1, 42, 42, 3)
    assert inputs["frame_ids"][inputs["frame_ids"] >= 0].tolist() == [0, 0, 0]
    for same in ([picture], [[picture]], torch.from_numpy(picture).to(torch.int64), torch.full((42, 42, 3), 7 / 255, dtype=torch.bfloat16)):
        assert torch.equal(processor(text="What is it?", images=same)["frames"], inputs["frames"])
    alone = processor(text="What is 2 plus 3?")
    assert (alone["frame_ids"] < 0).all()
    assert len(alone["frames"]) == 0


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"text": ""}, "give a question"),
        ({"text": ["a", "b"], "videos": [np.zeros((1, 42, 42, 3), np.uint8)]}, "2 questions, but 1 videos"),
        ({"text": ["a"], "answers": ["b", "c"]}, "1 questions, but 2 answers"),
        ({"text": "a", "images": [np.zeros((9, 9, 3), np.uint8)] * 2}, "2 pictures for a question"),
        ({"text": "a", "images": np.full((9, 9, 3), 200.0)}, "floats up to 200"),
        ({"text": "a", "images": np.full((9, 9, 3), -1)}, "whole numbers from -1"),
        ({"text": "a", "videos": []}, "a video without pictures"),
    ],
)
def test_unusable_inputs_are_named(processor, arguments, why):
    with pytest.raises(ValueError, match=why):
        processor(**arguments)


def test_a_pinned_revision_has_its_own_processor(wrapped, monkeypatch):
    asked = {}
    monkeypatch.setattr("fvlm_core.release.hub.modeling_fvlm.AutoProcessor.from_pretrained", lambda name, **options: asked.update(options))
    monkeypatch.setattr(wrapped.config, "_commit_hash", "c" * 40, raising=False)
    FVLMModel.processor.func(wrapped)
    assert asked == {"trust_remote_code": True, "revision": "c" * 40, "code_revision": "c" * 40}
