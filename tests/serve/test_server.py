"""The server through OpenAI's own client and over plain HTTP: answers equal to single use, limits, refusals, and it lives on."""

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import httpx
import numpy as np
import pytest
from PIL import Image

from benchmarks.bad_uploads import bad_uploads
from benchmarks.chat_server import about, data_url, running
from fvlm_core.data.batch import Sample, Turn
from fvlm_core.serve import app as app_module
from fvlm_core.serve.app import create_app
from fvlm_core.serve.batched_decoding import DecodingBatch, Sampling
from fvlm_core.serve.chat_request import ChatRequest, ModelInput, to_model_input
from fvlm_core.serve.engine import Engine, Event, Failed, Progress, Request
from fvlm_core.serve.limits import Limits, RequestRejectedError
from fvlm_core.serve.session import Session, gaze, open_media
from tests.serve.conftest import LIMITS


@pytest.fixture(scope="module")
def address(answerer) -> Iterator[str]:
    with running(create_app(answerer, LIMITS)) as url:
        yield url


@pytest.fixture(scope="module")
def openai_client() -> type:
    from openai import OpenAI  # a second in every process that only collects tests

    return OpenAI


@pytest.fixture(scope="module")
def client(address, openai_client):
    return openai_client(base_url=f"{address}/v1", api_key="none", max_retries=0)


def alone(root, answerer, question: str, *, mode=None, first: bool = False, most: int = 12) -> str:
    session = Session(answerer, open_media(root / "clip.mp4", answerer))
    return "".join(session.ask(question, mode=mode, question_first=first, sampling=Sampling(most)))


def test_the_openai_client_gets_the_answer_of_single_use(client, answerer, root, url):
    assert [model.id for model in client.models.list()] == [answerer.name]
    for first in (False, True):
        answer = client.chat.completions.create(model=answerer.name, messages=about(url, "Which digits?", first=first), max_tokens=12)
        assert answer.choices[0].message.content == alone(root, answerer, "Which digits?", first=first)
        assert answer.choices[0].finish_reason in ("stop", "length")
        assert answer.usage.completion_tokens <= 12 < answer.usage.prompt_tokens
    modes = {
        mode: client.chat.completions.create(
            model=answerer.name, messages=about(url, "Which digits?"), max_tokens=12, extra_body={"mode": mode}
        )
        for mode in ("coarse_only", "autoregressive")
    }
    for mode, answer in modes.items():
        assert answer.choices[0].message.content == alone(root, answerer, "Which digits?", mode=mode)


def test_streamed_it_is_the_same_with_usage_and_gaze(client, answerer, root, url):
    chunks = list(
        client.chat.completions.create(
            model=answerer.name,
            messages=about(url, "Which digits?", first=True),
            max_tokens=12,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"gaze": True},
        )
    )
    said = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(said) == alone(root, answerer, "Which digits?", first=True)
    assert sum(map(bool, said)) > 2
    assert chunks[-1].usage.total_tokens > 12
    assert chunks[-2].choices[0].finish_reason in ("stop", "length")
    looked = chunks[0].model_extra["fvlm"]
    expected = gaze(Session(answerer, open_media(root / "clip.mp4", answerer)), "Which digits?")
    np.testing.assert_allclose(looked["gaze"], expected.fine, atol=1e-5)
    assert len(looked["frames"]) == len(looked["entropy"]) == 5


def test_a_conversation_goes_on(client, answerer, root, url):
    session = Session(answerer, open_media(root / "clip.mp4", answerer))
    messages, first = about(url, "Which digits?"), "".join(session.ask("Which digits?", sampling=Sampling(6)))
    session.turns[-1] = Turn(session.turns[-1].question_ids, answerer.subject.encode(first))  # the text, as a client has it
    expected = "".join(session.ask("Why?", sampling=Sampling(6)))
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "Why?"}]
    said = client.chat.completions.create(model=answerer.name, messages=messages, max_tokens=6).choices[0].message.content
    assert said == expected.strip()
    brief = [{"role": "system", "content": "Be brief."}, *messages]
    plain, other = (client.chat.completions.create(model=answerer.name, messages=one, max_tokens=6).usage for one in (messages, brief))
    assert other.prompt_tokens != plain.prompt_tokens


