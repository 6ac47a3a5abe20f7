"""Sources of every format: what becomes rows, what is left out, and what is refused, with the row named."""

import csv
import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

import fvlm_core.data.sources
from fvlm_core.data.jobs import Source
from fvlm_core.data.rows import COLUMNS
from fvlm_core.data.sources import ADAPTERS
from fvlm_core.data.sources import record as record_module
from fvlm_core.data.sources.record import FILE, FILE_ROW, PATH, Record, cached_record, make_record, read_rows, record_folder
from fvlm_core.errors import UserError


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    frame = pd.DataFrame(rows)
    frame.to_csv(path, index=False) if path.suffix == ".csv" else frame.to_parquet(path)
    return path


def source(*files: Path, **settings: Any) -> Source:
    return Source.model_validate({"name": "mine", "files": files, **settings})


def rows_of(one: Source, volume: Path) -> list[dict[str, Any]]:
    make_record(one, volume)
    return [row for batch in read_rows(record_folder(one, volume)) for row in batch.to_pylist()]


def question(row: dict[str, Any]) -> str:
    return json.loads(row["conversations"])[0][0]["question"]


def test_every_adapter_is_registered_and_says_where_its_dataset_comes_from() -> None:
    folder = Path(fvlm_core.data.sources.__file__).parent
    files = {path.stem for path in folder.glob("*.py") if "\nADAPTER = " in path.read_text()}
    assert files == set(ADAPTERS)
    for adapter in ADAPTERS.values():
        assert adapter.required
        assert adapter.licence
        if adapter.name != "user":
            assert adapter.homepage.startswith("https://")
            assert adapter.citation
            assert adapter.published
            assert adapter.published.samples > 0
            assert adapter.published.source
        assert not (adapter.prompt and adapter.kind == "text")


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_url_and_caption_are_enough(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"videos{suffix}", [{"url": "a.mp4", "caption": "NA"}, {"url": "http://h/b.mp4", "caption": None}])
    first, second = rows_of(source(path), tmp_path)
    expected = {"url": "a.mp4", "caption": "NA", "source": "mine", "kind": "video", "split": "", "probes": "[null]", "extra": "{}"}
    assert first == expected | {
        "conversations": '[[{"question": "What is the caption of this video?", "answer": "NA"}]]',
        FILE: str(path),
        FILE_ROW: 1,
        PATH: str(tmp_path / "a.mp4"),
    }
    assert (second["caption"], second[PATH], second[FILE_ROW]) == ("", None, 2)


CELLS = st.text(st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from('",\n;\t'), max_size=12)


