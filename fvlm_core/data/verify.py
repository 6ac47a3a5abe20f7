"""Verifies a folder of shards completely: every file's digest, every entry of the index, and every frame and text."""

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq

from fvlm_core.data.batch import ChatFormat
from fvlm_core.data.jobs import INDEX_FILE, ShardManifest
from fvlm_core.data.rows import SPLITS
from fvlm_core.data.shard_set import CorruptSampleError, ShardSet
from fvlm_core.errors import UserError
from fvlm_core.settings import Settings

DataFrame = Any
"""A pandas.DataFrame. Type checkers do not know its groups and columns."""
PLACES = ("json_offset", "json_size", "frame_offsets", "frame_sizes")


class Verified(Settings):
    """What was checked, and the problems found."""

    files: int
    shards: int
    samples: int
    problems: list[str]
    """One line each: the file, the sample if it concerns only one, and the reason."""


def verify(folder: Path) -> Verified:
    """Read and check everything in a folder of shards.

    Raises UserError if the folder has no manifest or no readable index.
    """
    manifest = ShardManifest.read(folder)
    problems = manifest.problems(folder)
    shards = ShardSet(folder)
    rows: DataFrame = pd.concat([shards.rows(split) for split in SPLITS])
    places = pq.read_table(folder / INDEX_FILE, columns=list(PLACES))
    by_shard = rows.groupby("shard", sort=True)
    for name, mine in by_shard:
        problems += [f"{name}: {problem}" for problem in _shard_problems(shards, str(name), mine, places)]
    named = {entry.path for entry in manifest.files if entry.path.endswith(".tar")}
    problems += [f"{name}: its samples are not in the index" for name in sorted(named - set(rows["shard"]))]
    problems += list(_count_problems(manifest, rows))
    return Verified(files=len(manifest.files), shards=len(by_shard), samples=rows["key"].nunique(), problems=problems)


def _count_problems(manifest: ShardManifest, rows: DataFrame) -> Iterator[str]:
    """Yield the counts in which the manifest and the index differ."""
    for source in manifest.sources:
        mine = rows[(rows["source"] == source.name) & (rows["split"] == source.split)]
        found = {"samples": mine["key"].nunique(), "conversations": len(mine), "tokens": int(mine["n_tokens"].sum())}
        for name, number in found.items():
            if number != getattr(source, name):
                yield f"{INDEX_FILE}: {number} {name} of {source.name} in {source.split}, the manifest has {getattr(source, name)}"


def _shard_problems(shards: ShardSet, name: str, rows: DataFrame, places: Any) -> Iterator[str]:
    try:
        with tarfile.open(shards.folder / name) as archive:
            members = {(member.offset_data, member.size): member.name for member in archive}
    except (OSError, tarfile.TarError) as error:
        yield f"not a readable tar: {error}"
        return
    claimed: set[tuple[int, int]] = set()
    for key, sample in rows.groupby("key", sort=False):
        first = int(sample.index[0])
        where = places.slice(first, 1).to_pylist()[0]
        wanted = {(where["json_offset"], where["json_size"]): f"{key}.json"}
        frames = zip(where["frame_offsets"], where["frame_sizes"], strict=True)
        wanted |= {place: f"{key}.{number:03d}.jpg" for number, place in enumerate(frames)}
        claimed |= set(wanted)
        if any(members.get(place) != member for place, member in wanted.items()):
            yield f"{key}: the index points elsewhere than at its files"
        try:
            record = shards.record(first)
            yield from (f"{key}: {problem}" for problem in _record_problems(record, sample, shards.chat))
            if int(sample["conversation"].iloc[0]) < len(record["conversations"]):
                shards.read(first, image_repeats=1)
        except CorruptSampleError as error:
            yield f"{key}: {error}"
        except UserError as error:
            yield error.what
            return
    if unknown := [member for place, member in members.items() if place not in claimed]:
        yield f"{len(unknown)} files are not in the index, e.g. {unknown[0]}"


def _record_problems(record: dict[str, Any], rows: DataFrame, chat: ChatFormat) -> Iterator[str]:
    """Yield the differences between a sample's index rows and its JSON."""
    head = rows.iloc[0]
    for name in ("key", "source", "kind", "duration_s"):
        if record.get(name) != head[name]:
            yield f"the index has the {name} {head[name]}, its JSON {record.get(name)}"
    if record.get("num_frames") != head["n_frames"]:
        yield f"the index has {head['n_frames']} frames, its JSON {record.get('num_frames')}"
    chats = record["conversations"]
    if sorted(rows["conversation"]) != list(range(len(chats))):
        yield f"the index has the conversations {sorted(rows['conversation'])}, its JSON {len(chats)}"
        return
    template = len(chat.user_open) + len(chat.user_close) + len(chat.assistant_open) + len(chat.assistant_close)
    for number, tokens in zip(rows["conversation"], rows["n_tokens"], strict=True):
        turns = chats[number]
        answers = sum(max(len(turn["answer_ids"]), len(turn.get("rejected_ids", ()))) for turn in turns)
        found = len(chat.system) + answers + sum(len(turn["question_ids"]) + template for turn in turns)
        if found != tokens:
            yield f"the index has {tokens} tokens in conversation {number}, its JSON {found}"
