"""Decides what goes into which shard. The samples are in a table on disk (SQLite), so memory does not grow with their number.

Every decision depends only on the samples' content and the settings: which duplicates are dropped, which samples are held out, which
training samples would leak validation data, and the order of the rest.
"""

import csv
import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple, Self

import pyarrow.parquet as pq

from fvlm_core.data.jobs import BadClip
from fvlm_core.data.media import time_window, without_window
from fvlm_core.data.raw_shards import CONTENT, PLACES
from fvlm_core.data.rows import Split
from fvlm_core.data.shard_files import bucket_of, key_of
from fvlm_core.errors import UserError

CACHE_KB = 128 * 1024
"""Size of SQLite's page cache; larger sorts use the disk."""
BATCH_ROWS = 4096
LOCK_S = 60.0
"""How long a process waits for another one that is writing."""
DUPLICATE = "a duplicate of another sample"
LEAK, SAME_VIDEO = "its frames are in validation", "its video is in validation"
NOT_FROZEN = "in validation by its table, but not in the frozen validation set"

SCHEMA = """
CREATE TABLE tar (id INTEGER PRIMARY KEY, download INTEGER, name TEXT);
CREATE TABLE sample (
    ordinal INTEGER PRIMARY KEY, source TEXT, kind TEXT, split TEXT, origin TEXT, content BLOB, text BLOB, unit REAL,
    frames INTEGER, bucket INTEGER, seconds REAL, tar INTEGER, offset INTEGER, size INTEGER, chat TEXT,
    undecided INTEGER, reason TEXT);
CREATE TABLE planned (position INTEGER PRIMARY KEY, ordinal INTEGER, copy INTEGER, key TEXT);
CREATE TABLE unusable (ordinal INTEGER PRIMARY KEY);
CREATE TABLE frozen (source TEXT, content BLOB, text BLOB, PRIMARY KEY (source, content, text)) WITHOUT ROWID;
"""
FIELDS = "source, kind, split, origin, {copy}, chat, download, name, offset, size"
HELD_OUT = "FROM sample WHERE split = 'val' AND reason IS NULL AND ordinal NOT IN (SELECT ordinal FROM unusable)"
INSERT = f"INSERT INTO sample VALUES ({', '.join('?' * 17)})"


class Planned(NamedTuple):
    """A planned sample, and where its frames and texts are."""

    source: str
    kind: str
    split: Split
    origin: str
    copy: int
    """1 for the first sample of a video, 2 for the second, ..."""
    place: tuple[int, str, int, int] | None
    """Number of its download, name of the tar there, offset and size; None for text."""
    chat: str | None
    """JSON of a text sample's turns."""


class Group(NamedTuple):
    """The samples of a source in a split: consecutive positions of the plan."""

    source: str
    split: Split
    first: int
    samples: int


