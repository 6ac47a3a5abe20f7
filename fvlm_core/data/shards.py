"""Makes the shards that training reads out of downloads and text: splits, tokens, order, index.

`python -m fvlm_core.data.shards job.yaml`. Everything written is a function of the settings and of the inputs' content: byte
for byte the same, whatever the order in which videos arrived.
"""

import json
import shutil
import time
from collections.abc import Iterable, Iterator
from hashlib import blake2b, sha256
from itertools import islice
from pathlib import Path
from typing import cast

from transformers import PreTrainedTokenizerBase

from fvlm_core.cli import run_job
from fvlm_core.data.fetch import RAW
from fvlm_core.data.jobs import SHARD_FILES, TOKENIZER_FOLDER, BadClip, DownloadManifest, ShardJob, ShardManifest
from fvlm_core.data.raw_shards import RawSample, read_samples
from fvlm_core.data.rows import Kind, Split
from fvlm_core.data.shard_files import ShardSample, write_shards
from fvlm_core.data.sources.record import Record, read_rows
from fvlm_core.data.text import text_chats
from fvlm_core.data.tokenizer import load_tokenizer, render_chat, train_tokenizer
from fvlm_core.errors import UserError
from fvlm_core.manifest import file_entries
from fvlm_core.progress import Progress

TOKENIZER_CHATS = 100_000
"""Conversations that a tokenizer is trained on, at most."""


def make_shards(job: ShardJob) -> ShardManifest:
    """Write the folder of shards. Raises UserError for downloads that do not fit together or leave nothing."""
    started = time.monotonic()
    downloads = {f"download-{number}": (folder, DownloadManifest.read(folder)) for number, folder in enumerate(job.downloads)}
    sizes = {(manifest.frame_px, manifest.fps) for _, manifest in downloads.values()}
    if len(sizes) != 1:
        raise UserError(
            f"{len(sizes)} different frame sizes or rates in {len(downloads)} downloads",
            where="downloads",
            fix="give at least one download, and make all with the same frame_px and fps",
        )
    (frame_px, fps), *_ = sizes
    bad = [clip for _, manifest in downloads.values() for clip in manifest.bad]
    raws = [raw for folder, _ in downloads.values() for raw in read_samples(folder / RAW)]
    samples, leaks = _without_leaks(_with_splits(raws, job))
    if job.exercises:
        for split, number, turn in text_chats(job.seed, job.exercises.train, job.exercises.val):
            samples.append(ShardSample(job.exercises.name, "text", split, f"{split}-{number}", [[turn]], [None]))
    texts = {f"text-{number}": (folder, Record.read_folder(folder)) for number, folder in enumerate(job.texts)}
    for folder, _ in texts.values():
        samples.extend(_text_samples(folder, job))
    if not samples:
        raise UserError("the downloads hold no samples", where=", ".join(map(str, job.downloads)), fix="look into their bad.csv")
    shutil.rmtree(job.output / TOKENIZER_FOLDER, ignore_errors=True)
    tokenizer = _tokenizer(job, samples)
    progress = Progress(job.output, len(samples))
    counts, dropped = write_shards(
        job.output,
        samples,
        tokenizer,
        samples_per_shard=job.samples_per_shard,
        max_text_tokens=job.max_text_tokens,
        on_sample=lambda done: progress.update(done, note="samples"),
    )
    return ShardManifest(
        name="shards",
        settings_hash=job.hash(exclude={"output", "downloads", "texts"}),
        inputs={name: made.digest for name, (_, made) in (downloads | texts).items()},
        counts={
            "samples": sum(source.samples for source in counts),
            "frames": sum(source.frames for source in counts),
            "text_tokens": sum(source.tokens for source in counts),
            "too_long": len(dropped),
            "leaks": len(leaks),
        },
        files=file_entries(job.output, SHARD_FILES),
        sources=counts,
        frame_px=frame_px,
        fps=fps,
        vocab_size=len(tokenizer),
        bad=[*bad, *leaks, *dropped],
        seconds=time.monotonic() - started,
    ).write(job.output)


def choose_split(origins: Iterable[str], val_share: float) -> dict[str, Split]:
    """A split for every origin: validation where its hash falls below the share, and in any case (of two or more) for the least."""
    hashes = {origin: int.from_bytes(blake2b(origin.encode(), digest_size=8).digest(), "big") / 2**64 for origin in origins}
    chosen: dict[str, Split] = {origin: "val" if value < val_share else "train" for origin, value in hashes.items()}
    if len(chosen) > 1 and val_share > 0 and "val" not in chosen.values():
        chosen[min(hashes, key=lambda origin: hashes[origin])] = "val"
    return chosen


