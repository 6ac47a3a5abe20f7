"""Reads samples from shards: random access through the index, one read per sample, frames decoded in place by libjpeg-turbo."""

import json
from collections.abc import Callable, Iterable
from copy import copy
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg
from transformers import PreTrainedTokenizerBase

from fvlm_core.config import DataSettings, StagingSettings
from fvlm_core.data.arrow import pc
from fvlm_core.data.batch import ChatFormat, Sample, Turn
from fvlm_core.data.jobs import INDEX_FILE, TOKENIZER_FOLDER, ShardManifest
from fvlm_core.data.rows import Split
from fvlm_core.data.shard_io import CorruptSampleError, ShardFile, spans
from fvlm_core.data.staging import Staging
from fvlm_core.data.tiles import TiledFrame, TiledFrames, TiledSample
from fvlm_core.data.tokenizer import chat_format, load_tokenizer
from fvlm_core.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

OPEN_SHARDS = 256
"""Maximum number of open tars."""
MEMBER_COLUMNS = ("json_offset", "json_size", "frame_offsets", "frame_sizes")

Bytes = bytes | memoryview


class ShardSet:
    """The shards of a folder with a ShardManifest. A row is one (sample, conversation), identified by its row number in the index."""

    def __init__(self, folder: Path, staging: StagingSettings | None = None) -> None:
        """`staging`: where local copies of shards are kept; None reads the shards in place.

        Raises UserError if the folder has no manifest or no readable index.
        """
        self.folder = Path(folder)
        self.manifest = ShardManifest.read(self.folder)
        try:
            self._table = pq.read_table(self.folder / INDEX_FILE)
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(
                f"the index cannot be read: {error}", where=str(self.folder / INDEX_FILE), fix="make the shards again"
            ) from error
        shard = self._table["shard"].combine_chunks().dictionary_encode()
        self.shard_names: list[str] = shard.dictionary.to_pylist()
        self.shard_numbers = shard.indices.to_numpy()
        """int32 [rows]: index into `shard_names`."""
        self._conversations, self._json_offsets, self._json_sizes, self.n_frames, self.n_tokens = (
            self._table[name].to_numpy() for name in ("conversation", "json_offset", "json_size", "n_frames", "n_tokens")
        )
        self.is_caption = pc.equal(self._table["task"], "caption").to_numpy()
        self._offsets, self._sizes = (self._table[name].combine_chunks() for name in ("frame_offsets", "frame_sizes"))
        self._read_from(staging)

    def __reduce__(self) -> tuple:
        """Pickle only the folder and settings: loader processes open the folder themselves."""
        return ShardSet, (self.folder, self.staging_settings)

    def staged(self, settings: StagingSettings | None) -> "ShardSet":
        """Return the same shards, sharing the tables, with these staging settings."""
        if settings == self.staging_settings:
            return self
        other = copy(self)
        other._read_from(settings)
        return other

    def _read_from(self, staging: StagingSettings | None) -> None:
        self.staging_settings = staging
        self.staging = Staging(self.folder, self.manifest, staging) if staging else None
        self._open = lru_cache(maxsize=OPEN_SHARDS)(self._opened)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.folder / TOKENIZER_FOLDER)

    @cached_property
    def chat(self) -> ChatFormat:
        return chat_format(self.tokenizer)

    @cached_property
    def sample_numbers(self) -> np.ndarray:
        """int32 [rows]: the number of each row's sample. Conversations about the same frames have the same number."""
        return self._table["key"].combine_chunks().dictionary_encode().indices.to_numpy()

    def row_numbers(self, split: Split, source: str) -> np.ndarray:
        """Return the numbers of a source's rows in a split: int64, ascending."""
        chosen = pc.and_(pc.equal(self._table["split"], split), pc.equal(self._table["source"], source))
        return np.flatnonzero(chosen.to_numpy())

    def sequence_tokens(self, *, image_repeats: int, tokens_per_frame: int) -> np.ndarray:
        """int64 [rows]: length of each row's packed sequence, with text and visual tokens."""
        image = pc.equal(self._table["kind"], "image").to_numpy()
        return self.n_tokens + self.n_frames.astype(np.int64) * np.where(image, image_repeats, 1) * tokens_per_frame

    @cached_property
    def _frame(self) -> "pd.DataFrame":
        return self._table.drop_columns(list(MEMBER_COLUMNS)).to_pandas()

    def rows(self, split: Split, source: str | None = None) -> "pd.DataFrame":
        """Return the rows of a split (and source) in shard order. The DataFrame's index holds the row numbers for `read` and `record`.

        Columns: split, source, kind, task, shard, key, conversation, n_frames, n_tokens, n_answer_tokens, duration_s.
        """
        chosen = self._frame["split"] == split
        return self._frame.loc[chosen & (self._frame["source"] == source) if source else chosen]

    def record(self, row: int) -> dict[str, Any]:
        """Return the sample's JSON. Raises CorruptSampleError."""
        content = self._file(row).read(int(self._json_offsets[row]), int(self._json_sizes[row]))
        return _parse(content)

    def fetch(self, rows: Iterable[int]) -> dict[int, Bytes]:
        """Return the bytes of samples, by row.

        Neighbours in a shard are read with one request, and all requests are announced before the first read blocks. Samples that cannot
        be read are left out; `read` raises the reason.
        """
        by_shard: dict[int, dict[int, tuple[int, int]]] = {}
        for row in dict.fromkeys(rows):
            by_shard.setdefault(int(self.shard_numbers[row]), {})[row] = self._place(row)
        requests = [(self._open(shard), span, wanted) for shard, places in by_shard.items() for span, wanted in spans(places)]
        for file, (start, end), _ in requests:
            file.announce(start, end - start)
        contents: dict[int, Bytes] = {}
        for file, (start, end), wanted in requests:
            try:
                content = memoryview(file.read(start, end - start))
            except CorruptSampleError:
                continue
            contents |= {row: content[first - start : last - start] for row, (first, last) in wanted.items()}
        return contents

    def read(
        self,
        row: int,
        *,
        image_repeats: int,
        question_first: bool = False,
        label_questions: bool = False,
        content: Bytes | None = None,
        frames: Callable[[int], np.ndarray] | np.ndarray | None = None,
    ) -> Sample:
        """Return the row's conversation with its frames; an image is shown `image_repeats` times. Raises CorruptSampleError.

        `content`: the sample's bytes, if `fetch` returned them. `frames`: the decoded frames, if another conversation about them was read
        before, or a function that returns the array, uint8 [n, S, S, 3], into which n frames are decoded.
        """
        offsets, sizes = self._offsets[row].values.to_numpy(), self._sizes[row].values.to_numpy()
        first, end = self._place(row)
        if content is None:
            content = self._file(row).read(first, end - first)
        start = int(self._json_offsets[row])
        record = _parse(content[start - first :])
        try:
            turns = [
                Turn(turn["question_ids"], turn["answer_ids"], turn.get("rejected_ids"))
                for turn in record["conversations"][self._conversations[row]]
            ]
            key, source, is_image = record["key"], record["source"], record["kind"] == "image"
        except (KeyError, IndexError, TypeError) as error:
            raise CorruptSampleError(f"its JSON lacks {error}") from error
        if not isinstance(frames, np.ndarray):
            side = self.manifest.frame_px
            frames = np.empty((len(offsets), side, side, 3), np.uint8) if frames is None else frames(len(offsets))
            for frame, offset, size in zip(frames, (offsets - first).tolist(), sizes.tolist(), strict=True):
                _decode(content[offset : offset + size], frame)
        shown = [[index] * image_repeats for index in range(len(frames))] if is_image else [list(range(len(frames)))]
        return Sample(key, source, frames, shown if len(frames) else [], turns, question_first, label_questions)

    def read_tiled(self, row: int, *, image_repeats: int, small_px: int) -> Sample:
        """Like `read`, but returns a TiledSample, with only its small frames decoded, if the frames are stored as tiles.

        This requires small frames of `small_px`; otherwise the frames are decoded in full.
        """
        first, end = self._place(row)
        content = self._file(row).read(first, end - first)
        places = zip((self._offsets[row].values.to_numpy() - first).tolist(), self._sizes[row].values.to_numpy().tolist(), strict=True)
        try:
            stored = [TiledFrame.parse(content[offset : offset + size]) for offset, size in places]
            frames = [frame for frame in stored if frame is not None and frame.side == self.manifest.frame_px]
            small = [simplejpeg.decode_jpeg(frame.small, "RGB") for frame in frames]
        except ValueError as error:
            raise CorruptSampleError(f"a frame is damaged: {error}") from error
        if not frames or len(frames) < len(stored) or any(picture.shape[:2] != (small_px, small_px) for picture in small):
            return self.read(row, image_repeats=image_repeats, content=content)
        sample = self.read(row, image_repeats=image_repeats, content=content, frames=np.stack(small))
        return TiledSample(**vars(sample), tiles=TiledFrames(frames, f"{self.shard_names[self.shard_numbers[row]]}, sample {sample.key}"))

    def _opened(self, shard: int) -> ShardFile:
        return ShardFile(self.folder / self.shard_names[shard], self.staging)

    def _file(self, row: int) -> ShardFile:
        return self._open(int(self.shard_numbers[row]))

    def _place(self, row: int) -> tuple[int, int]:
        """Byte range of a sample's members in its shard: they are consecutive, with the JSON last."""
        start = int(self._json_offsets[row])
        first = self._offsets[row].values
        return (first[0].as_py() if len(first) else start), start + int(self._json_sizes[row])

    def longest_sequence(self, data: DataSettings, *, tokens_per_frame: int) -> int:
        """Return the tokens of the longest packed sample of the training and validation mixtures, to check against a model's context."""
        chosen = [part.source for part in [*data.mixture, *data.held_out.mixture] if part.share > 0]
        known = pc.is_in(self._table["source"], pa.array(chosen)).to_numpy()
        tokens = self.sequence_tokens(image_repeats=data.image_repeats, tokens_per_frame=tokens_per_frame)
        return int(tokens[known].max(initial=0))


def _parse(content: Bytes) -> dict[str, Any]:
    try:
        return json.loads(bytes(content))
    except ValueError as error:
        raise CorruptSampleError(f"its JSON is damaged: {error}") from error


def _decode(jpeg: Bytes, out: np.ndarray) -> None:
    """Decode a stored frame, with all its tiles if it has any, into `out`, uint8 [S, S, 3]."""
    try:
        tiles = TiledFrame.parse(jpeg)
        height, width = (tiles.side, tiles.side) if tiles else simplejpeg.decode_jpeg_header(jpeg)[:2]
        if (height, width) != out.shape[:2]:
            raise CorruptSampleError(f"a frame is {width}x{height}, not {out.shape[1]}x{out.shape[0]}")
        if tiles:
            tiles.decode(out)
        else:
            simplejpeg.decode_jpeg(jpeg, "RGB", buffer=out)
    except ValueError as error:
        raise CorruptSampleError(f"a frame is damaged: {error}") from error
