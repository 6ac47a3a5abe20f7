"""`fvlm data`: what it shows is what is in the shards, and no damage is overlooked."""

import json
import shutil
import tarfile
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from deployments import cli, data
from fvlm_core.data.jobs import INDEX_FILE, SHARD_FILES, RejectedCount, ShardManifest
from fvlm_core.data.rows import SPLITS
from fvlm_core.data.shard_set import ShardSet
from fvlm_core.data.stats import FIGURES
from fvlm_core.errors import UserError
from fvlm_core.manifest import file_entries
from tests.data.test_download import needs_video2dataset
from tests.tiny import PROFILE, tiny_shards

TAR = "train/gaze_cell-00000.tar"


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_shards(tmp_path_factory.mktemp("data") / "shards", clips=5)


@pytest.fixture
def shards(intact: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(intact, tmp_path / "shards"))


def seal(folder: Path) -> None:
    """Give the manifest the digests of what is there now: damage that was there when the digests were taken."""
    manifest = ShardManifest.read(folder)
    manifest.model_copy(update={"files": file_entries(folder, SHARD_FILES)}).write(folder)


def edit_index(folder: Path, column: str, change: Callable[[list], list]) -> None:
    table = pq.read_table(folder / INDEX_FILE)
    place = table.schema.get_field_index(column)
    field = table.schema.field(place)
    pq.write_table(table.set_column(place, field, pa.array(change(table[column].to_pylist()), field.type)), folder / INDEX_FILE)


