"""`fvlm chat` and `fvlm look` as typed, on a released folder and a real video."""

import io
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import av
import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from deployments import cli
from fvlm_core.errors import UserError
from fvlm_core.serve.batched_decoding import Sampling
from fvlm_core.serve.session import Session, gaze, open_media


def run(*arguments: str | Path) -> int:
    """The command's status."""
    return cli.app([str(argument) for argument in arguments], result_action="return_value")


def test_chat_answers_questions_of_the_options_and_of_a_pipe(root, answerer, capsys, monkeypatch):
    session = Session(answerer, open_media(root / "clip.mp4", answerer))
    expected = ["".join(session.ask(question, sampling=Sampling(8))) for question in ("Which digits?", "[b]Why?")]
    questions = ("--ask", "Which digits?", "--ask", "[b]Why?")
    assert run("chat", root / "released", root / "clip.mp4", *questions, "--max-new-tokens", "8") == 0
    said = capsys.readouterr().out
    assert said.index("> Which digits?") < said.index("> [b]Why?")
    for answer in expected:
        assert " ".join(answer.split()) in " ".join(said.split())
    run("chat", root / "run", root / "clip.mp4", "--ask", r"\[/x] C:\dir\ ", "--max-new-tokens", "1")
    assert r"> \[/x] C:\dir\ " in capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.StringIO("Which digits?\n\n/new\nWhich digits?\n/quit\nnever asked\n"))
    run("chat", root / "run", root / "clip.mp4", "--mode", "autoregressive", "--max-new-tokens", "4")
    said = capsys.readouterr().out
    first, second = said.split("> Which digits?\n")[1:]
    assert first == second
    assert "never" not in said


def test_look_writes_a_video_whose_pictures_show_frame_coarse_attention_and_gaze(root, answerer, tmp_path):
    assert run("look", root / "run", root / "clip.mp4", "-o", tmp_path / "gaze.mp4", "--question", "Which digits?", "--fps", "2") == 0
    with av.open(str(tmp_path / "gaze.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        shown = [frame.to_ndarray(format="rgb24").astype(float) for frame in container.decode(stream)]
        assert stream.average_rate == 2
    found = gaze(Session(answerer, open_media(root / "clip.mp4", answerer)), "Which digits?")
    assert len(shown) == len(found.frames) == 5
    plain = shown[1][76:364, 16:304]
    expected = np.asarray(Image.fromarray(found.frames[1]).resize((288, 288), Image.Resampling.BICUBIC), float)
    assert abs(plain - expected).mean() < 6  # what the codec loses
    for left, attention in ((320, found.coarse[1]), (624, found.fine[1])):
        darker = 1 - shown[1][76:364, left : left + 288, 2] / np.maximum(plain[..., 2], 40)  # the tint has hardly any blue
        blocks = darker.reshape(3, 96, 3, 96).mean((1, 3))
        assert np.corrcoef(blocks.ravel(), attention.ravel())[0, 1] < 0  # dark where there is little attention


def test_look_writes_a_gif(root, tmp_path):
    run("look", root / "run", root / "clip.mp4", "-o", tmp_path / "gaze.gif", "--mode", "autoregressive")
    with Image.open(tmp_path / "gaze.gif") as picture:
        assert picture.n_frames == 5
        assert picture.info["duration"] == 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("chat", "{root}/run", "{root}/nothing.mp4"), "there is no such file"),
        (("chat", "{root}/run", "{root}/original.safetensors"), "not a readable video"),
        (("chat", "{root}/nothing", "{root}/clip.mp4"), "there is no such model"),
        (("chat", "{root}/original.safetensors", "{root}/clip.mp4"), "give --vision and --llm"),
        (("chat", "{root}/pooled", "{root}/clip.mp4", "--mode", "fine"), "has no mode 'fine'"),
        (("look", "{root}/run", "{root}/clip.mp4", "-o", "gaze.txt"), "use .mp4 or .gif"),
        (("look", "{root}/run", "{root}/clip.mp4", "-o", "{root}/no/gaze.mp4"), "there is no such folder"),
        (("look", "{root}/run", "{root}/clip.mp4", "-o", "{root}/clip.mp4"), "take the place of the video"),
        (("look", "{root}/run", "{root}/clip.mp4", "-o", "/proc/gaze.mp4"), "cannot be written into"),
        (("look", "{root}/pooled", "{root}/clip.mp4"), "does not look anywhere"),
    ],
)
@pytest.mark.usefixtures("pooled")
def test_errors_say_what_where_and_what_to_do(root, arguments, message):
    with pytest.raises(UserError) as caught:
        run(*(argument.format(root=root) for argument in arguments))
    assert message in str(caught.value)


def test_a_gpu_that_is_not_there_is_refused(root, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match="there is no GPU 0: torch sees 0 here"):
        run("chat", root / "run", root / "clip.mp4", "--ask", "Which?", "--device", "cuda")


@pytest.mark.slow(reason="a process that imports torch")
def test_a_release_is_converted_without_saying_what_it_was_built_with(root, tmp_path):
    assert run("convert", "gguf", root / "released", tmp_path / "model.gguf") == 0
    assert (tmp_path / "model.gguf").stat().st_size > 1000


def test_serve_answers_with_its_key_and_ends_on_a_signal(root):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match="cannot listen here"):
            run("serve", root / "run", "--port", str(port))
    command = [sys.executable, "-m", "deployments.cli", "serve", str(root / "released"), "--port", str(port)]
    server = subprocess.Popen(command, env=os.environ | {"FVLM_API_KEY": "secret"}, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        assert f"http://127.0.0.1:{port}/v1" in server.stdout.readline()
        address = f"http://127.0.0.1:{port}/v1/models"
        assert httpx.get(address, timeout=60).status_code == 401
        (model,) = httpx.get(address, headers={"Authorization": "Bearer secret"}).json()["data"]
        assert model["id"] == "released"
        server.send_signal(signal.SIGINT)
        assert server.wait(30) in (0, 130, -signal.SIGINT)
    finally:
        server.kill()
        server.wait()