class Plan:
    """The table of samples. Add samples, call `decide` once, then read the plan from any number of processes."""

    def __init__(self, path: Path, *, new: bool) -> None:
        """`new`: start with an empty table, replacing an existing one."""
        if new:
            path.unlink(missing_ok=True)
        # used by one thread at a time, but not always the same one: tokenizers read their training texts from their own thread
        self._db = sqlite3.connect(
            path if new else f"file:{path}?mode=rw", uri=not new, isolation_level=None, timeout=LOCK_S, check_same_thread=False
        )
        # without a journal, because an incomplete plan is rebuilt from scratch
        for pragma in (*(("journal_mode=OFF", "synchronous=OFF") if new else ()), f"cache_size=-{CACHE_KB}", "temp_store=FILE"):
            self._db.execute(f"PRAGMA {pragma}")
        self._db.create_function("video_of", 1, without_window, deterministic=True)  # the scenes of a film belong to one video
        self._db.create_function("key_of", 3, lambda source, origin, copy: key_of(source, numbered(origin, copy)), deterministic=True)
        self._ordinal = 0
        if new:
            self._db.executescript(SCHEMA)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._db.close()

    def add_download(self, number: int, folder: Path) -> None:
        """Add the good samples of a download."""
        tars: dict[str, int] = {}
        with pq.ParquetFile(folder / CONTENT) as contents, pq.ParquetFile(folder / PLACES) as places:
            for content, place in zip(contents.iter_batches(BATCH_ROWS), places.iter_batches(BATCH_ROWS), strict=True):
                rows = [one | where for one, where in zip(content.to_pylist(), place.to_pylist(), strict=True)]
                for name in dict.fromkeys(row["tar"] for row in rows):
                    if name not in tars:
                        tars[name] = self._db.execute("INSERT INTO tar(download, name) VALUES (?, ?)", (number, name)).lastrowid or 0
                self._insert(
                    (
                        *(row[name] for name in ("source", "kind", "split", "origin")),
                        bytes.fromhex(row["frames_sha256"]),
                        bytes.fromhex(row["text_sha256"]),
                        row["num_frames"],
                        row["duration_s"],
                        tars[row["tar"]],
                        row["offset"],
                        row["size"],
                        None,
                    )
                    for row in rows
                )

    def add_texts(self, texts: Iterable[tuple[str, str, str | None, list[dict[str, str]]]]) -> None:
        """Add chats, each as source, split (empty: decided by a hash), identifier (None: its text) and turns."""

        def rows() -> Iterator[tuple]:
            for source, split, origin, turns in texts:
                chat = json.dumps(turns)
                digest = sha256((chat if origin is None else f"{origin} {chat}").encode())
                yield source, "text", split, origin or digest.hexdigest(), digest.digest(), digest.digest(), 0, 0.0, None, None, None, chat

        self._insert(rows())

    def decide(self, share: Callable[[str], float], *, val_samples: int | None, validation: Path | None) -> None:
        """Drop duplicates, hold out the validation set, drop training samples that leak it, and order the rest.

        `share` returns the share of a source's undecided samples to hold out. Raises UserError if a video is in two splits, or if samples
        of the frozen `validation` set are missing.
        """
        self._refuse_torn()
        self._db.execute(
            "UPDATE sample SET reason = ? WHERE ordinal IN (SELECT ordinal FROM (SELECT ordinal, ROW_NUMBER() OVER "
            "(PARTITION BY source, content, text ORDER BY split = 'val' DESC, ordinal) AS copy FROM sample) WHERE copy > 1)",
            (DUPLICATE,),
        )
        if validation:
            self._hold_out_frozen(validation)
        else:
            self._hold_out(share, val_samples)
        self._leave_out_leaks()
        self._db.execute(
            "INSERT INTO planned(ordinal, copy, key) SELECT ordinal, copy, key_of(source, origin, copy) AS key FROM ("
            "SELECT *, ROW_NUMBER() OVER (PARTITION BY source, origin ORDER BY ordinal) AS copy FROM sample WHERE reason IS NULL"
            ") ORDER BY source, split, bucket, seconds, key"
        )

    def groups(self) -> list[Group]:
        """Return the groups of samples by source and split, in the order of the plan."""
        found = self._db.execute("SELECT source, split, COUNT(*) FROM sample WHERE reason IS NULL GROUP BY source, split ORDER BY 1, 2")
        groups, first = [], 1
        for source, split, samples in found:
            groups.append(Group(source, split, first, samples))
            first += samples
        return groups

    def read(self, first: int, samples: int) -> Iterator[Planned]:
        """Yield `samples` planned samples in order, from position `first`."""
        rows = self._db.execute(
            f"SELECT {FIELDS.format(copy='copy')} FROM planned JOIN sample USING (ordinal) "
            "LEFT JOIN tar ON tar.id = tar WHERE position >= ? AND position < ? ORDER BY position",
            (first, first + samples),
        )
        yield from map(_planned, rows)

    def training(self, most: int) -> Iterator[Planned]:
        """Yield at most `most` training samples, in the order in which they were added."""
        rows = self._db.execute(
            f"SELECT {FIELDS.format(copy=1)} FROM sample LEFT JOIN tar ON tar.id = tar "
            "WHERE reason IS NULL AND split = 'train' ORDER BY ordinal LIMIT ?",
            (most,),
        )
        yield from map(_planned, rows)

    def lost(self) -> Iterator[BadClip]:
        """Yield the samples that were left out."""
        rows = self._db.execute("SELECT origin, reason, source FROM sample WHERE reason IS NOT NULL ORDER BY ordinal")
        yield from (BadClip(url=origin, reason=reason, source=source) for origin, reason, source in rows)

    def count_lost(self) -> dict[str, int]:
        """Return how many samples were left out, by reason."""
        return dict(self._db.execute("SELECT reason, COUNT(*) FROM sample WHERE reason IS NOT NULL GROUP BY reason").fetchall())

    def mark_unusable(self, first: int, samples: int, keys: Iterable[str]) -> None:
        """Mark the samples with these keys, in this range of positions, as missing from their shard after it was written."""
        self._db.executemany(
            "INSERT OR IGNORE INTO unusable SELECT ordinal FROM planned WHERE position >= ? AND position < ? AND key = ?",
            ((first, first + samples, key) for key in keys),
        )

    def write_validation(self, path: Path) -> None:
        """Write the validation set by content, one line per sample. `decide` accepts the file as a frozen set."""
        rows = self._db.execute(f"SELECT source, LOWER(HEX(content)), LOWER(HEX(text)) {HELD_OUT} ORDER BY 1, 2, 3")
        with path.open("w", newline="") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(["source", "content", "text"])
            writer.writerows(rows)

    def _insert(self, rows: Iterable[tuple]) -> None:
        """Insert rows of source, kind, split, origin, content, text, frames, seconds, tar, offset, size, chat."""

        def complete() -> Iterator[tuple]:
            for source, kind, split, origin, content, text, frames, seconds, *place in rows:
                self._ordinal += 1
                # all scenes of a film share one hash: if they were in both splits, those in training would be dropped as leaks
                drawn = content if time_window(origin) is None else sha256(without_window(origin).encode()).digest()
                unit = int.from_bytes(drawn[:6], "big") / 2**48
                known = (self._ordinal, source, kind, split, origin, content, text, unit, frames, bucket_of(frames), seconds)
                yield *known, *place, int(not split), None

        self._db.execute("BEGIN")
        self._db.executemany(INSERT, complete())
        self._db.execute("COMMIT")

    def _refuse_torn(self) -> None:
        torn = self._db.execute(
            "SELECT MIN(origin), COUNT(*) FROM (SELECT origin FROM sample WHERE kind != 'text' GROUP BY source, origin "
            "HAVING COUNT(DISTINCT split) > 1)"
        ).fetchone()
        if torn[1]:
            raise UserError(
                f"{torn[1]} videos are in more than one split, e.g. {torn[0]}", where="the table of videos", fix="give each url one split"
            )

    def _hold_out(self, share: Callable[[str], float], most: int | None) -> None:
        """Choose the validation samples by a hash of the content, or of the film for scenes; at least one per source."""
        run = self._db.execute
        undecided = "undecided AND reason IS NULL"
        sources = [source for (source,) in run(f"SELECT DISTINCT source FROM sample WHERE {undecided}").fetchall()]
        run("UPDATE sample SET split = 'train' WHERE undecided")
        least: dict[str, float] = {}
        for source in sources:
            first, last = run(f"SELECT MIN(unit), MAX(unit) FROM sample WHERE {undecided} AND source = ?", (source,)).fetchone()
            if share(source) > 0 and last > first:
                least[source] = first
            run(f"UPDATE sample SET split = 'val' WHERE {undecided} AND source = ? AND unit < ?", (source, share(source)))
        if most is not None:
            given = run("SELECT COUNT(*) FROM sample WHERE split = 'val' AND reason IS NULL AND NOT undecided").fetchone()[0]
            chosen = f"FROM sample WHERE split = 'val' AND {undecided}"
            beyond = run(f"SELECT unit {chosen} ORDER BY unit LIMIT 1 OFFSET ?", (max(0, most - given),)).fetchone()
            if beyond:
                run(f"UPDATE sample SET split = 'train' WHERE split = 'val' AND {undecided} AND unit >= ?", beyond)
        for source, unit in least.items():
            run(f"UPDATE sample SET split = 'val' WHERE {undecided} AND source = ? AND unit = ?", (source, unit))

    def _hold_out_frozen(self, path: Path) -> None:
        run = self._db.execute
        try:
            with path.open(newline="") as stream:
                rows = [(row["source"], bytes.fromhex(row["content"]), bytes.fromhex(row["text"])) for row in csv.DictReader(stream)]
        except (OSError, ValueError, KeyError, TypeError) as error:
            fix = "give the validation.csv of a folder of shards"
            raise UserError(f"not a frozen validation set: {type(error).__name__}: {error}", where=str(path), fix=fix) from error
        self._db.executemany("INSERT OR IGNORE INTO frozen VALUES (?, ?, ?)", rows)
        frozen = "(source, content, text) IN (SELECT source, content, text FROM frozen)"
        run(f"UPDATE sample SET reason = ? WHERE reason IS NULL AND split = 'val' AND NOT {frozen}", (NOT_FROZEN,))
        run("UPDATE sample SET split = 'train' WHERE undecided")
        run(f"UPDATE sample SET split = 'val' WHERE reason IS NULL AND {frozen}")
        self.require_frozen(path)

    def require_frozen(self, path: Path) -> None:
        """Raise UserError if samples of the frozen validation set are missing."""
        run = self._db.execute
        total = run("SELECT COUNT(*) FROM frozen").fetchone()[0]
        there = run(f"SELECT COUNT(*) {HELD_OUT}").fetchone()[0]
        if there < total:
            example = run(
                "SELECT source, LOWER(HEX(content)) FROM frozen WHERE (source, content, text) NOT IN "
                f"(SELECT source, content, text {HELD_OUT}) LIMIT 1"
            ).fetchone()
            raise UserError(
                f"{total - there} of the {total} samples of the frozen validation set are missing, e.g. one of {example[0]}: {example[1]}",
                where=str(path),
                fix="bring back their sources, frame settings and library versions, or freeze another validation set",
            )

    def _leave_out_leaks(self) -> None:
        """Drop training samples with the frames (from any source) or video of a validation sample. Raises RuntimeError if one is left."""
        run = self._db.execute
        run("CREATE INDEX held_out ON sample(content) WHERE split = 'val' AND reason IS NULL")
        leaks = "split = 'train' AND reason IS NULL AND content IN (SELECT content FROM sample WHERE split = 'val' AND reason IS NULL)"
        run(f"UPDATE sample SET reason = ? WHERE {leaks}", (LEAK,))
        run(
            "UPDATE sample SET reason = ? WHERE split = 'train' AND reason IS NULL AND kind != 'text' AND (source, video_of(origin)) IN "
            "(SELECT source, video_of(origin) FROM sample WHERE split = 'val' AND reason IS NULL AND kind != 'text')",
            (SAME_VIDEO,),
        )
        if left := run(f"SELECT COUNT(*) FROM sample WHERE {leaks}").fetchone()[0]:
            raise RuntimeError(f"{left} training samples are in validation too")


def _planned(row: tuple) -> Planned:
    """Convert a row of FIELDS."""
    source, kind, split, origin, copy, chat, *place = row
    return Planned(source, kind, split, origin, copy, None if place[0] is None else (place[0], place[1], place[2], place[3]), chat)


def numbered(origin: str, copy: int) -> str:
    """Return the origin of a video's sample, with `#2`, `#3`, ... for its second, third, ..."""
    return origin if copy == 1 else f"{origin}#{copy}"