def overwrite(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as stream:
        stream.seek(offset)
        stream.write(content)


def member(path: Path, suffix: str) -> tarfile.TarInfo:
    with tarfile.open(path) as archive:
        return next(one for one in archive if one.name.endswith(suffix))


def damage_frame(folder: Path) -> None:
    info = member(folder / TAR, ".001.jpg")
    overwrite(folder / TAR, info.offset_data + info.size // 2, b"\xff\xd9" + bytes(info.size // 2 - 10))


def damage_json(folder: Path) -> None:
    overwrite(folder / TAR, member(folder / TAR, ".json").offset_data, b"x")


def change_json(folder: Path) -> None:
    info = member(folder / TAR, ".json")
    content = (folder / TAR).read_bytes()[info.offset_data : info.offset_data + info.size]
    overwrite(folder / TAR, info.offset_data, content.replace(b'"kind":"video"', b'"kind":"image"'))


def truncate(folder: Path) -> None:
    content = (folder / TAR).read_bytes()
    (folder / TAR).write_bytes(content[: len(content) // 2])


def forget_sample(folder: Path) -> None:
    table = pq.read_table(folder / INDEX_FILE)
    first = table["key"].to_pylist().index(member(folder / TAR, ".json").name.removesuffix(".json"))
    keep = np.array(table["key"].to_pylist()) != table["key"][first].as_py()
    pq.write_table(table.filter(pa.array(keep)), folder / INDEX_FILE)


DAMAGE: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "a frame": (damage_frame, [TAR, "a frame is damaged"]),
    "a text": (damage_json, [TAR, "its JSON is damaged"]),
    "another kind": (change_json, [TAR, "the index has the kind video, its JSON image"]),
    "half a tar": (truncate, [TAR]),
    "no tar": (lambda folder: (folder / TAR).unlink(), [TAR, "not a readable tar"]),
    "offsets": (
        lambda folder: edit_index(folder, "json_offset", lambda values: [values[0] + 512, *values[1:]]),
        ["the index points elsewhere"],
    ),
    "tokens": (lambda folder: edit_index(folder, "n_tokens", lambda values: [values[0] + 1, *values[1:]]), ["tokens in conversation"]),
    "seconds": (lambda folder: edit_index(folder, "duration_s", lambda values: [9.0, *values[1:]]), ["the index has the duration_s 9.0"]),
    "a conversation": (
        lambda folder: edit_index(folder, "conversation", lambda values: [7, *values[1:]]),
        ["the index has the conversations"],
    ),
    "a sample less": (forget_sample, [TAR, "files are not in the index", "the manifest has 5"]),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("sealed", [False, True])
def test_all_damage_is_found_and_named(kind: str, sealed: bool, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the digests; and without their help, by what the index and the samples say of each other."""
    damage, said = DAMAGE[kind]
    damage(shards)
    if sealed:
        seal(shards)
    assert data.verify(shards) == data.DAMAGED
    shown = capsys.readouterr().out
    if not sealed:
        assert any(mark in shown for mark in ("sha256", "expected", "missing")), shown
    for part in said:
        assert part in shown
    assert shown.splitlines()[-1].endswith("problems")


def test_intact_shards_are_said_to_be(intact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert data.verify(intact) == 0
    samples = sum(source.samples for source in ShardManifest.read(intact).sources)
    assert capsys.readouterr().out.endswith(f"shards, {samples:,} samples: everything is intact\n")


@pytest.mark.filterwarnings("ignore:Cyclopts application invoked")
def test_the_command_s_exit_status_says_damage(
    shards: Path, intact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    damage_json(shards)
    for folder, status in ((intact, 0), (shards, 1), (shards / "nowhere", 2)):
        monkeypatch.setattr("sys.argv", ["fvlm", "data", "verify", str(folder)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == status
    assert "no manifest" in capsys.readouterr().err


def test_stats_are_those_of_the_samples(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lost = [RejectedCount(source="gaze_cell", reason="the video breaks off", samples=3)]
    ShardManifest.read(shards).model_copy(update={"lost": lost}).write(shards)
    assert data.stats(shards, output=tmp_path / "stats") == 0
    shown = capsys.readouterr().out
    seconds = []
    for path in shards.glob("train/gaze_cell-*.tar"):
        with tarfile.open(path) as archive:
            for one in archive:
                if one.name.endswith(".json") and (content := archive.extractfile(one)):
                    seconds.append(json.load(content)["duration_s"])
    (line,) = [line.split() for line in shown.splitlines() if line.startswith("gaze_cell ") and " train " in line]
    assert (line[3], float(line[-1])) == (str(len(seconds)), pytest.approx(sum(seconds) / 3600, rel=1e-3))
    (line,) = [line.split() for line in shown.splitlines() if "the video breaks off" in line]
    assert (line[0], line[-1]) == ("gaze_cell", "3")
    text = (tmp_path / "stats" / "stats.md").read_text()
    for figure in FIGURES:
        assert figure.file in text
        with Image.open(tmp_path / "stats" / figure.file) as image:
            pixels = np.asarray(image.convert("L"))
        assert pixels.min() < 100 < 250 < pixels.max(), "something is drawn"


class Sheet(HTMLParser):
    """What a page shows."""

    def __init__(self) -> None:
        super().__init__()
        self.pictures, self.words = 0, ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.pictures += tag == "img" and str(dict(attrs)["src"]).startswith("data:image/jpeg;base64,")

    def handle_data(self, data: str) -> None:
        self.words += data


def test_a_contact_sheet_shows_frames_and_all_that_is_asked(intact: Path, tmp_path: Path) -> None:
    assert data.look(intact, output=tmp_path / "look", samples=2) == 0
    sheet = Sheet()
    sheet.feed((tmp_path / "look" / "look.html").read_text())
    opened = ShardSet(intact)
    rows = opened.rows("train")
    samples = pd.concat([mine.iloc[[0, -1]] for _, mine in rows.drop_duplicates("key").groupby("source")])
    assert sheet.pictures == samples["n_frames"].sum()
    for row in samples.index:
        for turns in opened.record(int(row))["conversations"]:
            for turn in turns:
                assert turn["question"] in sheet.words
                assert turn["answer"] in sheet.words
    with Image.open(tmp_path / "look" / "look.png") as image:
        assert image.width > 1000


def test_texts_cannot_change_the_page(tmp_path: Path) -> None:
    from fvlm_core.data.look import Shown, page

    evil = "<script>alert(1)</script>"
    turn = {"question": evil, "answer": "$x_1$ & more", "rejected": "no"}
    record = {"key": "a", "origin": evil, "source": "x", "kind": "text", "num_frames": 0, "duration_s": 0.0, "conversations": [[turn]]}
    assert "<script>" not in page([Shown(record, [], [])], evil)


def test_an_unknown_source_is_refused_with_those_there_are(intact: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="use one of gaze_caption, gaze_cell, gaze_image, text"):
        data.look(intact, output=tmp_path / "look", source="cats")


@needs_video2dataset
def test_what_cannot_be_prepared_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the file does not exist"):
        data.prepare(profile=str(PROFILE), videos=tmp_path / "none.csv", volume=tmp_path / "volume")


def test_every_split_can_be_looked_at(intact: Path, tmp_path: Path) -> None:
    for split in SPLITS:
        assert data.look(intact, output=tmp_path / split, source="gaze_image", split=split, samples=1) == 0
