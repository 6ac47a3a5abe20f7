"""Bad input to `fvlm eval`: refused with what, where and a fix before a question is asked, or counted where a share is allowed."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from deployments.evaluate import evaluate
from fvlm_core.errors import UserError
from fvlm_core.eval.parts.benchmarks import BenchmarksResult
from fvlm_core.eval.results import Results
from tests.eval.published import jsonl, mp4, parquet, videomme_row

ROWS = 5


def videomme(folder: Path, **changes: object) -> Path:
    """Five questions about five videos; `changes` to the last one's row."""
    rows = [videomme_row(f"v{number}", 0) for number in range(ROWS)]
    rows[-1] |= changes
    for number in range(ROWS):
        mp4(folder / "data" / f"v{number}.mp4", seed=number)
    return parquet(folder / "videomme" / "test-00000-of-00001.parquet", rows)


def no_column(folder: Path) -> None:
    rows = [{name: value for name, value in videomme_row("v0", 0).items() if name != "options"}]
    parquet(folder / "videomme" / "test-00000-of-00001.parquet", rows)


def no_parquet(folder: Path) -> None:
    videomme(folder).write_bytes(b"PAR1 and then nothing")


def no_json(folder: Path) -> None:
    jsonl(folder / "test.jsonl", []).write_text('{"videoID": "v0",')


def no_media(folder: Path) -> None:
    videomme(folder)
    (folder / "data" / "v4.mp4").unlink()


def no_gold(folder: Path) -> None:
    videomme(folder, answer="E")


def no_options(folder: Path) -> None:
    videomme(folder, options=[])


def no_video(folder: Path) -> None:
    videomme(folder)
    (folder / "data" / "v4.mp4").write_bytes(b"not a video")


def cut_video(folder: Path) -> None:
    videomme(folder)
    video = folder / "data" / "v4.mp4"
    video.write_bytes(video.read_bytes()[: len(video.read_bytes()) // 2])


@pytest.mark.parametrize(
    ("spoil", "what", "where"),
    [
        (no_column, "videomme: no column options; the file has answer, domain", "test-00000-of-00001.parquet"),
        (no_parquet, "videomme: the file cannot be read: ", "test-00000-of-00001.parquet"),
        (no_json, "videomme: the file cannot be read: ", "test.jsonl"),
        (lambda folder: folder.mkdir(parents=True), "videomme: no annotation file", "videomme"),
        (no_media, "1 of 5 items of videomme lack their media; the limit is 1%:\n    v4-0: ", "videomme"),
        (
            no_gold,
            "1 of 5 rows of videomme are invalid; the limit is 1%:\n    test-00000-of-00001.parquet:5: the right answer 'E'",
            "videomme",
        ),
        (no_options, "test-00000-of-00001.parquet:5: 'options' is no list", "videomme"),
        (no_video, "1 of 5 items of videomme could not be decoded; the limit is 1%:\n    v4-0: not a readable video", "videomme"),
        (cut_video, "1 of 5 items of videomme could not be decoded; the limit is 1%:\n    v4-0: ", "videomme"),
    ],
)
def test_it_is_refused_with_what_where_and_a_fix(spoil: Callable[[Path], None], what: str, where: str, model_folder: Path, tmp_path: Path):
    spoil(tmp_path / "data" / "videomme")
    with pytest.raises(UserError) as refused:
        asked(model_folder, tmp_path)
    assert what in refused.value.what
    assert where in refused.value.where
    assert refused.value.fix
    assert not (tmp_path / "out" / "results.json").exists()


@pytest.mark.parametrize(
    ("spoil", "counts", "note"),
    [
        (no_media, (1, 0, 0), "1 without their media"),
        (no_gold, (0, 1, 0), "1 unreadable"),
        (no_video, (0, 0, 1), "1 not decodable"),
    ],
)
def test_what_may_be_missing_is_counted(
    spoil: Callable[[Path], None], counts: tuple[int, int, int], note: str, model_folder: Path, tmp_path: Path
):
    spoil(tmp_path / "data" / "videomme")
    assert asked(model_folder, tmp_path, max_missing_share=0.3) == 0
    part = Results.read(tmp_path / "out").part(BenchmarksResult)
    assert part is not None
    found = part.benchmarks["videomme"]
    assert (found.missing, found.unreadable, len(found.undecodable)) == counts
    assert (found.rows, found.questions) == (ROWS, ROWS - 1)
    assert f"4 questions about 4 clips, {note}" in (tmp_path / "out" / "tables.md").read_text()


def test_data_that_are_not_given_are_named(model_folder: Path, tmp_path: Path):
    with pytest.raises(UserError, match="the data of videomme, pope are not given") as refused:
        evaluate(checkpoint=model_folder, benchmarks="videomme,gaze,pope", output=tmp_path / "out")
    assert (refused.value.where, refused.value.fix) == ("--data", "give the folder that holds videomme/, pope/ as published")


def test_a_wrong_folder_is_not_asked_of_the_hub(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A relative `nowhere/videomme` has the form of a dataset's name on the hub."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="videomme: folder not found") as refused:
        asked(model_folder, Path())
    assert refused.value.where == "data/videomme"
    videomme(tmp_path / "data" / "videomme")
    assert asked(model_folder, Path()) == 0


def test_a_checkpoint_that_is_none_is_refused(model_folder: Path, tmp_path: Path):
    videomme(tmp_path / "data" / "videomme")
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "qwen2_vl"}))
    with pytest.raises(UserError, match="a checkpoint of another architecture: qwen2_vl"):
        asked(other, tmp_path)
    with pytest.raises(UserError, match="there is no such model"):
        asked(tmp_path / "nowhere", tmp_path)
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in model_folder.iterdir():
        content = file.read_bytes()
        (broken / file.name).write_bytes(content[: len(content) // 2] if file.name == "model.safetensors" else content)
    with pytest.raises(UserError) as refused:
        asked(broken, tmp_path)
    assert str(broken) in refused.value.where
    assert not (tmp_path / "out").exists()


def asked(checkpoint: Path, folder: Path, **options: object) -> int:
    """The command on Video-MME in `folder/data`."""
    where = {"checkpoint": checkpoint, "benchmarks": "videomme", "data": folder / "data", "output": folder / "out"}
    return evaluate(**where, mode="coarse", device="cpu", **options)
