"""One model for many clients: requests are queued, prefilled in groups, and decoded together, one token of each answer per step.

All model work runs in one thread. A client gets events through a callback, which this thread calls.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from fvlm_core.data.batch import ChatFormat, Sample
from fvlm_core.eval.subject import Subject
from fvlm_core.model.names import Mode
from fvlm_core.serve.batched_decoding import Answer, DecodingBatch, Sampling, read

log = logging.getLogger(__name__)
GATHER_S = 0.01
"""How long the first request after an idle time waits, so that simultaneous requests are prefilled together."""


@dataclass(frozen=True)
class Started:
    """Prefill is done; the answer begins."""

    prompt_tokens: int
    gaze: np.ndarray
    """[frames, rows, columns]; empty if not requested."""
    entropy: np.ndarray


@dataclass(frozen=True)
class Progress:
    """All tokens of the answer so far."""

    tokens: tuple[int, ...]
    finished: str
    """`stop` or `length` once the answer is complete, else empty."""


@dataclass(frozen=True)
class Failed:
    """The answer cannot be computed; the cause is in the log."""


Event = Started | Progress | Failed


@dataclass(eq=False)
class Request:
    """A question, and the callback that gets its events."""

    sample: Sample
    chat: ChatFormat
    mode: Mode
    sampling: Sampling
    on_event: Callable[[Event], object]
    """The callback; called from the engine's thread."""
    gaze: bool = False
    cancelled: bool = False
    """Set by the client when it no longer waits for the answer."""
    answer: Answer = field(init=False)

    def __post_init__(self) -> None:
        self.answer = Answer(self.sampling, self.chat.assistant_close[:1])


class Engine:
    """The thread and its queue. At most `running` answers are decoded, and `frames_at_once` distinct frames encoded, together."""

    def __init__(self, subject: Subject, *, running: int = 8, frames_at_once: int = 128) -> None:
        self.subject, self.most, self.frames_at_once = subject, running, frames_at_once
        self._waiting: deque[Request] = deque()
        self._change = threading.Condition()
        self._closed = False
        self._running: dict[int, Request] = {}
        """By the `id` of their answers."""
        self._batch = DecodingBatch(subject)
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def start(self) -> "Engine":
        """Start the thread."""
        self._thread.start()
        return self

    def submit(self, request: Request) -> None:
        """Put a request at the end of the queue."""
        with self._change:
            self._waiting.append(request)
            self._change.notify()

    def close(self) -> None:
        """Stop the thread after its current step; unfinished requests are reported as failed."""
        with self._change:
            self._closed = True
            self._change.notify()
        self._thread.join()
        for request in (*self._running.values(), *self._waiting):
            request.on_event(Failed())

    def _work(self) -> None:
        while True:
            with self._change:
                while not self._closed and not self._waiting and not self._running:
                    self._change.wait()
                if self._closed:
                    return
            if not self._running:
                time.sleep(GATHER_S)
            with self._change:
                group = self._group()
            self._leave([request for request in self._running.values() if request.cancelled])
            if group:
                self._guarded(partial(self._admit, group), group)
            if self._running:
                self._guarded(self._step, list(self._running.values()))

    def _guarded(self, work: Callable[[], None], requests: Sequence[Request]) -> None:
        """Run a pass. If it fails, report its requests as failed and drop them: no request may end the server."""
        try:
            work()
        except Exception:
            log.exception("a pass over %d requests failed", len(requests))
            for request in requests:
                self._running.pop(id(request.answer), None)
                request.on_event(Failed())
            self._batch.drop([request.answer for request in requests])
            if not self._running:
                self._batch = DecodingBatch(self.subject)

    def _group(self) -> list[Request]:
        """The next requests to prefill together: as many as there is room for, with the same mode, system message and gaze option."""
        while self._waiting and self._waiting[0].cancelled:
            self._waiting.popleft()
        group: list[Request] = []
        frames: dict[int, int] = {}
        while self._waiting and len(self._running) + len(group) < self.most:
            first = self._waiting[0]
            here = frames | {id(first.sample.frames): len(first.sample.frames)}
            if group and (_kind(first) != _kind(group[0]) or sum(here.values()) > self.frames_at_once):
                break
            frames = here
            group.append(self._waiting.popleft())
        return group

    def _admit(self, group: Sequence[Request]) -> None:
        first = group[0]
        samples = [request.sample for request in group]
        found = read(self.subject, samples, first.mode, chat=first.chat, gaze=first.gaze)
        for row, request in enumerate(group):
            request.on_event(Started(found.cache.lengths[row], found.gaze[row], found.entropy[row]))
            self._running[id(request.answer)] = request
        self._batch.add([request.answer for request in group], found.cache, found.hidden)
        self._report([request.answer for request in group])

    def _step(self) -> None:
        self._report(self._batch.step())

    def _report(self, answers: Sequence[Answer]) -> None:
        for answer in answers:
            self._running[id(answer)].on_event(Progress(tuple(answer.tokens), answer.finished))
            if answer.finished:
                del self._running[id(answer)]

    def _leave(self, requests: Sequence[Request]) -> None:
        self._batch.drop([request.answer for request in requests])
        for request in requests:
            del self._running[id(request.answer)]


def _kind(request: Request) -> tuple[Mode, tuple[int, ...], bool]:
    return request.mode, tuple(request.chat.system), request.gaze
