"""The processor called as transformers' other processors are: with text that the template rendered, and with their options."""

import numpy as np
import pytest
import torch
from PIL import Image

from fvlm_core.data.clips import encode_mp4
from tests.release.test_conversations import TENSORS, TOKENIZER, clip, processor, text, user

VIDEOS = [clip(3), clip(2, 1), clip(4, 2)]
PICTURES = [clip(1, seed)[0] for seed in (3, 4)]


def video(number: int) -> dict:
    return {"type": "video", "video": VIDEOS[number]}


def image(number: int) -> dict:
    return {"type": "image", "image": PICTURES[number]}


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert torch.equal(found[name], wanted[name]), name


SYSTEM = {"role": "system", "content": "Be brief."}
CHATS = {
    "a video": [user(text("Which digit is it?"), video(0))],
    "the video first": [user(video(0), text("Which digit is it?"))],
    "two videos and a picture": [user(video(1), text("Are "), image(0), text("they the same as "), video(0), text("?"))],
    "several turns": [SYSTEM, user(image(1), text("What?")), {"role": "assistant", "content": "A 5."}, user(video(2), text("And here?"))],
    "text alone": [user(text("What is 2 plus 3?"))],
}


def media(chats: list[list[dict]], kind: str) -> list:
    parts = [part for chat in chats for message in chat for part in message["content"] if isinstance(part, dict)]
    return [part[kind] for part in parts if part["type"] == kind]


@pytest.mark.parametrize("end", [{"add_generation_prompt": True}, {"continue_final_message": True}, {}], ids=str)
@pytest.mark.parametrize("name", CHATS)
def test_rendered_text_makes_the_tensors_of_its_conversation(name, end):
    chat = CHATS[name] + [{"role": "assistant", "content": "A red"}] * ("continue_final_message" in end)
    rendered = processor().apply_chat_template(chat, **end)
    wanted = processor().apply_chat_template(chat, **end, **TENSORS)
    videos, images = media([chat], "video") or None, media([chat], "image") or None
    assert_same(processor()(text=[rendered], videos=videos, images=images, return_tensors="pt", padding=True), wanted)
    assert_same(processor()(text=rendered, videos=videos, images=images), wanted)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_of_rendered_texts_takes_media_flat_or_per_text(side):
    chats = list(CHATS.values())
    rendered = processor().apply_chat_template(chats, add_generation_prompt=True)
    wanted = processor().apply_chat_template(chats, add_generation_prompt=True, padding_side=side, **TENSORS)
    flat = {"videos": media(chats, "video"), "images": media(chats, "image")}
    nested = {kind: [media([chat], kind.removesuffix("s")) for chat in chats] for kind in flat}
    for given in (flat, nested):
        assert_same(processor()(text=rendered, **given, padding_side=side), wanted)


def test_rendered_text_takes_a_path_a_single_medium_and_a_list_of_pictures(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(encode_mp4(VIDEOS[0].repeat(2, axis=1).repeat(2, axis=2)))
    for shown in (str(path), path, [Image.fromarray(frame) for frame in VIDEOS[0]], torch.from_numpy(VIDEOS[0])):
        chat = [user(text("Which digit is it?"), {"type": "video", "video": shown})]
        wanted = processor().apply_chat_template(chat, add_generation_prompt=True, **TENSORS)
        rendered = processor().apply_chat_template(chat, add_generation_prompt=True)
        for given in (shown, [shown], [[shown]]):
            assert_same(processor()(text=[rendered], videos=given), wanted)


@pytest.mark.parametrize(
    ("name", "arguments", "why"),
    [
        ("a video", {}, "the text: 1 <video> in the rendered text, but 0 videos given: give one per <video>"),
        ("a video", {"videos": VIDEOS[:2]}, "1 <video> in the rendered text, but 2 videos"),
        ("text alone", {"images": PICTURES[0]}, "0 <image> in the rendered text, but 1 images"),
        ("a video", {"videos": VIDEOS[:1], "answers": ["5"]}, "rendered text contains its answers"),
    ],
)
def test_media_that_do_not_match_the_placeholders_are_refused(name, arguments, why):
    rendered = processor().apply_chat_template(CHATS[name], add_generation_prompt=True)
    with pytest.raises(ValueError, match=why):
        processor()(text=[rendered], **arguments)


def test_media_of_another_text_of_the_batch_are_refused():
    chats = [CHATS["a video"], CHATS["text alone"]]
    rendered = processor().apply_chat_template(chats, add_generation_prompt=True)
    with pytest.raises(ValueError, match="text 0: 1 <video> in the rendered text, but 0 videos"):
        processor()(text=rendered, videos=[[], [VIDEOS[0]]])


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("<|im_start|>user\nWhat?<|im_end|>\n", "begins with '<|im_start|>system"),
        ("<|im_start|>system\nx<|im_end|>\n<|im_start|>robot\nx<|im_end|>\n", "breaks at '<|im_start|>robot"),
        ("<|im_start|>system\nx<|im_start|>user\nx<|im_end|>\n", "breaks at '<|im_start|>user"),
    ],
)
def test_text_of_another_template_is_refused(words, why):
    with pytest.raises(ValueError, match=why.replace("|", r"\|")):
        processor()(text=words)