@given(st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=8))
def test_any_caption_comes_back_from_a_csv_and_is_the_answer(
    tmp_path_factory: pytest.TempPathFactory, cells: list[tuple[str, str]]
) -> None:
    folder = tmp_path_factory.mktemp("csv")
    with (folder / "a.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, quoting=csv.QUOTE_ALL)
        writer.writerow(["url", "note", "caption"])
        writer.writerows([f"{number}.mp4", note, caption] for number, (note, caption) in enumerate(cells))
    found = rows_of(source(folder / "a.csv"), folder)
    assert [row["url"] for row in found] == [f"{number}.mp4" for number in range(len(cells))]
    for row, (_, caption) in zip(found, cells, strict=True):
        assert row["caption"] == caption.strip()
        asked = {"question": "What is the caption of this video?", "answer": row["caption"]}
        assert row["conversations"] == json.dumps([[asked]])


def test_a_table_s_rows_have_the_prompt_of_the_dataset_they_are_of(tmp_path: Path) -> None:
    names = ["openvid", "webvid", "elsewhere", ""]
    path = write(tmp_path / "a.csv", [{"url": "a.mp4", "caption": "a", "source": name} for name in names])
    found = rows_of(source(path), tmp_path)
    assert [question(row) for row in found] == [ADAPTERS["openvid"].prompt, ADAPTERS["webvid"].prompt, *[ADAPTERS["user"].prompt] * 2]
    assert [row["source"] for row in found] == ["openvid", "webvid", "elsewhere", "mine"]


def test_webvid_is_asked_for_what_it_is_and_filtered_by_seconds(tmp_path: Path) -> None:
    rows = [
        {"videoid": n, "name": f"a dog {n}", "page_dir": "x", "contentUrl": f"http://h/{n}.mp4", "duration": length}
        for n, length in enumerate(["PT00H00M05S", "PT00H01M10S", "PT00H00M64S", "unknown"])
    ]
    for path in (write(tmp_path / "part.csv", rows), write(tmp_path / "part.parquet", rows)):
        chosen = source(path, format="webvid", name="my_webvid", filter=[{"column": "duration", "min": 2, "max": 64}])
        found = rows_of(chosen, tmp_path)
        assert [(row["url"], row["caption"]) for row in found] == [("http://h/0.mp4", "a dog 0"), ("http://h/2.mp4", "a dog 2")]
        assert [row[FILE_ROW] for row in found] == [1, 3]
        assert question(found[0]) == "What would be the WebVid caption for this video?"
        assert make_record(chosen, tmp_path).filtered == 2
    with pytest.raises(UserError, match="not a file of the format webvid: it lacks the column contentUrl"):
        make_record(source(write(tmp_path / "other.csv", [{"name": "a", "url": "b"}]), format="webvid"), tmp_path)


def test_openvid_s_csv_names_files_of_a_folder(tmp_path: Path) -> None:
    rows = [{"video": f"{n}.mp4", "caption": f"clip {n}", "aesthetic score": score, "fps": 24} for n, score in enumerate([4.5, 5.5, 6.0])]
    path = write(tmp_path / "OpenVid-1M.csv", rows)
    chosen = source(path, format="openvid", media=tmp_path / "unpacked", filter=[{"column": "aesthetic score", "min": 5}], limit=1)
    [row] = rows_of(chosen, tmp_path)
    assert (row["url"], row[PATH], question(row)) == ("1.mp4", str(tmp_path / "unpacked/1.mp4"), ADAPTERS["openvid"].prompt)


GOOD = {"url": "a.mp4", "caption": "a"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"link": "a.mp4", "caption": "a"}], "lacks the column url"),
        ([{"x": 1}], "lacks the columns url and caption"),
        ([GOOD | {"source": "My Videos"}], "source that is not allowed: 'My Videos' \\(row 1\\)"),
        ([GOOD, GOOD | {"kind": "audio"}], "kind that is not allowed: 'audio' \\(row 2\\)"),
        ([GOOD, GOOD | {"kind": "text"}], "kind that is not allowed: 'text' \\(row 2\\)"),
        ([GOOD | {"split": "test"}], "split that is not allowed"),
        ([GOOD, GOOD | {"conversations": "{"}], r"conversations, probes or extra are wrong(.|\n)*row 2"),
        ([GOOD | {"conversations": "[[]]"}], "conversations, probes or extra are wrong"),
        ([GOOD | {"conversations": '[[{"question": "q"}]]'}], "conversations, probes or extra are wrong"),
        ([GOOD | {"probes": "[null, null]"}], "conversations, probes or extra are wrong"),
        ([GOOD | {"extra": "[]"}], "extra must be a JSON object"),
        ([GOOD | {"extra": '{"key": "a", "source": "b"}'}], "extra has key, source, which every sample already has"),
        ([GOOD | {"probes": '[{"choices": ["a", "b"], "answer_index": 0}]'}], "task; Field required"),
        ([GOOD | {"probes": '[{"task": "t", "choices": ["a", "b"], "answer_index": 2}]'}], "answer_index is 2, but the 2 choices"),
        ([GOOD, GOOD | {"url": "az://bucket/a.mp4"}], r"az:// cannot be fetched: 'az://bucket/a\.mp4' \(row 2\)"),
        ([GOOD | {"url": "GS://b/a.mp4"}, GOOD | {"url": "az://b/a.mp4"}], r"az://, gs:// cannot be fetched: .*row 1.*row 2"),
        ([GOOD | {"url": "file://clips/a.mp4"}], r"must be absolute(.|\n)*row 1"),
    ],
)
@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_bad_rows_are_refused_by_their_number(tmp_path: Path, rows: list[dict[str, str]], message: str, suffix: str) -> None:
    with pytest.raises(UserError, match=message):
        make_record(source(write(tmp_path / f"videos{suffix}", rows)), tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("videos.csv", b"url,caption\n", "no rows"),
        ("videos.csv", b"", "lacks the columns"),
        (
            "videos.csv",
            b"url,caption\na,b\nc,two, or three\n",
            r"row 2 has 3 values, the header 2; a comma in a value needs quotes: c,two, or",
        ),
        ("videos.csv", b"url,caption\na,b\nc\n", "row 2 has 1 values, the header 2"),
        ("videos.csv", b'url,caption\na,b\nc,"never closed\nd,e\n', 'no closing "'),
        ("videos.csv", b"url,caption,url\na,b,c\n", "a column appears twice"),
        ("videos.csv", b"url,caption\n\xff\xfe\xfa,b\n", "not a readable file"),
        ("videos.parquet", b"no parquet", "not a readable file"),
        ("videos.xlsx", b"", r"its suffix is '\.xlsx'"),
        ("missing.csv", None, "does not exist"),
        ("part-*.csv", None, "no file matches"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        make_record(source(tmp_path / name), tmp_path)
    assert name in str(caught.value)


def test_a_quote_within_a_value_is_fine(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('url,caption\na.mp4,a 5" pipe\nb.mp4,b\n')
    assert [row["caption"] for row in rows_of(source(tmp_path / "a.csv"), tmp_path)] == ['a 5" pipe', "b"]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize(
    ("condition", "kept"),
    [
        ({"column": "seconds", "min": 2}, [2.0, 3.5]),
        ({"column": "seconds", "max": 2}, [1.0, 2.0]),
        ({"column": "seconds", "one_of": [1, 3.5]}, [1.0, 3.5]),
        ({"column": "licence", "one_of": ["cc"]}, [1.0, 3.5]),
    ],
)
def test_filters(tmp_path: Path, suffix: str, condition: dict[str, Any], kept: list[float]) -> None:
    values = [(1.0, "cc"), (2.0, "other"), (None, "x"), (3.5, "cc")]
    rows = [{"url": f"{seconds}.mp4", "caption": "a", "seconds": seconds, "licence": licence} for seconds, licence in values]
    path = write(tmp_path / f"a{suffix}", rows)
    assert [float(row["url"].removesuffix(".mp4")) for row in rows_of(source(path, filter=[condition]), tmp_path)] == kept


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ({"column": "length", "min": 2}, "there is no column 'length'"),
        ({"column": "caption", "min": 2}, "the column 'caption' holds no numbers"),
        ({"column": "score", "min": 9}, r"has no rows: the filter left out 1 of 1"),
    ],
)
def test_a_filter_that_cannot_work_is_refused(tmp_path: Path, condition: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "a.csv", [GOOD | {"score": "3"}])
    with pytest.raises(UserError, match=message):
        make_record(source(path, filter=[condition]), tmp_path)


@pytest.mark.parametrize("condition", [{}, {"min": 2, "max": 1}, {"one_of": []}, {"one_of": ["a", 1]}])
def test_a_filter_says_something(condition: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        source(Path("a.csv"), filter=[{"column": "a", **condition}])


def test_an_unknown_format_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValidationError, match="choose one of: cauldron, finevideo"):
        source(Path("a.csv"), format="webvid10m")


def test_several_files_and_a_limit(tmp_path: Path) -> None:
    for part in (2, 1):
        write(tmp_path / f"part-{part}.csv", [{"url": f"{part}{n}.mp4", "caption": "a"} for n in range(3)])
    whole, some = source(tmp_path / "part-*.csv"), source(tmp_path / "part-*.csv", limit=4)
    assert [row["url"][:2] for row in rows_of(whole, tmp_path)] == ["10", "11", "12", "20", "21", "22"]
    assert [(row["url"][:2], row[FILE_ROW]) for row in rows_of(some, tmp_path)] == [("10", 1), ("11", 2), ("12", 3), ("20", 1)]
    assert make_record(whole, tmp_path).digest != make_record(some, tmp_path).digest


def test_one_row_in_so_many_is_taken_over_all_files(tmp_path: Path) -> None:
    for part in (1, 2):
        write(tmp_path / f"part-{part}.csv", [{"url": f"{part}{n}.mp4", "caption": "a", "n": n} for n in range(7)])
    some = source(tmp_path / "part-*.csv", every=3, filter=[{"column": "n", "min": 1}])
    assert [row["url"][:2] for row in rows_of(some, tmp_path)] == ["13", "16", "22", "25"]


def test_smoltalk_chats(tmp_path: Path) -> None:
    turn = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": " Hello! "}]
    chats = [
        turn,
        [{"role": "system", "content": "Be brief"}, *turn],
        turn + turn,
        turn[:1],
        [turn[0], {"role": "assistant", "content": " "}],
        [],
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps({"messages": chat, "source": "x"}) for chat in chats))
    pd.DataFrame({"messages": chats}).to_parquet(tmp_path / "chats.parquet")
    pair = {"question": "Hi", "answer": "Hello!"}
    for name in ("chats.jsonl", "chats.parquet"):
        chosen = source(tmp_path / name, format="smoltalk")
        found = rows_of(chosen, tmp_path)
        assert [json.loads(row["conversations"]) for row in found] == [[[pair]], [[pair, pair]]]
        assert [(row["kind"], row[FILE_ROW], row["url"]) for row in found] == [("text", 1, ""), ("text", 3, "")]
        known = make_record(chosen, tmp_path)
        assert (known.read, known.left_out, known.rows, known.kind) == (6, 4, 2, "text")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"text": 1}'),
        ("a.jsonl", '{"messages": [{"role": "user"}]}'),
        ("a.jsonl", '{"messages": 3}'),
        ("a.jsonl", "{"),
        ("a.parquet", "x"),
        ("a.csv", "messages\nx\n"),
    ],
)
def test_bad_chats(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=r"not a (readable )?file of the format smoltalk|has no rows"):
        make_record(source(tmp_path / name, format="smoltalk"), tmp_path)


