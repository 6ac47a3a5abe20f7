"""The samples to evaluate, selected from the validation split by the seed; the same for every run and mode."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from fvlm_core.config import DataSettings, SourceShare
from fvlm_core.data.batch import PackedBatch, Sample
from fvlm_core.data.frames import ClipError, FrameRule
from fvlm_core.data.loader import val_batches
from fvlm_core.data.shard_io import CorruptSampleError
from fvlm_core.data.shard_set import ShardSet
from fvlm_core.errors import UserError
from fvlm_core.eval.estimates import CLIP, TASK
from fvlm_core.eval.items import Item
from fvlm_core.eval.media import Media, Rendered
from fvlm_core.eval.questions import ClipQuestion

UNPROBED_TASKS = ("caption", "chat")
"""Tasks with free-form answers."""


@dataclass(frozen=True)
class Row:
    """One conversation about one sample, from the shards' index."""

    number: int
    """Row number, the argument of `ShardSet.read` and `ShardSet.record`."""
    source: str
    kind: str
    task: str
    key: str
    conversation: int

    @property
    def probed(self) -> bool:
        return self.task not in UNPROBED_TASKS


class ValidationSplit:
    """The validation split of a set of shards."""

    def __init__(self, shards: ShardSet, *, image_repeats: int, seed: int, workers: int = 0) -> None:
        """`workers` is the number of processes that read batches. Raises UserError if the shards have no validation samples."""
        self.shards, self.image_repeats, self.seed, self.workers = shards, image_repeats, seed, workers
        table = shards.rows("val")
        columns = zip(table.index, table["source"], table["kind"], table["task"], table["key"], table["conversation"], strict=True)
        self.rows = [Row(int(number), source, kind, task, key, int(turn)) for number, source, kind, task, key, turn in columns]
        self._last: tuple[str, np.ndarray | None] = ("", None)
        if not self.rows:
            raise UserError("the shards have no validation samples", where=str(shards.folder), fix="make shards with a validation split")

    def loss_batches(self, n_samples: int, *, tokens_per_frame: int, batch_samples: int) -> Iterator[PackedBatch]:
        """Batches for the validation loss, the same for every recipe: equal shares of all sources, half of the questions before the frames,
        labels on answers only."""
        sources = sorted({row.source for row in self.rows})
        data = DataSettings(
            mixture=[SourceShare(source=source, share=1 / len(sources)) for source in sources],
            loss_on="answers",
            image_repeats=self.image_repeats,
            workers=self.workers,
        )
        return val_batches(self.shards, n_samples, data, tokens_per_frame=tokens_per_frame, batch_samples=batch_samples)

    def captions(self, n: int, *, small_px: int | None = None) -> list[ClipQuestion]:
        """Up to `n` clips and images with captions as answers, spread evenly over their sources.

        With `small_px`, frames that the shards store as tiles plus a small frame of this size are not assembled
        (`fvlm_core.data.tiles.TiledSample`).
        """
        return [self._question(row, small_px) for row in self._pick((row for row in self.rows if row.task == "caption"), n)]

    def items(self, n: int) -> list[Item]:
        """Up to `n` multiple-choice questions, spread evenly over their sources; questions about one clip are adjacent."""
        items = []
        for row in self._pick((row for row in self.rows if row.probed), n):
            turn, probe = self._conversation(row)
            if probe and probe.get("choices"):
                groups = {CLIP: row.key, TASK: f"{row.source}/{row.task}"}
                media = Rendered(row.key, partial(self._frames, row), image=row.kind == "image")
                name = f"{row.key}/{row.conversation}"
                items.append(Item(name, media, turn["question"], probe["choices"], probe["answer_index"], groups=groups))
        return items

    def places(self, n: int) -> list[ClipQuestion]:
        """Up to `n` questions about places in videos."""
        questions = [self._question(row) for row in self._pick(self._asked_videos(), n)]
        return [question for question in questions if question.cells]

    def places_of_one_clip(self, n: int) -> list[ClipQuestion]:
        """Up to `n` questions about different places in one clip: the first clip with `n` such questions, or with the most."""
        rows = self._asked_videos()
        counts = Counter(row.key for row in rows)
        enough = min(n, max(counts.values(), default=0))
        key = next((row.key for row in rows if counts[row.key] >= enough), None)
        questions = [self._question(row) for row in self._pick((row for row in rows if row.key == key), n)]
        return [question for question in questions if question.cells]

    def clips(self, n: int) -> list[ClipQuestion]:
        """Up to `n` different videos, spread evenly over their sources, each with one of its questions."""
        order = np.random.default_rng(self.seed).permutation(len(self.rows))
        one_each = {row.key: row for row in (self.rows[index] for index in order) if row.kind == "video"}
        return [self._question(row) for row in self._pick(one_each.values(), n)]

    def _asked_videos(self) -> list[Row]:
        return [row for row in self.rows if row.probed and row.kind == "video"]

    def _question(self, row: Row, small_px: int | None = None) -> ClipQuestion:
        """A row as a question, which comes before the frames unless it asks for a caption and so does not say where to look."""
        turn, probe = self._conversation(row)
        cells = [(int(r), int(c)) for r, c in (probe or {}).get("cells") or []]
        return ClipQuestion(
            sample=replace(self._read(row) if small_px is None else self._read_tiled(row, small_px), question_first=row.task != "caption"),
            question=turn["question"],
            answer=turn["answer"],
            cells=cells if cells and len(cells) == len(turn["answer"]) else None,
        )

    def _pick(self, rows: Iterable[Row], n: int) -> list[Row]:
        """Up to `n` rows, spread evenly over sources, drawn at random within each source, returned in shard order."""
        by_source: dict[str, list[Row]] = {}
        for row in sorted(rows, key=lambda row: row.number):
            by_source.setdefault(row.source, []).append(row)
        groups = [by_source[source] for source in sorted(by_source)]
        rng = np.random.default_rng(self.seed)
        chosen: list[Row] = []
        for index, group in enumerate(sorted(groups, key=len)):  # small sources first: larger ones make up for their shortfall
            wanted = (n - len(chosen)) // (len(groups) - index)
            chosen.extend(group[place] for place in rng.permutation(len(group))[:wanted])
        return sorted(chosen, key=lambda row: row.number)

    def _conversation(self, row: Row) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """The last turn of a row's conversation, and its probe (choices, answer and cells), if any."""
        try:
            record = self.shards.record(row.number)
        except CorruptSampleError as error:
            raise self._damaged(row, error) from error
        return record["conversations"][row.conversation][-1], record["probes"][row.conversation]

    def _frames(self, row: Row, side: int) -> np.ndarray:
        """The frames of a row, uint8 [T, side, side, 3]."""
        try:
            frames = self.shards.read(row.number, image_repeats=1).frames
        except CorruptSampleError as error:
            raise ClipError(str(error)) from error
        return Media(frames, []).load(FrameRule(side), 1).frames

    def _read(self, row: Row) -> Sample:
        """Read a sample. Consecutive questions about the same clip share its frames array, so that a batch encodes them once."""
        key, frames = self._last
        try:
            sample = self.shards.read(row.number, image_repeats=self.image_repeats, frames=frames if key == row.key else None)
        except CorruptSampleError as error:
            raise self._damaged(row, error) from error
        self._last = row.key, sample.frames
        return sample

    def _read_tiled(self, row: Row, small_px: int) -> Sample:
        try:
            return self.shards.read_tiled(row.number, image_repeats=self.image_repeats, small_px=small_px)
        except CorruptSampleError as error:
            raise self._damaged(row, error) from error

    def _damaged(self, row: Row, error: CorruptSampleError) -> UserError:
        return UserError(f"validation sample {row.key} is damaged: {error}", where=str(self.shards.folder), fix="make the shards again")