def test_a_stop_text_ends_the_answer(client, answerer, root, url):
    whole = alone(root, answerer, "Which digits?")
    stop = whole[4:6]
    answer = client.chat.completions.create(
        model=answerer.name, messages=about(url, "Which digits?"), max_tokens=12, stop=stop, stream=True
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in answer) == whole[: whole.index(stop)]


def test_a_stop_text_at_the_beginning_of_the_answer_is_found(client, answerer, root, url):
    whole = alone(root, answerer, "Which digits?")
    for length in range(4, 12):
        answer = client.chat.completions.create(
            model=answerer.name, messages=about(url, "Which digits?"), max_tokens=12, stop=whole[:length]
        )
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("", "stop")


def test_fields_that_ask_for_nothing_change_nothing(address, answerer, root, url):
    body = {"model": answerer.name, "messages": about(url, "Which digits?"), "max_tokens": 12}
    body |= {"frequency_penalty": 0, "presence_penalty": 0.0, "min_p": 0, "top_k": -1, "repetition_penalty": 1.0}
    nulls = ("seed", "temperature", "top_p", "n", "stream", "stream_options", "stop", "max_completion_tokens", "gaze", "mode", "logprobs")
    for more in ({"temperature": 1e-40, "seed": 2**64 - 1}, dict.fromkeys(nulls)):
        answer = httpx.post(f"{address}/v1/chat/completions", json=body | more)
        assert answer.json()["choices"][0]["message"]["content"] == alone(root, answerer, "Which digits?")


def test_more_frames_than_are_encoded_together_are_refused(answerer):
    part = {"type": "video_url", "video_url": "data:,"}
    body = {"model": "m", "messages": [{"role": "user", "content": [part, part, {"type": "text", "text": "?"}]}], "max_tokens": 4}
    frames = np.zeros((5, 42, 42, 3), np.uint8)
    assert len(to_model_input(ChatRequest.model_validate(body), answerer, Limits(frames_at_once=10), lambda *_: frames).sample.frames) == 10
    with pytest.raises(RequestRejectedError, match="10 frames; this server takes 9 in a request"):
        to_model_input(ChatRequest.model_validate(body), answerer, Limits(frames_at_once=9), lambda *_: frames)


@pytest.mark.parametrize("turns", [1, 12])
def test_what_fills_the_context_is_taken_and_a_token_more_is_not(answerer, turns):
    messages = [{"role": role, "content": "2"} for _ in range(turns) for role in ("user", "assistant")][:-1]

    def asked(most: int) -> ModelInput:
        request = ChatRequest.model_validate({"model": "m", "messages": messages, "max_tokens": most})
        return to_model_input(request, answerer, Limits(), lambda *_: np.zeros(0))

    prompt = answerer.subject.pack([asked(1).sample]).lengths[0]
    room = answerer.subject.model.llm.config.max_position_embeddings - prompt
    assert asked(room).sampling.max_new_tokens == room
    with pytest.raises(RequestRejectedError, match="the model's context has"):
        asked(room + 1)


def test_many_clients_at_once_get_what_they_get_alone(client, answerer, root, url):
    questions = [f"Which digits, {'please, ' * n}?" for n in range(8)]
    firsts = [bool(n % 3) for n in range(8)]

    def ask(n: int) -> str:
        messages = about(url, questions[n], first=firsts[n])
        return client.chat.completions.create(model=answerer.name, messages=messages, max_tokens=4 + n).choices[0].message.content

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(ask, range(8)))
    assert together == [
        alone(root, answerer, question, first=first, most=4 + n) for n, (question, first) in enumerate(zip(questions, firsts, strict=True))
    ]