def test_a_record_is_made_once_and_follows_files_settings_and_local_videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = tmp_path / "a.mp4"
    clip.write_bytes(b"x")
    path = write(tmp_path / "a.csv", [GOOD, GOOD | {"url": "http://h/b.mp4"}, GOOD | {"url": "gone.mp4"}])
    made: list[Source] = []
    real = record_module._write_rows
    monkeypatch.setattr(record_module, "_write_rows", lambda one, *rest: made.append(one) or real(one, *rest))
    first = make_record(source(path), tmp_path)
    assert (first.local, first.missing, first.missing_examples, first.remote, first.probe, first.distinct) == (
        *(2, 1, [str(tmp_path / "gone.mp4")], 1),
        *(["http://h/b.mp4"], 2),
    )
    assert make_record(source(path), tmp_path) == cached_record(source(path), tmp_path) == first
    assert len(made) == 1
    clip.write_bytes(b"longer")
    assert cached_record(source(path), tmp_path) == first, "trusted until the next look"
    second = make_record(source(path), tmp_path)
    assert second.digest != first.digest
    assert cached_record(source(path), tmp_path) == second
    assert len(made) == 1, "the table is the same"
    make_record(source(path, limit=1), tmp_path)
    assert len(made) == 2
    write(path, [GOOD | {"caption": "another"}])
    assert cached_record(source(path), tmp_path).rows_digest != first.rows_digest
    assert len(made) == 3


