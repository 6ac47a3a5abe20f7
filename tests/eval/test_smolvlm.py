"""SmolVLM2, tiny and with random weights, asked the same items as ours, against transformers' own forward."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Idefics3VisionConfig, LlamaConfig, SmolVLMConfig, SmolVLMForConditionalGeneration

from benchmarks.gaze_forms import items as gaze_items
from fvlm_core.data.tokenizer import train_tokenizer
from fvlm_core.errors import UserError
from fvlm_core.eval.answerers.answerer import Ask, Condition
from fvlm_core.eval.answerers.smolvlm import FAKE, GLOBAL, IMAGE, MODE, TURN_END, SmolVLMAnswerer
from fvlm_core.eval.checkpoints import open_checkpoint
from fvlm_core.eval.jobs import CheckpointJob
from fvlm_core.eval.media import Media
from fvlm_core.eval.parts.benchmarks import BenchmarksResult
from fvlm_core.serve.evaluate import evaluate_checkpoint

CPU = torch.device("cpu")
SIDE = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as on the hub."""
    place = tmp_path_factory.mktemp("smolvlm") / "SmolVLM2-tiny"
    tokenizer = train_tokenizer([item.question for item in gaze_items(1)], 300)
    tokenizer.add_special_tokens({"additional_special_tokens": [FAKE, GLOBAL, IMAGE, TURN_END]})
    tokenizer.save_pretrained(place)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = SmolVLMConfig(
        text_config=LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=1, initializer_range=0.2, **shape).to_dict(),
        vision_config=Idefics3VisionConfig(image_size=SIDE, patch_size=16, **shape).to_dict(),
        scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
    )
    SmolVLMForConditionalGeneration(config).save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def answerer(folder: Path) -> SmolVLMAnswerer:
    opened = open_checkpoint(folder, CPU)
    assert isinstance(opened, SmolVLMAnswerer)
    return opened


def media(frames: int = 3) -> Media:
    return Media(np.random.default_rng(0).integers(0, 256, (frames, SIDE, SIDE, 3), dtype=np.uint8), [list(range(frames))])


def test_likelihoods_are_those_of_transformers_forward(answerer: SmolVLMAnswerer):
    """One forward of prompt and option with pixels, as its processor would give them."""
    shown, question, option = media(), "Which digits are at the top left?", "12 red"
    (reply,) = answerer.open(shown, "m").replies([Ask(question, (option, "9"))], Condition(MODE, "question_after"))
    mark = f"{FAKE}{GLOBAL}{IMAGE * answerer.tokens_per_frame}{FAKE}"
    frames = "".join(f"\nFrame from 00:0{second}:{mark}" for second in range(3))
    intro = "You are provided the following series of 3 frames from a 0:00:03 [H:MM:SS] video.\n"
    prompt = answerer.encode(f"<|im_start|>User: {intro}{frames}\n\n{question}{TURN_END}\nAssistant:")
    tokens = [*answerer.encode(f" {option}"), answerer.encode(TURN_END)[0]]
    pixels = torch.from_numpy(shown.frames).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        logits = answerer.model(input_ids=torch.tensor([prompt + tokens]), pixel_values=pixels[None]).logits[0].float().log_softmax(-1)
    each = [float(logits[len(prompt) - 1 + place, token]) for place, token in enumerate(tokens)]
    assert reply.sums[0] == pytest.approx([sum(each[:-1]), len(tokens) - 1, each[-1]], abs=1e-3)


def test_the_cache_is_left_as_it_was_after_each_option(answerer: SmolVLMAnswerer):
    opened = answerer.open(media(), "m")
    both = opened.replies([Ask("Which?", ("one two three", "4"), max_new_tokens=4)], Condition(MODE))[0]
    alone = opened.replies([Ask("Which?", ("4",), max_new_tokens=4)], Condition(MODE))[0]
    assert both.sums[1] == pytest.approx(alone.sums[0], abs=1e-4)
    assert both.said == alone.said


def test_a_frame_costs_as_many_tokens_as_its_configuration_says(answerer: SmolVLMAnswerer):
    assert answerer.tokens_per_frame == (SIDE // 16) ** 2 // 4


def test_it_runs_through_the_same_items_as_ours(folder: Path, tmp_path: Path):
    job = CheckpointJob.model_validate(
        {"output": tmp_path, "checkpoint": folder, "benchmarks": {"run": ["gaze"], "limit": 9}, "resamples": 50, "device": "cpu"}
    )
    results = evaluate_checkpoint(job)
    assert results is not None
    part = results.part(BenchmarksResult)
    assert part is not None
    gaze = part.benchmarks["gaze"]
    assert list(gaze.conditions) == [f"question_first/{MODE}", f"question_after/{MODE}", f"shuffled/{MODE}", "blind"]
    assert (gaze.questions, results.tokens_per_frame, results.modes) == (9, 4, [])
    assert "# Evaluation of SmolVLM2-tiny" in (tmp_path / "tables.md").read_text()
    accuracy, first_token, answer = results.headline()
    assert [list(one.values) for one in (accuracy, first_token, answer)] == [[MODE]] * 3, "its one mode is in the table at the end"
    assert accuracy.values[MODE] == gaze.conditions[f"question_first/{MODE}"].headline


def test_its_folder_has_to_be_complete(folder: Path, tmp_path: Path):
    job = {"output": tmp_path / "drawn", "checkpoint": folder, "resamples": 50, "device": "cpu"}
    asked = {"run": ["gaze"], "limit": 9, "ask": {"generation": {"method": "sample"}}}
    with pytest.raises(UserError, match="does not generate by sample"):
        evaluate_checkpoint(CheckpointJob.model_validate(job | {"benchmarks": asked}))
    with pytest.raises(UserError, match="SmolVLM2 has no mode coarse_fine"):
        open_checkpoint(folder, CPU).conditions(["question_first"], ["coarse_fine"], controls=False)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(UserError, match="the SmolVLM2 folder does not load"):
        open_checkpoint(tmp_path, CPU)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_vl"}')
    with pytest.raises(UserError, match="a checkpoint of another architecture: qwen2_vl"):
        open_checkpoint(tmp_path, CPU)
    with pytest.raises(UserError, match="there is no checkpoint"):
        open_checkpoint(tmp_path / "none", CPU)
