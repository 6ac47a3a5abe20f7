"""Use a model in three lines of Python.

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
from fvlm_core.serve.batched_decoding import MAX_NEW_TOKENS, Sampling
from fvlm_core.serve.load import checked_mode, load
from fvlm_core.serve.session import Session, gaze, open_media


class FoveatedVLM:
    """A model that answers questions about videos. For conversations with follow-up questions, see `fvlm_core.serve.session.Session`."""

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
            device: `auto` uses a GPU if available.
            int8: Use 8-bit weights on the CPU: smaller, with slightly different outputs; see `fvlm_core.release.int8`.
            vision: For checkpoints of the original only: hub name or folder of their DINOv2; only its configuration is read.
            llm: For checkpoints of the original only: hub name or folder of their SmolLM2; only its configuration is read.
            frame_px: For checkpoints of the original only: side of the frames in pixels, 224 by default.

        Raises:
            UserError: There is no model, or it is of an unknown kind.
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
        """Answer a question about a video, an image or a folder of frames.

        Args:
            video: Path of the video, image or folder.
            question: The question.
            mode: `coarse`, `fine` or `autoregressive`; by default `fine` if the model has queries.
            question_first: Put the question before the video, so that the model can look for what is asked.
            max_new_tokens: Maximum number of tokens in the answer.
            temperature: Sampling temperature; 0 decodes greedily.
            seed: Random seed for sampling.

        Raises:
            UserError: The video cannot be read, or the model does not support the mode.
        """
        session = Session(self.answerer, open_media(Path(video), self.answerer))
        sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
        pieces = session.ask(question, mode=checked_mode(self.answerer, mode), question_first=question_first, sampling=sampling)
        return "".join(pieces).strip()

    def gaze(self, video: str | Path, question: str, *, mode: str | None = None, question_first: bool = True) -> np.ndarray:
        """The model's attention over each frame's patches, float [frames, rows, columns]; each frame sums to 1.

        Raises UserError for a model without queries, or the mode `coarse`.
        """
        session = Session(self.answerer, open_media(Path(video), self.answerer))
        return gaze(session, question, mode=checked_mode(self.answerer, mode or "fine"), question_first=question_first).fine