def _with_splits(raws: list[RawSample], job: ShardJob) -> Iterator[tuple[RawSample, Split]]:
    """Every sample with its split: its table's, or by hash. Raises UserError if a source has one url in both."""
    given: dict[tuple[str, str], set[str]] = {}
    undecided: dict[str, set[str]] = {}
    for raw in raws:
        source, origin, split = (raw.record[name] for name in ("source", "origin", "split"))
        given.setdefault((source, origin), set()).add(split)
        if not split:
            undecided.setdefault(source, set()).add(origin)
    if torn := [origin for (_, origin), splits in given.items() if len(splits) > 1]:
        raise UserError(
            f"{len(torn)} videos are in more than one split, e.g. {torn[0]}", where="the table of videos", fix="give a url one split"
        )
    chosen = {source: choose_split(sorted(origins), _val_share(job, source)) for source, origins in undecided.items()}
    for raw in raws:
        split: Split = raw.record["split"] or chosen[raw.record["source"]][raw.record["origin"]]
        yield raw, split


def _without_leaks(raws: Iterator[tuple[RawSample, Split]]) -> tuple[list[ShardSample], list[BadClip]]:
    """Samples, without training samples whose frames are in validation too."""
    hashed: list[tuple[RawSample, Split, str]] = [(raw, split, raw.frames_hash()) for raw, split in raws]
    held_out = {frames for _, split, frames in hashed if split == "val"}
    samples: list[ShardSample] = []
    leaks: list[BadClip] = []
    seen: dict[tuple[str, str], int] = {}
    for raw, split, frames in hashed:
        source, origin = raw.record["source"], raw.record["origin"]
        if split == "train" and frames in held_out:
            leaks.append(BadClip(url=origin, reason="its frames are in validation"))
            continue
        seen[source, origin] = seen.get((source, origin), 0) + 1
        samples.append(_video_sample(raw, split, copy=seen[source, origin]))
    return samples, leaks


def _video_sample(raw: RawSample, split: Split, *, copy: int) -> ShardSample:
    """`copy`: 1 for a video's first row, 2 for its second, ..."""
    record = raw.record
    return ShardSample(
        source=record["source"],
        kind=cast(Kind, record["kind"]),
        split=split,
        origin=record["origin"] if copy == 1 else f"{record['origin']}#{copy}",
        conversations=json.loads(record["conversations"]),
        probes=json.loads(record["probes"]),
        caption=record["caption"],
        duration_s=record["duration_s"],
        num_frames=record["num_frames"],
        frames=raw.read_frames,
        extra=json.loads(record["extra"]),
    )


def _text_samples(folder: Path, job: ShardJob) -> Iterator[ShardSample]:
    """The different chats of a text source's record, by the hash of their text."""
    chats: dict[tuple[str, str], tuple[str, list[dict[str, str]]]] = {}
    for batch in read_rows(folder, ["source", "split", "conversations"]):
        columns = batch.to_pydict()
        for source, split, conversations in zip(columns["source"], columns["split"], columns["conversations"], strict=True):
            for chat in json.loads(conversations):
                chats.setdefault((source, sha256(json.dumps(chat).encode()).hexdigest()), (split, chat))
    origins: dict[str, list[str]] = {}
    for source, origin in sorted(chats):
        origins.setdefault(source, []).append(origin)
    chosen = {source: choose_split(hashes, _val_share(job, source)) for source, hashes in origins.items()}
    for (source, origin), (split, chat) in sorted(chats.items()):
        yield ShardSample(source, "text", cast(Split, split or chosen[source][origin]), origin, [chat], [None])


def _val_share(job: ShardJob, source: str) -> float:
    return job.val_shares.get(source, job.val_share)


def _tokenizer(job: ShardJob, samples: list[ShardSample]) -> PreTrainedTokenizerBase:
    if job.tokenizer is not None:
        return load_tokenizer(job.tokenizer)
    assert job.vocab_size is not None
    chats = (render_chat(turns) for sample in samples if sample.split == "train" for turns in sample.conversations)
    return train_tokenizer(islice(chats, TOKENIZER_CHATS), job.vocab_size)


if __name__ == "__main__":
    run_job(ShardJob, make_shards)
