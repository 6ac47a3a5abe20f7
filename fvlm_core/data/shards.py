"""Builds the shards that training reads from downloads and texts: drops duplicates, splits, tokenises, orders and indexes.

`python -m fvlm_core.data.shards job.yaml`. The output depends only on the settings and the inputs' content: it is byte-identical,
regardless of the order in which videos arrived and of the number of processes. The plan (`shard_plan`) is made first, on disk. Each shard
is then written separately, so a killed job resumes with the missing shards, and memory does not grow with the number of samples.
"""

import json
import shutil
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import cast

from transformers import PreTrainedTokenizerBase

from fvlm_core.cli import run_job
from fvlm_core.data.frames import FrameRule
from fvlm_core.data.jobs import (
    INDEX_FILE,
    LEFT_OUT_FILE,
    TOKENIZER_FOLDER,
    VALIDATION_FILE,
    DownloadManifest,
    ShardJob,
    ShardManifest,
    SourceCounts,
)
from fvlm_core.data.parent import end_with_parent
from fvlm_core.data.raw_shards import read_sample
from fvlm_core.data.rejected import RejectedSamples
from fvlm_core.data.rows import SPLITS, Kind, Split
from fvlm_core.data.shard_files import ShardSample, shard_name, sum_counts, write_shard
from fvlm_core.data.shard_parts import ShardPart, write_index
from fvlm_core.data.shard_plan import DUPLICATE, LEAK, SAME_VIDEO, Plan, Planned, numbered
from fvlm_core.data.sources.record import Record, read_rows
from fvlm_core.data.text import text_chats
from fvlm_core.data.tiles import tiled
from fvlm_core.data.tokenizer import chat_format, load_tokenizer, render_chat, train_tokenizer
from fvlm_core.errors import UserError
from fvlm_core.manifest import FileEntry, file_entries, sha256_file, write_atomically
from fvlm_core.progress import Progress
from fvlm_core.settings import hash_json

WORK, PLAN, PLANNED = "work", "plan.sqlite", "planned.json"
"""In the job's folder while it runs: the work folder, with the plan, the plan's identity (written last), and a file per finished shard."""
TOKENIZER_CHATS = 100_000
"""Maximum number of conversations that a tokenizer is trained on."""
AHEAD = 2
"""Shards queued per process."""


@dataclass(frozen=True)
class Task:
    """A shard to write: consecutive samples of the plan."""

    split: Split
    name: str
    first: int
    samples: int


def make_shards(job: ShardJob) -> ShardManifest:
    """Write the folder of shards. Raises UserError if the downloads do not fit together or contain no samples."""
    started = time.monotonic()
    inputs, rule = _inputs(job)
    job.output.mkdir(parents=True, exist_ok=True)
    _plan(job, inputs)
    counts: list[SourceCounts] = []
    tars: list[FileEntry] = []
    too_long = 0
    with Plan(job.output / WORK / PLAN, new=False) as plan, RejectedSamples(job.output / LEFT_OUT_FILE) as rejected:
        for clip in (clip for folder in job.downloads for clip in DownloadManifest.read(folder).bad):
            rejected.add(clip)
        for clip in plan.lost():
            rejected.add(clip)
        left_out = plan.count_lost()
        tasks = list(_tasks(plan, job))
        if not tasks:
            raise UserError("the downloads hold no samples", where=", ".join(map(str, job.downloads)), fix="look into their bad.csv")
        vocab_size = _tokenizer(job, plan)
        progress = Progress(job.output, sum(task.samples for task in tasks))

        def written() -> Iterator[Path]:
            nonlocal too_long
            done = 0
            for task, part in _write(job, tasks):
                if part.counts:
                    counts.append(part.counts)
                    tars.append(FileEntry(path=task.name, bytes=part.counts.bytes, sha256=part.sha256))
                for clip in part.dropped:
                    rejected.add(clip)
                too_long += len(part.dropped)
                plan.mark_unusable(task.first, task.samples, part.unusable)
                done += task.samples
                progress.update(done, note="samples")
                yield _part(job, task)

        write_index(written(), job.output / INDEX_FILE)
        if job.validation:
            plan.require_frozen(job.validation)
        plan.write_validation(job.output / VALIDATION_FILE)
    manifest = ShardManifest(
        name="shards",
        settings_hash=job.hash(exclude={"output", "downloads", "texts"}),
        inputs=inputs,
        counts={
            "samples": sum(source.samples for source in counts),
            "frames": sum(source.frames for source in counts),
            "text_tokens": sum(source.tokens for source in counts),
            "too_long": too_long,
            "leaks": left_out.get(LEAK, 0) + left_out.get(SAME_VIDEO, 0),
            "duplicates": left_out.get(DUPLICATE, 0),
        },
        files=[
            *tars,
            *file_entries(job.output, [f"{TOKENIZER_FOLDER}/*", INDEX_FILE]),
            *file_entries(job.output, [VALIDATION_FILE, LEFT_OUT_FILE], identity=False),
        ],
        sources=sum_counts(counts),
        frame_px=rule.frame_px,
        fps=rule.fps,
        max_frames=rule.max_frames,
        vocab_size=vocab_size,
        validation_digest=sha256_file(job.output / VALIDATION_FILE),
        lost=rejected.counts,
        bad=rejected.first,
        seconds=time.monotonic() - started,
    ).write(job.output)
    shutil.rmtree(job.output / WORK, ignore_errors=True)
    return manifest


