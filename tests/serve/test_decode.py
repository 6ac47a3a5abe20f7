"""The server's decoding of media: once for all who ask about them, within limits, and given up when nobody waits for it."""

import errno
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import partial

import av.error
import httpx
import numpy as np
import pytest

from benchmarks.chat_server import about, data_url, running
from fvlm_core.data.clips import encode_mp4
from fvlm_core.data.frames import ClipError, FrameRule
from fvlm_core.serve import app as app_module
from fvlm_core.serve import decode as decode_module
from fvlm_core.serve.app import Server, create_app
from fvlm_core.serve.decode import decode
from fvlm_core.serve.limits import Limits, RequestRejectedError
from tests.serve.conftest import LIMITS, clip
from tests.waiting import wait_until

NOBODY_GONE = threading.Event()


def test_who_leaves_while_a_video_is_decoded_frees_the_place(answerer, monkeypatch, tmp_path):
    """More clients than decoders, and a decoder that would take until its limit: it is ended."""
    endless = tmp_path / "python"
    endless.write_text('#!/bin/sh\necho > "$0.$$"\nexec sleep 60\n')
    endless.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(endless))
    monkeypatch.setattr(app_module, "HEARTBEAT_S", 0.1)

    def leave(address: str, n: int) -> None:
        body = {"model": answerer.name, "messages": about(data_url(clip(1, seed=n)), "Why?")}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{address}/v1/chat/completions", json=body, timeout=1)

    clients = app_module.DECODERS + 1
    with running(create_app(answerer, Limits(running=1, waiting=2))) as address:
        with ThreadPoolExecutor(clients) as pool:
            list(pool.map(partial(leave, address), range(clients)))
        limit = time.monotonic() + 20
        while httpx.get(f"{address}/health").json()["inside"] and time.monotonic() < limit:
            time.sleep(0.01)
        assert httpx.get(f"{address}/health").json()["inside"] == 0
    started = [int(path.name.rpartition(".")[2]) for path in tmp_path.glob("python.*")]
    assert started
    for process in started:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


def test_equal_videos_are_decoded_once_and_shared(answerer, url):
    server = Server(answerer, LIMITS, None)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: server.frames_of(url, "video", gone=NOBODY_GONE), range(4)))
    assert all(frames is found[0] for frames in found)
    assert server.frames_of(data_url(clip(5, seed=1)), "video", gone=NOBODY_GONE) is not found[0]


def test_after_a_failure_the_others_still_decode_one_at_a_time(answerer, monkeypatch):
    """The first request ends while the second waits; a third that comes then waits for the second."""
    server, at_once, most = Server(answerer, LIMITS, None), [], []
    begun, go_on = [threading.Event() for _ in range(3)], [threading.Event() for _ in range(3)]

    def slow(*_: object) -> np.ndarray:
        number = next(numbers)
        at_once.append(number)
        most.append(len(at_once))
        begun[number].set()
        assert go_on[number].wait(10)
        at_once.remove(number)
        if number < 2:
            raise RequestRejectedError("damaged")
        return np.zeros((1, 42, 42, 3), np.uint8)

    numbers = iter(range(3))
    monkeypatch.setattr(app_module, "decode", slow)
    with ThreadPoolExecutor(3) as pool:
        ask = partial(pool.submit, server.frames_of, "data:,x", "video", gone=NOBODY_GONE)
        first = ask()
        assert begun[0].wait(10)
        second = ask()
        wait_until(lambda: [users for _, users in server.decoding.values()] == [2], "the second request", 10, poll_s=0.01)
        go_on[0].set()
        assert isinstance(first.exception(10), RequestRejectedError)
        assert begun[1].wait(10)
        third = ask()
        assert not begun[2].wait(0.3)
        go_on[1].set()
        go_on[2].set()
        assert isinstance(second.exception(10), RequestRejectedError)
        assert third.result(10).shape == (1, 42, 42, 3)
    assert (max(most), server.decoding) == (1, {})


def test_a_video_that_is_asked_about_again_and_again_stays(answerer, monkeypatch):
    decoded = []
    monkeypatch.setattr(app_module, "decode", lambda content, *_: decoded.append(content) or np.zeros((1, 42, 42, 3), np.uint8))
    server = Server(answerer, LIMITS, None)
    for n in range(2 * app_module.KEPT_MEDIA):
        for name in (n, "again"):
            server.frames_of(f"data:,{name}", "video", gone=NOBODY_GONE)
    assert decoded.count(b"again") == 1
    assert len(server.media) == app_module.KEPT_MEDIA


def test_large_frames_have_memory_of_their_own(monkeypatch):
    rule, content = FrameRule(1792, max_frames=40), encode_mp4(np.zeros((40, 16, 16, 3), np.uint8))
    assert decode(content, "video", rule, Limits(decode_mb=600), NOBODY_GONE).shape == (40, 1792, 1792, 3)

    def too_large(*_: object) -> None:
        raise ClipError("not a readable video") from av.error.MemoryError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(decode_module, "extract_frames", too_large)
    with pytest.raises(MemoryError):  # which is reported as the limit, not as a bad video
        decode_module._video(content, rule, LIMITS.pixels, LIMITS.video_s)


def test_a_clip_that_kept_its_timestamps_is_no_longer_than_it_is(tmp_path):
    """Two seconds, cut from the middle of a film: Matroska counts its end from the film's start."""
    path = tmp_path / "clip.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
        for number in range(20):
            frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
            frame.pts, frame.time_base = 36000 + number, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert len(decode(path.read_bytes(), "video", FrameRule(42), LIMITS, NOBODY_GONE)) == 2
    with pytest.raises(RequestRejectedError, match="the video is 2 s long; this server takes 0 s"):
        decode_module._video(path.read_bytes(), FrameRule(42), LIMITS.pixels, 0)
