"""A contact sheet of shards: frames with their questions and answers, as an HTML page and as a picture."""

import base64
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from fvlm_core.canvas import WIDTH, canvas
from fvlm_core.data.frames import encode_jpeg
from fvlm_core.data.rows import Split
from fvlm_core.data.shard_set import ShardSet
from fvlm_core.errors import UserError

MOST_FRAMES = 8
"""Maximum number of frames shown per sample, evenly spaced."""
CHARACTERS = 600
"""Maximum length of a sample's text in the picture."""
LINE = 78


@dataclass(frozen=True)
class Shown:
    """A sample of the contact sheet."""

    record: dict[str, Any]
    frames: Sequence[np.ndarray]
    """uint8 [H, W, 3] each, at most MOST_FRAMES."""
    numbers: Sequence[int]
    """Index of each shown frame among the sample's frames."""

    @property
    def title(self) -> str:
        """Source, kind and size of the sample."""
        record = self.record
        count, video = record["num_frames"], record["kind"] == "video"
        size = f", {count} {'frame' if video else 'image'}{'s' * (count != 1)}" if count else ""
        return f"{record['source']}: {record['kind']}{size}" + (f", {record['duration_s']:.1f} s" if video else "")

    @property
    def text(self) -> str:
        """Questions and answers, one per line."""
        parts = [
            f"{mark} {turn[part]}"
            for turns in self.record["conversations"]
            for turn in turns
            for mark, part in (("Q:", "question"), ("A:", "answer"), ("Rejected:", "rejected"))
            if part in turn
        ]
        return "\n".join(parts)

    @property
    def pictures(self) -> list[str]:
        """The frames as data URLs."""
        return [f"data:image/jpeg;base64,{base64.b64encode(encode_jpeg(frame)).decode()}" for frame in self.frames]


def choose(shards: ShardSet, split: Split, *, source: str | None, samples: int) -> list[Shown]:
    """Choose up to `samples` samples of each source (or of one) in a split, evenly spaced in shard order: short ones first.

    Raises UserError if there are no samples of that source.
    """
    rows: Any = shards.rows(split, source)
    if rows.empty:
        known = ", ".join(shards.manifest.names(split)) or "none"
        raise UserError(f"there are no samples of {source or 'any source'} in {split}", where=str(shards.folder), fix=f"use one of {known}")
    firsts = rows.drop_duplicates("key")
    made: list[Shown] = []
    for _, mine in firsts.groupby("source"):
        places = np.unique(np.linspace(0, len(mine) - 1, min(samples, len(mine))).round().astype(int))
        made += [_shown(shards, int(row)) for row in mine.index[places]]
    return made


def page(shown: Sequence[Shown], title: str) -> str:
    """Render the sheet as one HTML page with embedded pictures."""
    environment = Environment(
        loader=PackageLoader("fvlm_core.data"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("look.html.j2").render(title=title, shown=shown, zip=zip)


def picture(shown: Sequence[Shown], path: Path) -> None:
    """Draw the sheet as a PNG: one row per sample, frames on the left, text on the right."""
    with canvas(path, (WIDTH + 4, 1.7 * len(shown))) as figure:
        grid = figure.add_gridspec(len(shown), MOST_FRAMES + 6)
        for row, one in enumerate(shown):
            for column, (frame, number) in enumerate(zip(one.frames, one.numbers, strict=True)):
                axes = figure.add_subplot(grid[row, column])
                axes.imshow(frame)
                axes.set_anchor("N")
                axes.set_axis_off()
                axes.set_title(str(number), fontsize=7)
            axes = figure.add_subplot(grid[row, MOST_FRAMES:])
            axes.set_axis_off()
            words = textwrap.shorten(one.text.replace("\n", " / "), CHARACTERS, placeholder=" ...")
            text = "\n".join([one.title, *textwrap.wrap(words, LINE)])
            axes.text(0, 1, text, va="top", fontsize=7, parse_math=False)


def _shown(shards: ShardSet, row: int) -> Shown:
    sample, record = shards.read(row, image_repeats=1), shards.record(row)
    count = len(sample.frames)
    numbers = np.unique(np.linspace(0, count - 1, min(MOST_FRAMES, count)).round().astype(int)).tolist() if count else []
    return Shown(record, [sample.frames[number] for number in numbers], numbers)