def test_pictures_and_several_media(client, answerer, url):
    buffer = BytesIO()
    Image.new("RGB", (80, 60), (200, 30, 30)).save(buffer, "PNG")
    picture = {"type": "image_url", "image_url": {"url": data_url(buffer.getvalue(), "image/png")}}
    video = {"type": "video_url", "video_url": {"url": url}}
    messages = [{"role": "user", "content": [video, picture, {"type": "text", "text": "Which?"}]}]
    answer = client.chat.completions.create(model=answerer.name, messages=messages, max_tokens=4, extra_body={"gaze": True})
    assert len(answer.model_extra["fvlm"]["frames"]) == 5 + answerer.image_repeats


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "other"}, "no model 'other'"),
        ({"mode": "blind"}, "no mode 'blind'"),
        ({"tools": [{"type": "function"}]}, "tools is not supported"),
        ({"frequency_penalty": 0.5}, "frequency_penalty is not supported"),
        ({"top_k": 5}, "top_k is not supported"),
        ({"repetition_penalty": 1.1}, "repetition_penalty is not supported"),
        ({"seed": 2**64}, "seed: Input should be less than 18446744073709551616"),
        ({"n": 2}, "n: "),
        ({"max_tokens": 1000}, "at most 64"),
        ({"temperature": -1}, "temperature: "),
        ({"stop": ["a"] * 5}, "stop must be"),
        ({"messages": [{"role": "assistant", "content": "Hello"}]}, "begin and end with user"),
        ({"messages": [{"role": "user", "content": ""}]}, "has no text"),
        ({"question_frist": True}, "there is no field 'question_frist'; do you mean 'question_first'?"),
        ({"Mode": "fine"}, "there is no field 'Mode'; do you mean 'mode'?"),
        ({"messages": about("data:image/png;base64,bm8gcGljdHVyZQ==", "?", kind="image_url")}, "not an image of a known format"),
        ({"messages": [{"role": "user", "content": "word " * 500}]}, "the model's context has"),
        ({"messages": [{"role": "user", "content": [{"type": "video_url"}, {"type": "text", "text": "?"}]}]}, "has no address"),
        ({"messages": about("file:///etc/passwd", "?")}, "files of the server cannot be read"),
        ({"messages": about("/etc/passwd", "?")}, "files of the server cannot be read"),
        ({"messages": about("http://127.0.0.1:1/", "?")}, "not on the public internet"),
    ],
)
def test_refusals_say_why(address, answerer, change, message):
    body = {"model": answerer.name, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4} | change
    answer = httpx.post(f"{address}/v1/chat/completions", json=body)
    assert 400 <= answer.status_code < 500
    assert message in answer.json()["error"]["message"]


def test_fields_of_openais_service_are_ignored(address, answerer):
    body = {"model": answerer.name, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
    ignored = ("user", "metadata", "store", "service_tier", "modalities", "verbosity", "tool_choice", "parallel_tool_calls")
    ignored += ("reasoning_effort", "safety_identifier", "prompt_cache_key", "web_search_options", "function_call", "timeout")
    answer = httpx.post(f"{address}/v1/chat/completions", json=body | dict.fromkeys(ignored, "x"))
    assert answer.status_code == 200, answer.text


def test_bad_uploads_are_refused_and_the_server_lives(address, client, answerer, root, url):
    """A few of every kind; `benchmarks.serving` sends a hundred."""
    refused = {}
    for name, content, kind in bad_uploads((root / "clip.mp4").read_bytes(), each=1):
        body = {"model": answerer.name, "messages": about(data_url(content), "?", kind=kind), "max_tokens": 4}
        answer = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60)
        refused[name] = answer.status_code
        assert 400 <= answer.status_code < 500, (name, answer.text)
        assert len(answer.json()["error"]["message"]) > 10
    assert refused["an hour long"] == refused["huge"] == refused["picture bomb"] == 413
    assert refused["playlist"] == refused["text"] == 415
    for raw, status in ((b"{", 400), (b"[]", 400), (b"\xff" * 100, 400), (b" " * (LIMITS.body_bytes + 1), 413)):
        answer = httpx.post(f"{address}/v1/chat/completions", content=raw, headers={"Content-Type": "application/json"})
        assert answer.status_code == status
    assert httpx.post(f"{address}/v1/chat/completions", content=b"{}", headers={"Content-Type": "text/plain"}).status_code == 415
    for answer in (httpx.get(f"{address}/v1/embeddings"), httpx.get(f"{address}/v1/chat/completions")):
        assert answer.status_code in (404, 405)
        assert answer.json()["error"]["code"] == "unknown_url"
    assert httpx.get(f"{address}/health").json() == {"status": "ok", "inside": 0}
    head, page = httpx.head(f"{address}/"), httpx.get(f"{address}/")
    assert (head.status_code, head.headers["content-length"], head.content) == (200, page.headers["content-length"], b"")
    client.chat.completions.create(model=answerer.name, messages=about(url, "?"), max_tokens=2)


