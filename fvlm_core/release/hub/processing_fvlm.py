"""Videos, pictures and questions to the packed tensors that fVLM reads.

A video becomes one square frame per second (at most `max_frames`, evenly spaced where it is longer), as in training.
"""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import BatchFeature, ProcessorMixin

from fvlm_core.data.batch import Sample, Turn, pack
from fvlm_core.data.frames import FrameRule, extract_frames
from fvlm_core.data.tokenizer import chat_format, encode


class FVLMProcessor(ProcessorMixin):
    """Tokenizer and frame rule.

    Args:
        tokenizer: The model's tokenizer.
        frame_px: Side of the square frames.
        fps: Frames read per second of video.
        max_frames: Frames of a longer video, evenly spaced.
        image_repeats: A picture is shown as a still video of this many frames.
        tokens_per_frame: Visual tokens of a frame; the model's.
    """

    def __init__(
        self,
        tokenizer: Any = None,
        frame_px: int = 224,
        fps: float = 1.0,
        max_frames: int = 64,
        image_repeats: int = 8,
        tokens_per_frame: int = 1,
        chat_template: str | None = None,
    ) -> None:
        self.frame_px, self.fps, self.max_frames = frame_px, fps, max_frames
        self.image_repeats, self.tokens_per_frame = image_repeats, tokens_per_frame
        super().__init__(tokenizer, chat_template=chat_template)

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        videos: Any = None,
        *,
        answers: str | list[str] | None = None,
        question_first: bool = True,
        **_unused: Any,
    ) -> BatchFeature:
        """Tensors of one question, or of a list of questions with as many videos or images.

        Args:
            images: A picture (PIL, array [H, W, 3] or path) per question.
            text: The question, or a list of questions.
            videos: A video per question: the path of a file, an array [T, H, W, 3], or a list of pictures one second apart.
            answers: An answer per question, for training; their tokens are the labels.
            question_first: The question stands before the frames, so the model can look for what is asked.

        Raises:
            ValueError: No text, or lists of different lengths.
        """
        if not text:
            raise ValueError("give a question as text")
        one = isinstance(text, str)
        questions = [text] if isinstance(text, str) else list(text)
        columns = {"images": images, "videos": videos, "answers": answers}
        filled = {name: [None] * len(questions) if part is None else [part] if one else list(part) for name, part in columns.items()}
        for name, part in filled.items():
            if len(part) != len(questions):
                raise ValueError(f"{len(questions)} questions, but {len(part)} {name}: give one each")
        samples = [
            self._sample(question, image, video, answer, question_first)
            for question, image, video, answer in zip(questions, filled["images"], filled["videos"], filled["answers"], strict=True)
        ]
        batch = pack(samples, chat_format(self.tokenizer), tokens_per_frame=self.tokens_per_frame)
        names = ("frames", "input_ids", "position_ids", "cu_seqlens", "shown_frames", "visual_positions", "query_sources")
        tensors = {name: getattr(batch, name) for name in names}
        return BatchFeature(tensors if answers is None else tensors | {"labels": batch.labels})

    def frames(self, video: Any) -> np.ndarray:
        """The square frames of a video, uint8 [T, frame_px, frame_px, 3]; see `__call__` for what it may be."""
        if isinstance(video, str | Path):
            rule = FrameRule(frame_px=self.frame_px, fps=self.fps, max_frames=self.max_frames)
            return extract_frames(Path(video).read_bytes(), rule).pixels
        picked = np.unique(np.linspace(0, len(video) - 1, min(len(video), self.max_frames)).round().astype(int))
        return np.stack([self._square(video[index]) for index in picked])

    def _sample(self, question: str, image: Any, video: Any, answer: str | None, question_first: bool) -> Sample:
        frames, media = np.zeros((0, self.frame_px, self.frame_px, 3), np.uint8), []
        if image is not None:
            frames, media = self._square(image)[None], [[0] * self.image_repeats]
        elif video is not None:
            frames = self.frames(video)
            media = [list(range(len(frames)))]
        turn = Turn(encode(self.tokenizer, question.strip()), encode(self.tokenizer, answer.strip()) if answer else [])
        return Sample(key="", source="", frames=frames, media=media, turns=[turn], question_first=question_first and bool(media))

    def _square(self, picture: Any) -> np.ndarray:
        """Short side scaled to `frame_px`, centre cut out: uint8 [frame_px, frame_px, 3]."""
        if isinstance(picture, str | Path):
            picture = Image.open(picture)
        image = (picture if isinstance(picture, Image.Image) else Image.fromarray(np.asarray(picture))).convert("RGB")
        side, (width, height) = self.frame_px, image.size
        scale = side / min(width, height)
        if scale != 1:
            image = image.resize((max(side, round(width * scale)), max(side, round(height * scale))), Image.Resampling.BOX)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        return np.asarray(image.crop((left, top, left + side, top + side)))