def _inputs(job: ShardJob) -> tuple[dict[str, str], FrameRule]:
    """Return the digests of the inputs, and the rule that chose their frames. Raises UserError if downloads differ in that rule."""
    digests: dict[str, str] = {}
    rules: set[FrameRule] = set()
    for number, folder in enumerate(job.downloads):
        manifest = DownloadManifest.read(folder)  # one at a time: each lists the videos that failed
        digests[f"download-{number}"] = manifest.digest
        rules.add(FrameRule(manifest.frame_px, manifest.fps, manifest.max_frames))
    if len(rules) != 1:
        raise UserError(
            f"frames of {len(rules)} different kinds in {len(job.downloads)} downloads",
            where="downloads",
            fix="give at least one download, and make all with the same frame_px, fps and max_frames",
        )
    digests |= {f"text-{number}": Record.read_folder(folder).digest for number, folder in enumerate(job.texts)}
    if job.validation:
        digests["validation"] = sha256_file(job.validation) if job.validation.is_file() else ""
    (rule,) = rules
    if job.tiles and (rule.frame_px % job.tiles.px or rule.frame_px % job.tiles.small_px):
        what = f"frames of {rule.frame_px} px are not cut into tiles of {job.tiles.px} px and small frames of {job.tiles.small_px} px"
        raise UserError(what, where="shards.tiles", fix="give sizes that divide the frame's side")
    return digests, rule


def _plan(job: ShardJob, inputs: dict[str, str]) -> None:
    """Make the plan, unless an interrupted job with the same inputs and settings left one, perhaps with finished shards."""
    work = job.output / WORK
    identity = hash_json([inputs, job.hash(exclude={"output", "downloads", "texts"})]).encode()
    if (work / PLANNED).is_file() and (work / PLANNED).read_bytes() == identity:
        return
    for folder in (WORK, TOKENIZER_FOLDER, *SPLITS):
        shutil.rmtree(job.output / folder, ignore_errors=True)
    work.mkdir()
    with Plan(work / PLAN, new=True) as plan:
        for number, folder in enumerate(job.downloads):
            plan.add_download(number, folder)
        if job.exercises:
            chats = text_chats(job.seed, job.exercises.train, job.exercises.val)
            name = job.exercises.name
            plan.add_texts((name, split, f"{split}-{number}", [turn]) for split, number, turn in chats)
        for folder in job.texts:
            plan.add_texts(_chats(folder))

        def share(source: str) -> float:
            return job.val_shares.get(source, job.val_share)

        plan.decide(share, val_samples=job.val_samples, validation=job.validation)
    write_atomically(work / PLANNED, identity)


def _chats(folder: Path) -> Iterator[tuple[str, str, None, list[dict[str, str]]]]:
    """Yield the chats of a text source's record, each identified by its text."""
    for batch in read_rows(folder, ["source", "split", "conversations"]):
        for row in batch.to_pylist():
            for chat in json.loads(row["conversations"]):
                yield row["source"], row["split"], None, chat