def test_more_than_may_wait_are_turned_away(answerer, url):
    app = create_app(answerer, Limits(running=1, waiting=1))
    with running(app) as address:
        body = json.dumps({"model": answerer.name, "messages": about(url, "?"), "max_tokens": 4}).encode()
        release = threading.Event()

        def slowly() -> Iterator[bytes]:
            yield body[:10]
            release.wait()
            yield body[10:]

        with ThreadPoolExecutor(2) as pool:
            headers = {"Content-Type": "application/json"}
            slow = [pool.submit(httpx.post, f"{address}/v1/chat/completions", content=slowly(), headers=headers) for _ in range(2)]
            while httpx.get(f"{address}/health").json()["inside"] < 2:
                pass
            refused = httpx.post(f"{address}/v1/chat/completions", content=body, headers=headers)
            release.set()
            assert [one.result().status_code for one in slow] == [200, 200]
        assert refused.status_code == 429
        assert refused.headers["Retry-After"]
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert httpx.get(f"{address}/health").json()["inside"] == 0


def test_who_leaves_is_forgotten(answerer, url):
    with running(create_app(answerer, Limits(running=1, waiting=0))) as address:
        body = {"model": answerer.name, "messages": about(url, "Why?"), "max_tokens": 100, "stream": True}
        with httpx.stream("POST", f"{address}/v1/chat/completions", json=body) as answer:
            next(answer.iter_lines())
        while httpx.get(f"{address}/health").json()["inside"]:
            pass
        assert httpx.post(f"{address}/v1/chat/completions", json=body | {"max_tokens": 2}).status_code == 200


def test_who_leaves_is_noticed_while_the_answer_grows(answerer, url, monkeypatch):
    step, steps = DecodingBatch.step, []

    def slowly(self: DecodingBatch) -> list:
        time.sleep(0.05)
        steps.append(1)
        return step(self)

    monkeypatch.setattr(DecodingBatch, "step", slowly)
    monkeypatch.setattr(app_module, "HEARTBEAT_S", 0.2)
    with running(create_app(answerer, Limits(running=1, waiting=0))) as address:
        body = {"model": answerer.name, "messages": about(url, "Why?"), "max_tokens": 60}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{address}/v1/chat/completions", json=body, timeout=0.5)
        while httpx.get(f"{address}/health").json()["inside"]:
            time.sleep(0.01)
    assert len(steps) < 40


def test_a_key_is_asked_for(answerer, openai_client):
    with running(create_app(answerer, LIMITS, api_key="secret")) as address:
        assert httpx.get(f"{address}/").status_code == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            assert httpx.get(f"{address}/v1/models", headers=headers).status_code == 401
            assert httpx.post(f"{address}/v1/chat/completions", json={}, headers=headers).status_code == 401
        assert openai_client(base_url=f"{address}/v1", api_key="secret").models.list().data[0].id == answerer.name


def test_a_request_that_breaks_a_pass_ends_nothing_else(answerer, root):
    """Frames of a size that the encoder does not take, between two requests that are answered."""
    media, subject = open_media(root / "clip.mp4", answerer), answerer.subject
    turns = [Turn(subject.encode("Which digits?"), [])]
    good = Sample("", "", media.frames, media.shown, turns)
    bad = Sample("", "", np.zeros((1, 43, 43, 3), np.uint8), [[0]], turns)
    told: dict[int, list[Event]] = {0: [], 1: [], 2: []}
    running = Engine(subject, running=1).start()
    for n, sample in enumerate((good, bad, good)):
        running.submit(Request(sample, subject.chat, "coarse_fine", Sampling(6), told[n].append))
    while not (told[2] and getattr(told[2][-1], "finished", "")):
        time.sleep(0.01)
    running.close()
    assert [type(event) for event in told[1]] == [Failed]
    assert told[0][-1] == told[2][-1] == Progress(told[0][-1].tokens, told[0][-1].finished)
