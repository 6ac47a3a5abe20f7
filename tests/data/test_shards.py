import csv
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fvlm_core.data import gaze
from fvlm_core.data.frames import FrameRule, encode_jpeg
from fvlm_core.data.jobs import INDEX_FILE, LEFT_OUT_FILE, VALIDATION_FILE, DownloadManifest, ShardJob, ShardManifest, Source
from fvlm_core.data.raw_shards import CONTENT, write_contents
from fvlm_core.data.rows import SPLITS
from fvlm_core.data.shard_files import ShardSample, write_shards
from fvlm_core.data.shard_plan import DUPLICATE, NOT_FROZEN, Plan
from fvlm_core.data.shard_set import ShardSet
from fvlm_core.data.shards import make_shards
from fvlm_core.data.sources.record import make_record, record_folder
from fvlm_core.data.text import split_of, text_chats
from fvlm_core.data.tokenizer import train_tokenizer
from fvlm_core.data.verify import verify
from fvlm_core.errors import UserError
from fvlm_core.manifest import file_entries
from tests.tiny import tiny_shards


def files_of(folder):
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()
    }


def test_shards_are_the_same_bytes_wherever_they_are_made(tmp_path):
    one, two = (tiny_shards(tmp_path / name, clips=6) for name in ("one", "two"))
    different = {name for name, digest in files_of(one).items() if files_of(two)[name] != digest}
    assert different <= {"manifest.json"}  # it says when
    assert ShardManifest.read(one).digest == ShardManifest.read(two).digest
    assert ShardManifest.read(tiny_shards(tmp_path / "three", clips=6, seed=1)).digest != ShardManifest.read(one).digest


def test_webdataset_reads_what_the_index_says(tmp_path):
    folder = tiny_shards(tmp_path, clips=20)
    shards = ShardSet(folder)
    seen = 0
    for path in sorted(folder.glob("*/*.tar")):
        rows = shards.rows(path.parent.name).query("shard == @name", local_dict={"name": f"{path.parent.name}/{path.name}"})
        assert rows["key"].nunique() <= 16
        for sample in webdataset.WebDataset(str(path), shardshuffle=False):
            mine = rows[rows["key"] == sample["__key__"]]
            record = json.loads(sample["json"])
            assert len(mine) == len(record["conversations"])
            assert shards.record(int(mine.index[0])) == record
            jpegs = [sample[f"{number:03d}.jpg"] for number in range(record["num_frames"])]
            decoded = shards.read(int(mine.index[0]), image_repeats=1).frames
            for jpeg, frame in zip(jpegs, decoded, strict=True):
                assert (np.asarray(Image.open(io.BytesIO(jpeg))) == frame).all()
            seen += len(mine)
    assert seen == len(shards.rows("train")) + len(shards.rows("val"))
    with tarfile.open(next(folder.glob("train/*.tar"))) as archive:
        assert {(member.mtime, member.uid, member.uname) for member in archive} == {(0, 0, "")}


def test_counts_in_the_manifest(tmp_path):
    shards = ShardSet(tiny_shards(tmp_path, clips=5))
    for source in shards.manifest.sources:
        rows = shards.rows(source.split, source.name)
        assert (source.samples, source.conversations, source.tokens) == (rows["key"].nunique(), len(rows), rows["n_tokens"].sum())
        assert source.frames == rows.drop_duplicates("key")["n_frames"].sum()
    assert shards.manifest.names("val") == ["gaze_caption", "gaze_cell", "gaze_image", "text"]
    assert shards.manifest.vocab_size == len(shards.tokenizer)


def sample(number, *, seconds=1, question="Why?", answer="Because."):
    frames = [encode_jpeg(np.full((8, 8, 3), 40 * index, np.uint8)) for index in range(seconds)]
    return ShardSample(
        "clips",
        "video",
        "train",
        f"{number}.mp4",
        [[{"question": question, "answer": answer}]],
        [None],
        answer,
        float(seconds),
        seconds,
        lambda: frames,
    )


def test_order_is_by_bucket_then_duration_whatever_the_arrival(tmp_path):
    tokenizer = train_tokenizer(["Why? Because."], 300)
    samples = [sample(number, seconds=1 + number % 7) for number in range(30)]
    write_shards(tmp_path / "one", samples, tokenizer, samples_per_shard=8)
    write_shards(tmp_path / "two", reversed(samples), tokenizer, samples_per_shard=8)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    rows = pd.read_parquet(tmp_path / "one" / INDEX_FILE)
    assert rows["duration_s"].is_monotonic_increasing
    assert rows["shard"].nunique() == 4


