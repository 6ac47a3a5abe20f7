import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fvlm_core.data import gaze
from fvlm_core.data.frames import encode_jpeg
from fvlm_core.data.jobs import INDEX_FILE, DownloadManifest, ShardJob, ShardManifest, Source
from fvlm_core.data.raw_shards import CONTENT, write_contents
from fvlm_core.data.shard_files import ShardSample, write_shards
from fvlm_core.data.shard_set import ShardSet
from fvlm_core.data.shards import make_shards
from fvlm_core.data.sources.record import record, record_folder
from fvlm_core.data.text import split_of, text_chats
from fvlm_core.data.tokenizer import train_tokenizer
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


def test_too_long_conversations_are_left_out_whole_and_listed(tmp_path):
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


def raw_download(folder: Path, rows: list[dict], *, frame_px=gaze.FRAME_PX) -> Path:
    """What a download leaves, written directly; a row's `grey` is the brightness of its one frame."""
    (folder / "raw" / "0").mkdir(parents=True)
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
            members = {"000.jpg": encode_jpeg(np.full((frame_px, frame_px, 3), grey, np.uint8)), "json": json.dumps(record).encode()}
            if record["status"] != "success":
                del members["000.jpg"]
            for suffix, content in members.items():
                info = tarfile.TarInfo(f"{number:08d}.{suffix}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    write_contents(folder)
    files = file_entries(folder, [CONTENT])
    DownloadManifest(name="download", settings_hash="", files=files, frame_px=frame_px, fps=1.0).write(folder)
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


def test_training_clip_with_a_validation_clips_frames_is_left_out(tmp_path):
    rows = [{"split": "val", "grey": 7}, {"split": "train", "grey": 7, "origin": "copy.mp4"}, {"split": "train", "grey": 9}]
    manifest = make_shards(job(tmp_path, raw_download(tmp_path / "download", rows)))
    assert manifest.counts["leaks"] == 1
    assert [(clip.url, clip.reason) for clip in manifest.bad] == [("copy.mp4", "its frames are in validation")]
    assert manifest.counts["samples"] == 2


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
    record(source, tmp_path)
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
    small, large = raw_download(tmp_path / "small", [{}]), raw_download(tmp_path / "large", [{}], frame_px=84)
    with pytest.raises(UserError, match="2 different frame sizes"):
        make_shards(job(tmp_path, small, large))
    with pytest.raises(UserError, match="0 different frame sizes"):
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