def _tasks(plan: Plan, job: ShardJob) -> Iterator[Task]:
    """Yield the shards in the order of the index."""
    for source, split, first, samples in plan.groups():
        for number, start in enumerate(range(0, samples, job.samples_per_shard)):
            name = shard_name(split, source, number)
            yield Task(split, name, first + start, min(job.samples_per_shard, samples - start))


def _tokenizer(job: ShardJob, plan: Plan) -> int:
    """Load or train the tokenizer and save it in the folder; returns its size."""
    if job.tokenizer is not None:
        tokenizer = load_tokenizer(job.tokenizer)
    else:
        assert job.vocab_size is not None
        samples = (_sample(job, one) for one in plan.training(TOKENIZER_CHATS))
        chats = (render_chat(turns) for sample in samples for turns in sample.conversations)
        tokenizer = train_tokenizer(islice(chats, TOKENIZER_CHATS), job.vocab_size)
    tokenizer.save_pretrained(str(job.output / TOKENIZER_FOLDER))
    return len(tokenizer)


def _write(job: ShardJob, tasks: list[Task]) -> Iterator[tuple[Task, ShardPart]]:
    """Write the missing shards. Yields all shards in order, with what is known about them."""
    if job.processes == 1:
        for task in tasks:
            yield task, _finished(job, task) or _write_one(job, task)
        return
    waiting: deque[tuple[Task, ShardPart | Future[ShardPart]]] = deque()
    with ProcessPoolExecutor(job.processes, mp_context=get_context("spawn"), initializer=end_with_parent) as pool:
        for task in tasks:
            waiting.append((task, _finished(job, task) or pool.submit(_write_one, job, task)))
            if len(waiting) > AHEAD * job.processes:
                yield _next(waiting)
        while waiting:
            yield _next(waiting)


def _next(waiting: deque[tuple[Task, ShardPart | Future[ShardPart]]]) -> tuple[Task, ShardPart]:
    task, part = waiting.popleft()
    return task, part.result() if isinstance(part, Future) else part


def _finished(job: ShardJob, task: Task) -> ShardPart | None:
    return ShardPart.read(_part(job, task), job.output / task.name)


def _part(job: ShardJob, task: Task) -> Path:
    """Path of the file that describes a finished shard."""
    return job.output / WORK / f"{task.name}.parquet"


def _write_one(job: ShardJob, task: Task) -> ShardPart:
    tokenizer = _loaded(job.output / TOKENIZER_FOLDER)
    with Plan(job.output / WORK / PLAN, new=False) as plan:
        planned = list(plan.read(task.first, task.samples))
    samples = (_sample(job, one) for one in planned)
    shard = write_shard(job.output, task.name, samples, tokenizer, chat_format(tokenizer), max_text_tokens=job.max_text_tokens)
    return ShardPart.write(shard, _part(job, task))


@cache
def _loaded(folder: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(folder)


def _sample(job: ShardJob, planned: Planned) -> ShardSample:
    """Read a planned sample."""
    origin = numbered(planned.origin, planned.copy)
    if planned.chat is not None:
        return ShardSample(planned.source, "text", planned.split, origin, [json.loads(planned.chat)], [None])
    assert planned.place is not None
    download, tar, offset, size = planned.place
    raw = read_sample(job.downloads[download] / tar, offset, size)
    record = raw.record
    return ShardSample(
        source=planned.source,
        kind=cast(Kind, planned.kind),
        split=planned.split,
        origin=origin,
        conversations=json.loads(record["conversations"]),
        probes=json.loads(record["probes"]),
        caption=record["caption"],
        duration_s=record["duration_s"],
        num_frames=record["num_frames"],
        frames=lambda: _frames(job, raw.frames, f"{job.downloads[download] / tar}, {planned.origin}"),
        extra=json.loads(record["extra"]),
    )


def _frames(job: ShardJob, jpegs: list[bytes], where: str) -> list[bytes]:
    """Return a sample's frames as they are stored in the shard."""
    if job.tiles is None:
        return jpegs
    try:
        return [tiled(jpeg, job.tiles.px, job.tiles.small_px) for jpeg in jpegs]
    except ValueError as error:
        raise UserError(f"a frame is damaged: {error}", where=where, fix="delete that download and run again") from error


if __name__ == "__main__":
    run_job(ShardJob, make_shards)
