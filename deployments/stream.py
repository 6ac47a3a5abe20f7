"""`fvlm stream`: watch a file, a camera or an address with a model, and ask it questions at any time."""

import queue
import sys
import threading
import time
from collections import deque
from statistics import median
from typing import Annotated, Literal

import psutil
from cyclopts import Parameter
from rich.console import Console
from rich.status import Status
from rich.text import Text

from deployments.use import Device, FramePx, Llm, Model, Vision, load_model
from fvlm_core.errors import UserError

RECENT = 30
"""Number of last frames in the median time."""
RESERVED_FOR_QUESTION = 192
"""Tokens of the context that are reserved for a question."""
PIPED_EVERY = 60
"""Without a terminal, a status line is printed after this many frames."""


def stream(
    model: Model,
    source: str,
    /,
    *,
    fps: float | None = None,
    task: str = "",
    ask: tuple[str, ...] = (),
    fast: Annotated[bool, Parameter(negative="")] = False,
    frames: int = 0,
    when_full: Literal["slide", "thin"] = "slide",
    context: int | None = None,
    max_new_tokens: int = 64,
    exact: Annotated[bool, Parameter(negative="")] = False,
    vision: Vision = None,
    llm: Llm = None,
    frame_px: FramePx = None,
    device: Device = "auto",
) -> int:
    """Watch a source live, at a token per frame; type a question and press return at any time, /quit ends.

    Shows the time per frame (the last one, and the median of the last 30), how full the context is, and the process's memory, which does
    not grow once the context is full. After the end of the source, questions are answered until the input ends.

    Parameters
    ----------
    source
        A file, a camera (/dev/video0), or an address that ffmpeg reads (http, rtsp, ...).
    fps
        Frames to watch per second of the source; by default as many as in training.
    task
        A question known before the first frame, which directs where the model looks.
    ask
        A question to ask at the end; may be repeated. No questions are then read from the input.
    fast
        Read a file as fast as possible, not at its own speed.
    frames
        Stop after this many frames; 0 means no limit.
    when_full
        Which frames a full context drops: `slide` the older half, `thin` every second one.
    context
        Most tokens in context; by default the model's limit.
    max_new_tokens
        Most tokens of an answer.
    exact
        Keep the KV cache in fp32. By default it is in bfloat16 on a CPU with bfloat16 multiplication, which takes half of the memory, and
        less time in long streams.
    """
    if (fps is not None and not 0.01 <= fps <= 60) or frames < 0 or max_new_tokens < 1:
        raise UserError("fps must be 0.01 to 60, frames at least 0, max_new_tokens at least 1", where="the options", fix="correct them")
    console = Console(highlight=False)
    answerer = load_model(model, vision, llm, frame_px, device, console)
    from fvlm_core.devices import multiplies_bfloat16
    from fvlm_core.serve.live import live_frames
    from fvlm_core.serve.stream import FrameStream

    subject = answerer.subject
    most = subject.model.llm.config.max_position_embeddings
    if context is not None and not 0 < context <= most:
        raise UserError(f"the model's context has {most} tokens", where="--context", fix=f"give 1 to {most}, or leave it out")
    reserve = min(max_new_tokens + RESERVED_FOR_QUESTION, most // 2)
    try:
        watching = FrameStream(
            subject.model,
            subject.chat,
            task_ids=subject.encode(task.strip()) if task else (),
            context=context,
            reserve=reserve,
            when_full=when_full,
            rounded=not exact and multiplies_bfloat16(),
            frame_px=answerer.rule.frame_px,
        )
    except ValueError as error:
        fix = "use a model that looks, a larger context, or a shorter task"
        raise UserError(str(error), where="the model, --context or --task", fix=fix) from error
    asked: queue.Queue[str | None] = queue.Queue()
    if not ask:
        threading.Thread(target=_read_questions, args=(asked,), daemon=True).start()
    process, taken = psutil.Process(), deque[float](maxlen=RECENT)

    def answer(question: str) -> None:
        console.print(Text.assemble((f"> {question}", "bold cyan"), (f" after {watching.seen} frames", "dim")))
        try:
            with subject.autocast():
                tokens = watching.ask(subject.encode(question), max_new_tokens=max_new_tokens)
            console.print(subject.decode(tokens), markup=False, soft_wrap=True)
        except ValueError as error:
            console.print(Text(str(error), "red"))

    def state(dropped: int) -> str:
        memory = process.memory_info().rss / 1e6
        text = f"frame {watching.seen}: {taken[-1] * 1000:.0f} ms, median {median(taken) * 1000:.0f} ms; "
        text += f"context {watching.length} of {watching.limit} tokens; memory {memory:,.0f} MB"
        return text + (f"; {dropped} frames dropped" if dropped else "")

    quit_now, dropped = False, 0
    with Status("waiting for the first frame", console=console) as status:
        for frame in live_frames(source, fps=fps or answerer.rule.fps, frame_px=answerer.rule.frame_px, pace=not fast):
            started = time.perf_counter()
            with subject.autocast():
                watching.push(frame.pixels)
            taken.append(time.perf_counter() - started)
            dropped = frame.dropped
            status.update(state(dropped))
            if not console.is_terminal and watching.seen % PIPED_EVERY == 0:
                console.print(state(dropped), soft_wrap=True)
            while not quit_now and not asked.empty():
                question = asked.get()
                quit_now = question == "/quit"
                if question and not quit_now:
                    answer(question)
                elif question is None:
                    asked.put(None)
                    break
            if quit_now or watching.seen == frames:
                break
    console.print(state(dropped), soft_wrap=True)
    for question in ask:
        answer(question)
    while not ask and not quit_now and (question := asked.get()) not in (None, "/quit"):
        answer(question)
    return 0


def _read_questions(asked: "queue.Queue[str | None]") -> None:
    """Put the lines of standard input on the queue, then None."""
    for line in sys.stdin:
        if line.strip():
            asked.put(line.strip())
    asked.put(None)
