"""Shards to read from: random access through the index, one read per sample, frames decoded by libjpeg-turbo."""

import json
import os
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg
from transformers import PreTrainedTokenizerBase

from fvlm_core.config import DataSettings
from fvlm_core.data.batch import ChatFormat, Sample, Turn
from fvlm_core.data.jobs import INDEX_FILE, TOKENIZER_FOLDER, ShardManifest
from fvlm_core.data.rows import Split
from fvlm_core.data.tokenizer import chat_format, load_tokenizer
from fvlm_core.errors import UserError

OPEN_SHARDS = 256
"""Tars kept open at a time."""
MEMBER_COLUMNS = ("json_offset", "json_size", "frame_offsets", "frame_sizes")


class CorruptSampleError(Exception):
    """A sample whose bytes are not what the index promises."""


class ShardSet:
    """The shards of a ShardManifest's folder. A row is one (sample, conversation), named by its number in the index."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError if the folder has no manifest or no readable index."""
        self.folder = Path(folder)
        self.manifest = ShardManifest.read(self.folder)
        try:
            self._table = pq.read_table(self.folder / INDEX_FILE)
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(
                f"the index cannot be read: {error}", where=str(self.folder / INDEX_FILE), fix="make the shards again"
            ) from error
        self._shards = self._table["shard"].to_pylist()
        self._conversations, self._json_offsets, self._json_sizes, self.n_frames, self.n_tokens = (
            self._table[name].to_numpy() for name in ("conversation", "json_offset", "json_size", "n_frames", "n_tokens")
        )
        self.is_caption = np.array([task == "caption" for task in self._table["task"].to_pylist()])
        self._offsets, self._sizes = (self._table[name].combine_chunks() for name in ("frame_offsets", "frame_sizes"))
        self._open = lru_cache(maxsize=OPEN_SHARDS)(lambda name: _ShardFile(self.folder / name))

    def __reduce__(self) -> tuple:
        """Loader processes open the folder themselves."""
        return ShardSet, (self.folder,)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.folder / TOKENIZER_FOLDER)

    @cached_property
    def chat(self) -> ChatFormat:
        return chat_format(self.tokenizer)

    @cached_property
    def sample_numbers(self) -> np.ndarray:
        """Per row, int32, the number of its sample: equal for all conversations about the same frames."""
        return self._table["key"].combine_chunks().dictionary_encode().indices.to_numpy()

    @cached_property
    def _frame(self) -> pd.DataFrame:
        return self._table.drop_columns(list(MEMBER_COLUMNS)).to_pandas()

    def rows(self, split: Split, source: str | None = None) -> pd.DataFrame:
        """Rows of a split (and source) in shard order; its index holds the row numbers that `read` and `record` take.

        Columns: split, source, kind, task, shard, key, conversation, n_frames, n_tokens, n_answer_tokens, duration_s.
        """
        chosen = self._frame["split"] == split
        return self._frame.loc[chosen & (self._frame["source"] == source) if source else chosen]

    def record(self, row: int) -> dict[str, Any]:
        """The sample's JSON. Raises CorruptSampleError."""
        content = self._open(self._shards[row]).read(int(self._json_offsets[row]), int(self._json_sizes[row]))
        return _parse(content)

    def read(self, row: int, *, image_repeats: int, question_first: bool = False, label_questions: bool = False) -> Sample:
        """The row's conversation with its frames; an image is shown `image_repeats` times. Raises CorruptSampleError."""
        offsets, sizes = self._offsets[row].values.to_numpy(), self._sizes[row].values.to_numpy()
        start, end = int(self._json_offsets[row]), int(self._json_offsets[row] + self._json_sizes[row])
        first = int(offsets[0]) if len(offsets) else start
        content = self._open(self._shards[row]).read(first, end - first)  # the members are neighbours: one read gets them all
        record = _parse(content[start - first :])
        side = self.manifest.frame_px
        frames = np.empty((len(offsets), side, side, 3), np.uint8)
        for frame, offset, size in zip(frames, offsets - first, sizes, strict=True):
            _decode(content[offset : offset + size], frame)
        try:
            turns = [
                Turn(turn["question_ids"], turn["answer_ids"], turn.get("rejected_ids"))
                for turn in record["conversations"][self._conversations[row]]
            ]
            shown = [[index] * image_repeats for index in range(len(frames))] if record["kind"] == "image" else [list(range(len(frames)))]
            return Sample(
                key=record["key"],
                source=record["source"],
                frames=frames,
                media=shown if len(frames) else [],
                turns=turns,
                question_first=question_first,
                label_questions=label_questions,
            )
        except (KeyError, IndexError, TypeError) as error:
            raise CorruptSampleError(f"its JSON lacks {error}") from error

    def longest_sequence(self, data: DataSettings, *, tokens_per_frame: int) -> int:
        """Tokens of the longest packed sample of what is trained and validated on; to be checked against a model's context."""
        chosen = self._frame["source"].isin([part.source for part in [*data.mixture, *data.held_out.mixture]]).to_numpy()
        repeats = np.where(self._frame["kind"] == "image", data.image_repeats, 1)
        return int((self.n_tokens + self.n_frames * repeats * tokens_per_frame)[chosen].max(initial=0))


class _ShardFile:
    """An open tar, closed when nobody uses it any more."""

    def __init__(self, path: Path) -> None:
        self.descriptor = -1
        try:
            self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise UserError(f"a shard cannot be opened: {error.strerror}", where=str(path), fix="make the shards again") from error

    def read(self, offset: int, size: int) -> bytes:
        content = os.pread(self.descriptor, size, offset)
        if len(content) < size:
            raise CorruptSampleError("the shard ends within the sample")
        return content

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


def _parse(content: bytes) -> dict[str, Any]:
    try:
        return json.loads(content)
    except ValueError as error:
        raise CorruptSampleError(f"its JSON is damaged: {error}") from error


def _decode(jpeg: bytes, out: np.ndarray) -> None:
    """Decode into `out`, uint8 [S, S, 3]."""
    try:
        height, width = simplejpeg.decode_jpeg_header(jpeg)[:2]
        if (height, width) != out.shape[:2]:
            raise CorruptSampleError(f"a frame is {width}x{height}, not {out.shape[1]}x{out.shape[0]}")
        simplejpeg.decode_jpeg(jpeg, "RGB", buffer=out)
    except ValueError as error:
        raise CorruptSampleError(f"a frame is damaged: {error}") from error
