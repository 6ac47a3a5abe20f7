"""`fvlm chat`, `fvlm look` and `fvlm serve`: use a model in the terminal or over HTTP."""

import os
import sys
from math import inf
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from rich.console import Console
from rich.status import Status
from rich.text import Text

from fvlm_core.errors import UserError
from infra.ports import address_of, listen

Model = Annotated[
    str,
    Parameter(
        help="A released folder, a finished run or its model folder, a checkpoint of the original fVLM (with --vision and --llm), or a "
        "hub name."
    ),
]
ModeName = Annotated[
    Literal["coarse", "fine", "autoregressive"] | None,
    Parameter(help="How frames are read: one query for all, a query per frame, or frame by frame like a stream. By default `fine`."),
]
Vision = Annotated[str | None, Parameter(help="Hub name or folder of the DINOv2 with which a checkpoint of the original was built.")]
Llm = Annotated[str | None, Parameter(help="Hub name or folder of the SmolLM2 with which a checkpoint of the original was built.")]
FramePx = Annotated[int | None, Parameter(help="Side of the frames of a checkpoint of the original; by default 224 px.")]
Device = Annotated[Literal["auto", "cpu", "cuda"], Parameter(help="Device to run on.")]

SEEDS = 1 << 63
"""Upper limit of seeds."""
HELP = "Type a question and press return; /new starts a new conversation, /quit ends."


def load_model(model: str, vision: str | None, llm: str | None, frame_px: int | None, device: str, console: Console):
    """Load the model that a command's options name, with a spinner."""
    with Status("loading the model", console=console):
        from fvlm_core.eval.jobs import Original
        from fvlm_core.serve.load import load

        return load(model, device, original=Original(vision=vision, llm=llm, frame_px=frame_px))


def chat(
    model: Model,
    video: Path,
    /,
    *,
    ask: tuple[str, ...] = (),
    mode: ModeName = None,
    question_first: Annotated[bool, Parameter(negative="")] = False,
    max_new_tokens: Annotated[int, Parameter(help="Most tokens of an answer.")] = 128,
    temperature: Annotated[float, Parameter(help="Sampling temperature; 0 is greedy decoding.")] = 0.0,
    seed: int = 0,
    vision: Vision = None,
    llm: Llm = None,
    frame_px: FramePx = None,
    device: Device = "auto",
) -> int:
    """Ask questions about a video; answers appear as they are computed. Further questions continue the conversation.

    Parameters
    ----------
    video
        A video, a picture, or a folder of frames.
    ask
        A question; may be repeated. By default questions are read from the terminal, or line by line from a pipe.
    question_first
        Put each question before the video, so that the model can look for what is asked; every question is then a new conversation.
    seed
        Seed of sampling.
    """
    if max_new_tokens < 1 or not 0 <= temperature < inf or not 0 <= seed < SEEDS:
        what = "max_new_tokens must be at least 1, temperature at least 0, seed a number of 63 bits"
        raise UserError(what, where="the options", fix="correct them")
    console = Console(highlight=False)
    if not video.exists():
        raise UserError("there is no such file", where=str(video), fix="give the path of a video, a picture, or a folder of frames")
    answerer = load_model(model, vision, llm, frame_px, device, console)
    from fvlm_core.serve.batched_decoding import Sampling
    from fvlm_core.serve.load import checked_mode
    from fvlm_core.serve.session import Session, open_media

    chosen = checked_mode(answerer, mode)
    session = Session(answerer, open_media(video, answerer))
    sampling = Sampling(max_new_tokens, temperature, seed=seed)
    interactive = not ask and sys.stdin.isatty()
    about = f": {session.media.n_shown} frames, mode {chosen}. {HELP if interactive else ''}"
    console.print(Text.assemble((video.name, "bold"), about))
    for question in ask or _questions(console, interactive=interactive):
        if question == "/quit":
            break
        if question == "/new":
            session.forget()
            continue
        if not interactive:
            console.print(Text(f"> {question}", "bold cyan"))
        try:
            for piece in session.ask(question, mode=chosen, question_first=question_first, sampling=sampling):
                console.print(piece, end="", markup=False, soft_wrap=True)
            console.print()
        except UserError as error:  # the conversation is too long: the user can start a new one
            if not interactive:
                raise
            console.print(Text(str(error), "red"))
    return 0


