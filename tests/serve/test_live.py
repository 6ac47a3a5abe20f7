"""Sources without an end: the frames that a file's extraction chooses, those of an address that does not wait, and `fvlm stream`."""

import io
import sys
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from deployments import cli
from fvlm_core.data.frames import FrameRule, extract_frames
from fvlm_core.errors import UserError
from fvlm_core.serve.live import LiveFrame, _newest, is_live, live_frames
from fvlm_core.serve.stream import FrameStream
from tests.serve.conftest import clip


@pytest.mark.parametrize("fps", [0.5, 1.0, 3.0])
def test_a_files_frames_are_those_of_the_extraction(root, fps):
    found = list(live_frames(str(root / "clip.mp4"), fps=fps, frame_px=42, pace=False))
    expected = extract_frames((root / "clip.mp4").read_bytes(), FrameRule(42, fps=fps)).pixels
    np.testing.assert_array_equal(np.stack([frame.pixels for frame in found])[: len(expected)], expected)
    assert len(found) - len(expected) in (0, 1)  # a stream knows no length, so a frame that begins is shown
    assert [frame.time_s for frame in found] == [n / fps for n in range(len(found))]


def test_a_file_is_shown_at_its_own_speed(root):
    started, times = time.monotonic(), []
    for frame in live_frames(str(root / "clip.mp4"), fps=4.0, frame_px=42):
        times.append((frame.time_s, time.monotonic() - started))
        if len(times) == 4:
            break
    assert all(at >= shown - 0.02 for shown, at in times)


def test_an_address_is_read(root):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(root)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/clip.mp4"
        assert is_live(url)
        frames = list(live_frames(url, fps=1.0, frame_px=42))
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert frames[-1].time_s == 4.0
    assert len(frames) + frames[-1].dropped == 5


def test_of_frames_that_come_meanwhile_the_newest_is_kept():
    pixels = np.zeros((1, 1, 3), np.uint8)
    sent = threading.Event()

    def source():
        yield LiveFrame(0.0, pixels)
        while not taken:
            time.sleep(0.001)
        yield from (LiveFrame(float(n), pixels) for n in range(1, 6))
        sent.set()

    taken: list[LiveFrame] = []
    for frame in _newest(source()):
        taken.append(frame)
        sent.wait()  # looking at the first takes until all have come
    assert [frame.time_s for frame in taken] == [0.0, 5.0]
    assert taken[-1].dropped == 4


@pytest.mark.parametrize("error", [RuntimeError("the decoder gave up"), MemoryError(), UserError("no source", where="x", fix="y")])
def test_an_error_in_the_source_reaches_the_consumer(error):
    def source():
        yield LiveFrame(0.0, np.zeros((1, 1, 3), np.uint8))
        raise error

    found: list[object] = []

    def consume() -> None:
        try:
            found.extend(_newest(source()))
        except BaseException as caught:
            found.append(caught)

    consumer = threading.Thread(target=consume, daemon=True)
    consumer.start()
    consumer.join(10)
    assert not consumer.is_alive()
    assert found[-1] is error


def test_stream_watches_and_answers(root, answerer, capsys, monkeypatch, tmp_path):
    (tmp_path / "long.mp4").write_bytes(clip(70, seed=2))
    stream = FrameStream(answerer.subject.model, answerer.subject.chat, context=256, reserve=128)
    for frame in live_frames(str(tmp_path / "long.mp4"), fps=1.0, frame_px=42, pace=False):
        stream.push(frame.pixels)
    expected = answerer.subject.decode(stream.ask(answerer.subject.encode("Which digits?"), max_new_tokens=8))
    command = ["stream", str(root / "released"), str(tmp_path / "long.mp4"), "--fast", "--max-new-tokens", "8"]
    assert cli.app([*command, "--ask", "Which digits?"], result_action="return_value") == 0
    said = capsys.readouterr().out
    assert "frame 60: " in said
    assert "frame 70: " in said
    assert "memory" in said
    assert "> Which digits? after 70 frames" in said
    assert " ".join(expected.split()) in " ".join(said.split())
    monkeypatch.setattr(sys, "stdin", io.StringIO("Which digits?\n/quit\nnever asked\n"))
    cli.app([*command, "--task", "Which digits?", "--frames", "3"], result_action="return_value")
    said = capsys.readouterr().out
    assert "> Which digits?" in said
    assert "never" not in said


def test_sources_that_cannot_be_read_are_named(root, tmp_path, pooled):
    (tmp_path / "text.mp4").write_text("no video")
    for source in (tmp_path / "nothing.mp4", tmp_path / "text.mp4", "http://127.0.0.1:9/clip.mp4", "/dev/video99"):
        with pytest.raises(UserError) as caught:
            list(live_frames(str(source), fps=1.0, frame_px=42))
        assert caught.value.where == str(source)
    for context in ("0", "100000"):
        with pytest.raises(UserError, match="the model's context has"):
            cli.app(["stream", str(root / "run"), str(root / "clip.mp4"), "--context", context], result_action="return_value")
    with pytest.raises(UserError, match="taken by the prompt"):
        cli.app(["stream", str(root / "run"), str(root / "clip.mp4"), "--task", "Which digits? " * 5000], result_action="return_value")
    with pytest.raises(UserError, match="cannot stream"):
        cli.app(["stream", str(pooled), str(root / "clip.mp4")], result_action="return_value")
