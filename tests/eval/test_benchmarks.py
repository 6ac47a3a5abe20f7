"""Every benchmark from files in its published form: right items, and clear words for what is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.gaze_forms import items as gaze_items
from benchmarks.gaze_forms import write as gaze_files
from fvlm_core.data.frames import ClipError, FrameRule
from fvlm_core.errors import UserError
from fvlm_core.eval.annotations import read_rows
from fvlm_core.eval.benchmarks import NAMES, benchmark
from fvlm_core.eval.benchmarks.benchmark import Loaded, load
from fvlm_core.eval.items import Item, gold_index, gold_letter
from fvlm_core.eval.media import NO_MEDIA, FrameFolder, Images, VideoFile
from tests.eval.published import jsonl, mp4, parquet, picture, png, videomme_row

RULE = FrameRule(42)


def read(name: str, folder: Path, **options: Any) -> Loaded:
    return load(benchmark(name), folder, **options)


def frames(item: Item) -> np.ndarray:
    return item.media.load(RULE, 8).frames


def test_every_name_is_a_benchmark_of_that_name():
    assert {benchmark(name).name for name in NAMES} == set(NAMES)
    with pytest.raises(UserError, match="there is no benchmark 'videomee'") as refused:
        benchmark("videomee")
    assert "videomme" in refused.value.fix


def test_videomme(tmp_path: Path):
    mp4(tmp_path / "data" / "abc.mp4")
    parquet(tmp_path / "videomme" / "test-00000-of-00001.parquet", [videomme_row("abc", 1), videomme_row("abc", 2, answer="A")])
    loaded = read("videomme", tmp_path)
    first, second = loaded.items
    assert (first.id, first.choices, first.gold, second.gold) == ("abc-1", ["Apples.", "Candles.", "Berries.", "U.S. flags."], 2, 0)
    assert first.groups == {
        "clip": "abc",
        "task": "Counting Problem",
        "duration": "short",
        "domain": "Knowledge",
        "sub_category": "Humanity & History",
    }
    assert frames(first).shape == (3, 42, 42, 3)
    assert benchmark("videomme").prompt.with_letters(first).splitlines()[1:] == [
        "How many?",
        "A. Apples.",
        "B. Candles.",
        "C. Berries.",
        "D. U.S. flags.",
        "The best answer is:",
    ]


def test_mlvu_as_first_published_and_with_options_in_the_question(tmp_path: Path):
    mp4(tmp_path / "a" / "video" / "4_count" / "count_1.mp4")
    mp4(tmp_path / "b" / "needle_1.mp4")
    row = {"video": "count_1.mp4", "duration": 61.2, "question": "How often?", "candidates": ["1", "2", "3", "4"], "answer": "3"}
    (tmp_path / "a" / "json").mkdir()
    (tmp_path / "a" / "json" / "4_count.json").write_text(json.dumps([row | {"question_type": "count"}]))
    inline = "What is it?\n(A) a cat\n(B) a dog\n(C) a cow"
    parquet(
        tmp_path / "b" / "test.parquet",
        [{"video_name": "needle_1.mp4", "duration": 5.0, "question": inline, "answer": "B", "task_type": "needle"}],
    )
    (one,), (other,) = read("mlvu", tmp_path / "a").items, read("mlvu", tmp_path / "b").items
    assert (one.gold, one.groups["task"], one.choices[2]) == (2, "count", "3")
    assert (other.question, other.choices, other.gold) == ("What is it?", ["a cat", "a dog", "a cow"], 1)
    assert frames(one).shape == frames(other).shape


def test_mvbench_with_parts_of_videos_and_folders_of_frames(tmp_path: Path):
    video = mp4(tmp_path / "video" / "sta" / "sta_video_segment" / "a.mp4", 6)
    mp4(tmp_path / "video" / "perception" / "videos" / "b.mp4", 6)
    folder = tmp_path / "video" / "tvqa" / "video_fps3_hq_segment" / "clip"
    folder.mkdir(parents=True)
    for number in range(9):
        (folder / f"{number:05d}.jpg").write_bytes(png(20 * number))
    row = {"question": "What?", "candidates": ["up", "down"], "answer": "down", "start": 2.0, "end": 5.0}
    (tmp_path / "json").mkdir()
    for task, name in (("action_localization", "a.mp4"), ("state_change", "b.mp4"), ("episodic_reasoning", "clip")):
        (tmp_path / "json" / f"{task}.json").write_text(json.dumps([row | {"video": name}]))
    cut, folder_item, part = read("mvbench", tmp_path).items
    assert cut.media == VideoFile(video), "already cut to its part"
    assert len(frames(cut)) == 6
    complete = VideoFile(tmp_path / "video" / "perception" / "videos" / "b.mp4").load(RULE, 1).frames
    assert (frames(part) == complete[2:5]).all()
    assert part.gold == 1
    assert isinstance(folder_item.media, FrameFolder)
    greys = FrameFolder(folder).load(RULE, 1).frames[:, 0, 0, 0].tolist()
    assert greys == [0, 60, 120], "three pictures a second, one frame a second"


def test_mvbench_in_its_authors_folders(tmp_path: Path):
    for folder in ("star/Charades_v1_480", "ssv2_video"):
        mp4(tmp_path / "video" / folder / "a.mp4", 6)
    clip = tmp_path / "video" / "tvqa" / "frames_fps3_hq" / "clip"
    clip.mkdir(parents=True)
    for number in range(1, 19):
        (clip / f"{number:05d}.jpg").write_bytes(png(10 * number))
    row = {"question": "What?", "candidates": ["up", "down"], "answer": "down"}
    (tmp_path / "json").mkdir()
    part = {"start": 2.0, "end": 5.0}
    for task, more in (
        ("action_antonym", {"video": "a"}),
        ("action_sequence", part | {"video": "a.mp4"}),
        ("episodic_reasoning", part | {"video": "clip"}),
    ):
        (tmp_path / "json" / f"{task}.json").write_text(json.dumps([row | more]))
    antonym, sequence, episode = read("mvbench", tmp_path).items
    assert (len(frames(antonym)), len(frames(sequence)), len(frames(episode))) == (6, 3, 3)
    assert frames(episode)[:, 0, 0, 0].tolist() == [70, 100, 130]


@pytest.mark.parametrize(
    ("name", "folders", "column"),
    [("mvbench", {"action_count": "perception/videos", "moving_count": "clevrer/video_validation"}, "video"), ("mlvu", {}, "video_name")],
)
def test_videos_of_equal_names_are_different_units_of_resampling(tmp_path: Path, name: str, folders: dict[str, str], column: str):
    row = {column: "v.mp4", "question": "How many?", "candidates": ["0", "1"], "answer": "1"}
    for task in ("action_count", "moving_count"):
        mp4(tmp_path / "video" / folders.get(task, task) / "v.mp4")
        (tmp_path / "json").mkdir(exist_ok=True)
        (tmp_path / "json" / f"{task}.json").write_text(json.dumps([row | {"task_type": task}] * 2))
    clips = [item.clip for item in read(name, tmp_path).items]
    assert (len(clips), len({*clips})) == (4, 2)


def test_mvbench_tasks_are_the_configurations_of_the_hub(tmp_path: Path):
    mp4(tmp_path / "video" / "clevrer" / "video_validation" / "v.mp4")
    row = {"video": "v.mp4", "question": "How many?", "candidates": ["0", "1"], "answer": "1"}
    for task in ("moving_count", "object_existence"):
        parquet(tmp_path / task / "test-00000-of-00001.parquet", [row])
    assert sorted(item.groups["task"] for item in read("mvbench", tmp_path).items) == ["moving_count", "object_existence"]


def test_mmmu(tmp_path: Path):
    row = {"id": "validation_Art_Theory_3", "question": "<image 1> or <image 2>?", "options": "['<image 1>', \"Klimt's\"]", "answer": "B"}
    row |= {"question_type": "multiple-choice", "subfield": "Art", "image_1": picture(10), "image_2": picture(200), "image_3": None}
    free = {"id": "validation_Math_1", "question": "<image 1> sum?", "options": "[]", "answer": "['24', '24.0']", "question_type": "open"}
    parquet(tmp_path / "data" / "validation-0.parquet", [row, free | {"image_1": picture()}], pictures=("image_1", "image_2", "image_3"))
    choice, question = read("mmmu", tmp_path).items
    assert (choice.choices, choice.gold, choice.groups["task"]) == (["<image 1>", "Klimt's"], 1, "Art_Theory")
    media = choice.media.load(RULE, 8)
    assert media.frames[:, 0, 0, 0].tolist() == [10, 200]
    assert media.shown == [[0] * 8, [1] * 8]
    assert (question.choices, question.gold, question.answers) == ([], None, ["24", "24.0"])


def test_mathvista(tmp_path: Path):
    shared = {"image": "images/1.jpg", "unit": None, "metadata": {"task": "figure question answering", "context": "bar chart"}}
    choice = {"pid": "1", "question": "Which?", "choices": ["yes", "no"], "answer": "no", "question_type": "multi_choice"}
    free = {"pid": "2", "question": "How much?", "choices": None, "answer": "1.2", "question_type": "free_form", "answer_type": "float"}
    rows = [shared | choice | {"answer_type": "text", "precision": None}, shared | free | {"precision": 1.0}]
    parquet(tmp_path / "testmini-0.parquet", [row | {"decoded_image": picture(7)} for row in rows], pictures=("decoded_image",))
    one, two = read("mathvista", tmp_path).items
    assert (one.gold, one.groups["task"], frames(one)[0, 0, 0, 0]) == (1, "figure question answering", 7)
    assert (two.answers, two.hints["precision"]) == (["1.2"], "1")


def test_docvqa_and_textvqa(tmp_path: Path):
    doc = {"questionId": "49153", "question": "Date?", "question_types": ["handwritten"], "docId": 1, "ucsf_document_id": "a"}
    doc |= {"ucsf_document_page_no": "4", "answers": ["1/8/93", "Jan 8"], "data_split": "val", "image": picture(3)}
    parquet(tmp_path / "DocVQA" / "validation-00000-of-00006.parquet", [doc, doc | {"questionId": "2"}], pictures=("image",))
    text = {
        "image_id": "x",
        "question_id": 34602,
        "question": "what brand is it?",
        "ocr_tokens": [],
        "answers": ["nokia"] * 9 + ["toshiba"],
    }
    parquet(tmp_path / "textvqa" / "data" / "validation-0.parquet", [text | {"image": picture(4)}], pictures=("image",))
    first, second = read("docvqa", tmp_path).items
    (item,) = read("textvqa", tmp_path / "textvqa").items
    assert (first.answers, first.groups["task"], first.clip) == (["1/8/93", "Jan 8"], "handwritten", second.clip)
    assert (item.question, len(item.answers), frames(item)[0, 0, 0, 0]) == ("What brand is it?", 10, 4)


def test_scienceqa_with_and_without_image(tmp_path: Path):
    row = {"question": "Which?", "choices": ["a", "b", "c"], "answer": 2, "hint": "Read this.", "task": "closed choice", "grade": "grade2"}
    row |= {"subject": "natural science", "topic": "physics"}
    parquet(
        tmp_path / "data" / "test-0.parquet",
        [row | {"image": picture()}, row | {"image": None, "hint": "", "subject": "language science"}],
        pictures=("image",),
    )
    seen, text = read("scienceqa", tmp_path).items
    assert (seen.question, seen.gold, seen.groups["image"]) == ("Context: Read this.\nWhich?", 2, "image")
    assert (text.question, text.media is NO_MEDIA, text.groups["task"]) == ("Which?", True, "language science")
    assert seen.clip != text.clip


def test_pope(tmp_path: Path):
    rows = [
        {"id": str(n), "question_id": str(n), "question": "Is there a dog in the image?", "answer": answer, "image_source": "COCO_1"}
        | {"image": picture(), "category": category}
        for n, (answer, category) in enumerate([("yes", "popular"), ("no", "adversarial")])
    ]
    parquet(tmp_path / "data" / "test-0.parquet", rows, pictures=("image",))
    yes, no = read("pope", tmp_path).items
    assert [(item.choices[item.gold or 0], item.groups["task"], item.clip) for item in (yes, no)] == [
        ("yes", "popular", "COCO_1"),
        ("no", "adversarial", "COCO_1"),
    ]
    assert yes.media.key == no.media.key, "encoded once"


def test_longvideobench_as_json_and_as_the_hubs_table(tmp_path: Path):
    mp4(tmp_path / "videos" / "86Cx.mp4")
    row = {"id": "86Cx_0", "video_id": "86Cx", "video_path": "86Cx.mp4", "question": "When?", "correct_choice": 1, "duration_group": 60}
    row |= {"question_category": "E2O", "subtitle_path": "86Cx.json"}
    (tmp_path / "lvb_val.json").write_text(json.dumps([row | {"candidates": ["a", "b", "c", "d"]}]))
    mp4(tmp_path / "hub" / "videos" / "86Cx.mp4")
    options = {"option0": "a", "option1": "b", "option2": "c", "option3": "N/A", "option4": "N/A"}
    parquet(tmp_path / "hub" / "validation-0.parquet", [row | options])
    (one,), (other,) = read("longvideobench", tmp_path).items, read("longvideobench", tmp_path / "hub").items
    assert (one.choices, other.choices, one.gold, one.groups["duration"]) == (["a", "b", "c", "d"], ["a", "b", "c"], 1, "60")


def test_tempcompass(tmp_path: Path):
    mp4(tmp_path / "videos" / "1.mp4")
    tasks = {
        "multi-choice": ("What is he doing?\nA. walking\nB. running", "B. running"),
        "yes_no": ("Is he running?", "yes"),
        "caption_matching": ("Which caption fits?\nCaption A: He walks.\nCaption B: He runs.", "Caption B: He runs."),
        "captioning": ("Describe.", ""),
    }
    for task, (question, answer) in tasks.items():
        parquet(tmp_path / task / "test-0.parquet", [{"video_id": "1", "question": question, "answer": answer, "dim": "action"}])
    found = {item.groups["task"]: item for item in read("tempcompass", tmp_path).items}
    assert set(found) == {"multi-choice", "yes_no", "caption_matching"}
    assert {task: item.choices[item.gold or 0] for task, item in found.items()} == {
        "multi-choice": "running",
        "yes_no": "yes",
        "caption_matching": "He runs.",
    }
    assert found["multi-choice"].question == "What is he doing?"


def test_your_own_questions(tmp_path: Path):
    mp4(tmp_path / "clips" / "a.mp4", 5)
    (tmp_path / "b.png").write_bytes(png(9))
    jsonl(
        tmp_path / "mine.jsonl",
        [
            {"video": "clips/a.mp4", "start": 1, "end": 3, "question": "What?", "choices": ["x", "y"], "answer": "B", "task": "parts"},
            {"image": "b.png", "question": "Which grey?", "answers": ["9", "nine"]},
            {"id": "text", "question": "1 + 1?", "answer": 2},
        ],
    )
    part, image, text = read("own", tmp_path).items
    assert (part.gold, len(frames(part)), part.groups["task"]) == (1, 2, "parts")
    assert (image.answers, isinstance(image.media, Images)) == (["9", "nine"], True)
    assert (text.id, text.answers, text.media is NO_MEDIA) == ("text", ["2"], True)


def test_media_of_one_name_in_two_folders_are_two(tmp_path: Path):
    for folder in ("1", "2"):
        (tmp_path / folder / "frames").mkdir(parents=True)
        (tmp_path / folder / "image.png").write_bytes(png())
        parquet(tmp_path / folder / "a.parquet", [{"image": picture()}], pictures=("image",))
    row = {"question": "Which?", "choices": ["a", "b"], "answer": 1}
    jsonl(
        tmp_path / "a.jsonl", [row | {kind: f"{n}/{name}"} for kind, name in (("image", "image.png"), ("frames", "frames")) for n in (1, 2)]
    )
    own, science = (read(name, tmp_path).items for name in ("own", "scienceqa"))
    assert len({item.media.key for item in own}) == len({item.clip for item in own}) == 4
    assert len({item.media.key for item in science if item.media is not NO_MEDIA}) == 2
    rows = [row for n in (1, 2) for row in read_rows(tmp_path / f"{n}" / "a.parquet", tmp_path, ["image"], where="")]
    assert [row["image"].name for row in rows] == ["1/a.parquet:0:0:image", "2/a.parquet:0:0:image"]


def test_rows_keep_line_breaks_that_stand_inside_their_texts(tmp_path: Path):
    text = "one\u2028two\u0085three"
    (tmp_path / "a.jsonl").write_text(json.dumps({"question": text}, ensure_ascii=False) + "\n\n" + json.dumps({"question": "b"}))
    (tmp_path / "a.csv").write_text('question,answer\n"one\ntwo",1\nthree,2\n')
    found = {
        name: [row["question"] for row in read_rows(tmp_path / name, tmp_path, ["question"], where="")] for name in ("a.jsonl", "a.csv")
    }
    assert found == {"a.jsonl": [text, "b"], "a.csv": ["one\ntwo", "three"]}


@pytest.mark.parametrize("form", ["videomme", "mlvu", "mvbench"])
def test_gaze_items_are_the_same_in_every_form(form: str, tmp_path: Path):
    wanted, found = gaze_items(2), read(form, gaze_files(tmp_path, form, 2)).items
    assert [(one.question, one.choices, one.gold) for one in found] == [(one.question, one.choices, one.gold) for one in wanted]
    for one, item in zip(found[::9], wanted[::9], strict=True):
        drawn = item.media.load(FrameRule(168), 1).frames
        decoded = one.media.load(FrameRule(168), 1).frames
        assert np.abs(decoded.astype(int) - drawn).mean() < 6, "compression"


def test_a_wrong_schema_names_the_column_and_the_file(tmp_path: Path):
    row = videomme_row("abc", 1)
    del row["options"]
    file = parquet(tmp_path / "videomme" / "test-0.parquet", [row])
    with pytest.raises(UserError, match=r"videomme: no column options; the file has answer, domain") as refused:
        read("videomme", tmp_path)
    assert refused.value.where == str(file)
    with pytest.raises(UserError, match="pope: no annotation file"):
        read("pope", tmp_path)


def test_missing_media_and_rows_that_are_no_items_are_counted(tmp_path: Path):
    mp4(tmp_path / "data" / "abc.mp4")
    rows = [videomme_row("abc", number) for number in range(97)]
    rows += [videomme_row("gone", 1), videomme_row("abc", 98, answer="E"), videomme_row("abc", 99, question=None)]
    parquet(tmp_path / "test-0.parquet", rows)
    with pytest.raises(UserError, match=r"2 of 100 rows of videomme are invalid; the limit is 1%:\n.*the right answer 'E' is not among"):
        read("videomme", tmp_path)
    loaded = read("videomme", tmp_path, max_missing_share=0.02)
    assert (len(loaded.items), loaded.rows, loaded.lost) == (97, 100, 3)
    assert loaded.missing == {"gone-1": str(tmp_path / "data" / "gone")}
    assert list(loaded.unreadable) == ["test-0.parquet:99", "test-0.parquet:100"]
    assert "no 'question'" in loaded.unreadable["test-0.parquet:100"]


def test_more_missing_media_than_allowed_is_an_error_that_says_which(tmp_path: Path):
    parquet(tmp_path / "test-0.parquet", [videomme_row("gone", number) for number in range(7)])
    with pytest.raises(UserError, match=r"7 of 7 items of videomme lack their media; the limit is 1%:") as refused:
        read("videomme", tmp_path)
    assert "and 2 more" in refused.value.what
    assert "--max-missing-share" in refused.value.fix


@pytest.mark.parametrize(("content", "reason"), [(b"", "empty"), (b"<!doctype html>", "a web page"), (b"\0" * 99, "not a readable video")])
def test_what_cannot_be_decoded_says_why(content: bytes, reason: str, tmp_path: Path):
    (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(ClipError, match=reason):
        VideoFile(tmp_path / "a.mp4").load(RULE, 1)
    with pytest.raises(ClipError, match="not a readable image"):
        Images((content,)).load(RULE, 1)


def test_an_empty_part_of_a_video_says_so(tmp_path: Path):
    with pytest.raises(ClipError, match=r"the part from 9 to 3 s is empty"):
        VideoFile(mp4(tmp_path / "a.mp4"), 9, 12).load(RULE, 1)


def test_a_limit_is_spread_over_the_rows(tmp_path: Path):
    mp4(tmp_path / "data" / "abc.mp4")
    parquet(tmp_path / "test-0.parquet", [videomme_row("abc", number) for number in range(101)])
    assert [item.id for item in read("videomme", tmp_path, limit=3).items] == ["abc-0", "abc-50", "abc-100"]


def test_a_dataset_on_the_hub_is_fetched(tmp_path: Path):
    """From the hub's cache, as after a download; in a process of its own, since the hub's library reads its settings once."""
    snapshot = tmp_path / "datasets--someone--videos" / "snapshots" / "0123"
    mp4(snapshot / "data" / "abc.mp4")
    parquet(snapshot / "videomme" / "test-0.parquet", [videomme_row("abc", 1)])
    (tmp_path / "datasets--someone--videos" / "refs").mkdir()
    (tmp_path / "datasets--someone--videos" / "refs" / "main").write_text("0123")
    code = (
        "from pathlib import Path; from fvlm_core.eval.benchmarks import benchmark; from fvlm_core.eval.benchmarks.benchmark import load;"
        "print(load(benchmark('videomme'), Path('someone/videos')).items[0].id); load(benchmark('videomme'), Path('no/such'))"
    )
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "abc-1"
    assert "videomme: download from the hub failed" in done.stderr


def test_a_folder_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(UserError, match="its folder is missing"):
        read("videomme", tmp_path / "none")
    with pytest.raises(UserError, match="its data are not given"):
        load(benchmark("videomme"), None)


def test_mlvu_as_its_authors_publish_it(tmp_path: Path):
    """A level further down, and with the open tasks, which are left out."""
    mp4(tmp_path / "MLVU" / "video" / "1_plotQA" / "v.mp4")
    (tmp_path / "MLVU" / "json").mkdir(parents=True)
    row = {"video": "v.mp4", "question": "What?", "answer": "x", "question_type": "plotQA"}
    (tmp_path / "MLVU" / "json" / "1_plotQA.json").write_text(json.dumps([row | {"candidates": ["y", "x"]}]))
    (tmp_path / "MLVU" / "json" / "9_summary.json").write_text(json.dumps([row | {"question_type": "summary"}]))
    (found,) = read("mlvu", tmp_path).items
    assert found.gold == 1
    assert found.media.load(RULE, 1).n_shown


def test_a_key_that_is_a_letter_is_no_text():
    assert gold_letter(["B", "C", "D", "A"], "A") == 0
    assert gold_index(["B", "C", "D", "A"], "A") == 3
    assert gold_letter(["a cat", "a dog"], "a dog") == 1