def look(
    model: Model,
    video: Path,
    /,
    *,
    output: Annotated[Path, Parameter(name=["--output", "-o"])] = Path("gaze.mp4"),
    question: str = "What happens in the video?",
    mode: Literal["fine", "autoregressive"] = "fine",
    question_first: bool = True,
    fps: float | None = None,
    vision: Vision = None,
    llm: Llm = None,
    frame_px: FramePx = None,
    device: Device = "auto",
) -> int:
    """Write a clip of where the model looks: each frame beside its coarse attention and its gaze, and the gaze's entropy.

    Parameters
    ----------
    video
        A video, a picture, or a folder of frames.
    output
        The clip to write, .mp4 or .gif.
    question
        The question to ask.
    mode
        The mode whose gaze is shown.
    question_first
        Put the question before the video, so that it directs the gaze.
    fps
        Frame rate of the written clip; by default the rate at which the model samples the video, so that the clip has the video's speed
        (unless the video has more frames than the model is shown).
    """
    from fvlm_core.serve.look import check_output, write_clip

    check_output(output)
    if output.exists() and video.exists() and output.samefile(video):
        raise UserError("the clip would take the place of the video", where=str(output), fix="name another file with --output")
    if fps is not None and not 0.01 <= fps <= 60:
        raise UserError(f"{fps:g} frames per second cannot be shown", where="--fps", fix="use 0.01 to 60")
    console = Console(highlight=False)
    answerer = load_model(model, vision, llm, frame_px, device, console)
    from fvlm_core.serve.load import checked_mode
    from fvlm_core.serve.session import Session, gaze, open_media

    session = Session(answerer, open_media(video, answerer))
    with Status("looking", console=console):
        chosen = checked_mode(answerer, mode) if answerer.subject.gazes else None
        found = gaze(session, question, mode=chosen, question_first=question_first)
        write_clip(output, found, title=question, fps=fps or answerer.rule.fps)
    console.print(
        f"wrote {output}: {len(found.frames)} frames, entropy {found.entropy.mean():.2f} nats on average", markup=False, soft_wrap=True
    )
    return 0


def serve(
    model: Model,
    /,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    upload_mb: int = 32,
    video_s: int = 1800,
    new_tokens: int = 1024,
    running: int = 8,
    waiting: int = 16,
    allow_internal: Annotated[bool, Parameter(negative="")] = False,
    vision: Vision = None,
    llm: Llm = None,
    frame_px: FramePx = None,
    device: Device = "auto",
) -> int:
    """Serve a model: a web page, and OpenAI's /v1/chat/completions with videos. If FVLM_API_KEY is set, every request must give it.

    Parameters
    ----------
    host
        Address to listen on; 0.0.0.0 accepts connections from other machines.
    port
        Port to listen on.
    upload_mb
        Largest video or picture, in MB.
    video_s
        Longest video, in seconds.
    new_tokens
        Longest answer, in tokens.
    running
        Answers that are decoded together.
    waiting
        Requests that may wait in addition to those; further ones are rejected with status 429.
    allow_internal
        Allow addresses of videos that lead to this machine or its private networks.
    """
    import uvicorn

    smallest = {"upload_mb": upload_mb, "video_s": video_s, "new_tokens": new_tokens, "running": running, "waiting": waiting + 1}
    if wrong := [name for name, value in smallest.items() if value < 1]:
        raise UserError(f"{', '.join(wrong)} must be at least 1 (waiting: 0)", where="the options", fix="correct them")
    console = Console(highlight=False)
    try:
        listening = listen(port, host)
    except OSError as error:
        raise UserError(f"cannot listen here: {error.strerror}", where=f"{host}:{port}", fix="choose another --port or --host") from error
    answerer = load_model(model, vision, llm, frame_px, device, console)
    from fvlm_core.serve.app import create_app
    from fvlm_core.serve.limits import Limits

    key = os.environ.get("FVLM_API_KEY")
    limits = Limits(upload_mb, video_s, new_tokens=new_tokens, running=running, waiting=waiting, allow_internal=allow_internal)
    console.print(f"{answerer.name}: web page at {address_of(host, port)}, OpenAI's API at {address_of(host, port)}/v1", soft_wrap=True)
    if not key and host not in ("127.0.0.1", "localhost", "::1"):
        console.print("[yellow]anyone who can reach this address can use the model; set FVLM_API_KEY to require a key[/]")
    with listening:
        uvicorn.Server(uvicorn.Config(create_app(answerer, limits, api_key=key), log_level="warning")).run([listening])
    return 0


def _questions(console: Console, *, interactive: bool):
    """Yield the non-empty lines of the terminal or a pipe."""
    while True:
        try:
            line = (console.input("[bold cyan]> [/]") if interactive else input()).strip()
        except EOFError:
            return
        if line:
            yield line.encode(errors="surrogateescape").decode(errors="replace")  # replace bytes that are not UTF-8
