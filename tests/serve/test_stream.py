"""A stream against the autoregressive mode over the whole clip."""

import numpy as np
import pytest
import torch
from PIL import Image

from fvlm_core.data.batch import Sample, Turn, pack
from fvlm_core.eval.stills import square
from fvlm_core.model.inference import generate, read_batch
from fvlm_core.serve.stream import FrameStream
from tests.model.build import CHAT, FRAME_PX, tiny_model

STOP = CHAT.assistant_close[:1]


def clip(frames: int) -> np.ndarray:
    return np.random.default_rng(frames).integers(0, 256, (frames, FRAME_PX, FRAME_PX, 3), dtype=np.uint8)


@pytest.mark.parametrize("query", ["deep", "shallow", "random"])
@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("task", [(), (21, 22)])
def test_stream_equals_the_autoregressive_mode(query, k, task):
    model = tiny_model(query=query, tokens_per_frame=k)
    frames = clip(7)
    stream = FrameStream(model, CHAT, task_ids=task, reserve=32)
    for frame in frames:
        stream.push(frame)
    asked = [31, 32, 33]
    media = [list(range(7))]
    whole = Sample("k", "s", frames, media, [Turn([*task] or asked, [])], bool(task))
    context = read_batch(model, pack([whole], CHAT, tokens_per_frame=k), "autoregressive")
    torch.testing.assert_close(torch.stack(stream.tokens), context.tokens)
    if not task:
        batch = pack([whole], CHAT, tokens_per_frame=k)
        assert stream.ask(asked, max_new_tokens=5) == generate(model, batch, "autoregressive", max_new_tokens=5, stop_ids=STOP)[0]


@pytest.mark.parametrize("size", [(FRAME_PX + 3, FRAME_PX + 3), (2 * FRAME_PX, 3 * FRAME_PX + 1), (FRAME_PX - 5, FRAME_PX), (480, 640)])
def test_frames_of_any_size_are_read_as_training_scales_and_crops_them(size):
    model = tiny_model()
    large = np.random.default_rng(0).integers(0, 256, (3, *size, 3), dtype=np.uint8)
    scaled, given = FrameStream(model, CHAT, reserve=32), FrameStream(model, CHAT, reserve=32)
    for number, frame in enumerate(large):
        scaled.push(square(Image.fromarray(frame), FRAME_PX))
        given.push(torch.from_numpy(frame) if number % 2 else frame)
    assert torch.equal(torch.stack(given.tokens), torch.stack(scaled.tokens))


@pytest.mark.parametrize("frame", [np.zeros((FRAME_PX, FRAME_PX), np.uint8), np.zeros((3, 5, 5), np.uint8), np.zeros((5, 5, 3))])
def test_what_is_no_frame_is_refused(frame):
    stream = FrameStream(tiny_model(), CHAT, reserve=32)
    with pytest.raises(ValueError, match=r"give uint8 \[H, W, 3\]"):
        stream.push(frame)
    assert stream.seen == 0


def test_a_question_leaves_no_trace():
    model = tiny_model()
    asked, silent = FrameStream(model, CHAT, reserve=99), FrameStream(model, CHAT, reserve=99)
    for frame in clip(6):
        first = asked.ask([40, 41])
        assert asked.ask([40, 41]) == first
        asked.push(frame)
        silent.push(frame)
    assert torch.equal(torch.stack(asked.tokens), torch.stack(silent.tokens))


def test_a_question_that_the_context_cannot_hold_is_refused():
    stream = FrameStream(tiny_model(), CHAT, context=40, reserve=20)
    for frame in clip(30):
        stream.push(frame)
    with pytest.raises(ValueError, match="larger reserve"):
        stream.ask([40] * 10, max_new_tokens=20)
    assert isinstance(stream.ask([40], max_new_tokens=2), list)


def test_the_cache_grows_with_the_frames_and_nothing_else_does():
    model = tiny_model()
    stream = FrameStream(model, CHAT, context=2000, reserve=10)
    for frame in clip(5).repeat(120, axis=0):
        stream.push(frame)
    assert stream.length == len(stream.head) + 600
    per_token = 2 * 2 * 2 * 12 * 8  # keys and values, layers, KV heads, head width, float64
    assert stream.cache.bytes <= 2 * stream.length * per_token


@pytest.mark.parametrize(("when_full", "kept"), [("slide", [6, 7, 8, 9, 10, 11]), ("thin", [0, 4, 7, 9, 10, 11])])
def test_a_full_context_forgets_as_asked_and_reads_on(when_full, kept):
    """Six frames fit; afterwards the stream is the same as one that only ever read the tokens it kept."""
    model = tiny_model()
    stream = FrameStream(model, CHAT, context=len(CHAT.system) + len(CHAT.user_open) + 6, reserve=0, when_full=when_full)
    frames = clip(12)
    history = []
    for frame in frames:
        stream.push(frame)
        history.append(stream.tokens[-1])
    assert stream.seen == 12
    assert stream.length <= stream.limit
    remembered = [next(n for n, token in enumerate(history) if token is kept_token) for kept_token in stream.tokens]
    assert remembered == kept
    fresh = FrameStream(model, CHAT, reserve=0)
    fresh.tokens = list(stream.tokens)
    fresh._reread()
    torch.testing.assert_close(fresh.hidden[-1], stream.hidden[-1])


def test_what_cannot_stream_is_refused():
    with pytest.raises(ValueError, match="no room for two frames"):
        FrameStream(tiny_model(), CHAT, context=9, reserve=5)
    with pytest.raises(ValueError, match="cannot stream"):
        FrameStream(tiny_model(query="pooled"), CHAT)