def test_too_long_conversations_are_left_out_and_listed(tmp_path):
    tokenizer = train_tokenizer(["Why? Because."], 300)
    long = sample(1, answer="Because. " * 100)
    mixed = ShardSample("clips", "video", "train", "2.mp4", [*long.conversations, *sample(2).conversations], [{"task": "x"}, {"task": "y"}])
    counts, dropped = write_shards(tmp_path, [sample(0), long, mixed], tokenizer, max_text_tokens=80)
    assert [source.samples for source in counts] == [2]
    reason = "1 conversations of more than 80 text tokens"
    assert {(clip.url, clip.reason) for clip in dropped} == {("1.mp4", reason), ("2.mp4", reason)}
    rows = pd.read_parquet(tmp_path / INDEX_FILE)
    assert rows["n_tokens"].max() <= 80
    assert rows.query("task == 'y'")["conversation"].tolist() == [0]  # as in the JSON, where it is now the first


def test_generated_text_keeps_validation_questions_to_itself():
    chats = list(text_chats(0, 2000, 200))
    train, val = ({turn["question"] for split, _, turn in chats if split == wanted} for wanted in ("train", "val"))
    assert not train & val
    assert all(split_of(turn["question"]) == split for split, _, turn in chats)
    assert [split for split, _, _ in chats].count("val") == 200
    assert chats == list(text_chats(0, 2000, 200)) != list(text_chats(1, 2000, 200))