def test_later_looks_open_no_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.csv", [GOOD])
    first = make_record(source(path), tmp_path)
    os.chmod(path, 0)
    monkeypatch.setattr("fvlm_core.data.sources.reading.read_source", None)
    looks: list[str] = []
    real = os.stat
    monkeypatch.setattr(os, "stat", lambda name, **rest: looks.append(str(name)) or real(name, **rest))
    assert cached_record(source(path), tmp_path) == first
    assert 1 <= looks.count(str(path)) <= 3


def test_a_damaged_record_is_made_again(tmp_path: Path) -> None:
    one = source(write(tmp_path / "a.csv", [GOOD]))
    first = make_record(one, tmp_path)
    folder = record_folder(one, tmp_path)
    (folder / "rows.parquet").write_bytes(b"cut")
    with pytest.raises(UserError, match="no record"):
        Record.read_folder(folder)
    assert cached_record(one, tmp_path) == first
    (folder / "record.json").write_text("{")
    assert cached_record(one, tmp_path) == first


def test_equal_rows_are_equal_whatever_file_holds_them(tmp_path: Path) -> None:
    rows = [{"url": f"http://h/{n}.mp4", "caption": f"clip {n}", "note": n} for n in range(1000)]
    files = [write(tmp_path / name, rows) for name in ("a.csv", "a.parquet")]
    digests = {make_record(source(file), tmp_path).digest for file in files}
    halves = [write(tmp_path / f"{name}.csv", part) for name, part in (("1", rows[:300]), ("2", rows[300:]))]
    digests.add(make_record(source(*halves), tmp_path).digest)
    assert len(digests) == 1
    rows[5]["caption"] = "clip 6"
    assert make_record(source(write(tmp_path / "b.csv", rows)), tmp_path).digest not in digests


def test_some_addresses_are_named_for_probing_evenly(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", [{"url": f"http://h/{n}.mp4", "caption": "a"} for n in range(100)])
    probe = make_record(source(path), tmp_path).probe
    assert 10 <= len(probe) <= 16
    places = [int(url.removeprefix("http://h/").removesuffix(".mp4")) for url in probe]
    assert {after - before for before, after in pairwise(places)} == {7}


def test_a_record_holds_the_row_s_columns(tmp_path: Path) -> None:
    one = source(write(tmp_path / "a.csv", [GOOD]))
    make_record(one, tmp_path)
    [batch] = list(read_rows(record_folder(one, tmp_path)))
    assert batch.schema.names == [*COLUMNS, FILE, FILE_ROW, PATH]
