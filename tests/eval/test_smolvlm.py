"""SmolVLM2, tiny and with random weights, asked the same items as ours, against transformers' own forward."""

import io
import json
from pathlib import Path

import jinja2
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, Idefics3VisionConfig, LlamaConfig, SmolVLMConfig, SmolVLMForConditionalGeneration
from transformers.models.smolvlm import processing_smolvlm

from benchmarks.gaze_forms import items as gaze_items
from fvlm_core.data.clips import encode_mp4
from fvlm_core.data.tokenizer import train_tokenizer
from fvlm_core.errors import UserError
from fvlm_core.eval.answerers.answerer import Ask, Condition
from fvlm_core.eval.answerers.smolvlm import FAKE, GLOBAL, IMAGE, MODE, TILE, TURN_END, OpenedForSmolVLM, SmolVLMAnswerer, _in_words
from fvlm_core.eval.checkpoints import open_checkpoint
from fvlm_core.eval.jobs import CheckpointJob
from fvlm_core.eval.media import Images, Media, Rendered, VideoFile
from fvlm_core.eval.parts.benchmarks import BenchmarksResult
from fvlm_core.eval.parts.latency import LatencyResult
from fvlm_core.serve.evaluate import evaluate_checkpoint

CPU = torch.device("cpu")
SIDE = 64
IMAGE_PROCESSOR = {  # the published one, with tiles of 64 px instead of 512
    "image_processor_type": "SmolVLMImageProcessor",
    "do_convert_rgb": True,
    "do_image_splitting": True,
    "do_normalize": True,
    "do_pad": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "max_image_size": {"longest_edge": SIDE},
    "resample": 1,
    "rescale_factor": 1 / 255,
    "size": {"longest_edge": 4 * SIDE},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as on the hub."""
    place = tmp_path_factory.mktemp("smolvlm") / "SmolVLM2-tiny"
    tokenizer = train_tokenizer([item.question for item in gaze_items(1)], 300)
    marks = [TILE.format(row=row, column=column) for row in range(1, 5) for column in range(1, 5)]
    tokenizer.add_special_tokens({"additional_special_tokens": [FAKE, GLOBAL, IMAGE, TURN_END, *marks]})
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
    (place / "preprocessor_config.json").write_text(json.dumps(IMAGE_PROCESSOR))
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
    intro = "You are provided the following series of three frames from a 0:00:03 [H:MM:SS] video.\n"
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
    assert list(gaze.conditions) == [f"question_after/{MODE}", f"question_first/{MODE}", f"shuffled/{MODE}", "blind"]
    assert gaze.main_order == "question_after"
    assert {gaze.conditions[name].order for name in (f"shuffled/{MODE}", "blind")} == {"question_after"}
    assert {one.a.split("/")[0] for one in gaze.differences if one.b in ("blind", f"shuffled/{MODE}")} == {"question_after"}
    assert (gaze.questions, results.tokens_per_frame, results.modes) == (9, 4, [])
    assert "# Evaluation of SmolVLM2-tiny" in (tmp_path / "tables.md").read_text()
    accuracy, first_token, answer = results.headline()
    assert [list(one.values) for one in (accuracy, first_token, answer)] == [[MODE]] * 3, "its one mode is in the table at the end"
    assert accuracy.values[MODE] == gaze.conditions[f"question_after/{MODE}"].headline
    latency = results.part(LatencyResult)
    assert latency is not None
    assert "question after, batch 1" in latency.tables()[0].note


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


def drawn(width: int, height: int, seed: int = 0) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def written(answerer: SmolVLMAnswerer, content: list[dict], parts: list[str]) -> list[int]:
    """The prompt that transformers' processor makes: its template, with its text for each image or video in place of the placeholders."""
    template = jinja2.Template(processing_smolvlm.DEFAULT_CHAT_TEMPLATE)
    text = template.render(messages=[{"role": "user", "content": content}], add_generation_prompt=True)
    for part in parts:
        text = text.replace("<image>" if "<video>" not in text else "<video>", part.replace("<image>", "<picture>"), 1)
    return answerer.encode(text.replace("<picture>", "<image>"))


@pytest.mark.parametrize("size", [(170, 220), (300, 60), (64, 64), (30, 41)], ids=str)
def test_an_image_is_split_and_prompted_as_by_transformers_own_processor(folder: Path, answerer: SmolVLMAnswerer, size: tuple[int, int]):
    """A page is read as 4 x 4 tiles and the whole, in its own proportions."""
    pages = [drawn(*size), drawn(120, 90, seed=1)]
    reference = AutoImageProcessor.from_pretrained(folder)([pages], return_row_col_info=True, return_tensors="pt")
    loaded = answerer.load_media(Images(tuple(map(png, pages))))
    pixels = torch.cat([loaded.tiles[index].pixels for index in range(2)])
    assert torch.equal(pixels, reference["pixel_values"][0])
    assert size != (170, 220) or loaded.tiles[0].pixels.shape == (17, 3, SIDE, SIDE)
    grids = list(zip(reference["rows"][0], reference["cols"][0], strict=True))
    parts = [processing_smolvlm.get_image_prompt_string(*grid, answerer.tokens_per_frame, FAKE, IMAGE, GLOBAL) for grid in grids]
    question, option = "Which is red?", "12 red"
    prompt = written(answerer, [{"type": "image"}, {"type": "image"}, {"type": "text", "text": question}], parts)
    opened = answerer.open(loaded, "m")
    assert isinstance(opened, OpenedForSmolVLM)
    assert opened._prompt(question, loaded, "question_after")[0] == prompt
    (reply,) = opened.replies([Ask(question, (option,))], Condition(MODE, "question_after"))
    tokens = answerer.encode(f" {option}")
    with torch.no_grad():
        logits = answerer.model(input_ids=torch.tensor([prompt + tokens]), pixel_values=reference["pixel_values"]).logits[0].log_softmax(-1)
    assert reply.sums[0, 0] == pytest.approx(sum(float(logits[len(prompt) - 1 + n, token]) for n, token in enumerate(tokens)), abs=1e-3)


def test_images_are_encoded_a_few_tiles_at_a_time(answerer: SmolVLMAnswerer, monkeypatch: pytest.MonkeyPatch):
    opened = answerer.open(answerer.load_media(Images(tuple(png(drawn(170, 220, seed)) for seed in range(3)))), "m")
    passes: list[int] = []
    encode = answerer.model.model.get_image_features
    monkeypatch.setattr(answerer.model.model, "get_image_features", lambda pixels: passes.append(pixels.shape[1]) or encode(pixels))
    for order in ("question_first", "question_after"):
        opened.replies([Ask("Which?", ("4",))], Condition(MODE, order))
    assert sum(passes) == 3 * 17, "once for both orders"
    assert max(passes) <= 16


def test_a_generated_image_is_split_and_a_video_of_one_frame_is_not(answerer: SmolVLMAnswerer, tmp_path: Path):
    square = np.asarray(drawn(SIDE, SIDE))
    assert list(answerer.load_media(Rendered("image", lambda side: square[None], image=True)).tiles) == [0]
    (tmp_path / "clip.mp4").write_bytes(encode_mp4(square[None]))
    assert answerer.load_media(VideoFile(tmp_path / "clip.mp4")).tiles == {}


@pytest.mark.parametrize(("seconds", "start_s", "end_s"), [(1, None, None), (5, None, None), (90, None, None), (90, 10.0, 85.0)])
def test_a_video_is_prompted_as_by_transformers_own_processor(
    answerer: SmolVLMAnswerer, tmp_path: Path, seconds: int, start_s: float | None, end_s: float | None
):
    """With the times at which its frames are shown, also if it is longer than 64 s."""
    (tmp_path / "clip.mp4").write_bytes(encode_mp4(np.zeros((seconds, 16, 16, 3), np.uint8)))
    source = VideoFile(tmp_path / "clip.mp4", start_s, end_s)
    loaded = answerer.load_media(source)
    length = seconds if end_s is None else int(end_s - (start_s or 0))
    times = [place * length / 64 for place in range(64)] if length > 64 else list(range(length))
    assert len(loaded.frames) == len(times)
    words = {1: "one", 5: "five", 64: "sixty-four"}[len(times)]
    text = processing_smolvlm.DEFAULT_VIDEO_INTRO.format(frame_count=words, video_duration=f"0:{length // 60:02d}:{length % 60:02d}")
    mark = processing_smolvlm.get_image_prompt_string(0, 0, answerer.tokens_per_frame, FAKE, IMAGE, GLOBAL)
    for time in times:
        stamp = f"{int(time // 60):02d}:{int(time % 60):02d}"
        text += processing_smolvlm.FRAME_TIMESTAMP_MESSAGE.format(timestamp=stamp) + mark
    text += processing_smolvlm.DEFAULT_MEDIA_OUTTRO
    prompt = written(answerer, [{"type": "video"}, {"type": "text", "text": "Which?"}], [text])
    assert answerer.open(loaded, "m")._prompt("Which?", loaded, "question_after")[0] == prompt


def test_numbers_in_words():
    assert [_in_words(number) for number in (0, 7, 13, 20, 21, 40, 99, 100)] == (
        ["zero", "seven", "thirteen", "twenty", "twenty-one", "forty", "ninety-nine", "100"]
    )
