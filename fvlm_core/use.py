"""A model in three lines of Python.

from fvlm_core import FoveatedVLM
model = FoveatedVLM.from_pretrained("release/model")  # or a run, OWNER/NAME on the hub, a checkpoint of the original
model.ask("clip.mp4", "What happens?")
"""

from dataclasses import replace
from pathlib import Path
from typing import Self

import numpy as np

from fvlm_core.eval.answerers.foveated import FoveatedAnswerer
from fvlm_core.eval.jobs import Original
from fvlm_core.release.int8 import int8_weights
from fvlm_core.serve.answering import MAX_NEW_TOKENS, Sampling
from fvlm_core.serve.load import checked_mode, load
from fvlm_core.serve.session import Session, gaze, open_media


class FoveatedVLM:
    """A model that is asked about videos; conversations with follow-up questions: `fvlm_core.serve.session.Session`."""

    def __init__(self, answerer: FoveatedAnswerer) -> None:
        self.answerer = answerer

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        device: str = "auto",
        int8: bool = False,
        vision: str | None = None,
        llm: str | None = None,
        frame_px: int | None = None,
    ) -> Self:
        """Load a released folder, a training run or its model folder, a hub name, or a checkpoint of the original fVLM.

        Args:
            model: Folder, file or hub name.
            device: `auto` takes a GPU where there is one.
            int8: 8-bit weights, on the CPU: smaller, and a little other in its numbers; see `fvlm_core.release.int8`.
            vision: For the original's checkpoints: hub name or folder of the DINOv2 it was built with; only the configuration is read.
            llm: The same of the SmolLM2.
            frame_px: The same: side of its frames, 224 px where it is not given.

        Raises:
            UserError: There is none, or it is of another kind.
        """
        answerer = load(model, "cpu" if int8 else device, original=Original(vision=vision, llm=llm, frame_px=frame_px))
        if int8:
            answerer = replace(answerer, subject=replace(answerer.subject, model=int8_weights(answerer.subject.model)))
        return cls(answerer)

    def ask(
        self,
        video: str | Path,
        question: str,
        *,
        mode: str | None = None,
        question_first: bool = True,
        max_new_tokens: int = MAX_NEW_TOKENS,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> str:
        """The answer to a question about a video, a picture or a folder of frames.

        Args:
            video: Path.
            question: Text.
            mode: `coarse`, `fine` or `autoregressive`; by default `fine` where the model looks at all.
            question_first: The model reads the question before the video, and can look for what is asked.
            max_new_tokens: The most tokens of the answer.
            temperature: Above 0 the answer is drawn, with `seed`.
            seed: Of the drawing.

        Raises:
            UserError: The video cannot be shown, or the model lacks the mode.
        """
        session = Session(self.answerer, open_media(Path(video), self.answerer))
        sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
        pieces = session.ask(question, mode=checked_mode(self.answerer, mode), question_first=question_first, sampling=sampling)
        return "".join(pieces).strip()

    def gaze(self, video: str | Path, question: str, *, mode: str | None = None, question_first: bool = True) -> np.ndarray:
        """Where the model looks, float [frames, rows, columns], each frame's adding up to 1.

        Raises UserError for a model that does not look.
        """
        session = Session(self.answerer, open_media(Path(video), self.answerer))
        return gaze(session, question, mode=checked_mode(self.answerer, mode or "fine"), question_first=question_first).fine