@given(st.integers(0, 1000))
def test_generated_text_is_right(seed):
    words = dict(zip(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"], range(10), strict=True))
    for _, _, turn in text_chats(seed, 14, 0):
        question, answer = turn["question"].rstrip(".?").replace(",", "").split(), turn["answer"]
        match question:
            case ["Repeat", digits]:
                assert answer == digits
            case ["Reverse", digits]:
                assert answer == "".join(reversed(digits))
            case ["Sort", digits]:
                assert list(answer) == sorted(digits)
            case ["What", "is", left, "plus", right]:
                assert int(answer) == int(left) + int(right)
            case ["Write", left, "and", right, "as", "words"]:
                assert [words[word] for word in answer.split()] == [int(left), int(right)]
            case ["Write", *numbers, "in", "digits"]:
                assert [words[word] for word in numbers] == [int(digit) for digit in answer]
            case ["Which", "colour", "is", place, "in", *names]:
                assert answer == names[["first", "second", "third"].index(place)]
            case _:
                pytest.fail(f"unknown exercise: {turn}")


RULE = FrameRule(gaze.FRAME_PX)


def raw_download(folder: Path, rows: list[dict], *, rule: FrameRule = RULE) -> Path:
    """What a download leaves, written directly; a row's `grey` is the brightness of its one frame."""
    (folder / "raw" / "0").mkdir(parents=True)
    outcomes = []
    with tarfile.open(folder / "raw" / "0" / "00000.tar", "w") as archive:
        for number, row in enumerate(rows):
            grey = row.pop("grey", number)
            defaults = {
                "source": "videos",
                "kind": "video",
                "split": "",
                "caption": f"clip {number}",
                "origin": f"{number}.mp4",
                "extra": "{}",
            }
            record = defaults | {"row": number, "num_frames": 1, "duration_s": 1.0, "status": "success"} | row
            record |= {"conversations": json.dumps([[{"question": "What?", "answer": record["caption"]}]]), "probes": "[null]"}
            members = {
                "000.jpg": encode_jpeg(np.full((rule.frame_px, rule.frame_px, 3), grey, np.uint8)),
                "json": json.dumps(record).encode(),
            }
            outcomes.append({"row": record["row"], "status": record["status"], "error_message": None})
            if record["status"] != "success":
                del members["000.jpg"]
            for suffix, content in members.items():
                info = tarfile.TarInfo(f"{number:08d}.{suffix}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    pq.write_table(pa.Table.from_pylist(outcomes), folder / "raw" / "0" / "00000.parquet")
    write_contents(folder)
    files = file_entries(folder, [CONTENT])
    DownloadManifest(
        name="download", settings_hash="", files=files, frame_px=rule.frame_px, fps=rule.fps, max_frames=rule.max_frames
    ).write(folder)
    return folder


def job(tmp_path, *downloads, **changes):
    return ShardJob(output=tmp_path / "shards", downloads=list(downloads), vocab_size=300, **changes)


def test_failed_rows_are_dropped_and_splits_kept(tmp_path):
    rows = [{"split": "val"}, {"split": "train"}, {"status": "failed_to_download"}, *({"source": "other"} for _ in range(30))]
    manifest = make_shards(job(tmp_path, raw_download(tmp_path / "download", rows), val_share=0.2))
    counted = {(source.name, source.split): source.samples for source in manifest.sources}
    assert counted["videos", "train"] == counted["videos", "val"] == 1
    assert 1 <= counted["other", "val"] <= 15
    assert counted["other", "val"] + counted["other", "train"] == 30
    assert manifest.problems(tmp_path / "shards") == []
    assert set(ShardSet(tmp_path / "shards").rows("train")["task"]) == {"caption"}


def test_a_tar_that_lost_samples_is_deleted_and_named(tmp_path):
    """tarfile takes a header that is not the first and no header for the end."""
    download = raw_download(tmp_path / "download", [{} for _ in range(4)])
    tar = download / "raw" / "0" / "00000.tar"
    with tarfile.open(tar) as archive:
        place = archive.getmembers()[4].offset
    with tar.open("r+b") as stream:
        stream.seek(place)
        stream.write(b"\xff" * tarfile.BLOCKSIZE)
    with pytest.raises(RuntimeError, match=r"deleted: raw/0/00000\.tar"):
        write_contents(download)
    assert not list((download / "raw" / "0").iterdir())


def test_frames_are_stored_as_tiles_where_that_is_asked_for(tmp_path):
    """The same pictures, and another set of shards; without the setting, the settings are what they were before there was one."""
    download = raw_download(tmp_path / "download", [{"grey": 40 * number} for number in range(6)])
    plain, other = job(tmp_path / "plain", download), job(tmp_path / "tiled", download, tiles={"px": 14, "small_px": 21})
    assert "tiles" not in plain.identity_values()
    manifests = [make_shards(one) for one in (plain, other)]
    assert manifests[0].settings_hash != manifests[1].settings_hash
    assert verify(other.output).problems == []
    shards = [ShardSet(one.output) for one in (plain, other)]
    for split in SPLITS:
        for row in shards[0].rows(split).index:
            plainly, tiled = (one.read(int(row), image_repeats=1).frames.astype(int) for one in shards)
            assert np.abs(plainly - tiled).max() <= 4
    with pytest.raises(UserError, match="42 px are not cut into tiles of 15 px"):
        make_shards(job(tmp_path / "wrong", download, tiles={"px": 15, "small_px": 21}))


def test_training_clip_with_a_validation_clips_frames_is_left_out(tmp_path):
    rows = [{"split": "val", "grey": 7}, {"split": "train", "grey": 7, "origin": "copy.mp4"}, {"split": "train", "grey": 9}]
    manifest = make_shards(job(tmp_path, raw_download(tmp_path / "download", rows)))
    assert manifest.counts["leaks"] == 1
    assert [(clip.url, clip.reason) for clip in manifest.bad] == [("copy.mp4", "its frames are in validation")]
    assert manifest.counts["samples"] == 2


def test_duplicates_are_left_out_and_counted(tmp_path):
    """Equal frames and texts under whatever address, in one download or two; equal frames with another caption stay."""
    same = {"grey": 7, "caption": "the same"}
    one = raw_download(tmp_path / "one", [{**same}, {**same, "origin": "copy.mp4"}, {"grey": 7, "caption": "another"}, {}])
    two = raw_download(tmp_path / "two", [{**same, "origin": "mirror.mp4"}, {"source": "other", **same}])
    manifest = make_shards(job(tmp_path, one, two))
    assert manifest.counts["duplicates"] == 2
    assert [(loss.source, loss.reason, loss.samples) for loss in manifest.lost] == [("videos", DUPLICATE, 2)]
    assert [clip.url for clip in manifest.bad] == ["copy.mp4", "mirror.mp4"]
    assert manifest.counts["samples"] == 4
    with (tmp_path / "shards" / LEFT_OUT_FILE).open() as stream:
        assert [row["origin"] for row in csv.DictReader(stream)] == ["copy.mp4", "mirror.mp4"]


@given(st.lists(st.tuples(st.integers(0, 60), st.sampled_from(["", "train", "val"])), min_size=2, max_size=60), st.floats(0, 1), st.data())
def test_no_content_is_in_both_splits_whatever_is_added(rows, share, data):
    """Every sample is in one split or listed as left out; what is added later moves none but the one that stood in for an empty split."""

    def planned(rows, folder, most=None):
        with Plan(Path(folder) / "plan.sqlite", new=True) as plan:
            plan.add_texts(("talk", split, None, [{"question": str(number), "answer": "."}]) for number, split in rows)
            plan.decide(lambda source: share, val_samples=most, validation=None)
            kept = {one.origin: one.split for one in plan.read(1, len(rows))}
            assert len(kept) + len(list(plan.lost())) == len(rows)
            assert sum(group.samples for group in plan.groups()) == len(kept)
            return kept

    with tempfile.TemporaryDirectory() as folder:
        before = planned(rows, folder)
        assert len(before) == len({number for number, _ in rows}), "one of each content"
        undecided = {number for number, _ in rows} - {number for number, split in rows if split}
        if len(undecided) > 1 and share > 0:
            assert "val" in before.values()
        after = planned([*rows, *data.draw(st.lists(st.tuples(st.integers(61, 80), st.just("")), max_size=5))], folder)
        assert sum(before[origin] != after[origin] for origin in before) <= 1
        held = planned(rows, folder, most=3)
        given_val = len({number for number, split in rows if split == "val"})
        assert list(held.values()).count("val") <= max(3, given_val) + 1


def test_a_frozen_validation_set_stays_when_data_comes_and_goes(tmp_path):
    rows = [{} for _ in range(40)]
    first = make_shards(job(tmp_path, raw_download(tmp_path / "some", rows), val_share=0.2))
    frozen = tmp_path / "frozen.csv"
    frozen.write_bytes((tmp_path / "shards" / VALIDATION_FILE).read_bytes())
    held_out = len(frozen.read_text().splitlines()) - 1
    assert 1 < held_out < 30

    more = raw_download(tmp_path / "more", [*({} for _ in range(80)), {"split": "val", "grey": 200}, {"split": "train", "grey": 201}])
    grown = make_shards(job(tmp_path, more, val_share=0.2))
    assert grown.validation_digest != first.validation_digest
    held = make_shards(job(tmp_path, more, val_share=0.2, validation=frozen))
    assert held.validation_digest == first.validation_digest
    assert held.counts["samples"] == 81
    assert [loss.reason for loss in held.lost] == [NOT_FROZEN]
    assert sum(source.samples for source in held.sources if source.split == "val") == held_out

    with pytest.raises(UserError, match=rf"\d+ of the {held_out} samples of the frozen validation set are missing"):
        make_shards(job(tmp_path, raw_download(tmp_path / "fewer", [{} for _ in range(4)]), validation=frozen))
    frozen.write_text("no,such,columns\n1,2,3\n")
    with pytest.raises(UserError, match="not a frozen validation set"):
        make_shards(job(tmp_path, more, validation=frozen))


def test_two_processes_write_the_same_bytes_as_one(tmp_path):
    download = raw_download(tmp_path / "download", [{"duration_s": float(number % 9)} for number in range(60)])
    digests = [
        make_shards(job(tmp_path / str(processes), download, samples_per_shard=7, processes=processes)).digest for processes in (1, 2)
    ]
    assert digests[0] == digests[1]
    one, two = (files_of(tmp_path / name / "shards") for name in ("1", "2"))
    assert {name for name in one if one[name] != two[name]} <= {"manifest.json", "progress.json"}
    assert one.keys() == two.keys()


def test_killed_shards_go_on_with_those_that_are_missing(tmp_path):
    """Killed while it writes: the bytes of one that was never stopped, and finished tars are not written again."""
    rows = [{} for _ in range(120)]
    download = raw_download(tmp_path / "download", rows)
    whole = make_shards(job(tmp_path / "whole", download, samples_per_shard=4))
    settings = job(tmp_path / "killed", download, samples_per_shard=4)
    settings.to_yaml(tmp_path / "job.yaml")
    command = [sys.executable, "-c", SLOW_SHARDS, str(tmp_path / "job.yaml")]
    process = subprocess.Popen(command)
    shards = tmp_path / "killed" / "shards"
    _wait(lambda: len(list(shards.glob("*/*.tar"))) >= 3)
    process.kill()
    process.wait()
    assert not (shards / "manifest.json").exists()
    known = {f"{path.parent.name}/{path.stem}" for path in (shards / "work").glob("*/*.parquet")}
    assert 2 <= len(known) < 30
    written = {shards / name: (shards / name).stat().st_mtime_ns for name in known}
    made = make_shards(settings)
    assert made.digest == whole.digest
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert not (shards / "work").exists()
    assert not list(shards.rglob("*.part"))


SLOW_SHARDS = """
import sys, time
from fvlm_core.data import shards
write = shards._write_one
def slowly(job, task):
    time.sleep(0.2)
    return write(job, task)
shards._write_one = slowly
shards.run_job(shards.ShardJob, shards.make_shards)
"""
"""The job with a pause before every shard, so that a kill can land between two."""


def _wait(condition, *, limit_s=60):
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def test_scenes_of_one_film_are_of_one_split(tmp_path):
    """Films are held out, not scenes, so none is left out for its film's sake."""
    films = [f"data/train-0.parquet#row={film}" for film in range(20)]
    rows = [
        {"origin": f"{film}&t={scene},{scene + 1}", "grey": 12 * number + scene} for number, film in enumerate(films) for scene in range(12)
    ]
    manifest = make_shards(job(tmp_path, raw_download(tmp_path / "download", rows), val_share=0.2))
    shards = ShardSet(tmp_path / "shards")
    sides = [{shards.record(row)["origin"].split("&")[0] for row in shards.rows(split).index} for split in ("train", "val")]
    assert len(sides[0]) > 10
    assert sides[1]
    assert not sides[0] & sides[1]
    assert manifest.lost == []
    assert manifest.counts["samples"] == len(rows)


def test_one_video_with_two_captions_is_two_samples_of_one_split(tmp_path):
    rows = [{"origin": "a.mp4", "caption": caption} for caption in ("one", "two")] + [{} for _ in range(20)]
    make_shards(job(tmp_path, raw_download(tmp_path / "download", rows), val_share=0.5))
    shards = ShardSet(tmp_path / "shards")
    found = [(split, shards.record(row)["caption"]) for split in ("train", "val") for row in shards.rows(split).index]
    splits = {split for split, caption in found if caption in ("one", "two")}
    assert len(splits) == 1
    assert {"one", "two"} <= {caption for _, caption in found}


def test_chats_of_a_record(tmp_path):
    chats = [{"messages": [{"role": "user", "content": f"Say {n % 30}"}, {"role": "assistant", "content": "So."}]} for n in range(40)]
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(map(json.dumps, chats)))
    source = Source(name="talk", format="smoltalk", files=[path])
    make_record(source, tmp_path)
    download = raw_download(tmp_path / "download", [{}, {}])
    settings = job(tmp_path, download, texts=[record_folder(source, tmp_path)], val_shares={"talk": 0.3})
    manifest = make_shards(settings)
    counted = {part.split: part.samples for part in manifest.sources if part.name == "talk"}
    assert sum(counted.values()) == 30, "an equal chat counts once"
    assert 3 <= counted["val"] <= 15
    assert {part.kind for part in manifest.sources if part.name == "talk"} == {"text"}
    shards = ShardSet(tmp_path / "shards")
    [turn] = shards.record(int(shards.rows("val", "talk").index[0]))["conversations"][0]
    assert turn["answer"] == "So."
    with pytest.raises(UserError, match="no record of a source"):
        make_shards(job(tmp_path, download, texts=[tmp_path / "nothing"]))


def test_inputs_that_do_not_fit(tmp_path):
    rules = RULE, FrameRule(84), FrameRule(gaze.FRAME_PX, max_frames=8)
    small, large, short = (raw_download(tmp_path / str(number), [{}], rule=rule) for number, rule in enumerate(rules))
    for other in (large, short):
        with pytest.raises(UserError, match="frames of 2 different kinds in 2 downloads"):
            make_shards(job(tmp_path, small, other))
    with pytest.raises(UserError, match="frames of 0 different kinds"):
        make_shards(job(tmp_path))
    with pytest.raises(UserError, match="no manifest"):
        make_shards(job(tmp_path, tmp_path / "nothing"))
    with pytest.raises(UserError, match="no samples"):
        make_shards(job(tmp_path, raw_download(tmp_path / "failed", [{"status": "failed_to_subsample"}])))
    torn = raw_download(tmp_path / "torn", [{"origin": "a.mp4", "split": split, "grey": n} for n, split in enumerate(["train", "val"])])
    with pytest.raises(UserError, match=r"1 videos are in more than one split, e\.g\. a\.mp4"):
        make_shards(job(tmp_path, torn))
    with pytest.raises(ValueError, match="exactly one of tokenizer and vocab_size"):
        ShardJob(output=tmp_path, downloads=[])


def test_a_tokenizer_of_ones_own(tmp_path):
    train_tokenizer(["What? clip 1"], 280).save_pretrained(tmp_path / "mine")
    download = raw_download(tmp_path / "download", [{}, {}])
    settings = ShardJob(output=tmp_path / "shards", downloads=[download], tokenizer=str(tmp_path / "mine"))
    first = make_shards(settings)
    assert first.vocab_size == len(ShardSet(tmp_path / "shards").tokenizer) <= 280
    assert make_shards(settings).digest == first.digest
