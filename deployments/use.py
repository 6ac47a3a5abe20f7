"""`fvlm chat`, `fvlm look` and `fvlm serve`: a model, asked in the terminal or over the web."""

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
    Parameter(help="How frames are read: all alike, each with a query of its own, or as a stream would. By default `fine`."),
]
Vision = Annotated[str | None, Parameter(help="Hub name or folder of the DINOv2 that a checkpoint of the original was built with.")]
Llm = Annotated[str | None, Parameter(help="Hub name or folder of its SmolLM2.")]
FramePx = Annotated[int | None, Parameter(help="Side of its frames: 224 px where it is not given.")]
Device = Annotated[Literal["auto", "cpu", "cuda"], Parameter(help="Where to compute.")]

SEEDS = 1 << 63
"""torch takes seeds below it."""
HELP = "A question and return; /new begins a new conversation, /quit ends."


def load_model(model: str, vision: str | None, llm: str | None, frame_px: int | None, device: str, console: Console):
    """The model that a command's options name, with a spinner."""
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
    temperature: Annotated[float, Parameter(help="0 takes the likeliest token, more draws.")] = 0.0,
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
        A question, any number of times; without any they are read from the terminal, or line by line from a pipe.
    question_first
        The model reads each question before the video, and can look for what is asked; every question is then a new conversation.
    seed
        Of the draws.
    """
    if max_new_tokens < 1 or not 0 <= temperature < inf or not 0 <= seed < SEEDS:
        what = "max_new_tokens must be at least 1, temperature at least 0, seed a number of 63 bits"
        raise UserError(what, where="the options", fix="correct them")
    console = Console(highlight=False)
    if not video.exists():
        raise UserError("there is no such file", where=str(video), fix="give the path of a video, a picture, or a folder of frames")
    answerer = load_model(model, vision, llm, frame_px, device, console)
    from fvlm_core.serve.answering import Sampling
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
        except UserError as error:  # the conversation has grown too long: the user can begin a new one
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
    """Write a clip of where the model looks: each frame with coarse attention and the gaze beside it, and the gaze's entropy.

    Parameters
    ----------
    video
        A video, a picture, or a folder of frames.
    output
        The clip to write, .mp4 or .gif.
    question
        What is asked while it looks.
    mode
        Whose gaze.
    question_first
        The question comes before the video, so that it directs the gaze.
    fps
        Frames of the written clip per second; by default as many as are taken of a second, so that the clip is as fast as the video
        (but for one of more frames than the model is shown).
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
    """Serve a model: a web page, and OpenAI's /v1/chat/completions with videos. FVLM_API_KEY, where it is set, is asked of every request.

    Parameters
    ----------
    host
        Address to listen at; 0.0.0.0 lets other machines in.
    port
        Port to listen at.
    upload_mb
        Largest video or picture.
    video_s
        Longest video.
    new_tokens
        Longest answer.
    running
        Answers that are computed together.
    waiting
        Requests that wait beside them; more are refused with status 429.
    allow_internal
        Addresses of videos may lead to this machine and its private networks.
    """
    import uvicorn

    smallest = {"upload_mb": upload_mb, "video_s": video_s, "new_tokens": new_tokens, "running": running, "waiting": waiting + 1}
    if wrong := [name for name, value in smallest.items() if value < 1]:
        raise UserError(f"{', '.join(wrong)} must be at least 1 (waiting: 0)", where="the options", fix="correct them")
    console = Console(highlight=False)
    try:
        listening = listen(port, host)
    except OSError as error:
        raise UserError(f"cannot listen there: {error.strerror}", where=f"{host}:{port}", fix="choose another --port or --host") from error
    answerer = load_model(model, vision, llm, frame_px, device, console)
    from fvlm_core.serve.app import create_app
    from fvlm_core.serve.limits import Limits

    key = os.environ.get("FVLM_API_KEY")
    limits = Limits(upload_mb, video_s, new_tokens=new_tokens, running=running, waiting=waiting, allow_internal=allow_internal)
    console.print(f"{answerer.name}: web page at {address_of(host, port)}, OpenAI's API at {address_of(host, port)}/v1", soft_wrap=True)
    if not key and host not in ("127.0.0.1", "localhost", "::1"):
        console.print("[yellow]anyone who reaches this address can use it; set FVLM_API_KEY to ask for a key[/]")
    with listening:
        uvicorn.Server(uvicorn.Config(create_app(answerer, limits, api_key=key), log_level="warning")).run([listening])
    return 0


def _questions(console: Console, *, interactive: bool):
    """Lines of the terminal or of a pipe, without empty ones."""
    while True:
        try:
            line = (console.input("[bold cyan]> [/]") if interactive else input()).strip()
        except EOFError:
            return
        if line:
            yield line.encode(errors="surrogateescape").decode(errors="replace")  # bytes that are not UTF-8