def test_a_bare_question_is_asked_as_it_was():
    wanted = processor().apply_chat_template([user(text("What <video>?"), video(0))], add_generation_prompt=True, **TENSORS)
    assert_same(processor()(text="What <video>?", videos=VIDEOS[0]), wanted)
    assert (wanted["input_ids"] == TOKENIZER.convert_tokens_to_ids("<|im_start|>")).sum() == 3


@pytest.fixture
def grey_clip(tmp_path):
    """Eight seconds, one picture each, brighter every second."""
    path = tmp_path / "clip.mp4"
    path.write_bytes(encode_mp4(np.full((8, 28, 28, 3), 1, np.uint8) * np.arange(0, 240, 30, dtype=np.uint8)[:, None, None, None]))
    return path


@pytest.mark.parametrize(
    ("options", "seconds"),
    [
        ({}, [0, 1.6, 3.2, 4.8, 6.4]),
        ({"max_frames": 64}, range(8)),
        ({"fps": 0.5}, [0, 2, 4, 6]),
        ({"fps": 2, "max_frames": 64}, np.arange(0, 8, 0.5)),
        ({"num_frames": 2}, [0, 4]),
        ({"num_frames": 3, "do_sample_frames": True}, [0, 8 / 3, 16 / 3]),
        ({"num_frames": 6}, np.arange(6) * 8 / 6),
        ({"num_frames": 6, "max_frames": 2}, [0, 4]),
    ],
    ids=str,
)
def test_frames_are_chosen_per_call(grey_clip, options, seconds):
    shown = [int(second + 1e-6) for second in seconds]
    pictures = np.full((8, 28, 28, 3), 1, np.uint8) * np.arange(8, dtype=np.uint8)[:, None, None, None]
    for given, scale in ((grey_clip, 30), (pictures, 1)):
        chat = [user(text("What?"), {"type": "video", "video": given})]
        called = processor()(text="What?", videos=given, **options)
        assert (called["frames"][:, 7, 7, 1].float() / scale).round().tolist() == shown
        assert_same(processor().apply_chat_template(chat, add_generation_prompt=True, **TENSORS, **options), called)
        assert_same(processor().apply_chat_template(chat, add_generation_prompt=True, **TENSORS, processor_kwargs=options), called)
        assert_same(processor()(text="What?", videos=given, videos_kwargs=options), called)


@pytest.mark.parametrize(
    ("options", "error", "why"),
    [
        ({"do_sample_frames": False}, ValueError, "do_sample_frames=False is not supported"),
        ({"truncation": True}, ValueError, "truncation=True is not supported"),
        ({"max_length": 5}, ValueError, "max_length=5 is not supported"),
        ({"padding": "max_length"}, ValueError, "padding='max_length'"),
        ({"return_tensors": "np"}, ValueError, "return_tensors='np'"),
        ({"num_frame": 2}, TypeError, "no option 'num_frame': it supports fps, num_frames, max_frames"),
        ({"processor_kwargs": {"size": 224}}, TypeError, "no option 'size'"),
        ({"fps": 2, "num_frames": 3}, ValueError, "exclude each other"),
        ({"text_kwargs": {"padding_side": "left"}}, TypeError, "padding_side is an argument of its own"),
        ({"num_frames": 0}, ValueError, "num_frames is 0"),
        ({"max_frames": 2.5}, ValueError, "max_frames is 2.5"),
        ({"fps": -1}, ValueError, "fps is -1"),
        ({"padding_side": "middle"}, ValueError, "padding_side is 'middle'"),
    ],
    ids=str,
)
def test_options_that_would_be_ignored_are_refused(options, error, why):
    with pytest.raises(error, match=why):
        processor()(text="What?", videos=VIDEOS[0], **options)
    with pytest.raises(error, match=why):
        processor().apply_chat_template(CHATS["a video"], **{**TENSORS, **options})


def test_another_template_is_for_text_only():
    own = processor().chat_template
    with pytest.raises(ValueError, match="leave chat_template out"):
        processor().apply_chat_template(CHATS["a video"], "{{ messages }}", **TENSORS)
    assert_same(
        processor().apply_chat_template(CHATS["a video"], own, **TENSORS), processor().apply_chat_template(CHATS["a video"], **TENSORS)
    )
